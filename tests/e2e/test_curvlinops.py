"""Every curvature of a composite against curvlinops, an independent library on PyTorch.
Its values are in a file.

tests/truth/curvlinops_values.py made the file and says how. PyTorch itself is not
needed here.
"""

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import hvpd

SCRIPT = Path(__file__).parents[1] / "truth" / "curvlinops_values.py"
TRUTH = json.loads(SCRIPT.with_name("curvlinops.json").read_text())
CASES = TRUTH["cases"]


def truth(case, kind):
    """Return a matrix of the file, in PyTorch's order of parameters."""
    rows = CASES[case]["matrices"][kind]
    lower = np.array([row + [0.0] * (len(rows) - len(row)) for row in rows])
    return np.tril(lower) + np.tril(lower, -1).T


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-10 * np.abs(expected).max()


# The layout "torch" is PyTorch's: weights are [out, in], and each comes before its
# bias. In "jax", kernels are [in, out], in dicts, whose sorted keys put the bias first.
def as_pytree(layers, layout):
    if layout == "torch":
        return [list(layer.values()) for layer in layers]
    names = {"weight": "kernel", "bias": "bias"}
    return {
        f"layer{i}": {names[name]: array.T for name, array in layer.items()}  # the transpose of a bias is itself
        for i, layer in enumerate(layers)
    }


def model(case, layout):
    spec = CASES[case]

    def forward(params, X):
        a = X
        for i in range(len(params)):
            if i > 0 and spec["activation"] == "tanh":
                a = jnp.tanh(a)
            if i == 1 and spec["positions"] is not None:
                a = jnp.mean(a, axis=1)
            if layout == "torch":
                weight, *bias = params[i]
                a = sum(bias, a @ weight.T)
            else:
                layer = params[f"layer{i}"]
                a = a @ layer["kernel"] + layer.get("bias", 0.0)
        return a

    return forward


def loss(case):
    """Return a loss like PyTorch's CrossEntropyLoss or MSELoss. MSELoss is the mean
    over rows and outputs, without a half.
    """
    over = {"mean": jnp.mean, "sum": jnp.sum}[CASES[case]["reduction"]]
    if CASES[case]["loss"] == "squared_error":
        return lambda z, Y: over((z - Y) ** 2)
    return lambda z, labels: -over(jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1))


class Here:
    """A case at a server: its point, and the file's matrices in the order of its x."""

    def __init__(self, client, case, layout):
        spec = CASES[case]
        self.case, self.layout, self.outputs = case, layout, spec["widths"][-1]
        self.squared_mean = spec["loss"] == "squared_error" and spec["reduction"] == "mean"
        layers = [{name: np.array(value) for name, value in layer.items()} for layer in spec["parameters"]]
        composite = hvpd.composite(
            model(case, layout),
            loss(case),
            distribution={"squared_error": "normal", "cross_entropy": "categorical"}[spec["loss"]],
            reduction=spec["reduction"],
        )
        params = as_pytree(layers, layout)
        objective = client.register(composite, params, np.array(spec["inputs"]), np.array(spec["targets"]))
        self.point = objective.at(params)
        # Positions of x's elements in PyTorch's order: the positions are raveled like
        # parameters.
        places, start = [], 0
        for layer in layers:
            places.append({})
            for name, value in layer.items():
                places[-1][name] = np.arange(start, start + value.size, dtype=np.float64).reshape(value.shape)
                start += value.size
        self.places = objective.ravel(as_pytree(places, layout)).astype(int)

    def truth(self, kind):
        return truth(self.case, kind)[np.ix_(self.places, self.places)]


LAYOUTS = {case: "jax" if case in ("classifier_sum", "classifier_pooled", "deep_linear") else "torch" for case in CASES}


@pytest.fixture(scope="module", params=LAYOUTS.items(), ids="-".join)
def here(request, client):
    return Here(client, *request.param)


def dense(operator):
    return operator @ np.eye(operator.shape[0])


