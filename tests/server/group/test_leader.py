"""The leader admits ranks, sends orders, and ends the group."""

import contextlib
import hashlib
import socket
import threading

import numpy as np
import pytest

from hvpd._wire import codec
from hvpd.v1 import group_pb2
from hvpd_server.group import failure
from hvpd_server.group.channel import Channel
from hvpd_server.group.follower import RefusedError
from hvpd_server.group.leader import _Rank
from hvpd_server.group.replay import Replay
from hvpd_server.liveness import LOST
from tests.support.waiting import until


class Mesh:
    """Devices that note what they do."""

    def __init__(self):
        self.done = []

    def load(self, blob):
        return bytes(blob)

    def place(self, tensor, rows):
        raise FileNotFoundError(tensor.digest)

    def put(self, value):
        return value.copy()

    def launch(self, program, arguments):
        if program == b"fails":
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory")
        self.done.append((program, [each.tolist() for each in arguments]))


def serving(follower):
    """Execute orders in a thread. Return the devices."""
    mesh = Mesh()
    threading.Thread(target=follower.serve, args=(Replay(mesh),), daemon=True).start()
    return mesh


def load(leader, blob):
    order = group_pb2.GroupOrder(load={"sha256": hashlib.sha256(blob).digest()})
    number = leader.order(order, blob, awaited=True)
    assert leader.done(number) == ""
    return number


def launch(leader, program, *values):
    message = group_pb2.GroupOrder.Launch(program=program)
    for value in values:
        message.arguments.add(value={"dtype": value.dtype.name, "shape": value.shape})
    return leader.order(group_pb2.GroupOrder(launch=message), b"".join(map(codec.payload, values)))


def test_a_rank_learns_where_jax_meets_and_executes_orders(group):
    leader, follower = group.formed()
    assert follower.coordinator == "nowhere:1"
    mesh = serving(follower)
    program = load(leader, b"program")
    launch(leader, program, np.array([1.0, 2.0]), np.float32([3]))
    until(lambda: not leader.pending)
    assert mesh.done == [(b"program", [[1.0, 2.0], [3.0]])]
    assert leader.counts == {"load": 1, "launch": 1}
    assert not group.leader_ends.reasons
    assert not group.rank_ends.reasons


def test_dropped_results_go_with_the_next_message(group):
    leader, follower = group.formed()
    serving(follower)
    program = load(leader, b"program")
    leader.drop(program)
    until(lambda: not leader._dropped)  # A sign of life takes them along.
    launch(leader, program)
    assert f"order {program} is used" in group.leader_ends.first()[0]


def test_an_awaited_order_says_why_it_failed(group):
    leader, follower = group.formed()
    serving(follower)
    number = leader.order(group_pb2.GroupOrder(place={"tensor": {"digest": "lost"}}), awaited=True)
    assert leader.done(number) == "rank 1: FileNotFoundError: lost"
    assert load(leader, b"program") == 2  # The group goes on.


@pytest.mark.parametrize(
    ("rank", "size", "facts", "why"),
    [
        (1, 3, {"version": "1"}, "rank 1 has --size 3, and the leader has --size 2"),
        (2, 2, {"version": "1"}, "there is no rank 2 among 2"),
        (0, 2, {"version": "1"}, "there is no rank 0 among 2"),
        (1, 2, {"version": "2"}, "its version is '2', and the leader's is '1'"),
    ],
)
def test_a_rank_that_does_not_fit_is_refused(group, rank, size, facts, why):
    leader = group.leader()
    group.gathering(leader)
    with pytest.raises(RefusedError, match=why):
        group.follower(leader, rank, size, facts=facts)


def test_a_rank_that_is_there_already_is_refused(group, monkeypatch):
    monkeypatch.setattr("hvpd_server.group.follower._REFUSED_SECONDS", 0.0)
    leader, (ours, theirs) = group.leader(3), socket.socketpair()
    leader._ranks[1] = _Rank(Channel(ours), (b"", b""))
    group.gathering(leader)
    with theirs, pytest.raises(RefusedError, match="rank 1 has joined already"):
        group.follower(leader, 1, 3)


def test_a_rank_without_the_secret_is_refused(group, monkeypatch):
    monkeypatch.setattr("hvpd_server.group.follower._REFUSED_SECONDS", 0.0)
    leader = group.leader()
    group.gathering(leader)
    with pytest.raises(RefusedError, match="does not know the secret"):
        group.follower(leader, secret=lambda: b"x" * 32)
    with pytest.raises(RefusedError, match="does not know the secret"):
        group.follower(leader, secret=lambda: None)


def test_a_rank_may_find_the_secret_later(group):
    leader = group.leader()
    gathered = group.gathering(leader)
    answers = iter([None, b"x" * 32, b"s" * 32])
    group.follower(leader, secret=lambda: next(answers))
    gathered.join(60)
    assert next(answers, None) is None


