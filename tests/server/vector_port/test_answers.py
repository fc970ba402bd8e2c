"""Products by the vector port, and refusals of what cannot be a product."""

import threading
import time

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

from hvpd._wire import vector_protocol
from hvpd.v1 import curvature_pb2
from hvpd_server.rpc.call_limits import Arrivals
from hvpd_server.scheduling import blocks
from tests.support.vector_port import BIG, N, Objective, calling, ends, reason
from tests.support.waiting import until


def test_products_come_back_one_after_the_other(port, engine):
    with calling(port) as caller:
        for k, priority in ((1, 0), (4, 7), (1, -100)):
            block = np.arange(1.0, 1 + k * N).reshape(k, N)
            caller.send(block, priority=priority)
            info, found = caller.receive(block.shape)
            np.testing.assert_array_equal(found, 2 * block)
            assert (info.batch_width, info.program) == (k, "hvp")
    assert [(tenant, priority) for tenant, priority, _ in engine.asked] == [
        ("tenant", 0),
        ("tenant", 7),
        ("tenant", -100),
    ]
    until(lambda: engine.ended == 3)


def test_large_ones_do_too(port):
    with calling(port) as caller:
        block = np.random.default_rng(0).normal(size=(1, BIG))
        sending = threading.Thread(target=caller.send, args=(block,), kwargs={"block": 1})
        sending.start()
        _, found = caller.receive(block.shape)
        sending.join()
        np.testing.assert_array_equal(found, 2 * block)


@pytest.mark.parametrize("block", [0, 1])
def test_a_vector_is_computed_where_it_was_received(port, engine, monkeypatch, block):
    """The device gets the memory that the socket filled, aligned as XLA wants it."""
    received, given = [], []
    empty, multiply = blocks.empty, engine.multiply
    monkeypatch.setattr(blocks, "empty", lambda *args: received.append(empty(*args)) or received[-1])
    monkeypatch.setattr(engine, "multiply", lambda *args, **rest: given.append(args[2]) or multiply(*args, **rest))
    with calling(port) as caller:
        vectors = np.ones((1, Objective.sizes[block]))
        sending = threading.Thread(target=caller.send, args=(vectors,), kwargs={"block": block})
        sending.start()
        caller.receive(vectors.shape)
        sending.join()
    (room,), (array,) = received, given
    assert np.shares_memory(room, array)
    assert array.ctypes.data % blocks.ALIGNMENT == 0


def test_a_quadratic_form_is_numbers(port):
    with calling(port) as caller:
        caller.send(np.ones((2, N)), quadratic_form=True)
        _, found = caller.receive((2,))
        np.testing.assert_array_equal(found, [2 * N, 2 * N])


def test_products_sent_ahead_are_answered_in_turn(port):
    with calling(port) as caller:
        for number in range(1, 21):
            caller.send(np.full((1, N), float(number)))
        for number in range(1, 21):
            np.testing.assert_array_equal(caller.receive()[1], np.full((1, N), 2.0 * number))


def test_the_time_that_a_caller_has_is_a_deadline(port, engine):
    with calling(port) as caller:
        before = time.monotonic()
        for timeout_ns in (10**9, 0):
            caller.send(np.ones((1, N)), timeout_ns=timeout_ns)
            caller.receive()
    (_, _, soon), (_, _, never) = engine.asked
    assert before + 1 <= soon <= time.monotonic() + 1
    assert never == float("inf")


# Refusals


