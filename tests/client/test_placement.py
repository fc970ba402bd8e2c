"""The placement of objectives, simulated for 1,000 servers and 100,000 objectives."""

import hashlib

import numpy as np
import pytest
import scipy.stats

from hvpd._transport import placement

SERVERS, OBJECTIVES = 1_000, 100_000
CHUNK = 2_000


def keys(kind, count):
    return np.array([placement.key(f"{kind}-{number}") for number in range(count)])


@pytest.fixture(scope="module")
def objectives():
    return keys("objective", OBJECTIVES)


def owners(objectives, servers, weights=None):
    """Return the position of each objective's server."""
    weights = np.ones(len(servers)) if weights is None else weights
    parts = [objectives[start : start + CHUNK] for start in range(0, len(objectives), CHUNK)]
    return np.concatenate([placement.scores(part, servers, weights).argmax(1) for part in parts])


def test_a_key_is_the_beginning_of_a_sha256():
    assert placement.key("a") == int(hashlib.sha256(b"a").hexdigest()[:16], 16)


def test_a_thousand_servers_have_as_many_objectives_as_chance_gives_them(objectives):
    """Counts are multinomial: each is within 5.5 standard deviations of 100, and the
    chi-squared statistic is not extreme.
    """
    counts = np.bincount(owners(objectives, keys("server", SERVERS)), minlength=SERVERS)
    mean = OBJECTIVES / SERVERS
    assert abs(counts - mean).max() <= 5.5 * mean**0.5
    assert 1e-4 < scipy.stats.chisquare(counts).pvalue < 1 - 1e-4


def test_of_a_thousand_servers_one_that_leaves_moves_only_its_own_objectives(objectives):
    servers, some = keys("server", SERVERS), objectives[:20_000]
    before = owners(some, servers)
    after = owners(some, np.delete(servers, 123))
    after += after >= 123
    moved = before != after
    np.testing.assert_array_equal(moved, before == 123)
    # They go to many servers, so that no single one gets them all.
    assert 10 < moved.sum() < 40
    assert np.bincount(after[moved]).max() <= 3


def test_a_fourth_server_moves_at_most_30_percent_and_only_to_itself(objectives):
    servers = keys("server", 4)
    before, after = owners(objectives, servers[:3]), owners(objectives, servers)
    moved = before != after
    assert 0.24 < moved.mean() < 0.26
    assert set(after[moved]) == {3}


def test_weights_are_shares(objectives):
    weights = np.array([1.0, 2.0, 4.0, 8.0])
    servers = keys("server", 4)
    before = owners(objectives, servers, weights)
    np.testing.assert_allclose(np.bincount(before) / OBJECTIVES, weights / 15, atol=0.006)
    # More weight only attracts.
    after = owners(objectives, servers, np.array([1.0, 2.0, 6.0, 8.0]))
    assert set(after[before != after]) == {2}


def test_the_order_begins_with_the_owner_and_goes_on_with_the_next_owners():
    servers, weights = keys("server", 5), np.array([1.0, 1.0, 3.0, 1.0, 2.0])
    digest = hashlib.sha256(b"f").hexdigest()
    order = list(placement.order(digest, servers, weights))
    assert sorted(order) == [0, 1, 2, 3, 4]
    for rank, place in enumerate(order):
        left = order[rank:]
        best = placement.order(digest, servers[left], weights[left])[0]
        assert left[best] == place


def test_the_order_of_the_list_does_not_count():
    servers = keys("server", 6)
    digest = hashlib.sha256(b"f").hexdigest()
    shuffled = np.random.default_rng(0).permutation(6)
    straight = servers[placement.order(digest, servers, np.ones(6))]
    np.testing.assert_array_equal(servers[shuffled][placement.order(digest, servers[shuffled], np.ones(6))], straight)


def test_the_order_is_the_same_in_every_release():
    """Clients of different releases must meet at one server."""
    servers = np.array([placement.key(name) for name in ("a:7070", "b:7070", "c:7070")])
    orders = ["".join(map(str, placement.order(digest, servers, np.ones(3)))) for digest in ("0", "1", "2", "3")]
    assert orders == ["012", "012", "120", "210"]
