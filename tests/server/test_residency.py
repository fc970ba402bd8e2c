"""The residency keeps used entries within its budget, and loads a missing entry
once.
"""

import contextlib
import threading
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpd_server.device.residency import Residency
from hvpd_server.errors import Code, ServiceError
from tests.support.clock import Clock

WAIT = 10


@pytest.fixture
def evicted():
    return []


@pytest.fixture
def residency(evicted):
    """Return a residency with room for ten bytes."""
    return Residency(10, on_evict=evicted.append)


def keys(residency, candidates="abcdef"):
    """Return the resident keys. Asking counts as use, so tests ask once, at the end."""
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


@given(st.lists(st.integers(0, 2), max_size=8))
def test_of_points_with_residuals_those_go_that_were_used_least_recently(asked):
    residency = Residency(9)
    for index in range(3):
        residency.put(f"p{index}", "point", "P", 2)
        residency.put(f"r{index}", "residuals", "R", 1, needs=[f"p{index}"])
    for index in asked:
        assert residency.get(f"p{index}") == "P"
        assert residency.get(f"r{index}") == "R"
    residency.put("new", "data", "N", 3)
    oldest = min(range(3), key=lambda index: max((at for at, each in enumerate(asked) if each == index), default=-1))
    gone = [index for index in range(3) if residency.get(f"p{index}") is None]
    assert gone == [index for index in range(3) if residency.get(f"r{index}") is None] == [oldest]


def test_residuals_that_are_not_used_go_before_their_point_that_is(residency):
    residency.put("d", "data", "D", 2)
    residency.put("p", "point", "P", 2, needs=["d"])
    residency.put("r", "residuals", "R", 4, needs=["p"])
    for _ in range(3):
        assert residency.get("p") == "P"
    residency.put("q", "point", "Q", 4, needs=["d"])
    assert keys(residency, "dpqr") == "dpq"


_NEEDED = {"d": "", "p": "d", "q": "d", "r": "dp", "s": "dq"}
"""Data, points, their residuals, and the entries that each needs."""


@given(st.text("".join(_NEEDED), max_size=12), st.integers(1, 10))
def test_use_of_an_entry_counts_as_use_of_its_needs(asked, room):
    residency, order = Residency(10), list[str]()

    def use(key):
        for each in _NEEDED[key] + key:
            order[:] = [*(other for other in order if other != each), each]

    for key, needed in _NEEDED.items():
        residency.put(key, "kind", key, 2, needs=needed[-1:])
        use(key)
    for key in asked:
        assert residency.get(key) == key
        use(key)
    residency.put("new", "kind", "N", room)
    while 2 * len(order) + room > 10:
        oldest = order[0]
        order = [key for key in order if key != oldest and oldest not in _NEEDED[key]]
    assert keys(residency, _NEEDED) == "".join(sorted(order))


def test_a_dropped_value_is_freed(residency):
    class Array:
        pass

    array = Array()
    seen = weakref.ref(array)
    residency.put("a", "residuals", array, 5)
    assert residency.get("a") is array
    del array
    residency.drop("a")
    assert seen() is None


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


def test_a_load_that_may_not_evict_is_refused_if_it_does_not_fit(residency, evicted):
    residency.put("a", "data", "A", 6)
    assert residency.free_bytes() == 4
    with pytest.raises(ServiceError, match=r"5 bytes more do not fit .* beside the resident values") as refused:
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


def test_use_of_an_entry_keeps_its_needs_resident(residency, evicted):
    residency.put("data", "data", "D", 3)
    residency.put("point", "point", "P", 1, needs=["data"])
    residency.put("other", "other", "O", 3)
    assert residency.get("point") == "P"
    residency.put("new", "new", "N", 5)
    assert evicted == ["other"]


def test_a_dropped_entry_takes_its_dependents_with_it(residency, evicted):
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


def test_a_dropped_entry_leaves_its_needs(residency):
    residency.put("data", "data", "D", 3)
    residency.put("point", "point", "P", 1, needs=["data"])
    residency.drop("point")
    residency.put("other", "other", "O", 7)
    assert keys(residency, ["data", "point", "other"]) == "dataother"


def test_a_need_that_is_gone_is_ignored(residency):
    residency.put("point", "point", "P", 1, needs=["gone"])
    assert residency.get("point") == "P"


