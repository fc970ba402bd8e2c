"""The residency keeps what is used, within its budget, and makes what is missing once."""

import contextlib
import threading
import weakref

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


def test_residuals_that_nobody_uses_go_before_their_point_that_somebody_does(residency):
    residency.put("d", "data", "D", 2)
    residency.put("p", "point", "P", 2, needs=["d"])
    residency.put("r", "residuals", "R", 4, needs=["p"])
    for _ in range(3):
        assert residency.get("p") == "P"
    residency.put("q", "point", "Q", 4, needs=["d"])
    assert keys(residency, "dpqr") == "dpq"


_NEEDED = {"d": "", "p": "d", "q": "d", "r": "dp", "s": "dq"}
"""Data, points, and their residuals."""


@given(st.text("".join(_NEEDED), max_size=12), st.integers(1, 10))
def test_what_is_needed_is_used_whenever_what_needs_it_is(asked, room):
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


def test_what_is_dropped_is_let_go(residency):
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


# Pins


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def leased(evicted, clock):
    """Room for twenty bytes, on a clock that the test turns. A point of two bytes, "p", with data of six, "d"; and another, "q"."""
    residency = Residency(20, on_evict=evicted.append, clock=clock)
    residency.put("d", "data", "D", 6)
    residency.put("p", "point", "P", 2, needs=["d"])
    residency.put("q", "point", "Q", 2)
    return residency


def test_what_is_pinned_stays_and_so_does_what_it_needs(leased, evicted):
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


def test_using_what_needs_it_renews_its_lease(leased, clock):
    leased.put("r", "residuals", "R", 1, needs=["p"])
    leased.pin("p", 10)
    clock.now += 9
    assert leased.get("r") == "R"
    clock.now += 9
    leased.put("new", "data", "N", 12)
    assert keys(leased, ["p", "r", "new"]) == "pnew"


def test_a_lease_that_has_ended_is_not_renewed_by_use_since_others_may_have_been_pinned_meanwhile(leased, clock):
    leased.pin("p", 10)
    clock.now += 10
    leased.put("e", "data", "E", 6)
    leased.pin("e", 100)
    assert leased.get("p") == "P"
    leased.put("new", "data", "N", 12)  # Half of the room, and more, is nobody's to hold.
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


def test_giving_up_what_is_not_pinned_and_pinning_what_is_not_there_is_nothing(leased):
    leased.pin("q", 0)
    leased.pin("gone", 10)
    leased.put("gone", "data", "G", 20)
    leased.put("new", "data", "N", 20)
    assert keys(leased, ["gone", "new"]) == "new"


