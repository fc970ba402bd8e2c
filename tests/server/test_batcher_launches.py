"""The batcher has several launches in flight on a device with memory of its own."""

import collections
import queue
import threading
import time

import numpy as np
import pytest

from hvpd_server.errors import Code
from hvpd_server.scheduling.batcher import Batcher
from hvpd_server.scheduling.job import Job
from tests.support.batcher import WAIT, Expecting, Gate, refusal
from tests.support.clock import Clock


class Runway:
    """A device that holds each launch until the test releases its key. It multiplies by
    ten.
    """

    def __init__(self, start, *, limit=64, max_launches=2, **settings):
        self._start = start
        self.launches = []
        self._begun = queue.SimpleQueue()
        self.naps = []
        self._may_end = collections.defaultdict(threading.Event)
        self.batcher = Batcher(
            self._execute,
            lambda key: limit,
            max_pending=1000,
            max_launches=max_launches,
            condition=self._condition,
            **settings,
        )

    def _condition(self, lock):
        """Make a condition that notes the times for which leaders mean to wait."""
        naps = self.naps

        class Condition(threading.Condition):
            def wait(self, timeout=None):
                naps.append(timeout)
                return super().wait(timeout)

        return Condition(lock)

    def _execute(self, key, jobs):
        may_end = self._may_end[key]
        self._begun.put((key, [int(job.block[0, 0]) for job in jobs]))
        assert may_end.wait(WAIT)
        return [10 * job.block for job in jobs]

    def ask(self, number, key, *, width=1, tenant="", deadline=float("inf"), holdback=None):
        """Start a caller."""
        job = Job(key, np.full((width, 2), float(number)), tenant, deadline, holdback=holdback, gate=Gate())
        return self._start(self.batcher.run, job), job

    def waits(self, number, key, **settings):
        """Start a caller; return when its product is queued, and another caller
        leads.
        """
        found = self.ask(number, key, **settings)
        found[1].gate.await_waiter()
        return found

    def parks(self, number, key, **settings):
        """Start a caller that leads; return when it waits for a launch to end."""
        found = self.ask(number, key, **settings)
        while not self.batcher._parked:
            assert not found[0].done()
        return found

    def begun(self):
        return self._begun.get(timeout=WAIT)

    def none_begins(self):
        return self._begun.empty()

    def end(self, *keys):
        """Release the launches of keys, also later ones."""
        for key in keys:
            self._may_end[key].set()


def test_a_launch_of_another_key_begins_before_the_one_in_flight_has_ended(start):
    runway = Runway(start)
    first, _ = runway.ask(1, "a")
    assert runway.begun() == ("a", [1])
    second, _ = runway.ask(2, "b")
    assert runway.begun() == ("b", [2])
    assert runway.batcher.in_flight.columns == 2
    runway.end("b")
    np.testing.assert_array_equal(second.result(WAIT), [[20.0, 20.0]])
    runway.end("a")
    np.testing.assert_array_equal(first.result(WAIT), [[10.0, 10.0]])
    assert runway.batcher.in_flight.columns == 0


def test_no_more_launches_are_in_flight_than_may_be(start):
    runway = Runway(start)
    futures = [runway.ask(1, "a")[0]]
    assert runway.begun() == ("a", [1])
    futures.append(runway.ask(2, "b")[0])
    assert runway.begun() == ("b", [2])
    futures.append(runway.parks(3, "c")[0])
    futures.append(runway.waits(4, "d")[0])
    assert runway.none_begins()
    runway.end("b")
    assert runway.begun() == ("c", [3])
    assert runway.none_begins()
    runway.end("a", "c", "d")
    assert [future.result(WAIT)[0, 0] for future in futures] == [10.0, 20.0, 30.0, 40.0]


