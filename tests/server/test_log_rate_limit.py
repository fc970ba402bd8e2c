"""A client that fails a million times makes a few lines, and a count. The tests move
the clock.
"""

import pytest

from hvpd_server.telemetry.log_rate_limit import QUIET, LogRateLimit

WHAT = ("logger", "failed")


class Clock:
    """A clock that moves when a test says so, and then makes the calls that are due."""

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
def limit(clock, told):
    return LogRateLimit(told.extend, clock=lambda: clock.now, later=clock.later)


def test_few_lines_all_pass(limit, clock, told):
    assert all(limit.admits("ann", WHAT, number) for number in range(10))
    clock.passes(100)
    assert told == []


def test_a_few_of_a_million_lines_pass_and_all_are_counted(limit, clock, told):
    said = 0
    for number in range(1_000_000):
        said += limit.admits("ann", WHAT, number)
        clock.passes(0.001)
    clock.passes(QUIET)
    assert 10 + 1000 / QUIET - 1 <= said <= 10 + 1000 / QUIET
    assert said + sum(each.lines for each in told) == 1_000_000
    assert len(told) <= 1000 / QUIET + 1
    assert told[-1].last == 999_999


def test_the_count_is_told_although_no_line_follows(limit, clock, told):
    for number in range(15):
        limit.admits("ann", WHAT, number)
    assert told == []
    clock.passes(QUIET)
    assert told == [(5, 14)]
    clock.passes(1000)
    assert len(told) == 1


def test_one_caller_does_not_silence_another(limit):
    for number in range(1000):
        limit.admits("ann", WHAT, number)
    assert limit.admits("ben", WHAT, 0)
    assert limit.admits("ann", ("logger", "something else"), 0)


def test_a_thousand_callers_are_bounded_together(limit, clock, told):
    said = sum(limit.admits(f"caller{number}", WHAT, number) for number in range(10_000))
    assert said == 100
    clock.passes(QUIET)
    assert told == [(9_900, 9_999)]
    assert sum(limit.admits(f"caller{number}", WHAT, number) for number in range(10_000)) == QUIET


def test_the_memory_of_callers_and_kinds_is_bounded(limit, clock, told):
    for number in range(100_000):
        limit.admits(f"caller{number}", f"kind{number}", number)
    assert len(limit._buckets) <= 1024
    clock.passes(QUIET)
    assert len(told) <= 1025
    assert sum(each.lines for each in told) == 100_000 - 100


def test_a_line_that_is_left_out_needs_no_thread(clock, told):
    started = []

    def later(seconds, call):
        started.append(call)
        if len(started) == 1:
            raise RuntimeError("can't start new thread")

    limit = LogRateLimit(told.extend, clock=lambda: clock.now, later=later)
    while limit.admits("ann", WHAT, 0):
        pass
    assert not limit.admits("ann", WHAT, 1)
    started[-1]()
    assert [each.lines for each in told] == [1]
    assert len(started) == 2