@pytest.mark.parametrize(
    ("spec", "announced", "expected"),
    [
        ({}, N * 8 - 1, "SIZE_MISMATCH"),
        ({}, 0, "SIZE_MISMATCH"),
        ({"k": 2}, None, "SIZE_MISMATCH"),
        ({"point_id": "nowhere"}, None, "POINT_NOT_RESIDENT"),
        ({"point_id": "nowhere", "k": 1000}, None, "POINT_NOT_RESIDENT"),
    ],
)
def test_a_product_that_cannot_be_is_refused_and_the_next_one_is_made(port, engine, spec, announced, expected):
    with calling(port) as caller:
        vectors = np.ones((1, N)) if announced is None else np.frombuffer(bytes(announced), np.uint8)
        caller.send(vectors, announced=announced, **{"k": 1} | spec)
        status = caller.receive()
        assert reason(status) == expected
        caller.send(np.ones((1, N)))
        np.testing.assert_array_equal(caller.receive()[1], np.full((1, N), 2.0))
    assert len(engine.asked) == 1


def test_a_refusal_has_the_time_of_a_retry_and_the_request_id(port, metrics):
    with calling(port) as caller:
        caller.send(np.ones((1, N)))
        caller.receive()
        caller.send(np.full((1, N), -1.0))
        status = caller.receive()
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    retry, request = error_details_pb2.RetryInfo(), error_details_pb2.RequestInfo()
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay.ToNanoseconds() == 500_000_000
    assert status.details[2].Unpack(request)
    assert request.request_id == "request/2"
    failed = {
        sample.labels["reason"]: sample.value for sample in samples(metrics, "hvpd_failures_total") if sample.value
    }
    assert failed == {"QUEUE_FULL": 1}


def samples(metrics, name):
    return [each for family in metrics.registry.collect() for each in family.samples if each.name == name]


def test_bytes_that_are_no_spec_are_refused_and_the_next_product_is_made(port):
    with calling(port) as caller:
        caller.connection.send(vector_protocol.request(b"\xff" * 5, 100, 0), bytes(100))
        assert reason(caller.receive()) == "MALFORMED_MESSAGE"
        caller.send(np.ones((1, N)))
        np.testing.assert_array_equal(caller.receive()[1], np.full((1, N), 2.0))


@pytest.mark.parametrize("size", [1 << 20, 2**63, 2**64 - 1])
def test_a_size_that_cannot_be_is_refused_before_it_has_come(port, size):
    with calling(port) as caller:
        caller.send(np.ones((1, N)), announced=size)
        assert reason(caller.receive()) == "SIZE_MISMATCH"


def test_a_request_of_an_unknown_kind_ends_the_connection(port, engine):
    with calling(port) as caller:
        message = curvature_pb2.ProductSpec(operator=curvature_pb2.OPERATOR_HESSIAN, k=1).SerializeToString()
        caller.connection.send(vector_protocol.REQUEST.pack(len(message), 3, 8 * N, 0) + message, bytes(8 * N))
        ends(caller.connection)
    assert not engine.asked


def test_a_spec_of_any_size_is_not_waited_for(port):
    with calling(port) as caller:
        caller.connection.send(vector_protocol.REQUEST.pack(vector_protocol.SPEC_BYTES + 1, 0, 0, 0))
        ends(caller.connection)


def test_arrivals_are_counted_while_they_last(opened):
    """The first product may have any size. The second is refused if it is too much."""
    arrivals = Arrivals(BIG)
    port = opened(arrivals=arrivals)
    block = np.ones((1, BIG))
    with calling(port) as caller, calling(port) as other:
        half = memoryview(block.tobytes())[: 4 * BIG]
        message = curvature_pb2.ProductSpec(operator=curvature_pb2.OPERATOR_HESSIAN, k=1, block=1).SerializeToString()
        caller.connection.send(vector_protocol.request(message, block.nbytes, 0), half)
        until(lambda: arrivals.held().get("tenant"))
        sending = threading.Thread(target=other.send, args=(block,), kwargs={"block": 1})
        sending.start()
        assert reason(other.receive()) == "ARRIVALS_FULL"
        sending.join()
        caller.connection.close()
        until(lambda: not arrivals.held())
        sending = threading.Thread(target=other.send, args=(block,), kwargs={"block": 1})
        sending.start()
        other.receive(block.shape)
        sending.join()
        until(lambda: not arrivals.held())
