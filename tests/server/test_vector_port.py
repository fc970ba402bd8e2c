"""The vector port alone, by TCP and by its Unix socket, with an engine that doubles.

Some clients have no ticket, stop half way, or hang up.
"""

import contextlib
import functools
import itertools
import mmap
import os
import resource
import socket
import struct
import threading
import time
import weakref
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from hvpd._wire import segment, vector_protocol, vector_socket
from hvpd._wire.vector_protocol import CallerEnd, ClosedError
from hvpd._wire.vector_socket import Connection, open_caller
from hvpd.v1 import curvature_pb2, objective_pb2
from hvpd_server.errors import Code, ServiceError
from hvpd_server.rpc import vector_connection
from hvpd_server.rpc.call_limits import Arrivals, Calls, Segments
from hvpd_server.rpc.gate import Gate
from hvpd_server.rpc.products import Products
from hvpd_server.rpc.streams import Streams
from hvpd_server.rpc.tickets import TICKET_SECONDS, Tickets
from hvpd_server.rpc.vector_port import VectorPort, is_same_host
from hvpd_server.scheduling import blocks
from hvpd_server.telemetry.metrics import Metrics
from tests.support.waiting import until

N = 3
BIG = 1 << 20  # Number of elements: 8 MiB of float64.


class Objective:
    digest = "d" * 64
    sizes = (N, BIG)
    dtype = np.dtype("float64")
    bundle = objective_pb2.Bundle(blocks=[objective_pb2.Block(leaves=[0])])
    own_rules = False

    def columns(self, program):
        return self.sizes["[" in program]


class Point:
    objective = Objective()


class Engine:
    """An engine that doubles, and notes the tenant. It refuses vectors that begin with
    a negative number.
    """

    busy = False

    def __init__(self):
        self.asked = []
        self.ended = 0

    def record_deferred(self):
        self.ended += 1

    def resident(self, spec, tenant):
        if spec.point_id == "nowhere":
            raise ServiceError(Code.NOT_FOUND, "POINT_NOT_RESIDENT", "not here")
        return Point()

    def point(self, identity, tenant):
        return Point()

    def multiply(self, point, program, vectors, *, tenant, deadline, on_queue, **settings):
        self.asked.append((tenant, settings["priority"], deadline))
        if vectors[0, 0] < 0:
            raise ServiceError(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "full", retry_after=0.5)
        return 2 * vectors, curvature_pb2.ProductInfo(batch_width=len(vectors), program="hvp")


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def streams():
    return Streams(8)


def by_tcp(port):
    return socket.create_connection(("127.0.0.1", port.port), 30)


def by_unix_socket(port):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    try:
        sock.connect(vector_socket.unix_name(port.unix_id))
    except BaseException:
        sock.close()
        raise
    return sock


@pytest.fixture
def starting(engine, metrics, streams):
    """Yield a function that opens ports, to be reached in a way. Each port has ended
    when the test ends, and so have its connections.
    """
    ports = []

    def start(way, **settings):
        common = {"gate": Gate(None, Calls(100)), "engine": engine, "products": Products(engine, metrics, None)}
        common |= {"streams": streams, "arrivals": Arrivals(1 << 30), "metrics": metrics}
        common |= {"segments": Segments(1 << 30)}
        ports.append(VectorPort("127.0.0.1", 0, **common | settings))
        ports[-1].connect = functools.partial(way, ports[-1])
        ports[-1].start()
        return ports[-1]

    yield start
    for port in ports:
        streams.drain()
        port.stop(30)
        assert not port._open
        assert not port._opening
        assert not port._hangups._thread.is_alive()


@pytest.fixture(params=[by_tcp, by_unix_socket], ids=["TCP", "Unix socket"])
def opened(request, starting):
    return functools.partial(starting, request.param)


@pytest.fixture
def port(opened):
    return opened()


@contextlib.contextmanager
def connected(port):
    """Yield a socket whose greeting has come, and is not read yet."""
    with port.connect() as sock:

        def greeted():
            said = sock.recv(vector_protocol.OPENING_BYTES, socket.MSG_PEEK)
            if not said:  # The port accepted it while it ended.
                raise ConnectionError("the port closed the connection")
            return len(said) == vector_protocol.OPENING_BYTES

        until(greeted)
        yield sock


