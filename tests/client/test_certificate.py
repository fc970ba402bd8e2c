"""Certificates without a server: each item fails on a planted error of its kind."""

import json
import math

import numpy as np
import pytest

import hvpd
from hvpd._check.verdicts import Item, RegistrationCheck, resolution
from hvpd._check.walk import SLOPE
from tests.support.planted import (
    ALGEBRA,
    ANTISYMMETRIC,
    BOTH,
    Function,
    cosh,
    failed,
    quadratic,
    relu,
    rounded_by,
    verdicts,
    x_of,
)

NAMES = [*ALGEBRA, "difference", "taylor"]


@BOTH
@pytest.mark.parametrize("seed", range(5))
def test_a_right_hessian_passes_every_item(dtype, seed):
    certificate = cosh().check(x_of(12, dtype, seed), seed=seed)
    assert verdicts(certificate) == dict.fromkeys(NAMES, True)
    items = {item.name: item for item in certificate.items}
    assert 2.7 < items["taylor"].measured < 4.3
    assert items["symmetry"].threshold == {np.float64: 1e-12, np.float32: 1e-5}[dtype]
    assert items["difference"].threshold < {np.float64: 1e-7, np.float32: 1e-3}[dtype]
    assert "bits equal" in items["repeats"].meaning


@BOTH
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_an_ill_conditioned_quadratic_passes_at_any_scale(dtype, scale):
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))
    H = scale * (Q * np.logspace(-12, 0, 40)) @ Q.T
    certificate = quadratic((H + H.T) / 2).check(x_of(40, dtype))
    assert verdicts(certificate) == dict.fromkeys(NAMES, True)
    assert "only rounding: f is quadratic" in certificate.items[-1].meaning


@BOTH
@pytest.mark.parametrize("n", [1, 2])
def test_few_variables_pass(dtype, n):
    quartic = Function(lambda x: (x**4).sum(), lambda x: 4 * x**3, lambda x, V: 12 * x**2 * V)
    assert verdicts(quartic.check(x_of(n, dtype))) == dict.fromkeys(NAMES, True)


@BOTH
def test_at_zero_there_is_a_step_too(dtype):
    assert verdicts(cosh().check(np.zeros(12, dtype))) == dict.fromkeys(NAMES, True)


@BOTH
@pytest.mark.parametrize(
    ("wrong", "items"),
    [
        pytest.param(lambda point, V, HV: 1.001 * HV, {"difference"}, id="scaled"),
        pytest.param(lambda point, V, HV: HV + 1e-2 * V, {"difference"}, id="shifted"),
        pytest.param(lambda point, V, HV: 0 * HV, {"difference", "taylor"}, id="zero"),
        pytest.param(lambda point, V, HV: 2 * HV, {"difference", "taylor"}, id="doubled"),
        pytest.param(lambda point, V, HV: HV + 1e-2 * (V @ ANTISYMMETRIC), {"symmetry", "difference"}, id="asymmetric"),
        pytest.param(lambda point, V, HV: HV * (np.arange(12) < 11), {"symmetry", "difference"}, id="row dropped"),
        pytest.param(lambda point, V, HV: HV + 1e-3 * np.abs(HV), {"linearity"}, id="nonlinear"),
        pytest.param(
            lambda point, V, HV: HV * (1 + 1e-3 * np.arange(len(V))[:, None]),
            {"matmat", "linearity"},
            id="by the column",
        ),
        pytest.param(lambda point, V, HV: HV * (1 + 1e-3 * (len(V) == 4)), {"widths", "matmat"}, id="by the width"),
        pytest.param(
            lambda point, V, HV: HV * (1 + 1e-4 * (len(V) == 1)), {"widths", "matmat"}, id="singles by a wrong program"
        ),
    ],
)
def test_a_planted_error_is_found_by_its_items(dtype, wrong, items):
    for seed in range(3):
        certificate = cosh(wrong=wrong).check(x_of(12, dtype, seed), seed=seed)
        assert not certificate.passed
        assert items <= failed(certificate)


@pytest.mark.parametrize(
    ("dtype", "noise"), [(np.float64, 1e-10), (np.float64, 1e-6), (np.float32, 1e-5), (np.float32, 1e-3)]
)
def test_products_that_vary_are_found_and_do_not_excuse_themselves(dtype, noise):
    rng = np.random.default_rng(0)
    wrong = lambda point, V, HV: HV * (1 + noise * rng.standard_normal(HV.shape))  # noqa: E731
    certificate = cosh(wrong=wrong).check(x_of(12, dtype))
    assert "repeats" in failed(certificate)
    assert "bits differ" in certificate.items[4].meaning


@BOTH
def test_products_of_a_point_visited_before_are_found(dtype):
    function = cosh()
    stale = x_of(12, dtype) * dtype(1.001)
    function.wrong = lambda point, V, HV: function.product(stale, V)
    assert "difference" in failed(function.check(x_of(12, dtype)))


