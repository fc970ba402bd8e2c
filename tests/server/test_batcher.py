"""The batcher coalesces without waiting, unless it is told to: who is alone goes at once, who arrives meanwhile goes together,
and nobody's product is another's business.

The device is a fake that the test holds busy, and the clock a fake where time decides. Who is next is test_queue.py's subject.
"""

import collections
import gc
import itertools
import queue
import random
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpd_server._batcher import Batcher, Job, pad, split
from hvpd_server._crowd import Crowd, Habits
from hvpd_server._errors import Code, ServiceError

WAIT = 10
"""Seconds until a thread that does not answer is a failure."""


class Gate:
    """A job's lock that tells each time that its caller has to wait at it: the job is queued by then."""

    def __init__(self):
        self._lock = threading.Lock()
        self._waits = threading.Semaphore(0)

    def acquire(self, timeout=-1):
        if self._lock.acquire(blocking=False):
            return True
        self._waits.release()
        return self._lock.acquire(timeout=timeout)

    def release(self):
        self._lock.release()

    def await_waiter(self):
        assert self._waits.acquire(timeout=WAIT)


class FakeDevice:
    """Multiplies by ten. Notes its launches, and holds each until the test lets it go on."""

    def __init__(self):
        self.launches = []
        self.threads = []
        self._begun = threading.Semaphore(0)
        self._may_end = threading.Semaphore(0)

    def execute(self, key, jobs):
        blocks = [job.block for job in jobs]
        self.launches.append((key, [int(block[0, 0]) for block in blocks]))
        self.threads.append(threading.current_thread())
        self._begun.release()
        assert self._may_end.acquire(timeout=WAIT)
        if key == "broken":
            raise ZeroDivisionError("the device says no")
        return [10 * block for block in blocks]

    def await_launch(self):
        assert self._begun.acquire(timeout=WAIT)

    def let_go(self, launches=1000):
        self._may_end.release(launches)


class Never(threading.Condition):
    """Where no leader may wait."""

    def wait(self, timeout=None):
        raise AssertionError(f"a leader waits for {timeout} s")


class Alarm(threading.Condition):
    """Where a leader waits until the test says that its time has come; tells for how long it wanted to."""

    def __init__(self, lock):
        super().__init__(lock)
        self._timeouts = queue.SimpleQueue()

    def wait(self, timeout=None):
        self._timeouts.put(timeout)
        assert super().wait(WAIT), "nothing woke the leader"
        return True

    def await_wait(self):
        return self._timeouts.get(timeout=WAIT)

    def never_waited(self):
        return self._timeouts.empty()

    def ring(self):
        with self:
            self.notify_all()


class Clock:
    """Time stands still until the test moves it."""

    now = 100.0

    def __call__(self):
        return self.now


class Bench:
    """A batcher on a fake device, whose first launch (job 0, key "first") holds the device while a test queues others."""

    def __init__(self, start, *, limit=64, max_pending=1000, max_delay=0.0, condition=Never, **settings):
        self._start = start
        self.device = FakeDevice()
        self.clock = Clock()

        def make_condition(lock):
            self.alarm = condition(lock)
            return self.alarm

        self.batcher = Batcher(
            self.device.execute,
            lambda key: limit,
            max_pending=max_pending,
            max_delay=max_delay,
            clock=self.clock,
            condition=make_condition,
            **settings,
        )

    def occupy(self):
        self.first = self._run(self.job(0, key="first"))
        self.device.await_launch()
        return self

    def job(self, number, *, key="k", width=1, tenant="", deadline=float("inf"), priority=0, crowd=None):
        return Job(key, np.full((width, 2), float(number)), tenant, deadline, priority, crowd=crowd, gate=Gate())

    def queue(self, number, **settings):
        """Starts a caller; returns when its product is queued."""
        job = self.job(number, **settings)
        future = self._run(job)
        job.gate.await_waiter()
        return future, job

    def lead(self, number, **settings):
        """Starts a caller that finds the device free, and waits for more to come; also returns for how long it means to."""
        job = self.job(number, **settings)
        return self._run(job), job, self.alarm.await_wait()

    def run(self, job):
        """The product. The caller is a thread of its own: one that is stuck fails its test, and no other."""
        return self._run(job).result(WAIT)

    def _run(self, job):
        return self._start(self.batcher.run, job)

    def finish(self):
        self.device.let_go()
        np.testing.assert_array_equal(self.first.result(WAIT), [[0.0, 0.0]])

    def launched(self):
        """(key, numbers of the jobs) of all launches after the first."""
        return self.device.launches[1:]


@pytest.fixture
def bench(start):
    return Bench(start).occupy()


def refusal(future):
    error = future.exception(WAIT)
    assert isinstance(error, ServiceError)
    return error.code


def test_a_lone_caller_is_executed_in_its_own_thread(start):
    bench = Bench(start, max_pending=1)
    bench.device.let_go()
    job = bench.job(4)

    def caller():
        return bench.batcher.run(job), threading.current_thread()

    product, thread = start(caller).result(WAIT)
    np.testing.assert_array_equal(product, [[40.0, 40.0]])
    assert bench.device.threads == [thread]
    assert (job.width, job.queued, job.started, job.finished) == (1, 100.0, 100.0, 100.0)
    assert bench.batcher.pending == 0


