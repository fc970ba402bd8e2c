"""The batcher joins products that wait for the same device, and loses none.

The device is a fake that the test holds busy. The clock is a fake in tests of time.
test_fair_queue.py tests the order.
"""

import gc
import itertools
import random
import threading
import time
import weakref

import numpy as np
import pytest

from hvpd_server.errors import Code, ServiceError
from hvpd_server.scheduling.batcher import Batcher
from hvpd_server.scheduling.holdback import Holdback, Timing
from hvpd_server.scheduling.job import Job, State
from tests.support.batcher import WAIT, Bench, refusal


@pytest.fixture
def bench(start):
    return Bench(start).occupy()


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


def test_products_that_arrive_while_the_device_works_share_a_launch(bench):
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
    bench = Bench(start, limit=1, weights=lambda tenant: 2.0 if tenant == "heavy" else 1.0).occupy()
    jobs = [(1, "heavy"), (2, "light"), (3, "heavy"), (4, "light"), (5, "heavy"), (6, "heavy")]
    callers = [bench.queue(number, tenant=tenant) for number, tenant in jobs]
    bench.finish()
    for future, _ in callers:
        future.result(WAIT)
    served = ["heavy" if number in (1, 3, 5, 6) else "light" for _, (number,) in bench.launched()]
    assert served[:3].count("heavy") == served[3:].count("heavy") == 2


def test_a_lone_product_is_charged_when_another_arrives(start):
    """Otherwise a lone product would be free, although others wait for its launch."""
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
        ServiceError, match="3 vectors wait for the device, and 2 more would exceed the limit of 4"
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
def test_a_full_queue_tells_callers_to_retry_after_the_time_that_its_vectors_take(start, seconds, expected):
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


def test_a_product_that_expires_in_the_queue_is_not_executed(bench):
    expired, _ = bench.queue(1, deadline=bench.clock.now + 5)
    alive, _ = bench.queue(2, deadline=bench.clock.now + 7)
    bench.clock.now += 6
    bench.finish()
    alive.result(WAIT)
    assert refusal(expired) is Code.DEADLINE_EXCEEDED
    assert bench.launched() == [("k", [2])]


def test_a_product_that_is_expired_on_arrival_is_not_executed(start):
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
    job.gate.await_waiter()  # Its time was over, and it waits again, because the device cannot be called back.
    bench.finish()
    leader.result(WAIT)
    np.testing.assert_array_equal(follower.result(WAIT), [[20.0, 20.0]])


def test_a_product_that_is_cancelled_in_the_queue_is_not_executed(bench):
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


def test_a_product_that_is_cancelled_before_it_is_queued_is_not_executed(start):
    bench = Bench(start)
    job = bench.job(1)
    bench.batcher.cancel(job)
    with pytest.raises(ServiceError) as refused:
        bench.run(job)
    assert refused.value.code is Code.CANCELLED
    assert bench.device.launches == []


def test_an_exception_reaches_the_callers_of_its_launch_only(bench):
    broken = [bench.queue(number, key="broken") for number in (1, 2)]
    sound = [bench.queue(number) for number in (3, 4)]
    bench.finish()
    for future, _ in broken:
        assert isinstance(future.exception(WAIT), ZeroDivisionError)
    for number, (future, _) in enumerate(sound, start=3):
        np.testing.assert_array_equal(future.result(WAIT), [[10.0 * number] * 2])
    np.testing.assert_array_equal(bench.run(bench.job(5)), [[50.0, 50.0]])


def test_the_lead_is_handed_to_a_caller_that_still_waits(bench):
    """A cancelled caller must not get the lead, or the device would stand still."""
    _, gone = bench.queue(1, key="a")
    waiting, _ = bench.queue(2, key="b")
    bench.batcher.cancel(gone)
    bench.finish()
    np.testing.assert_array_equal(waiting.result(WAIT), [[20.0, 20.0]])
    assert bench.device.threads[0] is not bench.device.threads[1]


def test_the_lead_may_come_before_the_caller_waits_for_it(start):
    bench = Bench(start).occupy()
    job = bench.job(1)

    class Lock:
        """A lock that hands the lead to the job's caller between its release and the
        caller's next step.
        """

        def __init__(self, lock):
            self._lock = lock

        def __enter__(self):
            self._lock.acquire()

        def __exit__(self, *error):
            queued = job.state is State.WAITING
            self._lock.release()
            if queued:
                bench.finish()
                assert job.state is State.LEADING

    bench.batcher._lock = Lock(bench.batcher._lock)
    np.testing.assert_array_equal(bench.run(job), [[10.0, 10.0]])


def test_a_product_runs_once(start):
    bench = Bench(start)
    bench.device.let_go()
    job = bench.job(1)
    bench.run(job)
    assert job.state is State.DONE
    with pytest.raises(RuntimeError, match="from DONE to LAUNCHED"):
        bench.run(job)


def test_a_lone_product_is_not_kept_after_its_answer(start):
    bench = Bench(start)
    bench.device.let_go()
    job = bench.job(1)
    kept = weakref.ref(job.block)
    bench.run(job)
    del job
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("max_launches", [1, 2, 5])
@pytest.mark.parametrize("max_delay", [0.0, 0.002])
def test_no_wake_up_is_lost_and_every_result_is_its_own(start, max_delay, max_launches):
    """32 threads, 50 products each, with random keys, tenants, priorities, widths,
    deadlines and cancellations, and a device that fails at times.
    """
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

    batcher = Batcher(
        execute,
        lambda key: limit,
        max_pending=3 * threads,
        max_launches=max_launches,
        max_delay=max_delay,
        weights=lambda tenant: {"0": 3.0, "1": 0.1}.get(tenant, 1.0),
    )
    holdbacks = [Holdback(Timing()), Holdback(Timing()), None]

    def caller(seed):
        rng = random.Random(seed)
        outcomes = []
        together.wait(WAIT)
        for number in range(products):
            soon = time.monotonic() + rng.choice([-1.0, 1e-4, 1e-3, 60.0, 60.0, 60.0])
            block = np.full((rng.randint(1, 3), 2), seed * products + number + 1.0)
            key = rng.randrange(3)
            job = Job(key, block, str(rng.randrange(4)), soon, rng.randint(-2, 2), holdback=holdbacks[key])
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


def test_errors_of_limits_and_missing_results_reach_their_callers_only(start):

    def limit(key):
        if key == "no limit":
            raise RuntimeError("no limit")
        return 4

    bench = Bench(start, limit=limit).occupy()
    bench.batcher._execute = lambda key, jobs: [] if key == "no results" else [job.block for job in jobs]
    failing = [bench.queue(number, key=key) for number, key in enumerate(["no limit", "no results"], start=1)]
    sound, _ = bench.queue(3)
    bench.finish()
    for (future, _), message in zip(failing, ["no limit", "0 results for 1 blocks"], strict=True):
        assert message in str(future.exception(WAIT))
    np.testing.assert_array_equal(sound.result(WAIT), [[3.0, 3.0]])
    assert bench.batcher.pending == 0
