"""Entries count for their users, within each user's limit."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpd_server.device.residency import Residency
from hvpd_server.errors import Code, ServiceError
from tests.support.residency import keys, put


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