def test_what_arrives_while_the_device_works_shares_one_launch(bench):
    callers = [bench.queue(number) for number in (1, 2, 3)]
    assert bench.batcher.pending == 3
    bench.clock.now = 103.0
    bench.finish()

    for number, (future, job) in enumerate(callers, start=1):
        np.testing.assert_array_equal(future.result(WAIT), [[10.0 * number] * 2])
        assert (job.width, job.queued, job.started) == (3, 100.0, 103.0)
    assert bench.launched() == [("k", [1, 2, 3])]
    assert bench.batcher.pending == 0


def test_different_keys_never_share_a_launch(bench):
    callers = [bench.queue(number, key=key) for number, key in enumerate("abab", start=1)]
    bench.finish()
    for future, _ in callers:
        future.result(WAIT)
    assert bench.launched() == [("a", [1, 3]), ("b", [2, 4])]


def test_a_launch_is_no_wider_than_the_limit(start):
    bench = Bench(start, limit=4).occupy()
    callers = [bench.queue(number, width=width) for number, width in [(1, 2), (2, 1), (3, 2), (4, 1)]]
    bench.finish()
    for future, _ in callers:
        future.result(WAIT)
    assert bench.launched() == [("k", [1, 2, 4]), ("k", [3])]
    assert [job.width for _, job in callers] == [4, 4, 2, 4]


def test_a_block_wider_than_the_limit_goes_alone(start):
    bench = Bench(start, limit=4).occupy()
    callers = [bench.queue(1, width=9), bench.queue(2)]
    bench.finish()
    assert callers[0][0].result(WAIT).shape == (9, 2)
    callers[1][0].result(WAIT)
    assert bench.launched() == [("k", [1]), ("k", [2])]


def test_tenants_take_turns(start):
    bench = Bench(start).occupy()
    jobs = [(1, "busy"), (2, "busy"), (3, "busy"), (4, "calm"), (5, "late"), (6, "calm")]
    callers = [bench.queue(number, key=number, tenant=tenant) for number, tenant in jobs]
    bench.finish()
    for future, _ in callers:
        future.result(WAIT)
    assert [number for _, (number,) in bench.launched()] == [1, 4, 5, 2, 6, 3]


def test_the_tenant_in_turn_comes_before_others_where_the_limit_leaves_no_room_for_all(start):
    bench = Bench(start, limit=2).occupy()
    jobs = [(1, "a"), (2, "b"), (3, "b"), (4, "a")]
    callers = [bench.queue(number, tenant=tenant) for number, tenant in jobs]
    bench.finish()
    for future, _ in callers:
        future.result(WAIT)
    assert bench.launched() == [("k", [1, 4]), ("k", [2, 3])]


def test_tenants_share_the_device_by_weight(start):
    bench = Bench(start, limit=1, weights={"heavy": 2.0}).occupy()
    jobs = [(1, "heavy"), (2, "light"), (3, "heavy"), (4, "light"), (5, "heavy"), (6, "heavy")]
    callers = [bench.queue(number, tenant=tenant) for number, tenant in jobs]
    bench.finish()
    for future, _ in callers:
        future.result(WAIT)
    served = ["heavy" if number in (1, 3, 5, 6) else "light" for _, (number,) in bench.launched()]
    assert served[:3].count("heavy") == served[3:].count("heavy") == 2


def test_a_lone_product_is_charged_too_once_somebody_else_comes(start):
    """Else it would pay to be alone: its launch is what the others wait for."""
    bench = Bench(start)
    first = start(bench.batcher.run, bench.job(1, width=3, tenant="a"))
    bench.device.await_launch()
    jobs = [(2, "a"), (3, "b"), (4, "b"), (5, "b")]
    callers = [bench.queue(number, key=number, tenant=tenant) for number, tenant in jobs]
    bench.device.let_go()
    for future in [first, *(future for future, _ in callers)]:
        future.result(WAIT)
    assert [number for _, (number,) in bench.launched()][:2] == [3, 4]


def test_of_one_tenants_products_those_of_higher_priority_go_first(start):
    bench = Bench(start).occupy()
    priorities = {1: 0, 2: -7, 3: 0, 4: 100, 5: 0}
    callers = [bench.queue(number, key=number, priority=priority) for number, priority in priorities.items()]
    bench.finish()
    for future, _ in callers:
        future.result(WAIT)
    assert [number for _, (number,) in bench.launched()] == [4, 1, 3, 5, 2]