def test_a_wrong_curvature_leaves_a_remainder_of_second_order():
    certificate = cosh(wrong=lambda point, V, HV: 1.001 * HV).check(x_of(12, np.float64))
    taylor = certificate.items[-1]
    assert (taylor.name, taylor.passed) == ("taylor", False)
    assert 1.8 < taylor.measured < SLOPE
    off = cosh(wrong=lambda point, V, HV: 1.5 * HV).check(x_of(12, np.float64)).items[-1]
    assert off.measured == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize(("dtype", "offset"), [(np.float64, 1e-1), (np.float64, 1e-4), (np.float32, 1e-1)])
def test_a_gradient_of_another_function_leaves_a_remainder_of_first_order(dtype, offset):
    function = cosh()
    gradient = function.gradient
    function.gradient = lambda x: gradient(x) + x.dtype.type(offset)
    certificate = function.check(x_of(12, dtype))
    assert failed(certificate) == {"taylor"}
    taylor = certificate.items[-1]
    assert taylor.measured == pytest.approx(1, abs=0.15)
    assert "the gradient does not fit the values" in taylor.meaning


def test_a_kink_at_x_itself_is_no_wrong_gradient():
    function = Function(lambda x: np.maximum(x, 0).sum(), lambda x: (x > 0) * 1.0, lambda x, V: 0 * V)
    certificate = function.check(np.zeros(3))
    assert certificate.items[-1].passed is None
    assert "not smooth" in certificate.items[-1].meaning


def test_in_float64_kinks_are_stepped_over():
    function = relu(200)
    certificate = function.check(x_of(6, np.float64))
    assert verdicts(certificate)["difference"] is True
    assert certificate.passed
    function.wrong = lambda point, V, HV: 1.001 * HV
    assert "difference" in failed(function.check(x_of(6, np.float64)))


@pytest.mark.parametrize("seed", range(3))
def test_kinks_that_float32_cannot_step_over_are_undecided(seed):
    certificate = relu(20_000).check(x_of(6, np.float32, seed), seed=seed)
    assert certificate.passed
    difference = certificate.items[-2]
    assert difference.passed is None
    assert "kinks" in difference.meaning


def test_errors_hidden_by_rounding_are_undecided():
    function = cosh()
    value = function.value
    function.value = lambda x: x.dtype.type(1e6) + value(x)
    taylor = function.check(x_of(12, np.float32)).items[-1]
    assert taylor.passed is None
    assert "hidden by rounding" in taylor.meaning


def test_products_that_are_badly_known_widen_the_thresholds_and_say_so():
    # The rounding of numbers 1e9 times its size is in each product, and differs from x
    # to x.
    def noisy(point, V, HV):
        s = np.sin(point.x)
        return HV + 1e9 * ((s + 1 / 3) - s - 1 / 3)

    certificate = cosh(wrong=noisy).check(x_of(12, np.float64))
    symmetry = certificate.items[1]
    assert certificate.passed
    assert symmetry.threshold > 1e-9
    assert "products are known to" in symmetry.meaning


@pytest.mark.parametrize(
    ("dtypes", "precision", "eps"),
    [
        (["float64"], "default", 2**-52),
        (["float32"], "highest", 2**-23),
        (["float32"], "default", 2**-10),
        (["float32", "float16"], "highest", 2**-10),
        (["bfloat16"], "highest", 2**-7),
    ],
)
def test_the_coarsest_dtype_sets_the_resolution(dtypes, precision, eps):
    assert resolution(dtypes, precision) == eps


def test_products_of_bfloat16_have_its_thresholds():
    function = cosh()

    def rounded(array):
        return (array.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)

    for name in ("value", "gradient"):
        exact = getattr(function, name)
        setattr(function, name, lambda x, exact=exact: rounded(np.asarray(exact(rounded(x)))))
    product = function.product
    function.product = lambda x, V: rounded(product(rounded(x), rounded(V)))
    x = x_of(12, np.float32)
    assert function.check(x, eps=resolution(["bfloat16"], "highest")).passed
    assert "linearity" in failed(function.check(x))


def test_finite_difference_products_have_the_tolerance_of_their_mode():
    function = cosh(mode="finite_difference")

    def differences(point, V, HV):
        steps = np.finfo(point.dtype).eps ** (1 / 3) * (1 + np.linalg.norm(point.x)) / np.linalg.norm(V, axis=1)
        rows = [
            (function.gradient(point.x + h * v) - function.gradient(point.x - h * v)) / (2 * h)
            for h, v in zip(steps, V, strict=True)
        ]
        return np.array(rows)

    function.wrong = differences
    for seed in range(5):
        certificate = function.check(x_of(12, np.float64, seed), seed=seed)
        assert certificate.passed, str(certificate)
        assert verdicts(certificate)["difference"] is True
    function.wrong = lambda point, V, HV: 1.001 * differences(point, V, HV)
    assert "difference" in failed(function.check(x_of(12, np.float64)))


