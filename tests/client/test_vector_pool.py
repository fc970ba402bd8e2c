"""Connections to the vector port, against silent, closed and forgotten sockets."""

import gc
import itertools
import os
import socket
import threading
import time
import warnings

import grpc
import numpy as np
import pytest

from hvpd._transport import vector_pool
from hvpd._transport.stream import RpcFailure
from hvpd._transport.vector_pool import VectorPool, VectorStream
from hvpd._wire import segment, vector_protocol, vector_socket
from hvpd._wire.vector_protocol import CallerEnd, Offer, Opening, ServerEnd
from hvpd._wire.vector_socket import Connection
from hvpd.v1 import curvature_pb2
from tests.support.threads import no_threads
from tests.support.waiting import until

SPEC = curvature_pb2.ProductSpec(point_id="p", operator=curvature_pb2.OPERATOR_HESSIAN, k=1).SerializeToString()
V = np.ones((1, 3))


PARTS = [bytes([each]) * 16 for each in range(1, 5)]


def answer(served, times=1):
    """Answer with the doubled vectors, as a server does."""
    for _ in range(times):
        block = np.empty(served.next_event().size // 8)
        served.receive_into(block.view("uint8").data)
        info = curvature_pb2.ProductInfo(batch_width=1).SerializeToString()
        served.send(vector_protocol.answer(info, block.nbytes), (2 * block).view("uint8").data)


@pytest.fixture
def ends():
    """Yield both ends of an open connection: the caller's and the server's."""
    here, there = socket.socketpair()
    with here, there:
        caller, end = Connection(here, CallerEnd(*PARTS)), ServerEnd(PARTS[0])
        served = Connection(there, end, 30)
        opening = threading.Thread(target=vector_socket.open_caller, args=(caller,))
        opening.start()
        served.send(end.greeting)
        assert served.next_event() == Opening(PARTS[1])
        served.send(end.admit(*PARTS[2:]))
        served.next_event()
        opening.join()
        yield caller, served


def multiply(stream, left=None):
    found = np.empty_like(V)
    info = stream.multiply(SPEC, V, found, left)
    np.testing.assert_array_equal(found, 2 * V)
    return info


def test_products_are_counted_as_the_server_counts_them(ends, beside):
    stream = VectorStream(ends[0], "id", lambda: True)
    beside(answer, ends[1], 3)
    for tag in (1, 2, 3):
        assert multiply(stream).batch_width == 1
        assert stream.tag == tag
    assert stream.quiet


def test_a_server_that_takes_long_is_waited_for_while_it_is_there(ends, beside, monkeypatch):
    monkeypatch.setattr(vector_pool, "_SILENCE", 0.02)
    asked = []

    def alive():
        asked.append(True)
        if len(asked) == 3:
            beside(answer, ends[1])
        return True

    stream = VectorStream(ends[0], "id", alive)
    multiply(stream)
    assert len(asked) >= 3


def test_a_server_that_is_silent_by_grpc_too_is_not(ends, monkeypatch):
    monkeypatch.setattr(vector_pool, "_SILENCE", 0.02)
    answers = itertools.chain([True, True], itertools.repeat(False))
    stream = VectorStream(ends[0], "id", lambda: next(answers))
    with pytest.raises(RpcFailure) as silent:
        multiply(stream)
    assert silent.value.failure.code is grpc.StatusCode.UNAVAILABLE


def test_with_a_deadline_the_server_is_not_asked(ends, beside):
    stream = VectorStream(ends[0], "id", lambda: pytest.fail("asked"))
    began = time.monotonic()
    with pytest.raises(RpcFailure) as late:
        multiply(stream, 0.05)
    assert time.monotonic() - began >= 0.05
    assert late.value.failure.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_deadline_that_was_kept_is_not_the_next_ones(ends, beside):
    stream = VectorStream(ends[0], "id", lambda: True)
    beside(answer, ends[1], 2)
    multiply(stream, 30.0)
    assert stream._connection.deadline is None
    multiply(stream)


def test_an_end_in_the_middle_of_an_answer_is_unavailable(ends, beside):
    stream = VectorStream(ends[0], "id", lambda: True)

    def half():
        ends[1].next_event()
        ends[1].send(vector_protocol.answer(b"", 24), bytes(10))
        ends[1].close()

    beside(half)
    with pytest.raises(RpcFailure, match="broke") as broken:
        multiply(stream)
    assert broken.value.failure.code is grpc.StatusCode.UNAVAILABLE


BIG = np.ones((1, vector_pool._SHARED_BYTES // 8))


def answer_in_memory(served, times=1, size=None):
    """Answer with the doubled vectors where they are, or offers with a refusal."""
    attached = None
    for _ in range(times):
        event = served.next_event()
        if isinstance(event, Offer):
            served.send(vector_protocol.segment_answer(taken=True))
            descriptor = served.receive_descriptor()
            attached = segment.attach(descriptor, event.size)
            os.close(descriptor)
            served.send(vector_protocol.segment_answer(taken=True))
            event = served.next_event()
        assert event.shared
        served.skip()
        attached.memory[: event.size].view(float)[:] *= 2
        served.send(vector_protocol.answer(b"", event.size if size is None else size, shared=True))


def test_large_blocks_lie_in_memory_that_later_ones_use_too(ends, beside):
    stream = VectorStream(ends[0], "id", lambda: True, 1 << 30)
    beside(answer_in_memory, ends[1], 3)
    for size in (1, 1, 2):  # The last one takes a larger segment.
        block = np.repeat(BIG, size, axis=0)
        found = np.empty_like(block)
        stream.multiply(SPEC, block, found, None)
        np.testing.assert_array_equal(found, 2 * block)
    stream.close()


def test_a_refused_segment_is_not_offered_again(ends, beside):
    stream = VectorStream(ends[0], "id", lambda: True, 1 << 30)

    def refuse():
        assert ends[1].next_event() == Offer(BIG.nbytes)
        ends[1].send(vector_protocol.segment_answer(taken=False))
        answer(ends[1], 2)

    beside(refuse)
    for _ in range(2):
        found = np.empty_like(BIG)
        stream.multiply(SPEC, BIG, found, None)
        np.testing.assert_array_equal(found, 2 * BIG)
    assert stream.segment_bytes == 0


def test_a_system_without_such_memory_sends_by_the_socket(ends, beside, monkeypatch):
    def none(size):
        raise OSError("no memory")

    monkeypatch.setattr(segment, "create", none)
    stream = VectorStream(ends[0], "id", lambda: True, 1 << 30)
    beside(answer, ends[1])
    found = np.empty_like(BIG)
    stream.multiply(SPEC, BIG, found, None)
    np.testing.assert_array_equal(found, 2 * BIG)


@pytest.mark.parametrize("size", [0, BIG.nbytes - 8, BIG.nbytes + 8, 2**64 - 1])
def test_an_answer_in_memory_of_a_wrong_size_is_an_error(ends, beside, size):
    stream = VectorStream(ends[0], "id", lambda: True, 1 << 30)
    beside(answer_in_memory, ends[1], 1, size)
    with pytest.raises(RpcFailure, match=f"the result has {size} bytes, expected {BIG.nbytes}"):
        stream.multiply(SPEC, BIG, np.empty_like(BIG), None)


def refused(seconds):
    raise ConnectionRefusedError("connection refused")


def test_a_returned_connection_is_reused_unless_the_other_end_has_closed():
    pool = VectorPool("127.0.0.1", None, refused, lambda: True)
    pool.offered = True
    pairs = [socket.socketpair() for _ in range(3)]
    streams = [VectorStream(Connection(here, CallerEnd(*PARTS)), "id", lambda: True) for here, _ in pairs]
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


def test_a_pool_that_cannot_connect_tries_less_and_less_often(monkeypatch):
    tries = []

    def refuse(seconds):
        tries.append(seconds)
        raise ConnectionRefusedError("connection refused")

    now = [0.0]
    monkeypatch.setattr(vector_pool.time, "monotonic", lambda: now[0])
    pool = VectorPool("127.0.0.1", None, refuse, lambda: True)
    assert pool.take() is None
    assert not tries  # The port was not offered.
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


def test_a_forgotten_client_is_closed_without_a_warning():
    here, there = socket.socketpair()
    pool = VectorPool("127.0.0.1", None, refused, lambda: True)
    pool.give_back(VectorStream(Connection(here, CallerEnd(*PARTS)), "id", lambda: True))
    pool.itself = pool  # Any other cycle would do, too.
    del here
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del pool
        gc.collect()
    with there:
        there.settimeout(30)
        assert there.recv(1) == b""


def test_without_a_thread_products_go_over_grpc_and_the_port_is_tried_again(monkeypatch):
    tries, now = [], [0.0]
    monkeypatch.setattr(vector_pool.time, "monotonic", lambda: now[0])

    def refuse(seconds):
        tries.append(now[0])
        raise ValueError("no ticket")

    pool = VectorPool("127.0.0.1", None, refuse, lambda: True)
    pool.offered = True
    with no_threads():
        assert pool.take() is None
    assert not pool._opening
    now[0] += 60.0
    assert pool.take() is None
    until(lambda: tries == [60.0] and not pool._opening)