def test_a_full_queue_refuses_and_says_when_to_retry(start):
    bench = Bench(start, max_pending=4).occupy()
    queued, _ = bench.queue(1, width=3)
    with pytest.raises(
        ServiceError, match="3 vectors wait for the device, and 2 more would be over the limit of 4"
    ) as refused:
        bench.run(bench.job(2, width=2))
    fits, _ = bench.queue(3)
    bench.finish()

    assert refused.value.code is Code.RESOURCE_EXHAUSTED
    assert refused.value.reason == "QUEUE_FULL"
    assert refused.value.retry_after > 0
    queued.result(WAIT)
    fits.result(WAIT)
    assert bench.launched() == [("k", [1, 3])]


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 0.01), (0.3, 0.3), (1e3, 2.0)])
def test_when_to_retry_is_what_the_queue_takes_at_the_rate_of_the_last_launches(start, seconds, expected):
    """10 vectors wait, and the launches before took a tenth of `seconds` a vector."""
    bench = Bench(start, max_pending=10)
    for number in (1, 2):
        earlier = start(bench.batcher.run, bench.job(number, width=4))
        bench.device.await_launch()
        bench.clock.now += 0.4 * seconds
        bench.device.let_go(1)
        earlier.result(WAIT)
    bench.occupy()
    queued, _ = bench.queue(3, width=10)
    with pytest.raises(ServiceError) as refused:
        bench.run(bench.job(4))
    bench.finish()
    queued.result(WAIT)
    assert refused.value.retry_after == pytest.approx(expected)


def test_a_refused_product_leaves_the_batcher_free(start):
    bench = Bench(start, max_pending=1)
    bench.device.let_go()
    with pytest.raises(ServiceError):
        bench.run(bench.job(1, width=2))
    np.testing.assert_array_equal(bench.run(bench.job(2)), [[20.0, 20.0]])


def test_what_expires_while_the_device_works_is_not_executed(bench):
    expired, _ = bench.queue(1, deadline=bench.clock.now + 5)
    alive, _ = bench.queue(2, deadline=bench.clock.now + 7)
    bench.clock.now += 6
    bench.finish()
    alive.result(WAIT)
    assert refusal(expired) is Code.DEADLINE_EXCEEDED
    assert bench.launched() == [("k", [2])]


def test_what_is_expired_on_arrival_is_not_executed(start):
    bench = Bench(start)
    with pytest.raises(ServiceError) as refused:
        bench.run(bench.job(1, deadline=bench.clock.now))
    assert refused.value.code is Code.DEADLINE_EXCEEDED
    assert bench.device.launches == []


def test_a_caller_leaves_at_its_deadline_although_the_device_still_works(bench):
    bench.clock.now = time.monotonic()  # The wait itself is in real time.
    expired, _ = bench.queue(1, deadline=bench.clock.now + 0.01)
    assert refusal(expired) is Code.DEADLINE_EXCEEDED
    assert not bench.first.done()
    assert bench.batcher.pending == 0
    bench.finish()
    assert bench.launched() == []


def test_a_deadline_that_passes_during_the_launch_does_not_lose_the_result(bench):
    leader, _ = bench.queue(1)
    follower, job = bench.queue(2, deadline=bench.clock.now + 0.01)
    bench.device.let_go(1)
    bench.device.await_launch()
    job.gate.await_waiter()  # Its time was over, and it waits again: the device cannot be called back.
    bench.finish()
    leader.result(WAIT)
    np.testing.assert_array_equal(follower.result(WAIT), [[20.0, 20.0]])


def test_what_is_cancelled_while_it_waits_is_not_executed(bench):
    cancelled, job = bench.queue(1)
    kept, _ = bench.queue(2)
    bench.batcher.cancel(job)
    assert refusal(cancelled) is Code.CANCELLED
    assert bench.batcher.pending == 1
    bench.finish()
    kept.result(WAIT)
    assert bench.launched() == [("k", [2])]


def test_cancelling_during_or_after_the_launch_changes_nothing(bench):
    future, job = bench.queue(1)
    bench.device.let_go(1)
    bench.device.await_launch()
    bench.batcher.cancel(job)
    bench.finish()
    np.testing.assert_array_equal(future.result(WAIT), [[10.0, 10.0]])
    bench.batcher.cancel(job)
    np.testing.assert_array_equal(bench.run(bench.job(2)), [[20.0, 20.0]])


def test_what_is_cancelled_before_it_is_queued_is_not_executed(start):
    bench = Bench(start)
    job = bench.job(1)
    bench.batcher.cancel(job)
    with pytest.raises(ServiceError) as refused:
        bench.run(job)
    assert refused.value.code is Code.CANCELLED
    assert bench.device.launches == []


def test_an_exception_reaches_all_of_its_launch_and_nobody_else(bench):
    broken = [bench.queue(number, key="broken") for number in (1, 2)]
    sound = [bench.queue(number) for number in (3, 4)]
    bench.finish()
    for future, _ in broken:
        assert isinstance(future.exception(WAIT), ZeroDivisionError)
    for number, (future, _) in enumerate(sound, start=3):
        np.testing.assert_array_equal(future.result(WAIT), [[10.0 * number] * 2])
    np.testing.assert_array_equal(bench.run(bench.job(5)), [[50.0, 50.0]])


def test_the_lead_is_handed_to_a_caller_that_still_waits(bench):
    """Not to the one who cancelled last, nor is it kept: the device would stand still."""
    _, gone = bench.queue(1, key="a")
    waiting, _ = bench.queue(2, key="b")
    bench.batcher.cancel(gone)
    bench.finish()
    np.testing.assert_array_equal(waiting.result(WAIT), [[20.0, 20.0]])
    assert bench.device.threads[0] is not bench.device.threads[1]


