"""Functions with known derivatives, and points with planted errors."""

from types import SimpleNamespace

import numpy as np
import pytest

from hvpd._check.certificate import brief, certify
from hvpd._check.verdicts import resolution
from hvpd._operators.curvature import CurvatureOperator, HessianOperator
from hvpd.v1 import curvature_pb2

ALGEBRA = ["finite", "symmetry", "linearity", "matmat", "repeats", "widths", "precision"]

KINDS = {
    "ggn": curvature_pb2.OPERATOR_GGN,
    "fisher": curvature_pb2.OPERATOR_FISHER,
    "empirical_fisher": curvature_pb2.OPERATOR_EMPIRICAL_FISHER,
}

BOTH = pytest.mark.parametrize("dtype", [np.float64, np.float32])


class Function:
    """f, gradient and H V in closed form; `wrong` spoils products."""

    def __init__(self, value, gradient, product, *, mode="forward_over_reverse", wrong=lambda point, V, HV: HV):
        self.value, self.gradient, self.product, self.wrong = value, gradient, product, wrong
        self.objective = SimpleNamespace(label="planted", digest="ab" * 32, precision="highest", mode=mode)
        self.points, self.products, self.kinds = 0, 0, set()

    def at(self, x):
        self.points += 1
        return PlantedPoint(self, x)

    def check(self, x, **options):
        eps = resolution([x.dtype.name], "highest")
        return certify(self.at(x), self.at, **({"eps": eps, "seed": 0, "probes": 4} | options))

    def brief(self, x):
        eps = resolution([x.dtype.name], "highest")
        return brief(self.at(x), self.at, eps=eps, mode=self.objective.mode)


class PlantedPoint:
    def __init__(self, function, x):
        self.function, self.objective = function, function.objective
        self.x, self.n, self.dtype = x, len(x), x.dtype
        self.value = float(function.value(x))
        self.gradient = function.gradient(x).astype(x.dtype)
        found = {"x": x, "value": self.value, "gradient": self.gradient}
        self.nonfinite = tuple(name for name, array in found.items() if not np.isfinite(array).all())

    def multiply(self, V, kind=curvature_pb2.OPERATOR_HESSIAN, *which):
        assert V.dtype == self.dtype
        self.function.products += len(V)
        self.function.kinds.add(kind)
        return self.function.wrong(self, V, self.function.product(self.x, V)).astype(self.dtype)

    def hessian(self):
        return HessianOperator(self)

    def ggn(self):
        return CurvatureOperator(self, KINDS["ggn"])

    def fisher(self):
        return CurvatureOperator(self, KINDS["fisher"])

    def empirical_fisher(self):
        return CurvatureOperator(self, KINDS["empirical_fisher"])


def cosh(**options):
    """Return sum cosh(a.x) over the rows of a fixed A, which has no zero derivative."""
    A = np.random.default_rng(11).normal(size=(30, 12)) / 3

    def product(x, V):
        B = A.astype(x.dtype)
        return (np.cosh(B @ x) * (V @ B.T)) @ B

    return Function(
        lambda x: np.cosh(A.astype(x.dtype) @ x).sum(),
        lambda x: np.sinh(A.astype(x.dtype) @ x) @ A.astype(x.dtype),
        product,
        **options,
    )


def quadratic(H, **options):
    return Function(
        lambda x: x @ (H.astype(x.dtype) @ x) / 2,
        lambda x: H.astype(x.dtype) @ x,
        lambda x, V: V @ H.astype(x.dtype),
        **options,
    )


def relu(width):
    """Return the mean of max(a.x + b, 0)^2 + max(a.x + b, 0), whose Hessian jumps."""
    rng = np.random.default_rng(3)
    A, b = rng.normal(size=(width, 6)), rng.normal(size=width)

    def on(x):
        z = A.astype(x.dtype) @ x + b.astype(x.dtype)
        return z, z > 0

    def value(x):
        z, active = on(x)
        return (active * (z * z + z)).mean(dtype=x.dtype)

    def gradient(x):
        z, active = on(x)
        return (active * (2 * z + 1)) @ A.astype(x.dtype) / width

    def product(x, V):
        return ((V @ A.T.astype(x.dtype)) * (2 * on(x)[1] / width)) @ A.astype(x.dtype)

    return Function(value, gradient, product)


def x_of(n, dtype, seed=1):
    return np.random.default_rng(seed).normal(size=n).astype(dtype)


def verdicts(certificate):
    return {item.name: item.passed for item in certificate.items}


def failed(certificate):
    return {item.name for item in certificate.items if item.passed is False}


ANTISYMMETRIC = np.triu(np.random.default_rng(2).normal(size=(12, 12)), 1)

ANTISYMMETRIC = ANTISYMMETRIC - ANTISYMMETRIC.T


def rounded_by(noise):
    """Return products whose rounding has this relative size, and depends on x alone."""

    def wrong(point, V, HV):
        seed = [int(bits) for bits in point.x.view(f"u{point.x.itemsize}")]
        return HV * (1 + noise * np.random.default_rng(seed).standard_normal(HV.shape[1]))

    return wrong