def test_products_with_the_key_in_flight_wait_and_share_a_launch(start):
    runway = Runway(start)
    futures = [runway.ask(1, "a")[0]]
    assert runway.begun() == ("a", [1])
    futures.append(runway.parks(2, "a")[0])
    futures += [runway.waits(number, "a")[0] for number in (3, 4)]
    assert runway.none_begins()
    runway.end("a")
    assert runway.begun() == ("a", [2, 3, 4])
    assert runway.naps == [threading.TIMEOUT_MAX]
    assert [future.result(WAIT)[0, 0] for future in futures] == [10.0, 20.0, 30.0, 40.0]


def test_a_full_block_overlaps_a_launch_with_its_key(start):
    runway = Runway(start, limit=3)
    futures = [runway.ask(1, "a")[0]]
    assert runway.begun() == ("a", [1])
    futures.append(runway.parks(2, "a")[0])
    futures.append(runway.waits(3, "a")[0])
    assert runway.none_begins()
    futures.append(runway.ask(4, "a")[0])
    assert runway.begun() == ("a", [2, 3, 4])
    runway.end("a")
    assert [future.result(WAIT)[0, 0] for future in futures] == [10.0, 20.0, 30.0, 40.0]


def test_a_block_with_expected_callers_does_not_overlap(start):
    runway = Runway(start)
    holdback = Expecting(2)
    first, _ = runway.ask(1, "a")
    assert runway.begun() == ("a", [1])
    second, _ = runway.parks(2, "b", holdback=holdback)
    assert runway.none_begins()
    third, _ = runway.ask(3, "b", holdback=holdback)
    assert runway.begun() == ("b", [2, 3])
    runway.end("a", "b")
    assert [future.result(WAIT)[0, 0] for future in (first, second, third)] == [10.0, 20.0, 30.0]


def test_a_block_overlaps_when_the_expected_callers_are_late(start):
    """Only the time shows the leader that they have left."""
    ends = time.monotonic() + 0.02

    class Late(Expecting):
        def expected_until(self, now):
            return max(ends, now)

    runway = Runway(start)
    first, _ = runway.ask(1, "a")
    assert runway.begun() == ("a", [1])
    second, _ = runway.ask(2, "b", holdback=Late(2))
    assert runway.begun() == ("b", [2])
    assert time.monotonic() >= ends
    runway.end("a", "b")
    assert [future.result(WAIT)[0, 0] for future in (first, second)] == [10.0, 20.0]


def test_a_parked_leader_that_is_cancelled_hands_the_lead_on(start):
    runway = Runway(start)
    first, _ = runway.ask(1, "a")
    assert runway.begun() == ("a", [1])
    second, job = runway.parks(2, "a")
    third, _ = runway.waits(3, "a")
    runway.batcher.cancel(job)
    assert refusal(second) == Code.CANCELLED
    runway.end("a")
    assert runway.begun() == ("a", [3])
    assert [future.result(WAIT)[0, 0] for future in (first, third)] == [10.0, 30.0]


def test_a_parked_leader_leaves_at_its_deadline(start):
    runway = Runway(start)
    first, _ = runway.ask(1, "a")
    assert runway.begun() == ("a", [1])
    second, _ = runway.ask(2, "a", deadline=time.monotonic() + 0.02)
    assert refusal(second) == Code.DEADLINE_EXCEEDED
    runway.end("a")
    assert first.result(WAIT)[0, 0] == 10.0
    assert runway.batcher.pending == 0


def test_a_leader_that_launched_others_gets_its_product_from_the_next_leader(start):
    """The tenant in turn comes first, so the leader's own product waits, and another
    caller leads meanwhile.
    """
    runway = Runway(start, weights=lambda tenant: 0.01 if tenant == "slow" else 1.0)
    first, _ = runway.ask(1, "a", tenant="slow")
    assert runway.begun() == ("a", [1])
    own, _ = runway.parks(2, "a", tenant="slow")  # That tenant has had its share with the first launch.
    others = [runway.waits(number, key, tenant="quick")[0] for number, key in ((3, "a"), (4, "c"))]
    runway.end("a", "c")
    results = [future.result(WAIT)[0, 0] for future in (first, own, *others)]
    assert results == [10.0, 20.0, 30.0, 40.0]
    assert runway.batcher.pending == runway.batcher.in_flight.columns == 0


