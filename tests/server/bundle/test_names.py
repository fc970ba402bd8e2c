"""Names of objectives follow a rule."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpd_server.bundle import (
    check_name,
)
from hvpd_server.errors import Code, ServiceError

_LETTERS = string.ascii_letters + string.digits + "_"


def _is_name(text):
    """Return whether a text is a name, by another form of the rule."""
    parts = text.split("/")
    digest = len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
    return (
        len(text) <= 200
        and not digest
        and all(part and part[0] in _LETTERS and set(part) <= set(_LETTERS + ".-") for part in parts)
    )


@settings(deadline=None)
@given(
    text=st.text(max_size=20)
    | st.text("ab0./_-é\n %", max_size=20)
    | st.text("0123456789abcdef", min_size=63, max_size=65)
)
def test_names_follow_the_rule(text):
    if _is_name(text):
        check_name(text)
        return
    with pytest.raises(ServiceError) as refused:
        check_name(text)
    assert (refused.value.code, refused.value.reason) == (Code.INVALID_ARGUMENT, "INVALID_NAME")


@pytest.mark.parametrize("name", ["a", "digits/mlp", "team_1/x.y-z/v2", "A" * 200, "0" * 63, "0" * 65])
def test_names_that_are_allowed(name):
    check_name(name)


@pytest.mark.parametrize(
    "name", ["", "/", "a/", "/a", ".a", "-a", "a/.b", "a/-b", "a\n", "a b", "a" * 201, "f" * 64, "é"]
)
def test_names_that_are_not(name):
    with pytest.raises(ServiceError, match="a name must have at most 200 letters"):
        check_name(name)