def test_an_entry_that_does_not_fit_beside_its_needs_is_refused_and_evicts_nothing(residency, evicted):
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
def test_any_sequence_keeps_the_count_right_and_no_entry_outlives_its_needs(steps):
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


# Pins


@pytest.fixture
def leased(evicted, clock):
    """Return a residency with room for twenty bytes, on a clock that the test moves. It
    has a point of two bytes, "p", with data of six, "d"; and another, "q".
    """
    residency = Residency(20, on_evict=evicted.append, clock=clock)
    residency.put("d", "data", "D", 6)
    residency.put("p", "point", "P", 2, needs=["d"])
    residency.put("q", "point", "Q", 2)
    return residency


def test_a_pinned_entry_stays_with_its_needs(leased, evicted):
    leased.pin("p", 10)
    assert leased.get("q") == "Q"  # The most recently used, by now.
    leased.put("new", "data", "N", 12)
    assert evicted == ["point"]
    assert keys(leased, ["d", "p", "q", "new"]) == "dpnew"


def test_without_a_pin_the_same_goes(leased, evicted):
    assert leased.get("q") == "Q"
    leased.put("new", "data", "N", 12)
    assert evicted == ["data", "point"]
    assert keys(leased, ["d", "p", "q", "new"]) == "qnew"


@pytest.mark.parametrize(("after", "stays"), [(9.9, True), (10.0, False), (1000.0, False)])
def test_a_pin_ends_when_it_was_not_used_for_so_long(leased, clock, after, stays):
    leased.pin("p", 10)
    clock.now += after
    leased.put("new", "data", "N", 12)
    assert keys(leased, ["p", "new"]) == ("pnew" if stays else "new")


def test_using_it_renews_its_lease(leased, clock):
    leased.pin("p", 10)
    for _ in range(5):
        clock.now += 9
        assert leased.get("p") == "P"
    clock.now += 9
    leased.put("new", "data", "N", 12)
    assert keys(leased, ["p", "new"]) == "pnew"


def test_a_use_from_before_the_pin_does_not_renew_it_later(leased, clock):
    leased.put("r", "residuals", "R", 1, needs=["p"])
    assert leased.get("p") == "P"
    leased.pin("p", 10)
    clock.now += 9
    assert leased.get("q") == "Q"
    clock.now += 9
    leased.put("new", "data", "N", 12)
    assert keys(leased, ["p", "new"]) == "new"


def test_use_of_a_dependent_renews_the_lease(leased, clock):
    leased.put("r", "residuals", "R", 1, needs=["p"])
    leased.pin("p", 10)
    clock.now += 9
    assert leased.get("r") == "R"
    clock.now += 9
    leased.put("new", "data", "N", 12)
    assert keys(leased, ["p", "r", "new"]) == "pnew"


def test_an_ended_lease_is_not_renewed_by_use(leased, clock):
    leased.pin("p", 10)
    clock.now += 10
    leased.put("e", "data", "E", 6)
    leased.pin("e", 100)
    assert leased.get("p") == "P"
    leased.put("new", "data", "N", 12)  # At most half of the room can be pinned.
    assert keys(leased, ["p", "e", "new"]) == "enew"


def test_a_pin_can_be_changed_and_given_up(leased, clock, evicted):
    leased.pin("p", 10)
    leased.pin("p", 100)
    clock.now += 50
    leased.put("new", "data", "N", 12)
    assert keys(leased, ["p", "new"]) == "pnew"
    leased.pin("p", 0)
    leased.put("newer", "data", "N", 20)
    assert keys(leased, ["p", "new", "newer"]) == "newer"


def test_unpinning_without_a_pin_and_pinning_an_absent_entry_change_nothing(leased):
    leased.pin("q", 0)
    leased.pin("gone", 10)
    leased.put("gone", "data", "G", 20)
    leased.put("new", "data", "N", 20)
    assert keys(leased, ["gone", "new"]) == "new"