def test_a_tenants_charge_counts_while_its_launch_is_in_flight(start):
    """The charge of a launch is not forgotten before the launch has ended, even if
    nothing waits.
    """
    runway = Runway(start, max_launches=2)
    futures = [runway.ask(1, "a", tenant="light")[0]]
    assert runway.begun() == ("a", [1])
    futures.append(runway.ask(2, "b", tenant="heavy", width=64)[0])
    assert runway.begun() == ("b", [2])
    futures.append(runway.parks(3, "c", tenant="heavy")[0])
    futures.append(runway.waits(4, "d", tenant="light")[0])
    runway.end("b")
    assert runway.begun() == ("d", [4])
    runway.end("a", "c", "d")
    assert [future.result(WAIT)[0, 0] for future in futures] == [10.0, 20.0, 30.0, 40.0]


def test_an_exclusive_launch_waits_for_the_others_and_ends_the_overlap(start):
    """Two do not fit beside each other, and each fits by itself."""
    inside, together, counts = threading.Semaphore(1), threading.Barrier(2), []

    def execute(key, jobs):
        together.wait(WAIT)
        with batcher.in_flight.exclusive():
            counts.append(inside.acquire(blocking=False))
            inside.release()
        return [10 * job.block for job in jobs]

    batcher = Batcher(execute, lambda key: 64, max_pending=10, max_launches=2)
    assert batcher.in_flight.max_launches == 2
    futures = [start(batcher.run, Job(key, np.ones((1, 2)))) for key in "ab"]
    assert [future.result(WAIT)[0, 0] for future in futures] == [10.0, 10.0]
    assert counts == [True, True]
    assert batcher.in_flight.max_launches == 1
    assert batcher.in_flight.columns == 0


def test_the_wait_for_another_launch_is_not_device_time(start):
    clock = Clock()
    runway = Runway(start, clock=clock)
    first, one = runway.ask(1, "a", width=2)
    runway.begun()
    second, other = runway.ask(2, "b")
    runway.begun()
    clock.now += 3
    runway.end("a")
    first.result(WAIT)
    clock.now += 1
    runway.end("b")
    second.result(WAIT)
    assert (one.device_seconds, other.device_seconds) == (3.0, 1.0)
    assert other.finished - other.started == 4.0


def test_the_leader_gets_an_error_of_the_queue_and_the_next_leads(start):
    """Nothing should raise there. If it does, the lead must not be lost."""

    class Broken(Expecting):
        def width(self, columns, room):
            raise ZeroDivisionError("in the holdback")

    for launches in (1, 2):
        runway = Runway(start, max_launches=launches)
        first, _ = runway.ask(1, "a")
        runway.begun()
        broken, _ = runway.ask(2, "b", holdback=Broken(1))
        if launches == 1:
            runway.end("a")
        with pytest.raises(ZeroDivisionError):
            broken.result(WAIT)
        third, _ = runway.ask(3, "c")
        runway.end("a", "c")
        assert [future.result(WAIT)[0, 0] for future in (first, third)] == [10.0, 30.0]
        assert runway.batcher.pending == 0


def test_a_caller_that_serves_a_launch_does_not_lead_while_another_waits(start):
    runway = Runway(start, weights=lambda tenant: 0.01 if tenant == "slow" else 1.0)
    first, _ = runway.ask(1, "a", tenant="slow")
    runway.begun()
    own, _ = runway.parks(2, "a", tenant="slow")
    quick, _ = runway.waits(3, "b", tenant="quick")
    runway.end("a")
    assert runway.begun() == (
        "b",
        [3],
    )  # The launch may be that of the caller that waits for 2, or another caller's.
    last, _ = runway.ask(4, "c", tenant="other")
    runway.end("b", "c")
    assert [future.result(WAIT)[0, 0] for future in (first, own, quick, last)] == [10.0, 20.0, 30.0, 40.0]