# Waiting for more to come, where it is configured


@pytest.fixture
def patient(start):
    """Blocks of fewer than 4 vectors wait for 5 seconds."""
    return Bench(start, limit=4, max_delay=5.0, condition=Alarm)


def test_a_block_that_could_be_wider_waits_until_its_oldest_product_is_so_old(patient):
    first, _, seconds = patient.lead(1)
    assert seconds == 5.0
    patient.clock.now += 2
    second, job = patient.queue(2)
    patient.clock.now += 2.5
    patient.alarm.ring()
    assert patient.alarm.await_wait() == 0.5
    assert patient.device.launches == []
    patient.clock.now += 0.5
    patient.alarm.ring()
    patient.device.let_go()
    first.result(WAIT)
    second.result(WAIT)
    assert patient.device.launches == [("k", [1, 2])]
    assert (job.queued, job.started, job.width) == (102.0, 105.0, 2)
    assert patient.batcher.pending == 0


@pytest.mark.parametrize("width", [4, 9])
def test_a_block_that_is_full_waits_for_nothing(start, width):
    bench = Bench(start, limit=4, max_delay=5.0)
    bench.device.let_go()
    bench.run(bench.job(1, width=width))
    assert bench.device.launches == [("k", [1])]


def test_a_block_that_gets_full_goes_at_once(patient):
    patient.device.let_go()
    first, *_ = patient.lead(1)
    second, _ = patient.queue(2, width=2)
    third = start_and_pass(patient, 3)
    for future in (first, second, third):
        future.result(WAIT)
    assert patient.device.launches == [("k", [1, 2, 3])]


def start_and_pass(bench, number, **settings):
    """Starts a caller whose product does not stay in the queue for so long that it could be awaited there."""
    return bench._run(bench.job(number, **settings))


def test_the_time_counts_while_the_device_works(patient):
    first, *_ = patient.lead(0, key="first")
    patient.clock.now += 5
    patient.alarm.ring()
    patient.device.await_launch()
    callers = [patient.queue(number, key=key) for number, key in [(1, "a"), (2, "b"), (3, "a")]]
    patient.clock.now += 5
    patient.device.let_go()
    for future in [first, *(future for future, _ in callers)]:
        future.result(WAIT)
    assert patient.device.launches[1:] == [("a", [1, 3]), ("b", [2])]
    assert patient.alarm.never_waited()


def test_a_full_block_of_another_key_does_not_wait_for_one_that_gathers(patient):
    gathers, _, _ = patient.lead(1, key="a")
    patient.clock.now += 1
    patient.device.let_go()
    start_and_pass(patient, 2, key="b", width=4).result(WAIT)
    assert patient.alarm.await_wait() == 4.0  # What is left of 5.
    assert patient.device.launches == [("b", [2])]
    patient.clock.now += 4
    patient.alarm.ring()
    gathers.result(WAIT)
    assert patient.device.launches == [("b", [2]), ("a", [1])]


def test_each_key_has_its_own_time(patient):
    first, _, _ = patient.lead(1, key="a")
    patient.clock.now += 3
    second, _ = patient.queue(2, key="b")
    patient.device.let_go()
    patient.clock.now += 2
    patient.alarm.ring()
    first.result(WAIT)
    assert patient.alarm.await_wait() == 3.0  # By the one that leads now.
    patient.clock.now += 3
    patient.alarm.ring()
    second.result(WAIT)
    assert patient.device.launches == [("a", [1]), ("b", [2])]


def test_what_is_cancelled_while_it_gathers_leaves_at_once_and_the_others_go_on(patient):
    leader, job, _ = patient.lead(1)
    patient.clock.now += 1
    second, second_job = patient.queue(2)
    third, _ = patient.queue(3)
    patient.batcher.cancel(second_job)
    assert refusal(second) is Code.CANCELLED
    patient.batcher.cancel(job)
    assert refusal(leader) is Code.CANCELLED
    assert patient.alarm.await_wait() == 5.0  # Counted from the third, which leads.
    assert patient.batcher.pending == 1
    patient.device.let_go()
    patient.clock.now += 5
    patient.alarm.ring()
    third.result(WAIT)
    assert patient.device.launches == [("k", [3])]
    assert patient.batcher.pending == 0


def test_the_last_that_is_cancelled_leaves_the_device_free(patient):
    leader, job, _ = patient.lead(1)
    patient.batcher.cancel(job)
    assert refusal(leader) is Code.CANCELLED
    assert patient.batcher.pending == 0
    patient.device.let_go()
    patient.run(patient.job(2, width=4))
    assert patient.device.launches == [("k", [2])]


def test_a_product_whose_deadline_comes_first_waits_for_nothing_nor_do_those_that_go_with_it(patient):
    patient.device.let_go()
    leader, *_ = patient.lead(1)
    start_and_pass(patient, 2, deadline=patient.clock.now + 4).result(WAIT)
    leader.result(WAIT)
    assert patient.device.launches == [("k", [1, 2])]


