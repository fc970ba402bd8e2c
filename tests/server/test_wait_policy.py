"""The wait policy states the time until which the next launch waits, given the waiting
products and the launches in flight.
"""

import threading

import numpy as np
import pytest

from hvpd_server.scheduling.backlog import Backlog
from hvpd_server.scheduling.in_flight import InFlight
from hvpd_server.scheduling.job import Job
from hvpd_server.scheduling.wait_policy import Wait, WaitPolicy

NOW, LIMIT, NEVER = 100.0, 4, float("inf")


class Expecting:
    """A hold-back that waits for two vectors until 105."""

    expected = 2

    def expected_until(self, now):
        return 103.0

    def due(self, columns, room, now):
        return 105.0 if columns < room else now


def limit(key):
    if key == "broken":
        raise RuntimeError("no limit")
    return LIMIT


def job(key="k", *, width=1, deadline=NEVER, holdback=None):
    return Job(key, np.zeros((width, 2)), deadline=deadline, queued=NOW, holdback=holdback)


def wait(*jobs, flying=(), max_launches=2, max_delay=0.0):
    backlog, in_flight = Backlog(limit, lambda tenant: 1.0, max_delay), InFlight(threading.Lock(), max_launches)
    for each in jobs:
        backlog.add(each)
    for key in flying:
        in_flight.begin(key, 1)
    return WaitPolicy(limit).next_launch(backlog, in_flight, NOW)


@pytest.mark.parametrize(
    ("jobs", "flying", "until"),
    [
        ([job()], [], NOW),
        ([job()], ["k"], NEVER),
        ([job()], ["other"], NOW),
        ([job()], ["other", "third"], NEVER),
        ([job(width=LIMIT)], ["k"], NOW),
        ([job(holdback=Expecting())], ["other"], 103.0),
        ([job("broken")], ["broken"], NOW),
    ],
    ids=["idle", "wider if it waits", "other key", "no launch left", "full", "expected callers", "broken limit"],
)
def test_a_launch_waits_for_those_in_flight_only_if_that_makes_it_wider(jobs, flying, until):
    assert wait(*jobs, flying=flying).until == until


@pytest.mark.parametrize(("width", "until"), [(1, NOW + 5), (LIMIT, NOW)])
def test_a_block_that_is_not_full_waits_for_the_queue_delay(width, until):
    assert wait(job(width=width), max_delay=5.0).until == until


def test_a_launch_is_held_back_for_expected_callers():
    holdback = Expecting()
    assert wait(job(holdback=holdback)) == Wait(105.0, holdback, 3)


@pytest.mark.parametrize(
    "jobs",
    [
        [job(holdback=Expecting()), job("other")],
        [job(holdback=Expecting(), deadline=104.0)],
        [job("broken", holdback=Expecting())],
        [job(holdback=Expecting(), width=LIMIT)],
    ],
    ids=["other key", "early deadline", "broken limit", "full"],
)
def test_a_launch_is_not_held_back_if_that_delays_others_or_is_of_no_use(jobs):
    assert wait(*jobs).until == NOW
