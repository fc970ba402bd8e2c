"""The cheap part of a certificate, which the server takes of each registration."""

import numpy as np
import pytest

from tests.support.planted import ANTISYMMETRIC, BOTH, Function, cosh, quadratic, relu, rounded_by, x_of


def brief_verdicts(items):
    return {item.name: item.passed for item in items}


BRIEF = ["finite", "symmetry", "linearity", "difference"]


@BOTH
@pytest.mark.parametrize("seed", range(5))
def test_a_right_hessian_takes_three_products_and_two_neighbours(dtype, seed):
    function = cosh()
    items = function.brief(x_of(12, dtype, seed))
    assert brief_verdicts(items) == dict.fromkeys(BRIEF, True)
    assert (function.products, function.points) == (3, 3)
    assert [item.threshold for item in items[1:3]] == [{np.float64: 1e-12, np.float32: 1e-5}[dtype]] * 2


@BOTH
@pytest.mark.parametrize(
    ("wrong", "item"),
    [
        pytest.param(lambda point, V, HV: 1.01 * HV, "difference", id="scaled"),
        pytest.param(lambda point, V, HV: 0 * HV, "difference", id="zero"),
        pytest.param(lambda point, V, HV: HV + 1e-2 * (V @ ANTISYMMETRIC), "symmetry", id="asymmetric"),
        pytest.param(lambda point, V, HV: HV + 1e-3 * np.abs(HV), "linearity", id="nonlinear"),
    ],
)
def test_the_cheap_part_finds_a_planted_error(dtype, wrong, item):
    for seed in range(3):
        assert brief_verdicts(cosh(wrong=wrong).brief(x_of(12, dtype, seed)))[item] is False


@BOTH
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_cheap_part_passes_at_zero_and_at_any_scale(dtype, scale):
    """Many objectives are registered at zero. The Hessian may vanish there."""
    assert brief_verdicts(cosh().brief(np.zeros(12, dtype))) == dict.fromkeys(BRIEF, True)
    quartic = Function(lambda x: (x**4).sum(), lambda x: 4 * x**3, lambda x, V: 12 * x**2 * V)
    assert brief_verdicts(quartic.brief(np.zeros(3, dtype))) == dict.fromkeys(BRIEF, True)
    linear = Function(lambda x: x.sum() * dtype(scale), lambda x: np.full(3, scale, dtype), lambda x, V: 0 * V)
    assert brief_verdicts(linear.brief(x_of(3, dtype))) == dict.fromkeys(BRIEF, True)
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))
    H = scale * (Q * np.logspace(-12, 0, 40)) @ Q.T
    assert brief_verdicts(quadratic((H + H.T) / 2).brief(x_of(40, dtype))) == dict.fromkeys(BRIEF, True)


def test_a_failed_first_look_gets_the_thresholds_of_a_certificate():
    """Neither products with errors of 1e-9 nor kinks within the step are failures."""
    function = cosh(wrong=rounded_by(1e-9))
    found = brief_verdicts(function.brief(x_of(12, np.float64)))
    assert False not in found.values()
    assert function.points > 10
    for seed in range(3):
        items = relu(20_000).brief(x_of(6, np.float32, seed))
        assert brief_verdicts(items)["difference"] is None
        assert "kinks" in items[-1].meaning


def test_a_second_look_that_takes_too_long_is_left_to_the_user(monkeypatch):
    monkeypatch.setattr("hvpd._check.certificate._PATIENCE", -1.0)
    function = cosh(wrong=lambda point, V, HV: 1.01 * HV)
    items = function.brief(x_of(12, np.float64))
    assert brief_verdicts(items) == dict.fromkeys(BRIEF[:3], True) | {"difference": None}
    assert "run objective.check(x)" in items[-1].meaning
    assert function.points == 3


@pytest.mark.parametrize(
    ("x", "wrong", "says", "finite"),
    [
        ([0.0, np.nan], None, "NaN or infinity in x, value, gradient", None),
        ([1.0, 2.0], lambda point, V, HV: HV / 0.0, "NaN or infinity in products", False),
    ],
)
def test_nan_and_infinity_leave_items_of_brief_undecided(x, wrong, says, finite):
    function = Function(
        lambda x: (x**4).sum(), lambda x: 4 * x**3, lambda x, V: 12 * x**2 * V, wrong=wrong or (lambda p, V, HV: HV)
    )
    items = function.brief(np.array(x))
    assert brief_verdicts(items) == dict.fromkeys(BRIEF) | {"finite": finite}
    assert says in items[0].meaning


def test_a_pole_within_the_step_of_the_cheap_part():
    """The first difference cannot be had; the second look takes smaller steps."""
    barrier = Function(lambda x: -np.log(x).sum(), lambda x: -1 / x, lambda x, V: V / x**2)
    with np.errstate(invalid="ignore"):
        assert brief_verdicts(barrier.brief(np.array([1e-5, 1.0, 50.0])))["difference"] is True