def test_half_of_the_budget_may_be_pinned_what_it_needs_counted_once(leased, evicted):
    leased.put("p2", "point", "P2", 2, needs=["d"])
    leased.pin("p", 10)
    leased.pin("p2", 10)  # 2 + 2 + 6
    leased.pin("p2", 20)
    with pytest.raises(
        ServiceError, match=r"12 bytes would be pinned, half of .* budget of 20 may be: .*unpin"
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
def test_what_does_not_fit_beside_what_is_pinned_is_refused_with_the_sizes_and_drops_nothing(leased, evicted, ask):
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


def test_what_needs_what_is_pinned_does_not_have_it_counted_twice(leased):
    leased.pin("p", 10)
    leased.check(12, "a point", {"d": 6})
    leased.check(6, "a point", {"d": 6, "absent": 6})
    with pytest.raises(ServiceError, match=r"19 bytes.* beside 2 bytes that are pinned"):
        leased.check(7, "a point", {"d": 6, "absent": 6})
    leased.put("new", "point", "N", 12, needs=["d"])
    assert keys(leased, ["d", "p", "q", "new"]) == "dpnew"


def test_what_is_absent_counts_with_the_size_that_it_will_have(residency):
    residency.put("d", "data", "D", 4)
    residency.check(2, "a point", {"d": 999, "e": 4})
    with pytest.raises(ServiceError, match=r"11 bytes.* larger than .* 10 bytes"):
        residency.check(2, "a point", {"d": 999, "e": 5})


# Giving way


def test_residuals_give_way_first_all_of_them_and_then_everything_that_is_not_kept(residency, evicted):
    residency.put("d", "data", "D", 2)
    residency.put("e", "data", "E", 2)
    residency.put("p", "point", "P", 1, needs=["d"])
    residency.put("q", "point", "Q", 1, needs=["e"])
    residency.put("rp", "residuals", "RP", 1, needs=["p"])
    residency.put("rq", "residuals", "RQ", 1, needs=["q"])
    assert residency.give_way(["p"])
    assert evicted == ["residuals"] * 2
    assert residency.give_way(["p"])
    assert sorted(evicted[2:]) == ["data", "point"]
    assert not residency.give_way(["p"])
    assert residency.used_bytes() == {"data": 2, "point": 1, "residuals": 0}
    assert keys(residency, ["d", "p"]) == "dp"


def test_what_is_pinned_does_not_give_way_and_what_is_kept_need_not_be_there(leased, evicted):
    leased.pin("p", 10)
    assert leased.give_way(["gone"])
    assert evicted == ["point"]
    assert keys(leased, ["d", "p", "q"]) == "dp"
    assert not leased.give_way([])


_pins = st.tuples(st.just("pin"), _keys, st.integers(0, 3), st.none())
_waits = st.tuples(st.just("wait"), st.none(), st.integers(0, 3), st.none())


@settings(max_examples=500, deadline=None)
@given(steps=st.lists(_puts | _others | _pins | _waits, max_size=40))
def test_whatever_is_done_what_is_pinned_stays_and_is_half_of_the_budget_at_most(steps):
    clock = Clock()
    residency = Residency(20, clock=clock)

    def held():
        """What is pinned, with what it needs."""
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
        elif key not in before:  # Putting an entry again replaces it, and what needs it goes with it.
            with contextlib.suppress(ServiceError):
                residency.put(key, "data", key, size, needs=[need for need in needs if need != key])
            assert held() == before
        assert residency._bytes(held()) <= 10
        assert sum(residency.used_bytes().values()) <= 20


# Users and their limits


@pytest.fixture
def limited(evicted):
    """Room for a hundred bytes, of which `a` may have ten."""
    return Residency(100, evicted.append, {"a": 10}.get)


def put(residency, key, size, user, *, kind="point", needs=()):
    residency.put(key, kind, key, size, needs=needs)
    residency.join(key, user)


def test_an_entry_is_for_those_who_joined_it(limited):
    put(limited, "p", 1, "a")
    assert limited.get("p", "a") == limited.get("p") == "p"
    assert limited.get("p", "b") is None
    limited.join("p", "b")
    assert limited.get("p", "b") == "p"
    assert limited.users("p") == {"a", "b"}
    limited.join("gone", "a")
    assert limited.users("gone") == set()


def test_who_would_have_more_than_it_may_leaves_what_it_used_least_recently(limited, evicted):
    for key in "pqr":
        put(limited, key, 3, "a")
    put(limited, "other", 50, "b")
    limited.get("p", "a")
    put(limited, "s", 3, "a")
    assert limited.had_bytes("a") == 9
    assert evicted == ["point"]
    assert keys(limited, "pqrs") == "prs"
    assert limited.had_bytes("b") == 50


def test_what_others_have_too_is_left_and_not_dropped(limited, evicted):
    put(limited, "p", 6, "a")
    limited.join("p", "b")
    put(limited, "q", 6, "a")
    assert evicted == []
    assert limited.get("p", "a") is None
    assert limited.get("p", "b") == "p"
    assert (limited.had_bytes("a"), limited.had_bytes("b")) == (6, 6)


def test_data_counts_for_all_who_need_it_and_stays_when_they_leave(limited):
    limited.put("data", "data", "D", 5)
    put(limited, "p", 1, "a", needs=["data"])
    put(limited, "q", 1, "a", needs=["data"])
    put(limited, "r", 1, "b", needs=["data"])
    assert (limited.had_bytes("a"), limited.had_bytes("b")) == (7, 6)
    put(limited, "s", 6, "a")
    assert limited.had_bytes("a") == 6
    assert limited.get("data") == "D"
    assert limited.get("r", "b") == "r"


def test_what_needs_an_entry_counts_for_its_users(limited, evicted):
    put(limited, "p", 3, "a")
    put(limited, "q", 3, "a")
    limited.put("residuals of q", "residuals", "R", 4, needs=["q"])
    assert limited.had_bytes("a") == 10
    limited.put("residuals of q", "residuals", "R", 6, needs=["q"])
    limited.fit("q")
    assert limited.had_bytes("a") == 9
    assert limited.get("p") is None
    limited.fit("gone")


def test_what_is_pinned_is_not_left(limited):
    put(limited, "p", 4, "a")
    limited.pin("p", 60, "a")
    put(limited, "q", 4, "a")
    put(limited, "r", 4, "a")
    assert keys(limited, "pqr") == "pr"


@pytest.mark.parametrize(("size", "pinned", "fits"), [(5, 0, True), (6, 0, False), (3, 2, True), (3, 3, False)])
def test_what_a_user_may_not_have_whatever_it_leaves_is_refused(limited, size, pinned, fits):
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


def test_what_fulfils_a_condition_is_dropped_with_what_needs_it(limited):
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
def test_nobody_has_more_than_it_may(steps):
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
    limited.check_user("a", 10, "a point")  # What b has pinned keeps a from nothing.
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
