"""The last failures are few, merged if they are alike, and in the order of their last
times.
"""

import itertools

from hvpd_server.telemetry.recent_failures import Failures


def test_a_repeated_failure_is_one_entry_with_a_count_and_comes_first():
    failures = Failures(itertools.count(100).__next__)
    failures.add(
        "NOT_FOUND", "POINT_NOT_RESIDENT", "StreamProducts", "ann", "point 0a1b2c3d4e5f is not on the device", "r1"
    )
    failures.add("INTERNAL", "INTERNAL", "StreamProducts", "ann", "ValueError: bad")
    failures.add(
        "NOT_FOUND", "POINT_NOT_RESIDENT", "StreamProducts", "ann", "point ffffffffffff is not on the device", "r2"
    )
    first, second = failures.recent()
    assert (first.reason, first.count, first.time, first.request_id) == ("POINT_NOT_RESIDENT", 2, 102, "r2")
    assert first.message == "point ffffffffffff is not on the device"
    assert (second.reason, second.count, second.time) == ("INTERNAL", 1, 101)


def test_failures_that_differ_otherwise_are_entries_of_their_own():
    failures = Failures()
    failures.add("A", "R", "M", "t", "one")
    for change in (("B", "R", "M", "t", "one"), ("A", "S", "M", "t", "one"), ("A", "R", "N", "t", "one")):
        failures.add(*change)
    failures.add("A", "R", "M", "u", "one")
    failures.add("A", "R", "M", "t", "two")
    assert [each.count for each in failures.recent()] == [1] * 6


def test_entries_and_their_texts_are_bounded():
    failures = Failures()
    for number in range(1000):
        failures.add("A", "R", "M", "tenant" + "x" * number, "m" * 100_000)
    found = failures.recent()
    assert len(found) == 100
    assert found[0].tenant.startswith("tenantxxx")
    assert max(len(text) for each in found for text in (each.message, each.tenant)) == 400
    assert found[0].message.endswith("…")