def test_what_expired_while_it_gathered_is_not_executed(patient):
    leader, *_ = patient.lead(1, deadline=patient.clock.now + 6)
    other, _ = patient.queue(2)
    patient.device.let_go()
    patient.clock.now += 7
    patient.alarm.ring()
    assert refusal(leader) is Code.DEADLINE_EXCEEDED
    other.result(WAIT)
    assert patient.device.launches == [("k", [2])]


def test_what_expired_takes_nothing_with_it(patient):
    """Not even what shares its key: that goes when it is its own turn."""
    leader, *_ = patient.lead(1, key="a")
    expired, _ = patient.queue(2, key="b", priority=2, deadline=patient.clock.now + 6)
    callers = [patient.queue(3, key="b"), patient.queue(4, key="c", priority=1)]
    patient.device.let_go()
    patient.clock.now += 7
    patient.alarm.ring()
    assert refusal(expired) is Code.DEADLINE_EXCEEDED
    for future in [leader, *(future for future, _ in callers)]:
        future.result(WAIT)
    assert patient.device.launches == [("c", [4]), ("a", [1]), ("b", [3])]


def test_what_comes_for_a_block_that_waits_for_the_device_only_rides_along(patient):
    first, *_ = patient.lead(0, key="first")
    patient.clock.now += 5
    patient.alarm.ring()
    patient.device.await_launch()
    callers = [patient.queue(number, width=width) for number, width in [(1, 3), (2, 4), (3, 1)]]
    patient.device.let_go()
    for future in [first, *(future for future, _ in callers)]:
        future.result(WAIT)
    assert patient.device.launches[1:] == [("k", [1, 3]), ("k", [2])]


def test_what_a_launch_has_no_room_for_gathers_again(patient):
    first, *_ = patient.lead(0, key="first")
    patient.clock.now += 5
    patient.alarm.ring()
    patient.device.await_launch()
    callers = []
    for number, width, tenant in [(1, 4, "a"), (2, 1, "b"), (3, 1, "a")]:
        callers.append(patient.queue(number, width=width, tenant=tenant))
        patient.clock.now += 1
    patient.device.let_go()
    assert patient.alarm.await_wait() == 3.0  # Since the second came, 2 seconds ago.
    assert patient.device.launches[1:] == [("k", [1])]
    assert patient.batcher.pending == 2
    patient.clock.now += 3
    patient.alarm.ring()
    for future in [first, *(future for future, _ in callers)]:
        future.result(WAIT)
    assert sorted(patient.device.launches[2][1]) == [2, 3]
    assert len(patient.device.launches) == 3


def test_what_is_old_enough_does_not_gather_again_nor_do_those_that_can_go_with_it(patient):
    first, *_ = patient.lead(0, key="first")
    patient.clock.now += 5
    patient.alarm.ring()
    patient.device.await_launch()
    callers = []
    for number, width in [(1, 4), (2, 1), (3, 1)]:
        callers.append(patient.queue(number, width=width))
        patient.clock.now += 2
    patient.clock.now += 1
    patient.device.let_go()
    for future in [first, *(future for future, _ in callers)]:
        future.result(WAIT)
    assert patient.device.launches[1:] == [("k", [1]), ("k", [2, 3])]


class Expecting:
    """A crowd of so many vectors, who are all to be waited for until then. test_crowd.py is about those that learn."""

    def __init__(self, expected, *, until=105.0, width=64):
        self.expected = expected
        self.until = until
        self.most = width
        self.launched = []

    def arrived(self, columns, now):
        self.expected -= columns

    def answered(self, widths, started, finished):
        self.launched.append((sum(widths), started, finished))

    def awaited(self, now):
        return float("inf") if self.expected > 0 else now

    def due(self, columns, room, now):
        return self.until if min(self.expected, room - columns) > 0 else now

    def width(self, columns, room):
        return min(columns, room, self.most)


@pytest.fixture
def calm(start):
    """A free device, whose leaders wait where a crowd says so."""
    return Bench(start, condition=Alarm)


def test_a_launch_waits_for_those_who_are_expected_and_for_nobody_else(calm):
    crowd = Expecting(3)
    leader, job, timeout = calm.lead(1, crowd=crowd)
    assert timeout == 5.0
    second, _ = calm.queue(2, crowd=crowd)
    assert calm.alarm.never_waited()
    calm.clock.now += 1
    third, _ = calm.queue(3, crowd=crowd)
    calm.device.let_go()
    for future in (leader, second, third):
        future.result(WAIT)
    assert calm.device.launches == [("k", [1, 2, 3])]
    assert (job.queued, job.started) == (100.0, 101.0)
    assert crowd.launched == [(3, 101.0, 101.0)]


def test_a_launch_goes_without_those_who_do_not_come(calm):
    crowd = Expecting(3)
    leader, *_ = calm.lead(1, crowd=crowd)
    second, _ = calm.queue(2, crowd=crowd)
    crowd.until, calm.clock.now = 0.0, 106.0
    calm.device.let_go()
    calm.alarm.ring()
    for future in (leader, second):
        future.result(WAIT)
    assert calm.device.launches == [("k", [1, 2])]


