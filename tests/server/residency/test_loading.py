"""The residency loads a missing entry once for all callers that ask for it."""

import threading

import pytest

from hvpd_server.device.residency import Residency
from hvpd_server.errors import ServiceError

WAIT = 10


def test_concurrent_requests_share_one_load(residency, start):
    loads, loading, may_end = [], threading.Event(), threading.Event()
    together = threading.Barrier(9)

    def loader():
        loads.append(threading.current_thread())
        loading.set()
        assert may_end.wait(WAIT)
        return object(), 4

    def ask():
        together.wait(WAIT)
        return residency.load("a", "data", loader)

    futures = [start(ask) for _ in range(8)]
    together.wait(WAIT)
    assert loading.wait(WAIT)
    may_end.set()
    values = [future.result(WAIT) for future in futures]
    assert len(loads) == 1
    assert all(value is values[0] for value in values)
    assert residency.used_bytes() == {"data": 4}


def test_different_entries_load_at_the_same_time(residency, start):
    both = threading.Barrier(2)

    def loader():
        both.wait(WAIT)
        return "loaded", 1

    futures = [start(residency.load, key, "data", loader) for key in "ab"]
    assert [future.result(WAIT) for future in futures] == ["loaded", "loaded"]


def test_a_resident_entry_is_not_loaded_again_and_counts_as_used(residency, evicted):
    residency.put("a", "old", "A", 5)
    residency.put("b", "young", "B", 5)
    assert residency.load("a", "old", lambda: pytest.fail("it is resident")) == "A"
    residency.put("c", "data", "C", 5)
    assert evicted == ["young"]


def test_a_loader_that_raises_leaves_the_entry_loadable(residency):
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        residency.load("a", "data", fail)
    assert residency.used_bytes().get("data", 0) == 0
    assert residency.load("a", "data", lambda: ("A", 2)) == "A"
    assert residency.get("a") == "A"


def test_callers_that_wait_for_a_failing_loader_load_themselves(residency, start):
    loading, may_fail = threading.Event(), threading.Event()

    def fail():
        loading.set()
        assert may_fail.wait(WAIT)
        raise ZeroDivisionError

    first = start(residency.load, "a", "data", fail)
    assert loading.wait(WAIT)
    second = start(residency.load, "a", "data", lambda: ("A", 2))
    may_fail.set()
    assert isinstance(first.exception(WAIT), ZeroDivisionError)
    assert second.result(WAIT) == "A"


def test_a_loaded_entry_larger_than_the_budget_is_refused(residency):
    with pytest.raises(ServiceError):
        residency.load("a", "data", lambda: ("A", 11))
    assert residency.get("a") is None


def test_the_callback_may_use_the_residency(start):
    """The callback runs outside of the lock."""
    seen = []
    residency = Residency(4, on_evict=lambda kind: seen.append((kind, residency.used_bytes())))
    residency.put("a", "data", "A", 3)
    start(residency.put, "b", "point", "B", 2).result(WAIT)
    assert seen == [("data", {"data": 0, "point": 2})]
