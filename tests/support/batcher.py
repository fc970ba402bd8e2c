"""A batcher on a fake device, for tests of its order and its waits."""

import queue
import threading

import numpy as np

from hvpd_server.errors import ServiceError
from hvpd_server.scheduling.batcher import Batcher
from hvpd_server.scheduling.job import Job
from tests.support.clock import Clock

WAIT = 10
"""Seconds until a thread that does not answer is a failure."""


class Gate:
    """A job's lock that reports each wait of its caller. The job is queued by then."""

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
    """A device that multiplies by ten. It notes its launches, and holds each until the
    test lets it go on.
    """

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
    """A condition on which no leader may wait."""

    def wait(self, timeout=None):
        raise AssertionError(f"a leader waits for {timeout} s")


class Alarm(threading.Condition):
    """A condition on which a leader waits until the test ends the wait. It notes the
    wanted time.
    """

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


class Bench:
    """A batcher on a fake device, whose first launch (job 0, key "first") holds the
    device while a test queues others.
    """

    def __init__(self, start, *, limit=64, max_pending=1000, max_delay=0.0, condition=Never, **settings):
        self._start = start
        self.device = FakeDevice()
        self.clock = Clock()

        def make_condition(lock):
            self.alarm = condition(lock)
            return self.alarm

        self.batcher = Batcher(
            self.device.execute,
            limit if callable(limit) else lambda key: limit,
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

    def job(self, number, *, key="k", width=1, tenant="", deadline=float("inf"), priority=0, holdback=None):
        return Job(key, np.full((width, 2), float(number)), tenant, deadline, priority, holdback=holdback, gate=Gate())

    def queue(self, number, **settings):
        """Start a caller; return when its product is queued."""
        job = self.job(number, **settings)
        future = self._run(job)
        job.gate.await_waiter()
        return future, job

    def lead(self, number, **settings):
        """Start a caller that finds the device free and waits for more products. Return
        the wanted time, too.
        """
        job = self.job(number, **settings)
        return self._run(job), job, self.alarm.await_wait()

    def run(self, job):
        """Return the product. The caller has its own thread, so a stuck caller fails
        only its own test.
        """
        return self._run(job).result(WAIT)

    def _run(self, job):
        return self._start(self.batcher.run, job)

    def finish(self):
        self.device.let_go()
        np.testing.assert_array_equal(self.first.result(WAIT), [[0.0, 0.0]])

    def launched(self):
        """Return (key, numbers of the jobs) of all launches after the first."""
        return self.device.launches[1:]


class Expecting:
    """A hold-back that always waits, until a time, for so many vectors."""

    def __init__(self, expected, *, until=105.0, width=64):
        self.expected = expected
        self.until = until
        self.most = width
        self.launched = []

    def arrived(self, columns, now):
        self.expected -= columns

    def answered(self, widths, started, finished):
        self.launched.append((sum(widths), started, finished))

    def expected_until(self, now):
        return float("inf") if self.expected > 0 else now

    def due(self, columns, room, now):
        return self.until if min(self.expected, room - columns) > 0 else now

    def width(self, columns, room):
        return min(columns, room, self.most)


def refusal(future):
    error = future.exception(WAIT)
    assert isinstance(error, ServiceError)
    return error.code
