"""A client's connections to the vector port, against sockets that are no server: who is silent, who is gone, who forgets to close."""

import gc
import itertools
import socket
import time
import warnings

import grpc
import numpy as np
import pytest

from hvpd import _vector_pool, _vectors
from hvpd._stream import RpcFailure
from hvpd._vector_pool import VectorPool, VectorStream
from hvpd._vectors import Connection
from hvpd.v1 import curvature_pb2

SPEC = curvature_pb2.ProductSpec(point_id="p", operator=curvature_pb2.OPERATOR_HESSIAN, k=1).SerializeToString()
V = np.ones((1, 3))


def answer(connection, times=1):
    """Doubles, as a server does."""
    for _ in range(times):
        size, _, count, _ = _vectors.REQUEST.unpack(connection.receive(_vectors.REQUEST.size))
        connection.skip(size)
        block = np.empty(count // 8)
        connection.receive_into(block.view("uint8").data)
        info = curvature_pb2.ProductInfo(batch_width=1).SerializeToString()
        head = _vectors.RESPONSE.pack(len(info), _vectors.ANSWERED, count)
        connection.send(head + info, (2 * block).view("uint8").data)


@pytest.fixture
def ends():
    here, there = socket.socketpair()
    with here, there:
        yield here, Connection(there, 30)


def multiply(stream, left=None):
    found = np.empty_like(V)
    info = stream.multiply(SPEC, V, found, left)
    np.testing.assert_array_equal(found, 2 * V)
    return info


def test_products_are_counted_as_the_server_counts_them(ends, beside):
    stream = VectorStream(Connection(ends[0]), "id", lambda: True)
    beside(answer, ends[1], 3)
    for tag in (1, 2, 3):
        assert multiply(stream).batch_width == 1
        assert stream.tag == tag
    assert stream.quiet


def test_a_server_that_takes_long_is_waited_for_while_it_is_there(ends, beside, monkeypatch):
    monkeypatch.setattr(_vector_pool, "_SILENCE", 0.02)
    asked = []

    def alive():
        asked.append(True)
        if len(asked) == 3:
            beside(answer, ends[1])
        return True

    stream = VectorStream(Connection(ends[0]), "id", alive)
    multiply(stream)
    assert len(asked) >= 3


def test_a_server_that_is_silent_by_grpc_too_is_not(ends, monkeypatch):
    monkeypatch.setattr(_vector_pool, "_SILENCE", 0.02)
    answers = itertools.chain([True, True], itertools.repeat(False))
    stream = VectorStream(Connection(ends[0]), "id", lambda: next(answers))
    with pytest.raises(RpcFailure) as silent:
        multiply(stream)
    assert silent.value.failure.code is grpc.StatusCode.UNAVAILABLE


def test_with_a_deadline_nobody_is_asked(ends, beside):
    stream = VectorStream(Connection(ends[0]), "id", lambda: pytest.fail("asked"))
    began = time.monotonic()
    with pytest.raises(RpcFailure) as late:
        multiply(stream, 0.05)
    assert time.monotonic() - began >= 0.05
    assert late.value.failure.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_deadline_that_was_kept_is_not_the_next_ones(ends, beside):
    stream = VectorStream(Connection(ends[0]), "id", lambda: True)
    beside(answer, ends[1], 2)
    multiply(stream, 30.0)
    assert stream._connection.deadline is None
    multiply(stream)


def test_an_end_in_the_middle_of_an_answer_is_unavailable(ends, beside):
    stream = VectorStream(Connection(ends[0]), "id", lambda: True)

    def half():
        ends[1].receive(_vectors.REQUEST.size)
        ends[1].send(_vectors.RESPONSE.pack(0, 0, 24), bytes(10))
        ends[1].close()

    beside(half)
    with pytest.raises(RpcFailure, match="broke") as broken:
        multiply(stream)
    assert broken.value.failure.code is grpc.StatusCode.UNAVAILABLE


def nobody(seconds):
    raise ConnectionRefusedError("nobody is there")


def test_who_is_given_back_is_taken_again_unless_the_other_end_is_gone():
    pool = VectorPool("127.0.0.1", None, nobody, lambda: True)
    pool.offered = True
    pairs = [socket.socketpair() for _ in range(3)]
    streams = [VectorStream(Connection(here), "id", lambda: True) for here, _ in pairs]
    for stream in streams:
        pool.give_back(stream)
    pairs[2][1].close()
    assert pool.take() is streams[1]
    assert streams[2]._connection.socket.fileno() < 0
    pool.close()
    assert streams[0]._connection.socket.fileno() < 0
    pool.give_back(streams[1])
    assert streams[1]._connection.socket.fileno() < 0
    assert not pool.ready
    for _, there in pairs:
        there.close()


def test_where_none_can_be_opened_it_is_tried_less_and_less_often(monkeypatch):
    tries = []

    def refuse(seconds):
        tries.append(seconds)
        raise ConnectionRefusedError("nobody is there")

    now = [0.0]
    monkeypatch.setattr(_vector_pool.time, "monotonic", lambda: now[0])
    pool = VectorPool("127.0.0.1", None, refuse, lambda: True)
    assert pool.take() is None
    assert not tries  # It was not offered.
    pool.offered = True
    pauses = []
    for _ in range(6):
        tried = len(tries)
        while len(tries) == tried or pool._opening:
            pool.take()
            now[0] += 0.0 if pool._opening else 0.25
        pauses.append(pool._not_before - now[0])
    assert pauses == sorted(pauses)
    assert pauses[0] < 5
    assert 200 < pauses[-1] <= 300
    pool.close()
    assert pool.take() is None


def test_a_client_that_nobody_closes_is_closed_without_a_word():
    here, there = socket.socketpair()
    pool = VectorPool("127.0.0.1", None, nobody, lambda: True)
    pool.give_back(VectorStream(Connection(here), "id", lambda: True))
    pool.itself = pool  # As good as any other cycle.
    del here
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del pool
        gc.collect()
    with there:
        there.settimeout(30)
        assert there.recv(1) == b""
