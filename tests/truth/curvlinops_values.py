"""Writes curvlinops.json: the curvature matrices of a few small networks, as curvlinops
computes them on PyTorch.

curvlinops (https://github.com/f-dangel/curvlinops) shares no code with hvpd and
differentiates with another framework. The suite compares with its matrices
(tests/e2e/test_curvlinops.py) without needing PyTorch: only this script does. In an
environment of its own:

    python3.11 -m venv /tmp/curvlinops
    /tmp/curvlinops/bin/pip install torch==2.13.0
    /tmp/curvlinops/bin/pip install torch==2.13.0 curvlinops-for-pytorch==3.0.1
    /tmp/curvlinops/bin/python tests/truth/curvlinops_values.py

All is float64. Rows and columns of the matrices are in PyTorch's order of parameters:
layer by layer, the weight [out, in] row-major, then the bias. As the matrices are
symmetric, the file has their lower triangles, row by row. Numbers are written such that
they are read back exactly. `matrices` says what each matrix is.

CASES and `problem` need no PyTorch. The suite checks with them that the file has
these networks.
"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("curvlinops.json")
DAMPING = 0.1
"""Damping that is added to K-FAC before it is inverted."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A network of dense layers and its loss."""

    widths: tuple[int, ...]
    """Widths of the input, and of each layer's output."""
    rows: int
    loss: str
    """"cross_entropy", with labels; or "squared_error", with targets of the output's
    shape.
    """
    reduction: str = "mean"
    """The reduction of PyTorch's losses. The mean of a squared error is over rows and
    outputs.
    """
    activation: str = "tanh"
    """The activation after each layer but the last; or "identity"."""
    biases: tuple[bool, ...] = (True, True)
    """Whether each layer has a bias."""
    positions: int | None = None
    """Number of vectors in a row. They share the first layer, whose activations are
    averaged over them.
    """


CASES = {
    "softmax_regression": Case((5, 4), 7, "cross_entropy", biases=(True,)),
    "classifier": Case((3, 3, 3), 5, "cross_entropy"),
    "classifier_sum": Case((2, 3, 4), 6, "cross_entropy", reduction="sum"),
    "classifier_pooled": Case((2, 3, 3), 5, "cross_entropy", positions=4),
    "regression": Case((2, 3, 3), 5, "squared_error"),
    "regression_sum": Case((2, 3, 3), 4, "squared_error", reduction="sum"),
    "deep_linear": Case((3, 2, 2, 3), 5, "squared_error", activation="identity", biases=(True, False, True)),
}
"""Rows and outputs differ in number, and means of squares do not have 2 outputs. So no
factor can be taken for another, or cancel it.
"""


def problem(name: str) -> dict[str, Any]:
    """Return a case's parameters, inputs and targets as nested lists of multiples of
    1/32, the same everywhere.
    """
    case = CASES[name]
    # random() of a seed is the same in all versions of Python. Its other methods
    # promise less.
    draws = random.Random(name)

    def array(*shape: int) -> Any:
        if not shape:
            return round(64 * draws.random()) / 32 - 1
        return [array(*shape[1:]) for _ in range(shape[0])]

    parameters = []
    for before, after, has_bias in zip(case.widths, case.widths[1:], case.biases, strict=False):
        layer = {"weight": array(after, before)}
        if has_bias:
            layer["bias"] = array(after)
        parameters.append(layer)
    outputs = case.widths[-1]
    inputs = array(case.rows, *([] if case.positions is None else [case.positions]), case.widths[0])
    labels = case.loss == "cross_entropy"
    targets = [int(outputs * draws.random()) for _ in range(case.rows)] if labels else array(case.rows, outputs)
    return {"parameters": parameters, "inputs": inputs, "targets": targets}


