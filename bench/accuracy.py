"""Errors of the whole path, from a client's call to a server's answer, in float64:
problems of CUTEst against jax itself, networks against curvlinops with the same
weights, and spectra against published and closed forms.

An error is the norm of a difference over the norm of the truth, or over 1 if that norm
is smaller.
"""

import dataclasses
import importlib.util
import math
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

import hvpd
from bench import _cutest
from bench._processes import address, serving
from bench._report import Figure, Goal, measured, skipped

BENCH = "accuracy"
PARTS = ("cutest", "curvlinops", "spectra")

Array = npt.NDArray[Any]

COUNTS = {"unconstrained": 75, "bounded": 45, "constrained": 75, "quadratic": 25}
"""Problems of each class of CUTEst."""
MOST_VARIABLES, MOST_OPERATIONS = 1_000, 300
"""Sizes of the largest problem. XLA takes minutes to compile some of the others."""

GOAL = Goal("<=", 1e-10)
"""The contract's error of a product in float64."""
PREDICTED = {"value": 1e-14, "gradient": 1e-13, "product": 1e-12, "curvlinops": 1e-13, "spectra": 1e-13}
"""Worst errors. Sums of other orders differ by rounding. Ill-conditioned problems
cancel digits.
"""


def run(*, quick: bool, part: str | None = None) -> Iterator[Figure]:
    """Yield the errors of each part."""
    with serving() as server, hvpd.connect(address(server)) as client, jax.enable_x64(True):
        for name, figures in {"cutest": cutest, "curvlinops": curvlinops, "spectra": spectra}.items():
            if part in (None, name):
                yield from figures(client, quick=quick)


def error(found: npt.ArrayLike, truth: npt.ArrayLike) -> float:
    """Return the relative error of a result; infinite if it is not finite."""
    expected = np.asarray(truth)
    relative = float(np.linalg.norm(np.asarray(found) - expected) / max(float(np.linalg.norm(expected)), 1.0))
    return relative if math.isfinite(relative) else math.inf


