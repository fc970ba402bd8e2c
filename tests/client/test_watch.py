import warnings

import pytest

import hvpd
from hvpd._check.verdicts import Item, RegistrationCheck
from hvpd._check.watch import Watch, message

PENDING = RegistrationCheck("pending", (), "the check has not finished")
PASSED = RegistrationCheck("passed", (), "")
FAILED = RegistrationCheck(
    "failed",
    (Item("symmetry", 0.0, 1e-12, True, "symmetric"), Item("difference", 1.0, 1e-11, False, "a difference")),
    "",
)


def looks(found, *answers):
    """Look once for each answer; return the warnings and the number of questions."""
    left = list(answers)
    watch = Watch("demo", found, lambda: left.pop(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(len(answers) + 3):
            watch.look(now=bool(left))
    return [each.category for each in caught], len(answers) - len(left), watch.over


@pytest.mark.parametrize(
    ("found", "answers", "warned", "asked"),
    [
        (PASSED, (), 0, 0),
        (RegistrationCheck("", (), "no x"), (), 0, 0),
        (FAILED, (), 1, 0),
        (PENDING, (PASSED,), 0, 1),
        (PENDING, (None, PENDING, FAILED), 1, 3),
    ],
)
def test_a_bad_verdict_warns_once(found, answers, warned, asked):
    assert looks(found, *answers) == ([hvpd.CurvatureWarning] * warned, asked, True)


def test_a_pending_verdict_is_asked_for_at_growing_intervals():
    asked = []
    watch = Watch("demo", PENDING, lambda: asked.append(1))
    for _ in range(100):
        watch.look()
    assert len(asked) < 5
    assert not watch.over


def test_a_client_that_has_warned_does_not_warn_again():
    watch = Watch("demo", FAILED, lambda: None, warned=True)
    watch.look()
    assert watch.over


def test_the_message_names_the_item_that_failed_and_the_remedy():
    said = message("demo", FAILED)
    assert "objective demo are wrong at the x of its registration: difference is 1, at most 1e-11 passes" in said
    assert "symmetry" not in said
    assert "objective.check(x)" in said


def test_the_message_of_an_undecided_check_has_its_reason():
    said = message("demo", RegistrationCheck("undecided", (), "NaN or infinity in x"))
    assert said.startswith("the server cannot tell whether products of objective demo are right")
    assert "registration: NaN or infinity in x. Call" in said
