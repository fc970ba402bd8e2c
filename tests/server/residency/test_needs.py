"""An entry keeps the entries that it needs, and is dropped with them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpd_server.device.residency import Residency
from hvpd_server.errors import ServiceError
from tests.support.residency import OTHERS, PUTS, keys


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


@settings(max_examples=500, deadline=None)
@given(steps=st.lists(PUTS | OTHERS, max_size=40))
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