def test_a_full_launch_waits_for_nobody(start):
    bench = Bench(start, condition=Alarm, limit=2)
    crowd = Expecting(100)
    leader, *_ = bench.lead(1, crowd=crowd)
    second, _ = bench.queue(2, crowd=crowd)
    bench.device.let_go()
    for future in (leader, second):
        future.result(WAIT)
    assert bench.device.launches == [("k", [1, 2])]


def test_nothing_else_is_held_up_by_a_crowd(calm):
    crowd = Expecting(3)
    leader, *_ = calm.lead(1, crowd=crowd)
    other, _ = calm.queue(2, key="other")
    calm.device.await_launch()
    calm.device.let_go()
    for future in (leader, other):
        future.result(WAIT)
    assert calm.device.launches == [("k", [1]), ("other", [2])]


def test_who_has_no_time_to_wait_for_a_crowd_does_not(start):
    bench = Bench(start)
    bench.device.let_go()
    bench.run(bench.job(1, deadline=104.0, crowd=Expecting(3)))
    assert bench.device.launches == [("k", [1])]


def test_who_is_cancelled_while_held_leaves_and_the_others_go_on(calm):
    crowd = Expecting(4)
    leader, job, _ = calm.lead(1, crowd=crowd)
    second, _ = calm.queue(2, crowd=crowd)
    calm.batcher.cancel(job)
    assert refusal(leader) is Code.CANCELLED
    assert calm.alarm.await_wait() == 5.0  # The second leads now.
    calm.device.let_go()
    calm.queue(3, crowd=crowd)
    last, _ = calm.queue(4, crowd=crowd)
    for future in (second, last):
        future.result(WAIT)
    assert calm.device.launches == [("k", [2, 3, 4])]


def test_a_crowd_says_how_wide_a_launch_is(start):
    bench = Bench(start).occupy()
    crowd = Expecting(0, width=2)
    callers = [bench.queue(number, crowd=crowd) for number in (1, 2, 3)]
    bench.finish()
    for future, _ in callers:
        future.result(WAIT)
    assert bench.launched() == [("k", [1, 2]), ("k", [3])]


def test_a_launch_that_fails_tells_a_crowd_nothing(start):
    bench = Bench(start)
    crowd = Expecting(0)
    bench.device.let_go()
    with pytest.raises(ZeroDivisionError):
        bench.run(bench.job(1, key="broken", crowd=crowd))
    assert crowd.launched == []


def test_the_end_of_a_lone_launch_is_noted_when_there_is_time_or_somebody_looks(start):
    bench = Bench(start)
    crowd = Expecting(0)
    bench.device.let_go()
    ways = [bench.batcher.settle, lambda: bench.batcher.in_flight, lambda: bench.batcher.launches]
    for number, look in enumerate(ways, 1):
        bench.run(bench.job(number, crowd=crowd))
        assert len(crowd.launched) == number - 1
        look()
        assert len(crowd.launched) == number
    assert bench.batcher.in_flight == bench.batcher.launches == 0


def test_the_next_product_finds_the_end_of_a_lone_launch_noted(start):
    bench = Bench(start)
    crowd = Expecting(0)
    bench.device.let_go()
    for number in range(3):
        bench.run(bench.job(number, crowd=crowd))
        assert len(crowd.launched) == number
    assert bench.batcher.begun == 3


def test_nothing_of_a_lone_product_is_kept_once_it_is_there(start):
    bench = Bench(start)
    bench.device.let_go()
    job = bench.job(1)
    kept = weakref.ref(job.block)
    bench.run(job)
    del job
    gc.collect()
    assert kept() is None


class Runway:
    """A device that holds each launch until the test lets it go by its key. Multiplies by ten."""

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
        """Notes for how long leaders mean to wait."""
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

    def ask(self, number, key, *, width=1, tenant="", deadline=float("inf"), crowd=None):
        """Starts a caller."""
        job = Job(key, np.full((width, 2), float(number)), tenant, deadline, crowd=crowd, gate=Gate())
        return self._start(self.batcher.run, job), job

    def waits(self, number, key, **settings):
        """Starts a caller; returns when its product is queued, and somebody else leads."""
        found = self.ask(number, key, **settings)
        found[1].gate.await_waiter()
        return found

    def parks(self, number, key, **settings):
        """Starts a caller that leads; returns when it waits for a launch to end."""
        found = self.ask(number, key, **settings)
        while not self.batcher._parked:
            assert not found[0].done()
        return found

    def begun(self):
        return self._begun.get(timeout=WAIT)

    def none_begins(self):
        return self._begun.empty()

    def end(self, *keys):
        """Lets the launches of keys go, those to come as well."""
        for key in keys:
            self._may_end[key].set()


def test_a_launch_of_another_key_begins_before_the_one_in_flight_has_ended(start):
    runway = Runway(start)
    first, _ = runway.ask(1, "a")
    assert runway.begun() == ("a", [1])
    second, _ = runway.ask(2, "b")
    assert runway.begun() == ("b", [2])
    assert runway.batcher.in_flight == 2
    runway.end("b")
    np.testing.assert_array_equal(second.result(WAIT), [[20.0, 20.0]])
    runway.end("a")
    np.testing.assert_array_equal(first.result(WAIT), [[10.0, 10.0]])
    assert runway.batcher.in_flight == 0


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