def network(case: Case, parameters: Any) -> Any:
    """Return a case's torch.nn.Module."""
    import torch

    class Average(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x.mean(dim=1)

    modules: list[Any] = []
    for before, after, layer in zip(case.widths, case.widths[1:], parameters, strict=False):
        if modules and case.activation == "tanh":
            modules.append(torch.nn.Tanh())
        if len(modules) == 2 and case.positions is not None:
            modules.append(Average())
        linear = torch.nn.Linear(before, after, bias="bias" in layer, dtype=torch.float64)
        with torch.no_grad():
            for name, value in layer.items():
                getattr(linear, name).copy_(torch.tensor(value, dtype=torch.float64))
        modules.append(linear)
    return torch.nn.Sequential(*modules)


def matrices(case: Case, model: Any, X: Any, y: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a case's matrices by name, and the Kronecker factors of its layers.

    hessian, ggn, empirical_fisher: curvlinops' operators of these names.
    fisher: of the model's own distribution, exactly: see `fisher`.
    kfac: K-FAC of type 2 (the loss's exact Hessian in the model's output), expanding,
    weight and bias of a layer jointly. kfac_inverse: of kfac + DAMPING I, by the
    eigenvectors of the factors.
    """
    import curvlinops
    import torch

    loss = losses(case.reduction)[case.loss]
    arguments = model, loss, list(model.parameters()), [(X, y)]
    kfac = curvlinops.KFACLinearOperator(
        *arguments, fisher_type="type-2", kfac_approx="expand", separate_weight_and_bias=False
    )
    inverse = curvlinops.KFACInverseLinearOperator(kfac, damping=DAMPING, use_exact_damping=True)
    operators = {
        "hessian": curvlinops.HessianLinearOperator(*arguments),
        "ggn": curvlinops.GGNLinearOperator(*arguments),
        "empirical_fisher": curvlinops.EFLinearOperator(*arguments),
        "kfac": kfac,
        "kfac_inverse": inverse,
    }
    found = {name: dense(operator) for name, operator in operators.items()}
    found["fisher"] = fisher(case, model, X)
    # The scale of the expectation is that of curvlinops' estimate: its error is about
    # 1/100 here.
    sampled = dense(curvlinops.FisherMCLinearOperator(*arguments, mc_samples=20000))
    assert torch.linalg.norm(sampled - found["fisher"]) < 0.05 * torch.linalg.norm(sampled)
    state = kfac.state_dict()
    factors = [
        {"A": state["input_covariances"][layer].tolist(), "G": state["gradient_covariances"][layer].tolist()}
        for layer, module in model.named_children()
        if isinstance(module, torch.nn.Linear)
    ]
    return found, factors


def losses(reduction: str) -> dict[str, Any]:
    """Return PyTorch's losses by hvpd's names."""
    import torch

    return {
        "cross_entropy": torch.nn.CrossEntropyLoss(reduction=reduction),
        "squared_error": torch.nn.MSELoss(reduction=reduction),
    }


def fisher(case: Case, model: Any, X: Any) -> Any:
    """Return the expectation of curvlinops' empirical Fisher matrix over targets from
    its distribution of the model.

    curvlinops itself only estimates this (FisherMCLinearOperator). Labels can be summed
    over. For a normal distribution of C outputs the gradients are linear in the target,
    so that the 2C targets at z +- sqrt(C) times a standard deviation along each axis
    have the same second moments. That deviation is sqrt(1/2): MSELoss is no half of a
    square (`make_grad_output_sampler` in curvlinops/fisher.py), and c = 1 / (rows C)
    for its mean (`reduction_factor` in `make_batch_fmc_matrix_product`, there).
    """
    import curvlinops
    import torch

    loss = losses("sum")[case.loss]
    z = model(X).detach()
    rows, outputs = z.shape
    if case.loss == "cross_entropy":
        cases = [(torch.full((rows,), label), z.softmax(dim=1)[:, label]) for label in range(outputs)]
    else:
        steps = [sign * (outputs / 2) ** 0.5 * axis for axis in torch.eye(outputs, dtype=z.dtype) for sign in (1, -1)]
        cases = [(z + step, torch.full((rows,), 1 / len(steps), dtype=z.dtype)) for step in steps]
    total = 0
    for targets, weights in cases:
        for row in range(rows):
            data = [(X[row : row + 1], targets[row : row + 1])]
            one = curvlinops.EFLinearOperator(model, loss, list(model.parameters()), data)
            total = total + weights[row] * dense(one)
    terms = rows if case.loss == "cross_entropy" else rows * outputs
    return total / terms if case.reduction == "mean" else total


def dense(operator: Any) -> Any:
    """Return an operator's matrix, made exactly symmetric."""
    import torch

    matrix = (operator @ torch.eye(operator.shape[0], dtype=torch.float64)).detach()
    assert torch.allclose(matrix, matrix.T, rtol=0, atol=1e-12 * float(matrix.abs().max()))
    return (matrix + matrix.T) / 2


def main() -> None:
    """Compute all matrices and write the file."""
    from importlib.metadata import version

    import torch

    cases = {}
    for name, case in CASES.items():
        arrays = problem(name)
        model = network(case, arrays["parameters"])
        X = torch.tensor(arrays["inputs"], dtype=torch.float64)
        labels = case.loss == "cross_entropy"
        y = torch.tensor(arrays["targets"], dtype=torch.int64 if labels else torch.float64)
        value = losses(case.reduction)[case.loss](model(X), y).item()
        found, factors = matrices(case, model, X, y)
        triangles = {kind: [row[: i + 1] for i, row in enumerate(found[kind].tolist())] for kind in sorted(found)}
        cases[name] = dataclasses.asdict(case) | arrays | {"value": value, "matrices": triangles, "factors": factors}
    packages = ("torch", "curvlinops-for-pytorch")
    content = {"versions": {name: version(name) for name in packages}, "damping": DAMPING, "cases": cases}
    # Without the indentation of deep levels, the file has a third of the size.
    lines = [f'"{key}": {json.dumps(content[key])}' for key in ("versions", "damping")]
    lines.append('"cases": {\n' + ",\n".join(f'"{name}": {json.dumps(case)}' for name, case in cases.items()) + "\n}")
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
