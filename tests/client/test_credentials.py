"""A token is read again from its file only when it was refused."""

import pytest

from hvpd._errors import InvalidArgumentError
from hvpd._transport.credentials import CallMetadata, Token


def never():
    raise AssertionError("the file was read")


def test_a_token_without_a_file_stays():
    token = Token("a")
    assert not token.renew("a")
    assert token.text == "a"


def test_a_refused_token_is_read_again_once():
    token = Token("a", iter("aab").__next__)
    assert [token.renew("a") for _ in range(3)] == [False, False, True]
    assert token.text == "b"


def test_another_thread_may_have_read_it():
    token = Token("b", never)
    assert token.renew("a")


@pytest.mark.parametrize("content", ["", "a\nb", "x" * 4097])
def test_a_file_without_a_token_changes_nothing(content):
    token = Token("a", lambda: content)
    assert not token.renew("a")
    assert token.text == "a"


def test_a_file_that_cannot_be_read_changes_nothing():
    def read():
        raise InvalidArgumentError("it is gone", reason="PROFILE")

    assert not Token("a", read).renew("a")


def test_each_try_has_the_newest_token():
    token = Token("a", lambda: "b")
    metadata = CallMetadata(lambda: (("authorization", token.text),), (("id", "1"),)).plus([("trace", "2")])
    assert tuple(metadata) == (("authorization", "a"), ("id", "1"), ("trace", "2"))
    token.renew("a")
    assert next(iter(metadata)) == ("authorization", "b")
