"""The queue of compiles takes tenants in turn, runs so many at a time, and can end."""

import threading

import pytest

from hvpd_server.errors import ServiceError
from hvpd_server.scheduling.compile_queue import CompileQueue
from tests.support.threads import no_threads

WAIT = 60


class Gate:
    """Calls that wait until the test releases them, and note the order in which they
    began.
    """

    def __init__(self):
        self.began, self.open = [], threading.Event()
        self.changed = threading.Condition()

    def call(self, name):
        def run():
            with self.changed:
                self.began.append(name)
                self.changed.notify_all()
            assert self.open.wait(WAIT)
            return name

        return run

    def until(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.began) >= count, WAIT)


def test_one_tenant_leaves_room_for_others():
    queue, gate = CompileQueue(threads=3, each=2), Gate()
    futures = [queue.submit("many", "", gate.call(f"many/{index}")) for index in range(5)]
    gate.until(2)
    futures.append(queue.submit("other", "", gate.call("other/0")))
    gate.until(3)
    assert gate.began == ["many/0", "many/1", "other/0"]
    gate.open.set()
    assert [future.result(WAIT) for future in futures] == [*(f"many/{index}" for index in range(5)), "other/0"]


def test_tenants_take_turns():
    queue, gate = CompileQueue(threads=1, each=1), Gate()
    futures = [queue.submit("a", "", gate.call("first"))]
    gate.until(1)
    for tenant, name in [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("b", "b2"), ("c", "c1")]:
        futures.append(queue.submit(tenant, "", gate.call(name)))
    gate.open.set()
    for future in futures:
        future.result(WAIT)
    assert gate.began == ["first", "a1", "b1", "c1", "a2", "b2", "a3"]


def test_programs_of_one_objective_wait_while_another_objective_can_begin():
    queue, gate = CompileQueue(threads=2, each=2), Gate()
    futures = [queue.submit("a", "x", gate.call("x1"))]
    gate.until(1)
    blocker = Gate()
    futures.append(queue.submit("b", "", blocker.call("blocker")))
    blocker.until(1)
    for objective, name in [("x", "x2"), ("x", "x3"), ("y", "y1"), ("y", "y2")]:
        futures.append(queue.submit("a", objective, gate.call(name)))
    blocker.open.set()
    gate.until(2)
    assert gate.began == ["x1", "y1"]
    gate.open.set()
    for future in futures:
        future.result(WAIT)
    assert sorted(gate.began) == ["x1", "x2", "x3", "y1", "y2"]


def test_programs_of_one_objective_run_together_if_no_other_waits():
    queue, gate = CompileQueue(threads=2, each=2), Gate()
    futures = [queue.submit("a", "x", gate.call(name)) for name in ("x1", "x2")]
    gate.until(2)
    gate.open.set()
    assert [future.result(WAIT) for future in futures] == ["x1", "x2"]


def test_an_error_is_its_callers_and_the_next_call_runs():
    queue = CompileQueue(threads=1, each=1)
    failed, worked = queue.submit("a", "", lambda: 1 / 0), queue.of("a", "").submit(lambda a, *, b: (a, b), 1, b=2)
    with pytest.raises(ZeroDivisionError):
        failed.result(WAIT)
    assert worked.result(WAIT) == (1, 2)
    assert queue.submit("b", "", lambda: 3).result(WAIT) == 3


def test_closing_cancels_waiting_compiles_and_lets_running_ones_end():
    queue, gate = CompileQueue(threads=1, each=1), Gate()
    running, waiting = queue.submit("a", "", gate.call("running")), queue.submit("a", "", gate.call("waiting"))
    gate.until(1)
    queue.close()
    assert waiting.cancelled()
    with pytest.raises(ServiceError, match="stopping"):
        queue.submit("a", "", gate.call("late"))
    gate.open.set()
    queue.close(wait=True)
    assert running.done()
    assert running.result(WAIT) == "running"
    assert gate.began == ["running"]


def test_a_call_without_a_thread_of_its_own_runs_after_another():
    queue, gate = CompileQueue(threads=2, each=2), Gate()
    running = queue.submit("a", "", gate.call("running"))
    gate.until(1)
    with no_threads():
        waiting = [queue.submit(tenant, "", gate.call(tenant)) for tenant in ("b", "c")]
    gate.open.set()
    assert [each.result(WAIT) for each in (running, *waiting)] == ["running", "b", "c"]
    queue.close(wait=True)  # No call counts as running any more.


def test_a_call_for_which_there_is_no_thread_at_all_is_refused_and_the_next_one_runs():
    queue = CompileQueue(threads=1, each=1)
    with no_threads(), pytest.raises(RuntimeError, match="start new thread"):
        queue.submit("a", "x", lambda: 1)
    assert queue.submit("a", "x", lambda: 2).result(WAIT) == 2
