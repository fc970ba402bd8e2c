"""Whoever fails a million times is heard a few times, and counted; on a clock that the tests turn."""

import pytest

from hvpd_server._flood import QUIET, Flood

WHAT = ("logger", "failed")


class Clock:
    """Time that passes when a test says so, and calls that are due then."""

    def __init__(self):
        self.now = 0.0
        self.due = []

    def later(self, seconds, call):
        self.due.append((self.now + seconds, call))

    def passes(self, seconds):
        self.now += seconds
        due, self.due = [each for each in self.due if each[0] <= self.now], [e for e in self.due if e[0] > self.now]
        for _, call in due:
            call()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def told():
    return []


@pytest.fixture
def flood(clock, told):
    return Flood(told.extend, clock=lambda: clock.now, later=clock.later)


def test_few_lines_are_all_said(flood, clock, told):
    assert all(flood.admits("ann", WHAT, number) for number in range(10))
    clock.passes(100)
    assert told == []


def test_of_a_million_a_few_are_said_and_all_are_counted(flood, clock, told):
    said = 0
    for number in range(1_000_000):
        said += flood.admits("ann", WHAT, number)
        clock.passes(0.001)
    clock.passes(QUIET)
    assert 10 + 1000 / QUIET - 1 <= said <= 10 + 1000 / QUIET
    assert said + sum(each.lines for each in told) == 1_000_000
    assert len(told) <= 1000 / QUIET + 1
    assert told[-1].last == 999_999


def test_what_was_left_out_is_told_although_nothing_more_comes(flood, clock, told):
    for number in range(15):
        flood.admits("ann", WHAT, number)
    assert told == []
    clock.passes(QUIET)
    assert told == [(5, 14)]
    clock.passes(1000)
    assert len(told) == 1


def test_who_is_loud_silences_nobody_else(flood):
    for number in range(1000):
        flood.admits("ann", WHAT, number)
    assert flood.admits("ben", WHAT, 0)
    assert flood.admits("ann", ("logger", "something else"), 0)


def test_a_thousand_callers_are_bounded_together(flood, clock, told):
    said = sum(flood.admits(f"caller{number}", WHAT, number) for number in range(10_000))
    assert said == 100
    clock.passes(QUIET)
    assert told == [(9_900, 9_999)]
    assert sum(flood.admits(f"caller{number}", WHAT, number) for number in range(10_000)) == QUIET


def test_what_is_remembered_of_callers_and_kinds_is_bounded(flood, clock, told):
    for number in range(100_000):
        flood.admits(f"caller{number}", f"kind{number}", number)
    assert len(flood._buckets) <= 1024
    clock.passes(QUIET)
    assert len(told) <= 1025
    assert sum(each.lines for each in told) == 100_000 - 100
