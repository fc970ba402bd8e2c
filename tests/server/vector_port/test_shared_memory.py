"""Vectors in memory that a client of the vector port shares with the server."""

import mmap
import os
import resource
import socket
from pathlib import Path

import numpy as np
import pytest

from hvpd._wire import segment, vector_protocol
from hvpd.v1 import curvature_pb2
from hvpd_server.rpc.call_limits import Segments
from hvpd_server.rpc.products import Products
from tests.support.vector_port import BIG, N, Objective, asked, by_tcp, calling, ends, reason
from tests.support.waiting import until


def numbers(shared, count):
    return shared.memory[: 8 * count].view(float)


def mapped():
    return Path("/proc/self/maps").read_text().count("memfd:hvpd-vectors")


def test_a_product_is_computed_in_shared_memory(here, engine, monkeypatch):
    given, multiply = [], engine.multiply
    monkeypatch.setattr(engine, "multiply", lambda *args, **rest: given.append(args[2]) or multiply(*args, **rest))
    segments = Segments(1 << 30)
    before = mapped()
    with calling(here(segments=segments)) as caller:
        shared = caller.share(8 * BIG + 100)
        assert segments.held == shared.size
        for value in (1.0, 3.0):
            numbers(shared, BIG)[:] = value
            caller.send_shared(8 * BIG, block=1)
            assert caller.receive_shared() == 8 * BIG
            np.testing.assert_array_equal(numbers(shared, BIG), np.full(BIG, 2 * value))
        base = given[0]
        while not isinstance(base, mmap.mmap):
            base = base.obj if isinstance(base, memoryview) else base.base
        caller.send(np.ones((1, N)))  # Others still come by the socket.
        np.testing.assert_array_equal(caller.receive()[1], np.full((1, N), 2.0))
    del base, shared
    given.clear()
    until(lambda: not segments.held and mapped() <= before)


def test_functions_of_a_client_get_a_copy_that_cannot_change(here, engine, monkeypatch):
    monkeypatch.setattr(Objective, "own_rules", True)
    multiply = engine.multiply

    def changed(*args, **rest):
        numbers(shared, N)[:] = 100
        return multiply(*args, **rest)

    monkeypatch.setattr(engine, "multiply", changed)
    with calling(here()) as caller:
        shared = caller.share(1 << 20)
        numbers(shared, N)[:] = [1, 2, 3]
        caller.send_shared(8 * N)
        assert caller.receive_shared() == 8 * N
        np.testing.assert_array_equal(numbers(shared, N), [2, 4, 6])


def test_refusals_and_quadratic_forms_come_by_the_socket(here):
    with calling(here()) as caller:
        shared = caller.share(1 << 20)
        numbers(shared, 2 * N)[:] = 1
        caller.send_shared(8 * 2 * N, k=2, quadratic_form=True)
        np.testing.assert_array_equal(caller.receive((2,))[1], [2 * N, 2 * N])
        caller.send_shared(8 * 2 * N)
        assert reason(caller.receive()) == "SIZE_MISMATCH"
        caller.send_shared(8 * N, point_id="nowhere")
        assert reason(caller.receive()) == "POINT_NOT_RESIDENT"
        numbers(shared, N)[:] = -1
        caller.send_shared(8 * N)
        assert reason(caller.receive()) == "QUEUE_FULL"
        numbers(shared, N)[:] = 1
        caller.send_shared(8 * N)
        assert caller.receive_shared() == 8 * N


@pytest.mark.parametrize("size", [0, (1 << 28) + 1, 1 << 62, 2**64 - 1])
def test_segments_of_impossible_sizes_are_not_taken(here, size):
    with calling(here()) as caller:
        assert not caller.offer(size)
        asked(caller)


def test_no_segment_is_taken_by_tcp(starting):
    with calling(starting(by_tcp)) as caller:
        assert not caller.offer(1 << 20)
        asked(caller)


def test_segments_are_bounded_and_others_keep_their_share():
    segments = Segments(1000, lambda tenant: 100 if tenant == "small" else None)
    assert segments.largest == 250
    assert [segments.take("one", 250) for _ in range(3)] == [True, True, False]
    assert [segments.take("small", 60), segments.take("small", 60)] == [True, False]
    assert not segments.take("two", 251)
    assert segments.take("two", 250)
    assert segments.held == 810
    assert not segments.take("three", 200)
    segments.give_back("one", 250)
    assert segments.take("three", 200)