class Caller:
    """A client with a ticket."""

    def __init__(self, sock, port, ticket):
        end = CallerEnd(port.greeting, ticket.id, ticket.server_proof, ticket.client_proof)
        self.connection = Connection(sock, end, 30)
        open_caller(self.connection)

    def send(self, vectors, *, timeout_ns=0, announced=None, **spec):
        message = curvature_pb2.ProductSpec(
            **{"operator": curvature_pb2.OPERATOR_HESSIAN, "k": len(vectors)} | spec
        ).SerializeToString()
        payload = vectors.tobytes()
        size = len(payload) if announced is None else announced
        self.connection.send(vector_protocol.request(message, size, timeout_ns), payload)

    def offer(self, size):
        """Offer a segment; return whether the server takes it."""
        self.connection.send(vector_protocol.offer(size))
        return self.connection.next_event().taken

    def share(self, size):
        """Share a segment; return it."""
        assert self.offer(size)
        found, descriptor = segment.create(size)
        self.connection.send_descriptor(descriptor)
        os.close(descriptor)
        assert self.connection.next_event().taken
        return found

    def send_shared(self, size, **spec):
        """Ask for the product of vectors that the segment has."""
        message = curvature_pb2.ProductSpec(
            **{"operator": curvature_pb2.OPERATOR_HESSIAN, "k": 1} | spec
        ).SerializeToString()
        self.connection.send(vector_protocol.request(message, size, 0, shared=True))

    def receive_shared(self):
        """Return the bytes of the result, which is in the segment."""
        response = self.connection.next_event()
        assert response.shared, status_pb2.Status.FromString(response.message)
        self.connection.skip()
        return response.size

    def receive(self, shape=(1, N)):
        response = self.connection.next_event()
        if response.failed:
            self.connection.skip()
            return status_pb2.Status.FromString(response.message)
        found = np.empty(shape)
        self.connection.receive_into(found.reshape(-1).view("uint8").data)
        return curvature_pb2.ProductInfo.FromString(response.message), found


@contextlib.contextmanager
def calling(port, caller=None):
    with connected(port) as sock:
        yield Caller(sock, port, port.tickets.new(caller, "tenant", "ipv4:10.0.0.1:5000", "request"))


def ends(connection):
    with pytest.raises((ClosedError, ConnectionError)):
        connection.next_event()


