"""A rank ends with its leader, and believes no other."""

import socket
import threading

import pytest

from hvpd.v1 import group_pb2
from hvpd_server.group import channel as _channel
from hvpd_server.group import failure
from hvpd_server.group.follower import RefusedError
from tests.server.group.conftest import FACTS


def test_a_rank_ends_when_its_leader_is_gone(group):
    leader, _ = group.formed()
    leader._ranks[1].channel._socket.shutdown(socket.SHUT_RDWR)
    reason, code = group.rank_ends.first()
    assert "the leader is gone" in reason
    assert code == failure.ENDED


def test_a_rank_ends_when_its_leader_falls_silent(group, monkeypatch):
    leader = group.leader()
    group.gathering(leader)
    monkeypatch.setattr(leader, "_watch", lambda: None)
    group.follower(leader, silence=0.1)
    assert "the leader has been silent for" in group.rank_ends.first()[0]


def test_a_leader_that_does_not_know_the_secret_is_not_believed(group):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        class Other:
            port = listener.getsockname()[1]

        def pretend():
            connection, _ = listener.accept()
            channel = _channel.Channel(connection)
            channel.send(_channel.written(group_pb2.GroupOrder(challenge={"nonce": b"n" * 32})))
            report = _channel.REPORTS.read(bytes(channel.receive()))
            assert dict(report.facts) == FACTS
            admission = {"proof": b"p" * 32, "coordinator": "evil:1"}
            channel.send(_channel.written(group_pb2.GroupOrder(admission=admission)))
            channel.close()

        threading.Thread(target=pretend, daemon=True).start()
        with pytest.raises(RefusedError, match="the leader does not know the secret"):
            group.follower(Other)