def test_a_segment_replaces_an_earlier_one(here):
    segments = Segments(1 << 30)
    with calling(here(segments=segments)) as caller:
        caller.share(1 << 20)
        shared = caller.share(2 << 20)
        assert segments.held == 2 << 20
        assert not caller.offer(1 << 30)  # Now there is none.
        assert segments.held == 0
        numbers(shared, N)[:] = 1
        caller.send_shared(8 * N)
        ends(caller.connection)


@pytest.mark.parametrize("size", [8 * N, 2**64 - 1])
def test_vectors_in_memory_that_is_not_shared_end_the_connection(here, engine, size):
    with calling(here()) as caller:
        caller.send_shared(size)
        ends(caller.connection)
    assert not engine.asked


def test_vectors_that_go_beyond_the_segment_end_the_connection(here, engine):
    with calling(here()) as caller:
        caller.share(100)
        caller.send_shared(8 * BIG, block=1)
        ends(caller.connection)
    assert not engine.asked


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_wrong_descriptors_are_closed_and_the_next_product_comes_by_the_socket(here, tmp_path):
    """There may be none, several, or one of something else."""
    segments = Segments(1 << 30)
    with (tmp_path / "file").open("w+b") as file, calling(here(segments=segments)) as caller:
        asked(caller)
        before = descriptors()
        shared, descriptor = segment.create(1 << 20)
        for sent in ([], [descriptor, descriptor], [descriptor] * 200, [file.fileno()]):
            assert caller.offer(1 << 20)
            socket.send_fds(caller.connection.socket, [b"0"], sent)
            assert not caller.connection.next_event().taken
        os.close(descriptor)
        del shared
        asked(caller)
        assert descriptors() == before
        assert segments.held == 0


def test_descriptors_that_come_unasked_are_closed(here, engine):
    with calling(here()) as caller:
        asked(caller)
        before = descriptors()
        shared, descriptor = segment.create(1 << 20)
        message = curvature_pb2.ProductSpec(operator=curvature_pb2.OPERATOR_HESSIAN, k=1).SerializeToString()
        for _ in range(20):
            said = [vector_protocol.request(message, 8 * N, 0), np.ones(N).tobytes()]
            socket.send_fds(caller.connection.socket, said, [descriptor] * 10)
            caller.receive()
        os.close(descriptor)
        del shared
        assert descriptors() == before


def test_bytes_that_come_before_the_descriptor_end_the_connection(here):
    segments = Segments(1 << 30)
    with calling(here(segments=segments)) as caller:
        caller.connection.send(vector_protocol.offer(1 << 20) + bytes(10))
        assert caller.connection.next_event().taken
        ends(caller.connection)
    until(lambda: not segments.held)


def test_a_descriptor_that_does_not_come_ends_the_connection(here):
    segments = Segments(1 << 30)
    with calling(here(segments=segments, stalled_seconds=0.1)) as caller:
        assert caller.offer(1 << 20)
        ends(caller.connection)
    until(lambda: not segments.held)


def test_a_server_without_free_descriptors_takes_no_segment(here):
    segments = Segments(1 << 30)
    with calling(here(segments=segments)) as caller:
        shared, descriptor = segment.create(1 << 20)
        assert caller.offer(1 << 20)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, limits[1]))
        try:
            caller.connection.send_descriptor(descriptor)
            assert not caller.connection.next_event().taken
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(descriptor)
        del shared
        asked(caller)
        assert segments.held == 0


def test_a_client_that_dies_during_a_product_leaves_no_memory(here, waiting, metrics):
    """The product that waits is cancelled, and its memory goes with the connection."""
    segments = Segments(1 << 30)
    port = here(engine=waiting, products=Products(waiting, metrics, None), segments=segments)
    before = mapped()
    with calling(port) as caller:
        numbers(caller.share(8 * BIG), BIG)[:] = 1
        caller.send_shared(8 * BIG, block=1)
        assert waiting.began.acquire(timeout=30)
        assert mapped() > before
    until(lambda: waiting.cancelled == 1)
    waiting.go_on()
    until(lambda: not segments.held and mapped() <= before)