def hears_nothing(sock):
    """The server ends the connection, and says nothing more than its greeting."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(1000):
            said += piece
    assert len(said) <= vector_protocol.OPENING_BYTES


def reason(status):
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info.reason


# Products


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


# Clients that hang up, stop, or do not read


class Waiting(Engine):
    """An engine that multiplies when the test says so, or never if the product is
    cancelled.
    """

    def __init__(self):
        super().__init__()
        self.began = threading.Semaphore(0)
        self.changed = threading.Condition()
        self.goes_on = False
        self.cancelled = 0

    def multiply(self, point, program, vectors, *, on_queue, **settings):
        mine = []

        def cancel():
            with self.changed:
                self.cancelled += 1
                mine.append(True)
                self.changed.notify_all()

        on_queue(cancel)
        self.began.release()
        with self.changed:
            assert self.changed.wait_for(lambda: mine or self.goes_on, 30)
        return super().multiply(point, program, vectors, on_queue=on_queue, **settings)

    def go_on(self):
        with self.changed:
            self.goes_on = True
            self.changed.notify_all()


@pytest.fixture
def waiting():
    return Waiting()


@pytest.fixture
def patient(opened, waiting, metrics):
    return opened(engine=waiting, products=Products(waiting, metrics, None))


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


# Shared memory


@pytest.fixture
def here(starting):
    return functools.partial(starting, by_unix_socket)


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


# Waiting for the next product


@pytest.fixture
def looks(monkeypatch):
    """Return how often connections were polled. A poll lasts half a minute here."""
    count = itertools.count()
    readable = Connection.readable.fget
    monkeypatch.setattr(Connection, "readable", property(lambda self: (next(count), readable(self))[1]))
    monkeypatch.setattr(vector_connection, "_SPIN_SECONDS", 30.0)
    return lambda: int(repr(count)[len("count(") : -1])


def asked(caller):
    caller.send(np.ones((1, N)))
    np.testing.assert_array_equal(caller.receive()[1], np.full((1, N), 2))


def test_the_next_product_of_a_quick_lone_client_is_polled_for(port, looks):
    with calling(port) as caller:
        for _ in range(2):  # It is quick, as the second product shows.
            asked(caller)
        until(looks)
        asked(caller)
        seen = looks()
        until(lambda: looks() > seen)


def test_the_next_product_of_a_slow_client_is_not_polled_for(port, looks, monkeypatch):
    monkeypatch.setattr(vector_connection, "_SPIN_SECONDS", 0.0)
    with calling(port) as caller:
        for _ in range(5):
            asked(caller)
    assert not looks()


def test_a_connection_does_not_poll_while_the_engine_is_busy(port, engine, looks):
    engine.busy = True
    with calling(port) as caller:
        for _ in range(5):
            asked(caller)
    assert not looks()


def test_products_that_were_sent_ahead_are_not_polled_for(port, looks):
    with calling(port) as caller:
        for _ in range(20):
            caller.send(np.ones((1, N)))
        for _ in range(20):
            caller.receive()
        until(looks)  # Now nothing comes.


def test_a_connection_does_not_poll_while_another_client_asks(port, looks):
    with calling(port) as caller, calling(port) as other:
        asked(caller)
        asked(caller)
        until(looks)
        asked(other)
        seen = looks()
        for _ in range(5):
            asked(caller)
            asked(other)
        assert looks() <= seen + 1  # One look may have been under way.


def test_a_drain_ends_a_connection_that_polls(port, looks, streams):
    with calling(port) as caller:
        asked(caller)
        asked(caller)
        until(looks)
        streams.drain()
        ends(caller.connection)


# Admission


@pytest.mark.parametrize(
    "opening",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        vector_protocol.MAGIC + bytes(vector_protocol.PROOF_BYTES),
        b"\x16\x03\x01\x02\x00\x01" + bytes(100),
        bytes(10_000),
    ],
)
def test_a_connection_without_a_ticket_is_told_nothing(port, opening):
    with connected(port) as connection:
        connection.send(opening)
        connection.shutdown(socket.SHUT_WR)
        hears_nothing(connection)


def test_a_ticket_is_good_once(port):
    ticket = port.tickets.new(None, "tenant", "peer", "request")
    with connected(port) as connection:
        Caller(connection, port, ticket)
    with connected(port) as connection:
        connection.send(vector_protocol.MAGIC + ticket.id)
        hears_nothing(connection)


def test_the_id_of_a_ticket_is_of_no_use_without_its_proof(port, engine):
    ticket = port.tickets.new(None, "tenant", "peer", "request")
    with connected(port) as connection:
        connection.send(vector_protocol.MAGIC + ticket.id)
        with connection.makefile("rb") as said:
            assert said.read(vector_protocol.OPENING_BYTES) == vector_protocol.MAGIC + port.greeting
            assert said.read(vector_protocol.PROOF_BYTES) == ticket.server_proof
        connection.send(bytes(vector_protocol.PROOF_BYTES))
        hears_nothing(connection)
    assert not engine.asked


def test_tickets_expire():
    now = [0.0]
    tickets = Tickets(lambda: now[0])
    ticket, late = (tickets.new(None, "tenant", "peer", "request") for _ in range(2))
    now[0] = TICKET_SECONDS - 0.1
    assert tickets.use(ticket.id) is ticket
    now[0] = TICKET_SECONDS
    assert tickets.use(late.id) is None


def test_tickets_of_a_tenant_are_bounded_and_others_keep_theirs():
    tickets = Tickets()
    others = tickets.new(None, "other", "peer", "request")
    drawn = [tickets.new(None, "tenant", "peer", "request") for _ in range(100)]
    assert len(tickets._unused) == 65
    assert tickets.use(drawn[35].id) is None
    assert tickets.use(drawn[36].id) is drawn[36]
    assert tickets.use(others.id) is others


def test_tickets_of_all_tenants_are_bounded_and_expired_ones_go_first():
    now = [0.0]
    tickets = Tickets(lambda: now[0])
    old = [tickets.new(None, f"old {index}", "peer", "request") for index in range(3000)]
    now[0] = TICKET_SECONDS - 1
    new = [tickets.new(None, f"new {index}", "peer", "request") for index in range(2000)]
    assert len(tickets._unused) == 4096
    now[0] = TICKET_SECONDS
    tickets.new(None, "last", "peer", "request")
    assert len(tickets._unused) == 2001
    assert tickets.use(old[-1].id) is None
    assert tickets.use(new[0].id) is new[0]


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("ipv4:127.0.0.1:50000", True),
        ("ipv4:127.1.2.3:50000", True),
        ("ipv6:%5B::1%5D:50000", True),
        ("ipv6:[::1]:50000", True),
        ("unix:/run/hvpd", True),
        ("unix:", True),
        ("ipv4:10.0.0.1:50000", False),
        ("ipv6:%5Bfe80::1%25eth0%5D:50000", False),
        ("ipv4:127.0.0.1.example:1", False),
        ("unknown", False),
        ("", False),
    ],
)
def test_clients_of_loopback_are_on_the_servers_machine(peer, expected):
    assert is_same_host(peer) is expected


def test_silent_connections_are_ended_for_new_ones(port):
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(port)) for _ in range(100)]
        with calling(port) as caller:
            caller.send(np.ones((1, N)))
            caller.receive()
        for each in silent[:30]:
            hears_nothing(each)
        assert len(port._opening) <= 64


def test_connections_count_as_calls(opened, streams):
    port = opened(gate=Gate(None, Calls(1)))
    with calling(port) as caller:
        with connected(port) as connection:
            connection.send(vector_protocol.MAGIC + port.tickets.new(None, "tenant", "peer", "request").id)
            hears_nothing(connection)
        caller.send(np.ones((1, N)))
        caller.receive()
        assert streams.count == 1
    until(lambda: not port._open)
    with calling(port) as caller:
        caller.send(np.ones((1, N)))
        caller.receive()


def test_of_too_many_the_one_that_is_idle_for_longest_goes(opened):
    streams = Streams(2)
    port = opened(streams=streams)
    with contextlib.ExitStack() as stack:
        callers = []
        for _ in range(3):
            callers.append(stack.enter_context(calling(port)))
            callers[-1].send(np.ones((1, N)))
            callers[-1].receive()
            until(lambda: not any(stream.busy for stream in streams._open))  # Else the next one may be idle first.
        ends(callers[0].connection)
        for caller in callers[1:]:
            caller.send(np.ones((1, N)))
            caller.receive()


class Token:
    """The token of a call, which can be revoked."""

    right = "use"

    def __init__(self):
        self.grant = type("Grant", (), {"tenant": "vision"})
        self.good = True

    def check(self):
        if not self.good:
            raise ServiceError(Code.UNAUTHENTICATED, "TOKEN_REVOKED", "it was revoked")


def test_a_revoked_token_gets_no_more_products(port, engine):
    token = Token()
    with calling(port, token) as caller:
        caller.send(np.ones((1, N)))
        caller.receive()
        token.good = False
        caller.send(np.ones((1, N)))
        assert reason(caller.receive()) == "TOKEN_REVOKED"
        with connected(port) as connection:
            connection.send(vector_protocol.MAGIC + port.tickets.new(token, "tenant", "peer", "request").id)
            hears_nothing(connection)
    assert len(engine.asked) == 1


# The end


def listens(port):
    try:
        with connected(port):
            return True
    except OSError:
        return False


def test_a_drain_ends_idle_connections_and_waits_for_busy_ones(patient, waiting, streams, start):
    with calling(patient) as idle, calling(patient) as busy:
        busy.send(np.ones((1, N)))
        assert waiting.began.acquire(timeout=30)
        streams.drain()
        ends(idle.connection)
        stopped = start(patient.stop, 30)
        until(lambda: not listens(patient))
        assert not stopped.done()
        waiting.go_on()
        np.testing.assert_array_equal(busy.receive()[1], np.full((1, N), 2.0))
        ends(busy.connection)
        stopped.result(30)


def test_a_connection_that_comes_during_a_drain_is_ended(port, streams, start):
    """The connection has an earlier ticket, and is already connected."""
    with connected(port) as connection:
        until(lambda: port._opening)
        ticket = port.tickets.new(None, "tenant", "peer", "request")
        streams.drain()
        with contextlib.suppress(OSError):
            Caller(connection, port, ticket)
        hears_nothing(connection)
    start(port.stop, 30).result(10)


def test_the_name_of_an_ended_port_is_free_again(here):
    first = here()
    first.stop(30)
    name = f"@{vector_socket.unix_name(first.unix_id)[1:]}"
    until(lambda: name not in Path("/proc/net/unix").read_text())


def test_a_system_without_unix_sockets_has_the_port_alone(starting, monkeypatch, caplog):
    """Some sandboxes forbid them."""

    def forbidden(*args):
        raise PermissionError("not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(vector_socket, "unix_name", forbidden)
        port = starting(by_tcp)
    assert (port.unix_id, port.segment_bytes) == (b"", 0)
    assert "cannot use a Unix socket: not permitted" in caplog.text
    with calling(port) as caller:
        asked(caller)


def test_a_port_that_is_taken_is_an_error(port, engine, metrics, streams):
    with pytest.raises(OSError, match="in use"):
        VectorPort(
            "127.0.0.1",
            port.port,
            gate=Gate(None),
            engine=engine,
            products=Products(engine, metrics, None),
            streams=streams,
            arrivals=Arrivals(1),
            metrics=metrics,
        )