def test_half_of_the_budget_may_be_pinned_with_shared_needs_counted_once(leased, evicted):
    leased.put("p2", "point", "P2", 2, needs=["d"])
    leased.pin("p", 10)
    leased.pin("p2", 10)  # 2 + 2 + 6
    leased.pin("p2", 20)
    with pytest.raises(
        ServiceError,
        match=r"12 bytes would be pinned, but at most half of .* budget of 20 bytes may be pinned: .*unpin",
    ) as refused:
        leased.pin("q", 10)
    assert (refused.value.code, refused.value.reason) == (Code.RESOURCE_EXHAUSTED, "PINNED")
    leased.pin("p2", 0)
    leased.pin("q", 10)
    leased.put("new", "data", "N", 10)
    assert keys(leased, ["d", "p", "p2", "q", "new"]) == "dpqnew"


def test_a_pin_that_is_refused_changes_nothing(leased, clock):
    leased.put("large", "data", "L", 9)
    leased.pin("p", 10)
    with pytest.raises(ServiceError):
        leased.pin("large", 10)
    leased.put("new", "data", "N", 12)
    assert keys(leased, ["p", "large", "new"]) == "pnew"


def test_pins_that_have_ended_do_not_count(leased, clock):
    leased.put("large", "data", "L", 10)
    leased.pin("p", 10)
    clock.now += 10
    leased.pin("large", 10)
    leased.put("new", "data", "N", 10)
    assert keys(leased, ["p", "large", "new"]) == "largenew"


@pytest.mark.parametrize("ask", ["put", "check", "load"])
def test_an_entry_that_does_not_fit_beside_pins_is_refused_and_drops_nothing(leased, evicted, ask):
    leased.pin("p", 10)
    asks = {
        "put": lambda: leased.put("new", "data", "N", 13),
        "check": lambda: leased.check(13, "data"),
        "load": lambda: leased.load("new", "data", lambda: ("N", 13)),
    }
    says = r"data of 13 bytes.* beside 8 bytes that are pinned, .* of 20 bytes: unpin points, or .*--memory-budget"
    with pytest.raises(ServiceError, match=says) as refused:
        asks[ask]()
    assert (refused.value.code, refused.value.reason) == (Code.RESOURCE_EXHAUSTED, "PINNED")
    assert evicted == []
    assert keys(leased, ["d", "p", "q"]) == "dpq"


def test_a_pinned_need_is_not_counted_twice(leased):
    leased.pin("p", 10)
    leased.check(12, "a point", {"d": 6})
    leased.check(6, "a point", {"d": 6, "absent": 6})
    with pytest.raises(ServiceError, match=r"19 bytes.* beside 2 bytes that are pinned"):
        leased.check(7, "a point", {"d": 6, "absent": 6})
    leased.put("new", "point", "N", 12, needs=["d"])
    assert keys(leased, ["d", "p", "q", "new"]) == "dpnew"


def test_an_absent_need_counts_with_its_later_size(residency):
    residency.put("d", "data", "D", 4)
    residency.check(2, "a point", {"d": 999, "e": 4})
    with pytest.raises(ServiceError, match=r"11 bytes.* larger than .* 10 bytes"):
        residency.check(2, "a point", {"d": 999, "e": 5})


# Eviction


def test_residuals_are_evicted_first_all_of_them_and_then_everything_that_is_not_kept(residency, evicted):
    residency.put("d", "data", "D", 2)
    residency.put("e", "data", "E", 2)
    residency.put("p", "point", "P", 1, needs=["d"])
    residency.put("q", "point", "Q", 1, needs=["e"])
    residency.put("rp", "residuals", "RP", 1, needs=["p"])
    residency.put("rq", "residuals", "RQ", 1, needs=["q"])
    assert residency.relieve(["p"])
    assert evicted == ["residuals"] * 2
    assert residency.relieve(["p"])
    assert sorted(evicted[2:]) == ["data", "point"]
    assert not residency.relieve(["p"])
    assert residency.used_bytes() == {"data": 2, "point": 1, "residuals": 0}
    assert keys(residency, ["d", "p"]) == "dp"


def test_memory_relief_spares_pinned_entries_and_accepts_absent_keys(leased, evicted):
    leased.pin("p", 10)
    assert leased.relieve(["gone"])
    assert evicted == ["point"]
    assert keys(leased, ["d", "p", "q"]) == "dp"
    assert not leased.relieve([])


_pins = st.tuples(st.just("pin"), _keys, st.integers(0, 3), st.none())
_waits = st.tuples(st.just("wait"), st.none(), st.integers(0, 3), st.none())


