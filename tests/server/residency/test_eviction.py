"""The residency keeps the entries that were used last, within its budget."""

import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvpd_server.device.residency import Residency
from hvpd_server.errors import Code, ServiceError
from tests.support.residency import keys


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


def test_there_are_no_more_entries_than_the_host_has_memory_for(evicted):
    residency = Residency(1 << 20, evicted.append)
    for number in range(1200):
        residency.put(number, "point", number, 1)
    assert len(residency.values()) == 1000
    assert residency.get(200) == 200
    assert residency.get(199) is None
