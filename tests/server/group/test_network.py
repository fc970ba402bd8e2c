"""A leader and a rank whose network is cut, goes black or is slow."""

import contextlib
import threading

import pytest

from bench._network import Network
from hvpd_server.group import failure
from hvpd_server.group.replay import Replay
from tests.server.group.test_leader import Mesh, launch, load
from tests.support.waiting import until

SILENCE = 0.5
"""Seconds without a sign of life."""


@pytest.fixture
def between(group, monkeypatch):
    """Return a function that forms a group, and returns the network between its
    processes, the leader and the rank.
    """
    monkeypatch.setattr(failure, "BEAT_SECONDS", 0.05)
    with contextlib.ExitStack() as stack:

        def form(silence=60.0, **settings):
            leader = group.leader(silence=silence)
            network = stack.enter_context(contextlib.closing(Network(leader.port, **settings)))
            gathering = group.gathering(leader)
            follower = group.follower(leader, port=int(network.address.rpartition(":")[2]), silence=silence)
            gathering.join(60)
            return network, leader, follower

        yield form


def test_both_sides_of_a_network_that_is_cut_end(group, between):
    network, *_ = between()
    network.cut()
    assert "rank 1 is gone" in group.leader_ends.first()[0]
    assert "the leader is gone" in group.rank_ends.first()[0]


@pytest.mark.parametrize("ways", [("there",), ("back",), ("there", "back")], ids="-".join)
def test_the_side_that_hears_nothing_ends(group, between, ways):
    network, *_ = between(SILENCE)
    network.darken(*ways)
    if "there" in ways:
        assert "rank 1 has been silent for" in group.leader_ends.first()[0]
    if "back" in ways:
        assert "the leader has been silent for" in group.rank_ends.first()[0]


def test_a_slow_network_ends_no_group(group, between):
    _, leader, follower = between(delay=0.02)
    mesh = Mesh()
    threading.Thread(target=follower.serve, args=(Replay(mesh),), daemon=True).start()
    program = load(leader, b"program")
    for _ in range(20):
        launch(leader, program)
    until(lambda: not leader.pending)
    assert len(mesh.done) == 20
    assert not group.leader_ends.reasons
    assert not group.rank_ends.reasons