@settings(max_examples=500, deadline=None)
@given(steps=st.lists(_puts | _others | _pins | _waits, max_size=40))
def test_pinned_entries_always_stay_and_take_at_most_half_of_the_budget(steps):
    clock = Clock()
    residency = Residency(20, clock=clock)

    def held():
        """Return the pinned entries, with the entries that they need."""
        return residency._closure(residency._pinned())

    for action, key, size, needs in steps:
        before = held()
        if action == "wait":
            clock.now += size
        elif action == "get":
            residency.get(key)
            assert held() == before
        elif action == "drop":
            residency.drop(key)
        elif action == "pin":
            with contextlib.suppress(ServiceError):
                residency.pin(key, size)
                assert size == 0 or key in held() or key not in residency._entries
        elif key not in before:  # Putting an entry again replaces it, and drops its dependents.
            with contextlib.suppress(ServiceError):
                residency.put(key, "data", key, size, needs=[need for need in needs if need != key])
            assert held() == before
        assert residency._bytes(held()) <= 10
        assert sum(residency.used_bytes().values()) <= 20


# Users and their limits


@pytest.fixture
def limited(evicted):
    """Return a residency with room for a hundred bytes, of which `a` may have ten."""
    return Residency(100, evicted.append, {"a": 10}.get)


def put(residency, key, size, user, *, kind="point", needs=()):
    residency.put(key, kind, key, size, needs=needs)
    residency.join(key, user)


def test_an_entry_is_for_users_that_joined_it(limited):
    put(limited, "p", 1, "a")
    assert limited.get("p", "a") == limited.get("p") == "p"
    assert limited.get("p", "b") is None
    limited.join("p", "b")
    assert limited.get("p", "b") == "p"
    assert limited.users("p") == {"a", "b"}
    limited.join("gone", "a")
    assert limited.users("gone") == set()


def test_a_user_above_its_limit_leaves_its_least_recently_used_entries(limited, evicted):
    for key in "pqr":
        put(limited, key, 3, "a")
    put(limited, "other", 50, "b")
    limited.get("p", "a")
    put(limited, "s", 3, "a")
    assert limited.had_bytes("a") == 9
    assert evicted == ["point"]
    assert keys(limited, "pqrs") == "prs"
    assert limited.had_bytes("b") == 50


def test_an_entry_of_several_users_is_left_and_not_dropped(limited, evicted):
    put(limited, "p", 6, "a")
    limited.join("p", "b")
    put(limited, "q", 6, "a")
    assert evicted == []
    assert limited.get("p", "a") is None
    assert limited.get("p", "b") == "p"
    assert (limited.had_bytes("a"), limited.had_bytes("b")) == (6, 6)


def test_data_counts_for_all_its_users_and_stays_when_they_leave(limited):
    limited.put("data", "data", "D", 5)
    put(limited, "p", 1, "a", needs=["data"])
    put(limited, "q", 1, "a", needs=["data"])
    put(limited, "r", 1, "b", needs=["data"])
    assert (limited.had_bytes("a"), limited.had_bytes("b")) == (7, 6)
    put(limited, "s", 6, "a")
    assert limited.had_bytes("a") == 6
    assert limited.get("data") == "D"
    assert limited.get("r", "b") == "r"


def test_dependents_count_for_the_users_of_an_entry(limited, evicted):
    put(limited, "p", 3, "a")
    put(limited, "q", 3, "a")
    limited.put("residuals of q", "residuals", "R", 4, needs=["q"])
    assert limited.had_bytes("a") == 10
    limited.put("residuals of q", "residuals", "R", 6, needs=["q"])
    limited.fit("q")
    assert limited.had_bytes("a") == 9
    assert limited.get("p") is None
    limited.fit("gone")


def test_a_users_share_of_an_entry_counts_for_that_user_only(limited):
    put(limited, "p", 3, "a")
    limited.join("p", "b")
    put(limited, "run of b", 20, "b", kind="run", needs=["p"])
    assert (limited.had_bytes("a"), limited.had_bytes("b")) == (3, 23)


