"""A pinned entry stays until it has not been used for some seconds."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpd_server.device.residency import Residency
from hvpd_server.errors import Code, ServiceError
from tests.support.clock import Clock
from tests.support.residency import KEYS, OTHERS, PUTS, keys


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


def test_an_entry_does_not_grow_into_pinned_ones(residency):
    residency.put("pinned", "data", "D", 5)
    residency.pin("pinned", 60)
    residency.put("run", "run", "R", 4)
    with pytest.raises(ServiceError, match="does not fit beside 5 bytes that are pinned"):
        residency.resize("run", 6)
    assert keys(residency, ["pinned", "run"]) == "pinnedrun"


def test_memory_relief_spares_pinned_entries_and_accepts_absentKEYS(leased, evicted):
    leased.pin("p", 10)
    assert leased.relieve(["gone"])
    assert evicted == ["point"]
    assert keys(leased, ["d", "p", "q"]) == "dp"
    assert not leased.relieve([])


_pins = st.tuples(st.just("pin"), KEYS, st.integers(0, 3), st.none())


_waits = st.tuples(st.just("wait"), st.none(), st.integers(0, 3), st.none())


@settings(max_examples=500, deadline=None)
@given(steps=st.lists(PUTS | OTHERS | _pins | _waits, max_size=40))
def test_pinned_entries_always_stay_and_take_at_most_half_of_the_budget(steps):
    clock = Clock()
    residency = Residency(20, clock=clock)

    def held():
        """Return the pinned entries, with the entries that they need."""
        return residency._entries.closure(residency._entries.pinned())

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
        assert residency._entries.bytes_of(held()) <= 10
        assert sum(residency.used_bytes().values()) <= 20
