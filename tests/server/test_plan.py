"""The plan chooses the program that multiplies by mode, by memory and by measured
times. Its reason says by which.
"""

import pytest

from hvpd_server.engine.plan import Plan


def measured(plan, width, hvp, apply):
    for _ in range(Plan.SAMPLES):
        plan.add("hvp", width, hvp)
        plan.add("apply", width, apply)
    return plan


@pytest.mark.parametrize("mode", ["reverse_over_forward", "reverse_over_reverse", "finite_difference"])
def test_a_bundle_without_apply_has_no_choice(mode):
    choice = Plan(mode, has_apply=False, fits=True).choose(4)
    assert (choice.program, choice.width, choice.reason) == ("hvp", 4, f"mode {mode}")
    assert not Plan("linearized", has_apply=False, fits=True).needs_apply


@pytest.mark.parametrize("mode", ["forward_over_reverse", "linearized", "auto"])
def test_residuals_that_do_not_fit_are_not_kept(mode):
    plan = measured(Plan(mode, has_apply=True, fits=False), 1, hvp=9.0, apply=1.0)
    assert plan.choose(1).program == "hvp"
    assert "do not fit" in plan.choose(1).reason
    assert not plan.needs_apply


def test_linearized_mode_ignores_measurements():
    plan = measured(Plan("linearized", has_apply=True, fits=True), 8, hvp=1.0, apply=9.0)
    assert plan.choose(8).program == plan.choose(1).program == "apply"
    assert plan.needs_apply


def test_the_default_keeps_residuals_for_single_vectors_only():
    plan = measured(Plan("forward_over_reverse", has_apply=True, fits=True), 1, hvp=2.0, apply=1.0)
    measured(plan, 2, hvp=2.0, apply=1.0)
    assert plan.choose(1).program == "apply"
    assert plan.choose(2).program == "hvp"


def test_each_is_tried_before_one_is_preferred():
    plan = Plan("auto", has_apply=True, fits=True)
    for _ in range(Plan.SAMPLES):
        assert plan.choose(2).program == "hvp"
        plan.add("hvp", 2, 1.0)
    for seconds in (9.0, 8.5, 8.0, 7.5, 7.0):
        assert (plan.choose(2).program, plan.choose(2).reason) == ("apply", "not yet measured")
        plan.add("apply", 2, seconds)
    choice = plan.choose(2)
    assert (choice.program, choice.reason) == ("hvp", "measured to be faster")
    assert (choice.hvp_seconds, choice.apply_seconds) == (1.0, 7.0)
    assert plan.choose(4).reason == "not yet measured"


@pytest.mark.parametrize(
    ("hvp", "apply", "expected"), [(2.0, 1.0, "apply"), (1.0, 2.0, "hvp"), (1.0, 1.0, "hvp"), (1.2, 1.0, "apply")]
)
def test_the_least_time_decides(hvp, apply, expected):
    plan = measured(Plan("auto", has_apply=True, fits=True), 4, hvp, apply)
    plan.add("hvp", 4, 99.0)  # once, something else was running
    plan.add("apply", 4, 99.0)
    assert (plan.choose(4).program, plan.choose(4).reason) == (expected, "measured to be faster")


def test_residuals_that_save_hardly_any_time_are_not_kept():
    plan = measured(Plan("auto", has_apply=True, fits=True), 4, hvp=1.05, apply=1.0)
    assert (plan.program(4), plan.choose(4).reason) == ("hvp", "apply is hardly faster, and takes memory")


def test_more_samples_of_one_program_do_not_favour_it():
    """The least of a hundred times is less than the least of five, even for equal
    programs.
    """
    plan = Plan("auto", has_apply=True, fits=True)
    for number in range(100):
        plan.add("hvp", 1, 2.0 - 0.3 * (number == 50))
    for _ in range(Plan.SAMPLES):
        assert plan.program(1) == "apply"
        plan.add("apply", 1, 1.75)
    assert plan.program(1) == "apply"
    assert (plan.choose(1).hvp_seconds, plan.choose(1).apply_seconds) == (2.0, 1.75)


def test_a_choice_stays_so_that_the_bits_stay():
    plan = measured(Plan("auto", has_apply=True, fits=True), 1, hvp=2.0, apply=1.0)
    assert plan.program(1) == "apply"
    for _ in range(100):
        plan.add("apply", 1, 50.0)
        plan.add("hvp", 1, 0.1)
    assert plan.program(1) == "apply"
    plan.forgo_residuals()
    assert plan.program(1) == "hvp"
    assert "do not fit" in plan.choose(1).reason
