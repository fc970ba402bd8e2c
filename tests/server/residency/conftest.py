"""Residencies with little room."""

import pytest

from hvpd_server.device.residency import Residency


@pytest.fixture
def evicted():
    return []


@pytest.fixture
def residency(evicted):
    """Return a residency with room for ten bytes."""
    return Residency(10, on_evict=evicted.append)


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


@pytest.fixture
def limited(evicted):
    """Return a residency with room for a hundred bytes, of which `a` may have ten."""
    return Residency(100, evicted.append, {"a": 10}.get)
