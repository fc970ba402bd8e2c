"""Ranks execute the leader's orders, on devices that are only pretended."""

import collections
import hashlib
import random

import numpy as np
import pytest

from hvpd._wire import codec
from hvpd.v1 import group_pb2, tensor_pb2
from hvpd_server.group import channel
from hvpd_server.group.order_log import DisagreementError, OrderLog
from hvpd_server.group.replay import Replay

ROWS = {"t": np.arange(12.0).reshape(6, 2)}


class FakeMesh:
    """Devices whose state is one number, which depends on the sequence of all
    launches.
    """

    def __init__(self):
        self.state = 0.0
        self.launches = 0

    def load(self, blob):
        return float(blob)

    def place(self, tensor, rows):
        return ROWS[tensor.digest][rows]

    def put(self, value):
        return value.copy()

    def launch(self, program, arguments):
        self.state = (self.state * 0.5 + program * sum(float(each.sum()) for each in arguments)) % 1e6
        self.launches += 1


def order(number, chunk=b"", *, dropped=(), **kind):
    return group_pb2.GroupOrder(number=number, dropped=dropped, **kind), chunk


def put(number, value, **settings):
    array = tensor_pb2.ArraySpec(dtype=value.dtype.name, shape=value.shape)
    return order(number, bytes(codec.payload(value)), put={"array": array}, **settings)


def load(number, blob, digest=None):
    return order(number, blob, load={"sha256": digest or hashlib.sha256(blob).digest()})


def launch(number, program, *arguments, **settings):
    message, values = group_pb2.GroupOrder.Launch(program=program), []
    for each in arguments:
        if isinstance(each, int):
            message.arguments.add(array=each)
        else:
            message.arguments.add(value={"dtype": each.dtype.name, "shape": each.shape})
            values.append(bytes(codec.payload(each)))
    return order(number, b"".join(values), launch=message, **settings)


def place(number, digest="t", start=0, stop=6):
    return order(number, place={"tensor": {"digest": digest}, "start": start, "stop": stop})


@pytest.fixture
def mesh():
    return FakeMesh()


@pytest.fixture
def replay(mesh):
    return Replay(mesh)


def test_a_launch_takes_arrays_of_earlier_orders_and_values_of_its_own(replay, mesh):
    for each in (load(1, b"2"), put(2, np.array([1.0, 2.0])), place(3, start=2, stop=4)):
        assert not replay.execute(*each).failure
    report = replay.execute(*launch(4, 1, 2, np.float32([[5.0]]), 3, np.arange(3)))
    assert (report.done, report.failure, report.fatal) == (4, "", False)
    assert mesh.state == 2 * (3 + 5 + (4 + 5 + 6 + 7) + 3)
    assert list(replay.held) == [1, 2, 3]


def test_a_program_is_reported_with_its_digest(replay):
    assert replay.execute(*load(1, b"7")).sha256 == hashlib.sha256(b"7").digest()


def test_a_program_of_another_digest_is_not_loaded(replay):
    with pytest.raises(DisagreementError, match="another digest"):
        replay.execute(*load(1, b"7", hashlib.sha256(b"8").digest()))


def test_dropped_results_are_gone(replay):
    replay.execute(*put(1, np.ones(2)))
    replay.execute(*put(2, np.ones(2), dropped=[1]))
    assert list(replay.held) == [2]
    with pytest.raises(DisagreementError, match="order 1 is used"):
        replay.execute(*launch(3, 1))


@pytest.mark.parametrize("number", [1, 3])
def test_an_order_out_of_turn_is_a_disagreement(replay, number):
    replay.execute(*put(1, np.ones(2)))
    with pytest.raises(DisagreementError, match=f"order {number} follows order 1"):
        replay.execute(*put(number, np.ones(2)))


def test_a_result_cannot_be_dropped_twice(replay):
    with pytest.raises(DisagreementError, match="does not hold"):
        replay.drop([1])


def test_an_order_of_no_kind_is_a_disagreement(replay):
    with pytest.raises(DisagreementError, match="does not know"):
        replay.execute(*order(1))


def test_a_placement_that_fails_is_reported_and_the_rank_goes_on(replay):
    report = replay.execute(*place(1, "lost"))
    assert (report.done, report.failure, report.fatal) == (1, "KeyError: 'lost'", False)
    with pytest.raises(DisagreementError, match="order 1 is used"):
        replay.execute(*launch(2, 1))
    assert not replay.execute(*put(3, np.ones(1), dropped=[1])).failure


def test_a_launch_that_fails_is_fatal(replay, mesh, monkeypatch):
    replay.execute(*load(1, b"2"))
    monkeypatch.setattr(mesh, "launch", lambda program, arguments: 1 / 0)
    report = replay.execute(*launch(2, 1))
    assert report.fatal
    assert "ZeroDivisionError" in report.failure


def random_orders(count, rng):
    """Yield orders of all kinds. Each uses only what was made and not dropped."""
    programs, arrays = [], []
    for number in range(1, count + 1):
        dropped = [arrays.pop(rng.randrange(len(arrays)))] if len(arrays) > 8 else []
        kind = rng.random()
        if kind < 0.02 or not programs:
            programs.append(number)
            yield load(number, str(rng.randrange(1, 9)).encode())
        elif kind < 0.2 or not arrays:
            arrays.append(number)
            yield put(number, np.array([float(rng.randrange(9))]), dropped=dropped)
        elif kind < 0.25:
            arrays.append(number)
            yield place(number, start=rng.randrange(3), stop=rng.randrange(3, 7))
        else:
            few = rng.sample(arrays, min(2, len(arrays)))
            yield launch(number, rng.choice(programs), *few, np.array([float(rng.randrange(9))]), dropped=dropped)


@pytest.mark.slow
def test_ten_thousand_orders_with_random_delays_leave_all_ranks_in_one_state():
    """Each rank executes its orders when chance lets it, and its reports arrive
    late.
    """
    count, rng = 10_000, random.Random(0)
    orders = random_orders(count, rng)
    log, meshes = OrderLog([1, 2, 3]), {rank: FakeMesh() for rank in range(4)}
    replays = {rank: Replay(mesh) for rank, mesh in meshes.items()}
    sent = {rank: collections.deque() for rank in (1, 2, 3)}
    reports = {rank: collections.deque() for rank in (1, 2, 3)}
    behind = 0
    while log.latest < count or log.pending:
        if log.latest < count and rng.random() < 0.5:
            number = log.append(0.0)
            each = next(orders)
            assert each[0].number == number
            replays[0].execute(*each)  # The leader's own devices.
            message = channel.written(*each)
            for waiting in sent.values():
                waiting.append(message)
        rank = rng.choice((1, 2, 3))
        if sent[rank] and rng.random() < 0.7:
            frame = channel.read(bytearray(sent[rank].popleft()))
            reports[rank].append(replays[rank].execute(frame.message, frame.chunk))
        if reports[rank] and rng.random() < 0.7:
            log.done(rank, reports[rank].popleft().done)
        behind = max(behind, log.pending)
    assert log.latest == count
    assert behind > 10
    assert meshes[0].launches > count // 2
    assert {mesh.state for mesh in meshes.values()} == {meshes[0].state}
    assert len({tuple(replay.held) for replay in replays.values()}) == 1
