"""Checks of arguments name the argument, its value, and the expected values."""

import numpy as np
import pytest

from hvpd import InvalidArgumentError
from hvpd._arguments import check_choice, finite, integer, name_or_digest


@pytest.mark.parametrize("number", [1, 3, np.int64(2)])
def test_an_integer_within_its_limits_is_returned(number):
    found = integer(number, "rank", 1, 3)
    assert found == number
    assert type(found) is int


@pytest.mark.parametrize(
    ("number", "most", "says"), [(0, None, "of at least 1"), (4, 3, "from 1 to 3"), (1.0, 3, "1.0")]
)
def test_another_number_is_refused(number, most, says):
    with pytest.raises(InvalidArgumentError, match=f"rank must be an integer .*{says}"):
        integer(number, "rank", 1, most)


def test_a_finite_number_is_returned_as_a_float():
    found = finite(np.float32(0.5), "shift")
    assert found == 0.5
    assert type(found) is float


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1j, "1", None])
def test_a_number_that_is_not_finite_and_real_is_refused(number):
    with pytest.raises(InvalidArgumentError, match="shift must be a finite real number, got"):
        finite(number, "shift")


def test_an_array_is_named_by_its_shape():
    with pytest.raises(
        InvalidArgumentError, match=r"shift must be a finite real number, got a ndarray of shape \(900,\)$"
    ):
        finite(np.zeros(900), "shift")


@pytest.mark.parametrize(("name", "says"), [(3, "got 3"), (None, "got None"), (np.ones(2), r"\(2,\)")])
def test_a_name_or_digest_must_be_a_string(name, says):
    assert name_or_digest("demo/x") == "demo/x"
    with pytest.raises(InvalidArgumentError, match=f"a name or digest must be a string, .*{says}") as caught:
        name_or_digest(name)
    assert caught.value.reason == "INVALID_NAME"
    with pytest.raises(InvalidArgumentError, match="the name is empty"):
        name_or_digest("")


def test_only_a_listed_word_is_accepted():
    check_choice("sum", "reduction", ("mean", "sum"))
    with pytest.raises(InvalidArgumentError, match="reduction must be one of mean, sum, got 'max'"):
        check_choice("max", "reduction", ("", "mean", "sum"))
