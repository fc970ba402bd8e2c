"""Clients of the vector port that hang up, stop half way, or do not read."""

import contextlib
import socket
import struct
import threading
import weakref

import grpc
import numpy as np

from hvpd._wire import vector_protocol
from hvpd_server.rpc.products import Products
from hvpd_server.rpc.streams import Streams
from hvpd_server.scheduling import blocks
from tests.support.vector_port import (
    BIG,
    N,
    calling,
    ends,
)
from tests.support.waiting import until


def test_a_product_is_cancelled_when_its_client_hangs_up(patient, waiting):
    with calling(patient) as caller:
        caller.send(np.ones((1, N)))
        assert waiting.began.acquire(timeout=30)
        assert not waiting.cancelled
    until(lambda: waiting.cancelled == 1)


def test_all_products_of_a_client_that_dies_are_cancelled(opened, waiting, metrics, streams):
    port = opened(engine=waiting, products=Products(waiting, metrics, None), streams=Streams(200))
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            stack.enter_context(calling(port)).send(np.ones((1, N)))
        for _ in range(64):
            assert waiting.began.acquire(timeout=30)
        assert not waiting.cancelled
    until(lambda: waiting.cancelled == 64)


def test_a_product_whose_answer_is_not_taken_is_still_a_request(patient, waiting, metrics):
    with calling(patient) as caller:
        caller.send(np.ones((1, N)))
        assert waiting.began.acquire(timeout=30)
        # Such a close resets the connection at once, so the answer cannot leave.
        caller.connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    waiting.go_on()
    until(lambda: not patient._open)
    assert metrics.registry.get_sample_value("hvpd_request_seconds_count", {"method": "StreamProducts"}) == 1


def test_a_product_that_was_answered_is_not_cancelled_any_more(patient, waiting):
    waiting.go_on()
    with calling(patient) as caller:
        caller.send(np.ones((1, N)))
        caller.receive()
    until(lambda: not patient._open)
    assert not waiting.cancelled


def test_a_connection_that_stops_within_a_product_is_ended(opened, engine):
    port = opened(stalled_seconds=0.1)
    with calling(port) as caller:
        caller.connection.send(vector_protocol.request(b"", 100, 0)[:7])
        ends(caller.connection)
    assert not engine.asked


def test_a_connection_that_does_not_read_is_ended_and_delays_no_other(opened):
    port = opened(stalled_seconds=0.2)
    with calling(port) as deaf, calling(port) as other:
        deaf.connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.send(np.ones((1, BIG)), block=1)
        other.send(np.ones((1, N)))
        other.receive()
        until(lambda: port._open == 1)
        other.send(np.ones((1, N)))
        other.receive()


def test_an_idle_connection_may_stay(opened):
    """The time limit is for a product that has begun."""
    port = opened(stalled_seconds=0.01)
    with calling(port) as caller:
        for _ in range(3):
            assert not threading.Event().wait(0.05)
            caller.send(np.ones((1, N)))
            caller.receive()


def test_nothing_of_a_product_is_kept_when_it_is_answered(port, engine, monkeypatch):
    """Otherwise a large product would hold its memory while the next one comes."""
    made = []
    empty, multiply = blocks.empty, engine.multiply

    def tracked(shape, dtype):
        array = empty(shape, dtype)
        made.append(weakref.ref(array))
        return array

    def noted(*args, **settings):
        product, info = multiply(*args, **settings)
        made.append(weakref.ref(product))
        return product, info

    monkeypatch.setattr(blocks, "empty", tracked)
    monkeypatch.setattr(engine, "multiply", noted)
    with calling(port) as caller:
        for _ in range(3):
            caller.send(np.ones((1, BIG)), block=1)
            caller.receive((1, BIG))
            until(lambda: len(made) == 2 and not any(each() is not None for each in made))
            made.clear()


def test_the_memory_of_a_small_product_is_the_next_ones_when_its_answer_has_left(port, engine, monkeypatch):
    lay, multiply = [], engine.multiply

    def noted(point, program, vectors, **settings):
        lay.append(vectors.ctypes.data)
        product, info = multiply(point, program, vectors, **settings)
        return (vectors if len(lay) == 2 else product), info  # XLA, too, may return its input as it lies.

    monkeypatch.setattr(engine, "multiply", noted)
    with calling(port) as caller, calling(port) as other:
        for value, factor in ((1, 2), (2, 1), (3, 2)):
            caller.send(np.full((1, N), value, float))
            np.testing.assert_array_equal(caller.receive()[1], np.full((1, N), factor * value))
        other.send(np.ones((1, N)))
        other.receive()
        caller.send(-np.ones((1, N)))  # It is refused, and its vectors may still be in use.
        assert caller.receive().code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        caller.send(np.ones((2, N)))
        np.testing.assert_array_equal(caller.receive((2, N))[1], np.full((2, N), 2))
    own, others = [*lay[:3], lay[4]], lay[3]
    assert len(set(own)) == 1
    assert others not in own
