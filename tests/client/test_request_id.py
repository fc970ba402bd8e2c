"""Ids of calls are short texts that are safe in logs, and that no token can be."""

import re

import pytest

from hvpd._wire import request_id


def test_new_ids_differ_and_are_valid():
    made = {request_id.new() for _ in range(100)}
    assert len(made) == 100
    assert all(re.fullmatch("[0-9a-f]{16}", each) and request_id.is_valid(each) for each in made)


@pytest.mark.parametrize("text", ["a", "A-1.b:c", "x" * 64])
def test_ids_of_other_software_are_valid(text):
    assert request_id.is_valid(text)


@pytest.mark.parametrize("text", ["", "x" * 65, "hvpd_token", "a/12", "a\n", "é", "a b", None, b"abc"])
def test_other_values_are_no_ids(text):
    assert not request_id.is_valid(text)