def test_the_file_is_of_the_networks_of_the_script():
    script = runpy.run_path(str(SCRIPT))
    assert list(CASES) == list(script["CASES"])
    assert TRUTH["damping"] == script["DAMPING"]
    assert f"torch=={TRUTH['versions']['torch'].partition('+')[0]}" in script["__doc__"]
    assert f"curvlinops-for-pytorch=={TRUTH['versions']['curvlinops-for-pytorch']}" in script["__doc__"]
    for name, case in CASES.items():
        written = {key: case[key] for key in ("parameters", "inputs", "targets")}
        assert written == script["problem"](name)
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in case.items()}
        described = vars(script["CASES"][name])
        assert {key: fields[key] for key in described} == described


def test_the_file_discriminates():
    """No two curvatures of a nonlinear network are alike, and K-FAC is not the
    Gauss-Newton matrix. So a wrong operator would be seen.
    """
    for case in ("classifier", "classifier_sum", "classifier_pooled", "regression", "regression_sum"):
        found = [truth(case, kind) for kind in ("hessian", "ggn", "empirical_fisher", "kfac")]
        for i, one in enumerate(found):
            for other in found[:i]:
                assert np.abs(one - other).max() > 0.05 * np.abs(one).max()


def test_value(here):
    assert here.point.value == pytest.approx(CASES[here.case]["value"], rel=1e-12)


def test_hessian(here):
    assert_close(dense(here.point.hessian()), here.truth("hessian"))


def test_ggn(here):
    assert_close(dense(here.point.ggn()), here.truth("ggn"))


def test_fisher(here):
    """Our normal distribution has variance 1, so -log p is half the squared error. That
    of curvlinops has variance 1/2, so its -log p is the squared error, which is twice
    as much (`make_grad_output_sampler` in its fisher.py, std = sqrt(0.5)). For a mean,
    ours is 1/rows of the sum over rows. That of curvlinops is 1/(rows outputs), like
    MSELoss (`reduction_factor` in `make_batch_fmc_matrix_product`, there).
    """
    factor = 1.0
    if CASES[here.case]["loss"] == "squared_error":
        factor = 2.0 / (here.outputs if here.squared_mean else 1)
    assert_close(factor * dense(here.point.fisher()), here.truth("fisher"))


def test_empirical_fisher(here):
    """Let l be the loss of a row, and c = 1/rows for a mean. Ours is c sum of grad l
    grad l'. That of curvlinops is equal, except for the mean of a squared error, where
    l is itself the mean over C outputs. There curvlinops takes the sum over them for l,
    and 1/(rows C) for c (`reduction_factor` in `make_batch_ef_matrix_product`, its
    gradient_moments.py), which is C**2 / C = C times as much.
    """
    factor = here.outputs if here.squared_mean else 1
    assert_close(factor * dense(here.point.empirical_fisher()), here.truth("empirical_fisher"))


def test_kfac(here):
    assert_close(dense(here.point.kfac()), here.truth("kfac"))
    assert_close(dense(here.point.kfac(shift=0.25)), here.truth("kfac") + 0.25 * np.eye(here.point.n))


def test_the_inverse_of_kfac(here):
    inverse = here.point.kfac(shift=TRUTH["damping"]).inverse()
    assert_close(dense(inverse), here.truth("kfac_inverse"))


def test_the_factors_of_kfac(here):
    """Both split alike: A is a mean over rows, and G has the scale of the loss. A bias
    is the last row and column of A.
    """
    layers, spec = here.point.kfac().layers, CASES[here.case]
    assert len(layers) == len(spec["factors"])
    for i, (layer, factors) in enumerate(zip(layers, spec["factors"], strict=True)):
        kernel, bias = {"torch": (f"{i}/0", f"{i}/1"), "jax": (f"layer{i}/kernel", f"layer{i}/bias")}[here.layout]
        assert (layer.kernel, layer.bias) == (kernel, bias if spec["biases"][i] else None)
        assert_close(layer.A, np.array(factors["A"]))
        assert_close(layer.G, np.array(factors["G"]))


def test_kfac_of_a_deep_linear_network_is_the_block_diagonal_of_the_ggn(client):
    """Source: Bernacchia, Lengyel and Hennequin, Exact natural gradient in deep linear
    networks, NeurIPS (2018).
    """
    point = Here(client, "deep_linear", "torch").point
    sizes = [sum(np.size(value) for value in layer.values()) for layer in CASES["deep_linear"]["parameters"]]
    blocks = scipy.linalg.block_diag(*[np.ones((size, size)) for size in sizes])
    assert_close(dense(point.kfac()), dense(point.ggn()) * blocks)
