"""Eviction from a full cache: entries of the tenant with most bytes, oldest first."""

import random

import pytest

from hvpd_server.tenancy.fair_share import Holding, shares, surplus

UNLIMITED = {}.get


def gone(holdings, most, limits=UNLIMITED, asking=()):
    return [each.entry for each in surplus(holdings, most, limits, asking)]


def of(tenant, *sizes, since=0.0):
    """Return holdings of a tenant, such as "a0", "a1", the oldest first."""
    return [Holding(f"{tenant}{i}", (tenant,), size, since + i) for i, size in enumerate(sizes)]


def test_a_cache_with_room_evicts_nothing():
    assert gone([*of("a", 5, 5), *of("b", 2)], 12) == []


def test_the_largest_tenant_loses_its_least_recently_used_entries():
    holdings = [*of("a", 2, 2, 2, 2), *of("b", 1, 1, since=-100)]
    assert gone(holdings, 7) == ["a0", "a1"]


def test_equal_tenants_lose_in_turn():
    holdings = [*of("a", 1, 1, 1), *of("b", 1, 1, 1, since=0.5)]
    assert gone(holdings, 2) == ["a0", "b0", "a1", "b1"]


def test_a_thing_that_may_not_go_counts_and_stays():
    holdings = [Holding("fixed", ("a",), 9, 0, stays=True), *of("a", 1), *of("b", 3)]
    assert gone(holdings, 8) == ["a0", "b0"]  # It does not fit, even so.


def test_a_request_evicts_nothing_of_a_tenant_with_less():
    holdings = [Holding("asking", ("a",), 5, 9, stays=True), *of("a", 1), *of("b", 4)]
    assert gone(holdings, 3, asking="a") == ["a0"]
    assert gone([*holdings, *of("c", 7)], 10, asking="a") == ["c0"]


def test_a_tenant_over_its_own_limit_loses_although_there_is_room():
    holdings = [*of("a", 2, 2, 2), *of("b", 9)]
    assert gone(holdings, 100, {"a": 4}.get) == ["a0"]
    assert gone(holdings, 100, {"a": 1}.get) == ["a0", "a1", "a2"]


def test_an_entry_of_several_tenants_counts_for_each_and_is_evicted_once():
    both = Holding("both", ("a", "b"), 3, -1)
    holdings = [both, *of("a", 2), *of("b", 2)]
    assert shares(holdings) == {"a": 5, "b": 5}
    assert gone(holdings, 100, {"a": 4, "b": 4}.get) == ["both"]


def test_entries_without_a_tenant_form_a_share():
    holdings = [Holding("old", (), 5, 0), Holding("new", (), 5, 1), *of("a", 6, since=-9)]
    assert gone(holdings, 11, {"": 1}.get) == ["old"]


@pytest.mark.parametrize("seed", range(20))
def test_the_remaining_entries_fit_and_the_small_tenant_loses_nothing(seed):
    rng = random.Random(seed)
    small = of("s", *[rng.randint(1, 3) for _ in range(5)], since=-1000)
    rest = [h for t in "abc" for h in of(t, *[rng.randint(1, 50) for _ in range(rng.randint(5, 30))])]
    most = rng.randint(4 * 15, 400)
    left = [each for each in [*small, *rest] if each not in surplus([*small, *rest], most, UNLIMITED)]
    assert sum(each.size_bytes for each in left) <= most
    assert [each for each in small if each not in left] == []  # A fair quarter holds all that it has.