def test_what_shares_the_key_in_flight_waits_and_goes_together(start):
    runway = Runway(start)
    futures = [runway.ask(1, "a")[0]]
    assert runway.begun() == ("a", [1])
    futures.append(runway.parks(2, "a")[0])
    futures += [runway.waits(number, "a")[0] for number in (3, 4)]
    assert runway.none_begins()
    runway.end("a")
    assert runway.begun() == ("a", [2, 3, 4])
    assert runway.naps == [None]
    assert [future.result(WAIT)[0, 0] for future in futures] == [10.0, 20.0, 30.0, 40.0]


def test_a_full_block_goes_ahead_of_the_end_of_the_launch_before(start):
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


def test_a_block_whose_crowd_is_expected_does_not_go_ahead(start):
    runway = Runway(start)
    crowd = Expecting(2)
    first, _ = runway.ask(1, "a")
    assert runway.begun() == ("a", [1])
    second, _ = runway.parks(2, "b", crowd=crowd)
    assert runway.none_begins()
    third, _ = runway.ask(3, "b", crowd=crowd)
    assert runway.begun() == ("b", [2, 3])
    runway.end("a", "b")
    assert [future.result(WAIT)[0, 0] for future in (first, second, third)] == [10.0, 20.0, 30.0]


def test_a_block_goes_ahead_when_those_who_were_expected_have_had_their_time(start):
    """They have left, perhaps, and nobody else comes to say so."""
    ends = time.monotonic() + 0.02

    class Late(Expecting):
        def awaited(self, now):
            return max(ends, now)

    runway = Runway(start)
    first, _ = runway.ask(1, "a")
    assert runway.begun() == ("a", [1])
    second, _ = runway.ask(2, "b", crowd=Late(2))
    assert runway.begun() == ("b", [2])
    assert time.monotonic() >= ends
    runway.end("a", "b")
    assert [future.result(WAIT)[0, 0] for future in (first, second)] == [10.0, 20.0]


def test_who_leads_and_is_cancelled_while_it_waits_for_a_launch_to_end_leaves_and_the_next_leads(start):
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


def test_who_leads_leaves_at_its_deadline_although_a_launch_is_in_flight(start):
    runway = Runway(start)
    first, _ = runway.ask(1, "a")
    assert runway.begun() == ("a", [1])
    second, _ = runway.ask(2, "a", deadline=time.monotonic() + 0.02)
    assert refusal(second) == Code.DEADLINE_EXCEEDED
    runway.end("a")
    assert first.result(WAIT)[0, 0] == 10.0
    assert runway.batcher.pending == 0


def test_who_launches_for_others_gets_its_own_product_from_whoever_leads_then(start):
    """The tenant in turn comes first, whoever leads: the leader's own product waits, and somebody else leads meanwhile."""
    runway = Runway(start, weights={"slow": 0.01})
    first, _ = runway.ask(1, "a", tenant="slow")
    assert runway.begun() == ("a", [1])
    own, _ = runway.parks(2, "a", tenant="slow")  # Which has had its share with the first.
    others = [runway.waits(number, key, tenant="quick")[0] for number, key in ((3, "a"), (4, "c"))]
    runway.end("a", "c")
    results = [future.result(WAIT)[0, 0] for future in (first, own, *others)]
    assert results == [10.0, 20.0, 30.0, 40.0]
    assert runway.batcher.pending == runway.batcher.in_flight == 0


def test_what_a_tenant_has_had_counts_while_its_launch_is_in_flight(start):
    """A heavy launch is taken and nobody waits: what it cost is not forgotten before it has ended."""
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


def test_a_launch_can_be_alone_when_the_others_have_landed_and_all_are_from_then_on(start):
    """Two do not fit beside each other, and each fits by itself."""
    inside, together, counts = threading.Semaphore(1), threading.Barrier(2), []

    def execute(key, jobs):
        together.wait(WAIT)
        with batcher.alone():
            counts.append(inside.acquire(blocking=False))
            inside.release()
        return [10 * job.block for job in jobs]

    batcher = Batcher(execute, lambda key: 64, max_pending=10, max_launches=2)
    assert batcher.overlaps
    futures = [start(batcher.run, Job(key, np.ones((1, 2)))) for key in "ab"]
    assert [future.result(WAIT)[0, 0] for future in futures] == [10.0, 10.0]
    assert counts == [True, True]
    assert not batcher.overlaps
    assert batcher.in_flight == 0


def test_time_that_a_launch_waits_for_another_is_not_its_own(start):
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


def test_whoever_leads_when_the_queue_fails_is_told_and_the_next_leads(start):
    """Nothing should raise there. If it does, nobody waits for who is gone."""

    class Broken(Expecting):
        def width(self, columns, room):
            raise ZeroDivisionError("in the crowd")

    for launches in (1, 2):
        runway = Runway(start, max_launches=launches)
        first, _ = runway.ask(1, "a")
        runway.begun()
        broken, _ = runway.ask(2, "b", crowd=Broken(1))
        if launches == 1:
            runway.end("a")
        with pytest.raises(ZeroDivisionError):
            broken.result(WAIT)
        third, _ = runway.ask(3, "c")
        runway.end("a", "c")
        assert [future.result(WAIT)[0, 0] for future in (first, third)] == [10.0, 30.0]
        assert runway.batcher.pending == 0