def test_an_entry_that_grows_evicts_others_and_not_its_needs(residency, evicted):
    residency.put("point", "point", "P", 2)
    residency.put("old", "data", "O", 3)
    residency.put("run", "run", "R", 2, needs=["point"])
    assert residency.resize("run", 8)
    assert evicted == ["data"]
    assert residency.used_bytes() == {"point": 2, "data": 0, "run": 8}
    with pytest.raises(ServiceError, match="larger than the server's memory budget"):
        residency.resize("run", 9)
    assert residency.used_bytes()["run"] == 8
    assert residency.resize("run", 1)
    assert residency.used_bytes()["run"] == 1
    assert not residency.resize("gone", 1)


def test_an_entry_does_not_grow_into_pinned_ones(residency):
    residency.put("pinned", "data", "D", 5)
    residency.pin("pinned", 60)
    residency.put("run", "run", "R", 4)
    with pytest.raises(ServiceError, match="does not fit beside 5 bytes that are pinned"):
        residency.resize("run", 6)
    assert keys(residency, ["pinned", "run"]) == "pinnedrun"


def test_a_user_whose_entry_grows_leaves_others(limited):
    put(limited, "p", 4, "a")
    put(limited, "run", 4, "a")
    assert limited.resize("run", 8)
    assert keys(limited, ["p", "run"]) == "run"


def test_a_user_does_not_leave_a_pinned_entry(limited):
    put(limited, "p", 4, "a")
    limited.pin("p", 60, "a")
    put(limited, "q", 4, "a")
    put(limited, "r", 4, "a")
    assert keys(limited, "pqr") == "pr"


@pytest.mark.parametrize(("size", "pinned", "fits"), [(5, 0, True), (6, 0, False), (3, 2, True), (3, 3, False)])
def test_a_size_that_can_never_fit_a_users_limit_is_refused(limited, size, pinned, fits):
    limited.put("data", "data", "D", 5)
    if pinned:
        put(limited, "p", pinned, "a")
        limited.pin("p", 60, "a")
    with contextlib.nullcontext() if fits else pytest.raises(ServiceError) as error:
        limited.check_user("a", size, "a point", {"data": 5})
    if not fits:
        assert (error.value.code, error.value.reason) == (Code.RESOURCE_EXHAUSTED, "TENANT_MEMORY")
        assert f"a point of {size + 5} bytes" in str(error.value)
        assert "tenant a may have on the device" in str(error.value)
    limited.check_user("b", 1000, "a point")
    with pytest.raises(ServiceError):
        limited.check_user("a", size, "a point", {"data that is not here yet": 11 - size})


def test_dropping_by_a_condition_drops_the_dependents_too(limited):
    limited.put("data", "data", "D", 5)
    put(limited, "p", 1, "a", needs=["data"])
    put(limited, "q", 1, "a", needs=["data"])
    limited.put("residuals", "residuals", "R", 1, needs=["p"])
    limited.drop_where(lambda value: value == "p")
    assert [limited.get(key) for key in ("data", "p", "q", "residuals")] == ["D", None, "q", None]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("pqrstu"), st.integers(1, 10), st.sampled_from("ab"), st.sampled_from(["", "d", "e"]))
    )
)
def test_no_user_exceeds_its_limit(steps):
    residency = Residency(40, limit_of={"a": 20, "b": 25}.get)
    for key, size, user, need in steps:
        if need and residency.get(need) is None:
            residency.put(need, "data", need, 8)
        put(residency, key, size, user, needs=[need] if need else [])
        assert residency.get(key, user) == key
        assert residency.had_bytes("a") <= 20
        assert residency.had_bytes("b") <= 25
        assert sum(residency.used_bytes().values()) <= 40


def test_a_pin_is_its_owners(limited):
    put(limited, "p", 6, "b")
    limited.join("p", "a")
    limited.pin("p", 60, "b")
    limited.check_user("a", 10, "a point")  # b's pins keep a from nothing.
    put(limited, "q", 6, "a")
    assert limited.get("p", "a") is None
    limited.join("p", "a")
    limited.pin("p", 0, "a")
    put(limited, "large", 90, "c")
    assert limited.get("p", "b") == "p"
    limited.pin("p", 0, "b")
    put(limited, "larger", 95, "c")
    assert limited.get("p") is None


def test_there_are_no_more_entries_than_the_host_has_memory_for(evicted):
    residency = Residency(1 << 20, evicted.append)
    for number in range(1200):
        residency.put(number, "point", number, 1)
    assert len(residency.values()) == 1000
    assert residency.get(200) == 200
    assert residency.get(199) is None
