"""Certificates of the curvature of composites: planted errors, and definiteness."""

import json

import numpy as np
import pytest

import hvpd
from tests.support.planted import (
    ALGEBRA,
    ANTISYMMETRIC,
    BOTH,
    KINDS,
    Function,
    cosh,
    failed,
    verdicts,
    x_of,
)


def gauss_newton(dtype, *, loss=1.0, minus=0.0, **options):
    """Return G = J(x)' diag(loss) J(x) - minus, of a model z = tanh(A x)."""
    A = (np.random.default_rng(4).normal(size=(7, 12)) / 3).astype(dtype)

    def product(x, V):
        J = A / np.cosh(A @ x)[:, None] ** 2
        return (V @ J.T * dtype(loss)) @ J - dtype(minus) * V

    return Function(
        lambda x: (np.tanh(A @ x) ** 2).sum() / 2,
        lambda x: A.T @ (np.tanh(A @ x) / np.cosh(A @ x) ** 2),
        product,
        **options,
    )


@BOTH
@pytest.mark.parametrize("operator", KINDS)
def test_other_curvature_is_held_against_itself_and_is_definite(dtype, operator):
    function = gauss_newton(dtype)
    for seed in range(3):
        certificate = function.check(x_of(12, dtype, seed), seed=seed, operator=operator)
        assert verdicts(certificate) == dict.fromkeys([*ALGEBRA, "definite"], True)
        assert certificate.operator == operator
        assert 0 < certificate.items[-1].measured <= 1
    assert function.kinds == {KINDS[operator]}
    assert f": {operator}, n = 12" in str(certificate).splitlines()[0]
    assert f">= {certificate.items[-1].threshold:.2g}" in str(certificate)
    assert json.loads(json.dumps(certificate.to_json()))["operator"] == operator


@BOTH
@pytest.mark.parametrize("operator", ["fisher", "empirical_fisher"])
def test_a_fisher_matrix_that_is_negative_somewhere_fails(dtype, operator):
    certificate = gauss_newton(dtype, minus=1.0).check(x_of(12, dtype), operator=operator)
    assert failed(certificate) == {"definite"}
    assert certificate.items[-1].measured < certificate.items[-1].threshold


@BOTH
def test_gauss_newton_may_be_negative_if_the_loss_is_not_convex(dtype):
    certificate = gauss_newton(dtype, loss=-1.0).check(x_of(12, dtype), operator="ggn")
    definite = certificate.items[-1]
    assert (definite.name, definite.passed) == ("definite", None)
    assert definite.measured < 0
    assert "not convex" in definite.meaning
    assert certificate.passed


@BOTH
def test_rounding_in_the_null_space_is_not_negative(dtype):
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))
    G = np.outer(Q[0], Q[0])
    function = Function(lambda x: x @ x, lambda x: 2 * x, lambda x, V: V @ G.astype(dtype))
    certificate = function.check(x_of(12, dtype), operator="fisher", probes=Q[1:9])
    assert certificate.items[-1].passed is True
    assert abs(certificate.items[-1].measured) < {np.float64: 1e-14, np.float32: 1e-6}[dtype]


def test_other_curvature_fails_on_its_planted_errors():
    asymmetric = gauss_newton(np.float64, wrong=lambda point, V, GV: GV + 1e-2 * (V @ ANTISYMMETRIC))
    assert "symmetry" in failed(asymmetric.check(x_of(12, np.float64), operator="fisher"))
    by_width = gauss_newton(np.float64, wrong=lambda point, V, GV: GV * (1 + 1e-3 * (len(V) == 4)))
    assert "widths" in failed(by_width.check(x_of(12, np.float64), operator="ggn"))


def test_other_curvature_at_a_point_that_is_not_finite():
    certificate = gauss_newton(np.float64).check(np.full(12, np.nan), operator="ggn")
    assert verdicts(certificate) == {"finite": False} | dict.fromkeys([*ALGEBRA[1:], "definite"])


@pytest.mark.parametrize("operator", ["kfac", "Hessian", "", "multiply", None])
def test_an_operator_that_is_none_is_refused(operator):
    with pytest.raises(
        hvpd.InvalidArgumentError, match="operator must be one of hessian, ggn, fisher, empirical_fisher"
    ):
        cosh().check(x_of(12, np.float64), operator=operator)