def test_who_is_busy_with_others_launch_does_not_lead_while_somebody_else_waits(start):
    runway = Runway(start, weights={"slow": 0.01})
    first, _ = runway.ask(1, "a", tenant="slow")
    runway.begun()
    own, _ = runway.parks(2, "a", tenant="slow")
    quick, _ = runway.waits(3, "b", tenant="quick")
    runway.end("a")
    assert runway.begun() == (
        "b",
        [3],
    )  # Launched by who waits for 2, and that waits, or went already, by somebody else.
    last, _ = runway.ask(4, "c", tenant="other")
    runway.end("b", "c")
    assert [future.result(WAIT)[0, 0] for future in (first, own, quick, last)] == [10.0, 20.0, 30.0, 40.0]


@pytest.mark.parametrize("max_launches", [1, 2, 5])
@pytest.mark.parametrize("max_delay", [0.0, 0.002])
def test_no_wake_up_is_lost_and_every_result_is_its_own(start, max_delay, max_launches):
    """32 threads, 50 products each, with random keys, tenants, priorities, widths, deadlines and cancellations, and a device that
    fails at times."""
    threads, products, limit = 32, 50, 6
    together = threading.Barrier(threads)
    launches, well = itertools.count(), threading.Event()
    room = threading.Semaphore(max_launches)

    def execute(key, jobs):
        assert room.acquire(blocking=False)
        try:
            return multiply(key, jobs)
        finally:
            room.release()

    def multiply(key, jobs):
        blocks = [job.block for job in jobs]
        assert sum(map(len, blocks)) <= limit
        if next(launches) % 50 == 49 and not well.is_set():
            raise ZeroDivisionError
        return [block * (key + 2) for block in blocks]

    weights = {"0": 3.0, "1": 0.1}
    batcher = Batcher(
        execute,
        lambda key: limit,
        max_pending=3 * threads,
        max_launches=max_launches,
        max_delay=max_delay,
        weights=weights,
    )
    crowds = [Crowd(Habits()), Crowd(Habits()), None]

    def caller(seed):
        rng = random.Random(seed)
        outcomes = []
        together.wait(WAIT)
        for number in range(products):
            soon = time.monotonic() + rng.choice([-1.0, 1e-4, 1e-3, 60.0, 60.0, 60.0])
            block = np.full((rng.randint(1, 3), 2), seed * products + number + 1.0)
            key = rng.randrange(3)
            job = Job(key, block, str(rng.randrange(4)), soon, rng.randint(-2, 2), crowd=crowds[key])
            canceller = start(batcher.cancel, job) if rng.random() < 0.1 else None
            try:
                np.testing.assert_array_equal(batcher.run(job), block * (job.key + 2))
                outcomes.append("result")
            except ServiceError as error:
                outcomes.append(error.reason)
            except ZeroDivisionError:
                outcomes.append("failed")
            if canceller is not None:
                canceller.result(WAIT)
        return outcomes

    futures = [start(caller, seed) for seed in range(threads)]
    outcomes = [outcome for future in futures for outcome in future.result(30)]
    assert len(outcomes) == threads * products
    assert set(outcomes) >= {"result", "DEADLINE_EXCEEDED", "failed"}
    assert outcomes.count("result") > threads * products / 4
    assert batcher.pending == 0
    well.set()
    np.testing.assert_array_equal(start(batcher.run, Job(0, np.ones((1, 2)))).result(WAIT), [[2.0, 2.0]])


@settings(deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    n=st.integers(1, 4),
    spare=st.integers(0, 9),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_split_undoes_pad(widths, n, spare, dtype):
    blocks = [np.random.default_rng(i).standard_normal((width, n)).astype(dtype) for i, width in enumerate(widths)]
    padded = pad(blocks, sum(widths) + spare)
    assert padded.shape == (sum(widths) + spare, n)
    assert padded.dtype == dtype
    assert not padded[sum(widths) :].any()
    for block, again in zip(blocks, split(padded, widths), strict=True):
        np.testing.assert_array_equal(again, block)


def test_one_block_of_the_right_width_is_not_copied():
    block = np.ones((4, 3))
    assert pad([block], 4) is block


def test_a_limit_that_fails_and_results_that_are_missing_reach_their_callers_and_nobody_else(start):
    bench = Bench(start)

    def limit(key):
        if key == "no limit":
            raise RuntimeError("no limit")
        return 4

    bench.batcher._limit = limit
    bench.occupy()
    bench.batcher._execute = lambda key, jobs: [] if key == "no results" else [job.block for job in jobs]
    failing = [bench.queue(number, key=key) for number, key in enumerate(["no limit", "no results"], start=1)]
    sound, _ = bench.queue(3)
    bench.finish()
    for (future, _), message in zip(failing, ["no limit", "0 results for 1 blocks"], strict=True):
        assert message in str(future.exception(WAIT))
    np.testing.assert_array_equal(sound.result(WAIT), [[3.0, 3.0]])
    assert bench.batcher.pending == 0
