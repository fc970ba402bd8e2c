"""Suspects of a crash run one at a time, and all others as before.
tests/attacks/test_probation.py has a real server.
"""

import contextlib
import logging
import queue
import threading

import pytest

from hvpd_server.errors import Code, ServiceError
from hvpd_server.scheduling.probation import Probation
from tests.support.clock import Clock

A, B, C, INNOCENT = (letter * 64 for letter in "abcd")
WAIT = 60


@pytest.fixture
def clock():
    return Clock(0.0)


@pytest.fixture
def probation(clock):
    return Probation([A, B, C], seconds=1000, clock=clock)


class Work:
    """A thread that takes a turn, and gives the turn back when the test says so."""

    def __init__(self, probation, digest, **settings):
        self.waits, self.runs, self.end = queue.SimpleQueue(), threading.Event(), threading.Event()
        self.error = None
        self.thread = threading.Thread(target=self._run, args=(probation, digest), kwargs=settings)
        self.thread.start()

    def _run(self, probation, digest, **settings):
        try:
            with probation.turn(digest, on_wait=self.waits.put, **settings):
                self.runs.set()
                assert self.end.wait(WAIT)
        except ServiceError as error:
            self.error = error

    def waiting(self):
        """Return the function that cancels the thread, once it waits."""
        return self.waits.get(timeout=WAIT)

    def running(self):
        assert self.runs.wait(WAIT)
        return self

    def finish(self):
        self.end.set()
        self.thread.join(WAIT)
        assert not self.thread.is_alive()


def test_suspects_run_one_at_a_time_in_the_order_of_their_arrival(probation):
    first = Work(probation, A).running()
    second = Work(probation, B)
    second.waiting()
    third = Work(probation, A)  # Otherwise a stream of A's work would keep the turn for ever.
    third.waiting()
    assert not second.runs.is_set()
    first.finish()
    second.running()
    assert not third.runs.is_set()
    second.finish()
    third.running().finish()


def test_work_of_one_objective_shares_its_turn(probation):
    works = [Work(probation, A).running() for _ in range(3)]
    other = Work(probation, B)
    other.waiting()
    for work in works[:2]:
        work.finish()
    assert not other.runs.is_set()
    works[2].finish()
    other.running().finish()


def test_others_are_no_suspects_and_wait_for_nothing(probation):
    work = Work(probation, A).running()
    assert not probation.suspect(INNOCENT)
    with probation.turn(INNOCENT):
        pass
    work.finish()


def test_an_error_gives_the_turn_back(probation):
    with pytest.raises(ZeroDivisionError), probation.turn(A):
        raise ZeroDivisionError
    with probation.turn(B):
        pass


def test_a_load_joins_the_launch_that_may_wait_for_it(probation):
    launch = Work(probation, A).running()
    other = Work(probation, B)
    other.waiting()
    load = Work(probation, A, load=True).running()
    launch.finish()
    assert not other.runs.is_set()
    load.finish()
    other.running().finish()


def test_a_load_does_not_wait_for_ever(probation, monkeypatch):
    monkeypatch.setattr("hvpd_server.scheduling.probation._LOAD_SECONDS", 0.0)
    launch = Work(probation, A).running()
    with probation.turn(B, load=True):
        assert not launch.end.is_set()
    launch.finish()


def test_a_deadline_ends_the_wait(probation, clock):
    work, late = Work(probation, A).running(), Work(probation, C)
    late.waiting()
    with (
        pytest.raises(ServiceError, match="turn of objective bbbbbbbbbbbb") as error,
        probation.turn(B, deadline=clock()),
    ):
        pass
    assert error.value.code is Code.DEADLINE_EXCEEDED
    work.finish()
    late.running().finish()  # Work that gave up does not delay it.


def test_a_caller_can_cancel_the_wait(probation):
    work, waits, late = Work(probation, A).running(), Work(probation, B), None
    cancel = waits.waiting()
    late = Work(probation, C)
    late.waiting()
    cancel()
    waits.finish()
    assert waits.error.code is Code.CANCELLED
    work.finish()
    late.running().finish()


def test_a_suspect_is_cleared_by_work_that_ends_but_not_at_once(probation, clock):
    with probation.turn(A):
        pass
    assert probation.suspect(A)  # Its point is good, and its product may crash. Clients repeat both within seconds.
    clock.now = 61.0
    with probation.turn(A, load=True):
        pass
    with contextlib.suppress(ZeroDivisionError), probation.turn(A):
        raise ZeroDivisionError
    assert probation.suspect(A)
    with probation.turn(A):
        pass
    assert not probation.suspect(A)
    assert probation.suspect(B)


def test_work_of_an_objective_that_was_cleared_waits_no_longer(probation, clock):
    clock.now = 61.0
    first = Work(probation, A).running()
    other, waits = Work(probation, B), None
    other.waiting()
    waits = Work(probation, A)
    waits.waiting()
    first.finish()
    other.running()
    waits.running().finish()
    other.finish()


def test_if_all_objectives_are_on_probation_none_is_cleared(clock):
    probation = Probation([A], everyone=True, seconds=1000, clock=clock)
    clock.now = 61.0
    with probation.turn(INNOCENT):
        pass
    assert probation.suspect(INNOCENT)
    clock.now = 1000.0
    assert not probation.suspect(INNOCENT)


def test_it_is_told_when_probation_begins_and_ends(clock, caplog):
    caplog.set_level(logging.INFO)
    probation = Probation([A, B], seconds=1000, label={A: "team/a", B: "team/b"}.__getitem__, clock=clock)
    assert "on probation for at most 1000 s: team/a, team/b." in caplog.text
    clock.now = 61.0
    for digest in (A, B):
        with probation.turn(digest):
            pass
    assert "objective team/a is off probation" in caplog.text
    assert caplog.text.count("probation has ended") == 1


def test_without_suspects_there_is_no_probation(clock, caplog):
    caplog.set_level(logging.INFO)
    probation = Probation(clock=clock)
    assert not probation.suspect(A)
    assert not Probation([A], seconds=-1.0, clock=clock).suspect(A)
    assert "probation" not in caplog.text