# CUTEst


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors of one problem."""

    value: float
    gradient: float
    product: float


def cutest(client: hvpd.Client, *, quick: bool) -> Iterator[Figure]:
    """Yield the worst errors of each class of problems, near their starts, and the
    names of those that could not be compared.
    """
    for kind, count in COUNTS.items():
        found, failed = dict[str, Errors](), list[str]()
        for make in _cutest.problems(kind):
            if len(found) + len(failed) == (2 if quick else count):
                break
            try:
                problem = make()
                if _is_small(problem):
                    found[make.__name__] = of_problem(client, problem)
            except NotImplementedError:  # The package has no data for it.
                continue
            except (ArithmeticError, hvpd.HvpdError) as failure:
                failed.append(f"{make.__name__}: {str(failure)[:100]}")
        for quantity in ("value", "gradient", "product"):
            errors = {name: getattr(each, quantity) for name, each in found.items()} or {"none": math.inf}
            worst = max(errors, key=lambda name: errors[name])
            yield measured(
                BENCH,
                f"CUTEst, {kind}: worst error of the {quantity}",
                "",
                [errors[worst]],
                predicted=PREDICTED[quantity],
                goal=GOAL,
                note=f"{worst}, of {len(found)} problems",
            )
        label = f"CUTEst, {kind}: problems that could not be compared"
        yield measured(BENCH, label, "", [len(failed)], note="; ".join(failed))


def _is_small(problem: Any) -> bool:
    if not 2 <= np.size(problem.y0) <= MOST_VARIABLES:
        return False
    traced = jax.make_jaxpr(lambda x: problem.objective(x, problem.args))(problem.y0)
    return len(traced.eqns) <= MOST_OPERATIONS


def of_problem(client: hvpd.Client, problem: Any) -> Errors:
    """Return the errors of a problem near its start, with three vectors.

    Raises:
        ArithmeticError: jax itself finds no finite derivatives there.
        hvpd.HvpdError: The server refuses the problem.
    """
    random = np.random.default_rng(0)
    start = np.asarray(problem.y0, np.float64)
    x = start + 1e-2 * (1 + np.abs(start)) * random.standard_normal(start.shape)
    V = random.standard_normal((start.size, 3))

    def fun(x: Any) -> Any:
        return problem.objective(x, problem.args)

    value, gradient = jax.jit(jax.value_and_grad(fun))(x)
    multiply = jax.jit(jax.vmap(lambda v: jax.jvp(jax.grad(fun), (x,), (v,))[1], in_axes=1, out_axes=1))
    HV = multiply(V)
    if not all(np.all(np.isfinite(each)) for each in (value, gradient, HV)):
        raise ArithmeticError("jax finds no finite derivatives")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hvpd.CurvatureWarning)  # It is about the start, which may be at a kink.
        point = client.register(fun, start).at(x)
    return Errors(error(point.value, value), error(point.gradient, gradient), error(point.hessian() @ V, HV))


# curvlinops


def curvlinops(client: hvpd.Client, *, quick: bool) -> Iterator[Figure]:
    """Yield the errors of products of PyTorch's modules, against curvlinops on the same
    modules.
    """
    if importlib.util.find_spec("curvlinops") is None:
        yield skipped(BENCH, "curvlinops", "", "curvlinops is not installed")
        return
    import curvlinops as theirs
    import torch
    from torch import nn

    import hvpd.torch

    torch.manual_seed(0)
    features = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
    modules: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "perceptron": (nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5)), (40, 16)),
        "convolution": (nn.Sequential(*features, nn.Linear(64, 5)), (20, 2, 8, 8)),
    }
    operators = {"hessian": theirs.HessianLinearOperator, "ggn": theirs.GGNLinearOperator}
    for label, (single, shape) in list(modules.items())[: 1 if quick else None]:
        module = single.double().eval()
        loss, inputs = nn.CrossEntropyLoss(), torch.randn(*shape, dtype=torch.float64)
        targets = torch.randint(0, 5, shape[:1])
        objective = hvpd.torch.register(client, module, loss, inputs, targets)
        V = torch.randn(objective.n, 4, dtype=torch.float64)
        point = objective.at(module)
        for kind, operator in operators.items():
            truth = (
                operator(module, loss, list(module.parameters()), [(inputs, targets)], check_deterministic=False) @ V
            )
            found = (point.hessian() if kind == "hessian" else point.ggn()) @ V
            figure = f"curvlinops, {label}: error of {kind} products"
            worst, predicted = error(np.asarray(found), truth.detach().numpy()), PREDICTED["curvlinops"]
            yield measured(BENCH, figure, "", [worst], n=objective.n, k=4, predicted=predicted, goal=GOAL)


# Spectra


def rosser() -> tuple[Array, Array]:
    """Return Rosser's matrix and its eigenvalues: Rosser, Lanczos, Hestenes and Karush,
    Separation of close eigenvalues of a real symmetric matrix, Journal of Research of
    the National Bureau of Standards 47 (1951).
    """
    rows = [
        [611, 196, -192, 407, -8, -52, -49, 29],
        [196, 899, 113, -192, -71, -43, -8, -44],
        [-192, 113, 899, 196, 61, 49, 8, 52],
        [407, -192, 196, 611, 8, 44, 59, -23],
        [-8, -71, 61, 8, 411, -599, 208, 208],
        [-52, -43, 49, 44, -599, 411, 208, 208],
        [-49, -8, 8, 59, 208, 208, 99, -911],
        [29, -44, 52, -23, 208, 208, -911, 99],
    ]
    far, near = 10 * math.sqrt(10_405), 100 * math.sqrt(26)
    return np.array(rows, float), np.array([-far, 0, 510 - near, 1000, 1000, 510 + near, 1020, far])


def wilkinson() -> tuple[Array, Array]:
    """Return Wilkinson's matrix W21+ and its two largest eigenvalues: Wilkinson, The
    Algebraic Eigenvalue Problem (1965), section 5.45.
    """
    return np.diag(np.abs(np.arange(-10.0, 11.0))) + np.eye(21, k=1) + np.eye(21, k=-1), np.array(
        [10.746194182903322, 10.746194182903393]
    )


def chain(n: int) -> tuple[Array, Array]:
    """Return the second difference of n points with fixed ends, and its eigenvalues
    4 sin^2(pi j / (2n + 2)).
    """
    A = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    return A, 4 * np.sin(np.pi * np.arange(1, n + 1) / (2 * n + 2)) ** 2


def spectra(client: hvpd.Client, *, quick: bool) -> Iterator[Figure]:
    """Yield the errors of eigenvalues: of all, from products with the identity; or of
    some, by Lanczos's iteration on the server.
    """
    matrices: dict[str, tuple[tuple[Array, Array], int]] = {
        "Rosser's matrix, all eigenvalues": (rosser(), 8),
        "Wilkinson's W21+, the two largest": (wilkinson(), 2),
        "a chain of 200 points, the 20 largest": (chain(200), 20),
    }
    for label, ((A, eigenvalues), k) in list(matrices.items())[: 1 if quick else None]:
        n = len(A)
        objective = client.register(lambda x, A: 0.5 * jnp.vdot(x, A @ x), np.zeros(n), A)
        H = objective.at(np.zeros(n)).hessian()
        found = dense(H) if k == n else np.sort(H.eigsh(k, which="LA", tol=0).values)
        figure, truth = f"{label}: error", np.sort(eigenvalues)[-k:]
        yield measured(BENCH, figure, "", [error(found, truth)], n=n, k=k, predicted=PREDICTED["spectra"], goal=GOAL)


def dense(H: hvpd.CurvatureOperator) -> Array:
    """Return all eigenvalues of a small operator, from products with the identity."""
    found: Array = np.linalg.eigvalsh(H @ np.eye(H.shape[0]))
    return found
