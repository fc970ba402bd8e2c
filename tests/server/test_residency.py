"""The residency keeps what is used, within its budget, and makes what is missing once."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpd_server._errors import Code, ServiceError
from hvpd_server._residency import Residency

WAIT = 10


@pytest.fixture
def evicted():
    return []


@pytest.fixture
def residency(evicted):
    """Room for ten bytes."""
    return Residency(10, on_evict=evicted.append)


def keys(residency, candidates="abcdef"):
    """What is resident. Asking counts as using, so tests ask once, at the end."""
    return "".join(key for key in candidates if residency.get(key) is not None)


def test_the_least_recently_used_goes_first(residency, evicted):
    for key in "abc":
        residency.put(key, f"kind of {key}", key.upper(), 3)
    assert residency.get("a") == "A"
    residency.put("d", "data", "D", 3)
    assert evicted == ["kind of b"]
    residency.put("e", "data", "E", 6)
    assert evicted == ["kind of b", "kind of c", "kind of a"]
    assert keys(residency) == "de"


def test_nothing_is_dropped_while_all_fits_exactly(residency, evicted):
    residency.put("a", "data", "A", 4)
    residency.put("b", "point", "B", 6)
    assert evicted == []
    assert residency.used_bytes() == {"data": 4, "point": 6}


def test_bytes_are_counted_by_kind_and_never_exceed_the_budget(residency):
    for size, key in enumerate("abcdefabcdef", start=1):
        residency.put(key, "data" if key < "c" else "point", key, size % 5 + 1)
        assert sum(residency.used_bytes().values()) <= 10
    residency.put("whole", "data", "W", 10)
    assert residency.used_bytes() == {"data": 10, "point": 0}


def test_an_entry_that_is_put_again_replaces_itself(residency, evicted):
    residency.put("a", "data", "old", 6)
    residency.put("a", "residuals", "new", 8)
    assert residency.get("a") == "new"
    assert residency.used_bytes() == {"data": 0, "residuals": 8}
    assert evicted == []


def test_an_entry_larger_than_the_budget_is_refused_and_drops_nothing(residency, evicted):
    residency.put("a", "data", "A", 10)
    with pytest.raises(ServiceError, match=r"11 bytes.* 10 bytes: raise .*--memory-budget") as refused:
        residency.put("b", "point", "B", 11)
    assert refused.value.code is Code.RESOURCE_EXHAUSTED
    assert refused.value.reason == "MEMORY_BUDGET"
    assert keys(residency) == "a"
    assert evicted == []


def test_what_may_drop_nothing_is_refused_where_it_does_not_fit_beside_the_rest(residency, evicted):
    residency.put("a", "data", "A", 6)
    assert residency.free_bytes() == 4
    with pytest.raises(ServiceError, match=r"5 bytes more do not fit .* beside what is resident") as refused:
        residency.load("b", "data", lambda: ("B", 5), evict=False)
    assert refused.value.code is Code.RESOURCE_EXHAUSTED
    assert keys(residency) == "a"
    assert residency.load("c", "data", lambda: ("C", 4), evict=False) == "C"
    assert residency.load("a", "data", lambda: ("new", 99), evict=False) == "A"
    assert residency.free_bytes() == 0
    assert evicted == []


def test_dropping_is_no_eviction(residency, evicted):
    residency.put("a", "data", "A", 4)
    residency.drop("a")
    residency.drop("a")
    assert residency.get("a") is None
    assert residency.used_bytes() == {"data": 0}
    assert evicted == []


# Entries that hold on to others


def test_using_an_entry_uses_what_it_needs(residency, evicted):
    residency.put("data", "data", "D", 3)
    residency.put("point", "point", "P", 1, needs=["data"])
    residency.put("other", "other", "O", 3)
    assert residency.get("point") == "P"
    residency.put("new", "new", "N", 5)
    assert evicted == ["other"]


def test_what_needs_an_entry_goes_with_it(residency, evicted):
    residency.put("data", "data", "D", 3)
    residency.put("point", "point", "P", 1, needs=["data"])
    residency.put("residuals", "residuals", "R", 1, needs=["point"])
    residency.put("other", "other", "O", 2)
    residency.drop("data")
    assert residency.used_bytes() == {"data": 0, "point": 0, "residuals": 0, "other": 2}
    assert keys(residency, ["data", "point", "residuals", "other"]) == "other"
    assert evicted == []


def test_an_eviction_tells_of_all_that_goes_with_it(residency, evicted):
    residency.put("data", "data", "D", 3)
    for key in ("p", "q"):
        residency.put(key, "point", key, 1, needs=["data"])
    residency.put("new", "new", "N", 10)
    assert sorted(evicted) == ["data", "point", "point"]
    assert residency.used_bytes() == {"data": 0, "point": 0, "new": 10}


def test_dropping_an_entry_keeps_what_it_needed(residency):
    residency.put("data", "data", "D", 3)
    residency.put("point", "point", "P", 1, needs=["data"])
    residency.drop("point")
    residency.put("other", "other", "O", 7)
    assert keys(residency, ["data", "point", "other"]) == "dataother"


def test_a_need_that_is_gone_is_ignored(residency):
    residency.put("point", "point", "P", 1, needs=["gone"])
    assert residency.get("point") == "P"


def test_an_entry_that_does_not_fit_beside_what_it_needs_is_refused_and_drops_nothing(residency, evicted):
    residency.put("data", "data", "D", 6)
    residency.put("point", "point", "P", 1, needs=["data"])
    for needs in (["data"], ["point"]):
        with pytest.raises(ServiceError) as refused:
            residency.put("residuals", "residuals", "R", 5, needs=needs)
        assert refused.value.reason == "MEMORY_BUDGET"
    assert keys(residency, ["data", "point"]) == "datapoint"
    assert residency.used_bytes() == {"data": 6, "point": 1}
    assert evicted == []


_keys = st.sampled_from("abcdef")
_puts = st.tuples(st.just("put"), _keys, st.integers(0, 6), st.lists(_keys, max_size=3))
_others = st.tuples(st.sampled_from(["get", "drop"]), _keys, st.none(), st.none())


@settings(max_examples=500, deadline=None)
@given(steps=st.lists(_puts | _others, max_size=40))
def test_whatever_is_done_the_count_is_right_and_nothing_outlives_what_it_needs(steps):
    residency = Residency(10)
    sizes, needed = {}, {}

    def resident():
        return {key for key in "abcdef" if residency.get(key) is not None}

    for action, key, size, needs in steps:
        if action == "get":
            residency.get(key)
        elif action == "drop":
            residency.drop(key)
            assert key not in resident()
        else:
            before = resident()
            try:
                residency.put(key, key, f"value of {key}", size, needs=[need for need in needs if need < key])
            except ServiceError:
                continue
            sizes[key], needed[key] = size, {need for need in needs if need < key} & before
            assert residency.get(key) == f"value of {key}"
        now = resident()
        used = {kind: count for kind, count in residency.used_bytes().items() if count}
        assert used == {key: sizes[key] for key in now if sizes[key]}
        assert sum(used.values()) <= 10
        assert all(needed[key] <= now for key in now)


# Loading


def test_many_who_ask_at_once_share_one_load(residency, start):
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


def test_what_is_resident_is_not_loaded_again_and_counts_as_used(residency, evicted):
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


def test_those_who_wait_for_a_loader_that_raises_load_themselves(residency, start):
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
    """It is told outside of the lock."""
    seen = []
    residency = Residency(4, on_evict=lambda kind: seen.append((kind, residency.used_bytes())))
    residency.put("a", "data", "A", 3)
    start(residency.put, "b", "point", "B", 2).result(WAIT)
    assert seen == [("data", {"data": 0, "point": 2})]