def test_a_stranger_does_not_stop_the_group_from_forming(group, monkeypatch):
    monkeypatch.setattr("hvpd_server.group.leader._GREETING_SECONDS", 0.05)
    leader = group.leader()
    gathered = group.gathering(leader)
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n" + bytes(100)):
        with socket.create_connection(("127.0.0.1", leader.port)) as stranger:
            stranger.sendall(words)
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(1000):
                    pass
    group.follower(leader)
    gathered.join(60)
    assert not gathered.is_alive()


def test_a_rank_that_leaves_before_the_group_is_complete_may_come_again(group):
    leader = group.leader(3)
    gathered = group.gathering(leader)
    first = socket.create_connection(("127.0.0.1", leader.port))
    first.close()

    def join():
        group.follower(leader, 1, 3)

    one = threading.Thread(target=join, daemon=True)
    one.start()
    until(lambda: leader._ranks)
    group.follower(leader, 2, 3)
    gathered.join(60)
    one.join(60)
    assert sorted(leader._ranks) == [1, 2]


def test_a_second_group_cannot_have_the_same_address(group):
    leader = group.leader()
    with pytest.raises(OSError, match=r"[Aa]ddress already in use"):
        type(leader)(("127.0.0.1", leader.port), 2, {}, b"")


def test_devices_that_differ_end_the_group(group):
    leader, follower = group.formed()
    follower.confirm({"kind of device": "H100"})
    with pytest.raises(SystemExit):
        leader.confirm({"kind of device": "A100"})
    assert "its kind of device is 'H100', and the leader's is 'A100'" in group.leader_ends.first()[0]


def test_equal_devices_are_confirmed(group):
    leader, follower = group.formed()
    follower.confirm({"kind of device": "A100"})
    leader.confirm({"kind of device": "A100"})
    assert not group.leader_ends.reasons


def test_the_end_of_a_rank_ends_the_group_at_once(group):
    _, follower = group.formed()
    follower._channel._socket.shutdown(socket.SHUT_RDWR)
    reason, code = group.leader_ends.first()
    assert "rank 1 is gone" in reason
    assert code == failure.ENDED


def test_a_silent_rank_ends_the_group(group, monkeypatch):
    monkeypatch.setattr(failure, "BEAT_SECONDS", 60.0)
    group.formed(silence=0.2)
    reason, code = group.leader_ends.first()
    assert "rank 1 has been silent for" in reason
    assert code == failure.ENDED


def test_an_order_that_takes_too_long_ends_the_group(group):
    leader, _ = group.formed(patience=0.2)  # The rank executes no order.
    launch(leader, 1)
    assert "rank 1 has not executed order 1 within 0.2 s" in group.leader_ends.first()[0]


def test_a_rank_has_the_whole_timeout_for_each_order(group):
    leader, follower = group.formed(patience=60.0)
    launch(leader, 1)
    first = leader._log.oldest(1)[1]
    leader.order(group_pb2.GroupOrder(put={"array": {"dtype": "float64", "shape": [0]}}))
    leader._ranks[1].heard = first + 60.0
    assert leader._overdue(first + 59.9) == ""
    assert "has not executed order 1 within 60 s" in leader._overdue(first + 60.1)
    follower._send(group_pb2.GroupReport(done=1))
    until(lambda: leader.pending == 1)
    number, second = leader._log.oldest(1)
    leader._ranks[1].heard = second + 60.0
    assert number == 2
    assert leader._overdue(second + 59.9) == ""


def test_a_rank_that_disagrees_ends_the_group(group):
    _, follower = group.formed()
    follower._send(group_pb2.GroupReport(done=7))
    assert group.leader_ends.first()[0].startswith("rank 1 disagrees: rank 1 reports order 7")


def test_a_program_of_another_digest_ends_the_group(group):
    leader, follower = group.formed()
    leader.order(group_pb2.GroupOrder(load={"sha256": b"1" * 32}), b"", awaited=True)
    follower._send(group_pb2.GroupReport(done=1, sha256=b"2" * 32))
    assert "has another digest there" in group.leader_ends.first()[0]


def test_a_launch_without_memory_on_a_rank_is_the_fault_of_its_objective(group):
    leader, follower = group.formed()
    serving(follower)
    launch(leader, load(leader, b"fails"))
    reason, code = group.leader_ends.first()
    assert "rank 1 failed: RuntimeError: RESOURCE_EXHAUSTED" in reason
    assert code == LOST


@pytest.mark.parametrize(("error", "code"), [("RESOURCE_EXHAUSTED: x", LOST), ("connection closed", failure.ENDED)])
def test_a_launch_that_fails_at_the_leader_ends_the_group(group, monkeypatch, error, code):
    monkeypatch.setattr("hvpd_server.group.leader._GRACE_SECONDS", 0.0)
    leader, _ = group.formed()
    with pytest.raises(SystemExit):
        leader.launch_failed(RuntimeError(error))
    assert group.leader_ends.first() == (f"a launch failed: {error}", code)