@pytest.mark.parametrize(
    ("x", "wrong", "says"),
    [
        ([0.0, np.nan], None, "NaN or infinity in x, value, gradient"),
        ([0.0, 1e200], None, "NaN or infinity in value, gradient, products"),
        ([1.0, 2.0], lambda point, V, HV: HV / 0.0, "NaN or infinity in products"),
    ],
)
def test_nan_and_infinity_fail_and_skip_the_rest(x, wrong, says):
    function = Function(
        lambda x: (x**4).sum(), lambda x: 4 * x**3, lambda x, V: 12 * x**2 * V, wrong=wrong or (lambda p, V, HV: HV)
    )
    with np.errstate(all="ignore"):
        certificate = function.check(np.array(x))
    assert verdicts(certificate) == {"finite": False} | dict.fromkeys(NAMES[1:])
    assert says in certificate.items[0].meaning
    assert all("skipped" in item.meaning for item in certificate.items[1:])
    assert not certificate.passed


def test_steps_where_f_is_not_finite_are_passed_over():
    # The logarithm's pole is nearer than the largest step.
    barrier = Function(lambda x: -np.log(x).sum(), lambda x: -1 / x, lambda x, V: V / x**2)
    x = np.array([1e-3, 1.0, 50.0])
    with np.errstate(invalid="ignore"):
        certificate = barrier.check(x)
    assert certificate.passed
    assert verdicts(certificate)["difference"] is True


def test_probes_of_the_callers_own():
    H = np.diag([1.0, 2.0, 3.0])
    wrong = lambda point, V, HV: HV + np.outer(V[:, 2], [0.0, 0.0, 1.0])  # noqa: E731 - wrong along the last axis only
    x = np.array([1.0, 1.0, 0.5])
    assert "difference" not in failed(quadratic(H, wrong=wrong).check(x, probes=np.eye(3)[:2]))
    assert "difference" in failed(quadratic(H, wrong=wrong).check(x, probes=[[0, 0, 1]]))
    # A long probe does not hide an error of a short one.
    by_width = lambda point, V, HV: HV + 1e-3 * np.outer(V[:, 2], [0.0, 0.0, 1.0]) * (len(V) == 1)  # noqa: E731
    assert "matmat" in failed(quadratic(H, wrong=by_width).check(x, probes=[[1e100, 0, 0], [0, 0, 1e-100]]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"probes": 0}, "probes must be a number of tangents from 1"),
        ({"probes": 2.5}, "got 2.5"),
        ({"probes": True}, "got True"),
        ({"probes": [[1.0, np.nan]]}, r"probes\[0\] holds NaN or infinity"),
        ({"probes": [[1.0, 2.0], [np.inf, 0.0]]}, r"probes\[1\] holds NaN or infinity"),
        ({"probes": [[0.0, 0.0]]}, r"probes\[0\] is zero"),
        ({"probes": [[1.0, 2.0, 3.0]]}, r"real tangents of shape \(k, 2\), got float64\[1, 3\]"),
        ({"probes": [[1j, 2.0]]}, "got complex128"),
        ({"probes": np.empty((0, 2))}, r"got float64\[0, 2\]"),
        ({"seed": -1}, "seed must be an integer from 0, got -1"),
        ({"seed": 0.5}, "got 0.5"),
    ],
)
def test_bad_input_is_refused(options, says):
    with pytest.raises(hvpd.InvalidArgumentError, match=says):
        quadratic(np.eye(2)).check(np.ones(2), **options)


def test_a_float64_probe_that_overflows_float32_is_refused():
    with pytest.raises(hvpd.InvalidArgumentError, match="NaN or infinity in float32"):
        quadratic(np.eye(2)).check(np.ones(2, np.float32), probes=[[1e300, 1.0]])


def test_the_same_seed_asks_the_same():
    first, again, other = (cosh().check(x_of(12, np.float64), seed=seed) for seed in (3, 3, 4))
    assert first.items == again.items
    assert first.items != other.items
    assert first.products == again.products > 50


