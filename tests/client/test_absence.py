"""For how long a server is left alone, with a clock of the test."""

import random

import pytest

from hvpd._transport.absence import Absence, spread


def test_nobody_is_absent_at_first():
    assert Absence(1.0, 30.0).over(0.0)


def test_an_absence_ends_after_its_time():
    absence = Absence(1.0, 30.0)
    absence.begin(100.0)
    assert not absence.over(100.999)
    assert absence.over(101.3)


def test_failures_at_once_do_not_prolong_an_absence():
    absence = Absence(1.0, 30.0)
    absence.begin(100.0)
    until = absence.until
    absence.begin(100.5)
    assert absence.until == until


def test_each_absence_is_twice_as_long_up_to_the_limit():
    absence, now = Absence(1.0, 8.0), 100.0
    for seconds in (1.0, 2.0, 4.0, 8.0, 8.0):
        absence.begin(now)
        assert seconds <= absence.until - now <= 1.3 * seconds
        now = absence.until


@pytest.mark.parametrize(("quiet", "seconds"), [(59.0, 2.0), (61.0, 1.0)])
def test_a_minute_without_an_absence_is_forgiven(quiet, seconds):
    absence = Absence(1.0, 30.0)
    absence.begin(100.0)
    now = absence.until + quiet
    absence.begin(now)
    assert seconds <= absence.until - now <= 1.3 * seconds


def test_pauses_leave_the_users_random_numbers_alone():
    """Otherwise a retry in another thread would look like a side effect of a trace."""
    before = random.getstate()
    assert 1.0 <= spread(1.0) <= 1.3
    assert random.getstate() == before