def test_the_table_and_the_json():
    certificate = cosh(wrong=lambda point, V, HV: 1.01 * HV).check(x_of(12, np.float64), seed=7)
    lines = str(certificate).splitlines()
    assert lines[0] == "planted (abababababab): hessian, n = 12, float64, precision highest, seed 7"
    assert lines[1].split() == ["ITEM", "MEASURED", "THRESHOLD", "VERDICT", "MEANING"]
    assert [line.split()[0] for line in lines[2:-1]] == NAMES
    assert lines[-1].startswith("FAILED: ")
    assert all(len(line) < 160 for line in lines)
    plain = json.loads(json.dumps(certificate.to_json(), allow_nan=False))
    assert (plain["passed"], plain["n"], plain["dtype"], plain["seed"]) == (False, 12, "float64", 7)
    assert (plain["operator"], plain["precision"]) == ("hessian", "highest")
    assert [item["name"] for item in plain["items"]] == NAMES
    assert plain["items"][7]["verdict"] == "failed"
    assert plain["items"][7]["measured"] == pytest.approx(0.01, rel=0.02)

    skipped = quadratic(np.eye(2)).check(np.array([np.nan, 1.0]))
    plain = json.loads(json.dumps(skipped.to_json(), allow_nan=False))
    assert plain["items"][1] | {"meaning": ""} == {
        "name": "symmetry",
        "measured": "nan",
        "threshold": "nan",
        "passed": None,
        "verdict": "undecided",
        "meaning": "",
    }
    assert str(skipped).splitlines()[-1].startswith("FAILED, 8 undecided: ")


# Precision


@pytest.mark.parametrize(
    ("dtype", "noise", "passed"),
    [(np.float64, 1e-12, True), (np.float64, 1e-8, None), (np.float32, 1e-6, True), (np.float32, 1e-3, None)],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_precision_is_measured_rounding_and_never_fails(dtype, noise, passed, seed):
    precision = cosh(wrong=rounded_by(noise)).check(x_of(12, dtype, seed), seed=seed).items[6]
    assert precision.name == "precision"
    assert noise / 2 < precision.measured < 5 * noise
    assert precision.threshold == {np.float64: 1e-10, np.float32: 1e-5}[dtype]
    assert precision.passed is passed
    assert precision.meaning.startswith("precision highest: ")
    assert ("ill-conditioned" in precision.meaning) == (passed is None)


def test_one_ulp_of_x_can_move_a_product_further_than_rounding():
    # H = 12 (x - 1)^2: relative to it, a change of x by x eps is 2 x eps / (x - 1).
    function = Function(lambda x: ((x - 1) ** 4).sum(), lambda x: 4 * (x - 1) ** 3, lambda x, V: 12 * (x - 1) ** 2 * V)
    precision = function.check(np.array([1 + 1e-5])).items[6]
    assert precision.measured == pytest.approx(2 * np.finfo(float).eps / 1e-5, rel=0.2)
    assert precision.passed is True
    assert function.check(np.array([1 + 1e-9])).items[6].passed is None


def test_a_lower_precision_is_named_and_has_the_threshold_of_its_eps():
    function = cosh(wrong=rounded_by(1e-3))
    function.objective.precision = "default"
    x = x_of(12, np.float32)
    precision = function.check(x, eps=resolution(["float32"], "default")).items[6]
    assert precision.passed is True
    assert precision.threshold == pytest.approx(1e-5 * 2**13)
    assert precision.meaning.startswith("precision default: ")


@pytest.mark.parametrize(("noise", "passed"), [(1e-11, True), (1e-9, None)])
def test_products_that_vary_show_all_of_it_in_their_precision(noise, passed):
    rng = np.random.default_rng(0)
    wrong = lambda point, V, HV: HV * (1 + noise * rng.standard_normal(HV.shape))  # noqa: E731
    precision = cosh(wrong=wrong).check(x_of(12, np.float64)).items[6]
    assert noise / 2 < precision.measured < 5 * noise
    assert precision.passed is passed


def test_precision_cannot_be_measured_without_a_finite_neighbour():
    x = x_of(12, np.float64)
    function = cosh()
    value = function.value
    function.value = lambda at: value(at) if np.array_equal(at, x) else np.nan
    precision = function.check(x).items[6]
    assert (precision.passed, np.isnan(precision.measured)) == (None, True)
    assert "cannot be measured" in precision.meaning


def test_finite_differences_have_the_precision_of_their_step():
    precision = cosh(mode="finite_difference").check(x_of(12, np.float32)).items[6]
    eps = np.finfo(np.float32).eps
    assert precision.passed is True
    assert 2 * eps ** (2 / 3) <= precision.measured < precision.threshold < 100 * eps ** (2 / 3)


def test_the_servers_check_is_a_table_as_text():
    items = (
        Item("symmetry", 0.5, 1e-12, False, "|u.Hv - v.Hu|"),
        Item("difference", math.nan, math.nan, None, "skipped"),
    )
    assert str(RegistrationCheck("failed", items, "")).splitlines() == [
        "Registration check: failed",
        "ITEM        MEASURED  THRESHOLD  VERDICT    MEANING",
        "symmetry    0.5       <= 1e-12   FAILED     |u.Hv - v.Hu|",
        "difference  -                    undecided  skipped",
    ]
    assert str(RegistrationCheck("", (), "off")).splitlines()[0] == "Registration check: none, off"
