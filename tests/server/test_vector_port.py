"""The vector port by itself: real sockets, an engine that doubles, and whoever comes without a ticket, stops half way, or hangs up."""

import contextlib
import itertools
import socket
import struct
import threading
import time
import weakref

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from hvpd import _vectors
from hvpd._vectors import ClosedError, Connection
from hvpd.v1 import curvature_pb2, objective_pb2
from hvpd_server import _buffers, _vector_port
from hvpd_server._calls import Arrivals, Calls
from hvpd_server._errors import Code, ServiceError
from hvpd_server._gate import Gate
from hvpd_server._metrics import Metrics
from hvpd_server._products import Products
from hvpd_server._streams import Streams
from hvpd_server._vector_port import TICKET_SECONDS, Tickets, VectorPort

N = 3
BIG = 1 << 20  # Elements: 8 MiB of float64.


class Objective:
    digest = "d" * 64
    sizes = (N, BIG)
    dtype = np.dtype("float64")
    bundle = objective_pb2.Bundle(blocks=[objective_pb2.Block(leaves=[0])])

    def columns(self, program):
        return self.sizes["[" in program]


class Point:
    objective = Objective()


class Engine:
    """Doubles, and notes for whom; refuses what begins with a negative number."""

    busy = False

    def __init__(self):
        self.asked = []
        self.settled = 0

    def settle(self):
        self.settled += 1

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


@pytest.fixture
def opened(engine, metrics, streams):
    """Opens ports; each has ended when the test ends, with all that came in."""
    ports = []

    def start(**settings):
        common = {"gate": Gate(None, Calls(100)), "engine": engine, "products": Products(engine, metrics, None)}
        common |= {"streams": streams, "arrivals": Arrivals(1 << 30), "metrics": metrics}
        ports.append(VectorPort("127.0.0.1", 0, **common | settings))
        ports[-1].start()
        return ports[-1]

    yield start
    for port in ports:
        streams.drain()
        port.stop(30)
        assert not port._open
        assert not port._opening


@pytest.fixture
def port(opened):
    return opened()


@contextlib.contextmanager
def connected(port):
    with socket.create_connection(("127.0.0.1", port.port), 30) as sock:
        connection = Connection(sock, 30)
        assert connection.receive(_vectors.OPENING_BYTES) == _vectors.MAGIC + port.greeting
        yield connection


class Caller:
    """Somebody with a ticket."""

    def __init__(self, connection, ticket):
        self.connection = connection
        connection.send(_vectors.MAGIC + ticket.id)
        assert connection.receive(_vectors.PROOF_BYTES) == ticket.server_proof
        connection.send(ticket.client_proof)

    def send(self, vectors, *, timeout_ns=0, announced=None, **spec):
        message = curvature_pb2.ProductSpec(
            **{"operator": curvature_pb2.OPERATOR_HESSIAN, "k": len(vectors)} | spec
        ).SerializeToString()
        payload = vectors.tobytes()
        size = len(payload) if announced is None else announced
        self.connection.send(_vectors.REQUEST.pack(len(message), 0, size, timeout_ns) + message, payload)

    def receive(self, shape=(1, N)):
        size, kind, count = _vectors.RESPONSE.unpack(self.connection.receive(_vectors.RESPONSE.size))
        message = bytes(self.connection.receive(size))
        if kind == _vectors.FAILED:
            assert count == 0
            return status_pb2.Status.FromString(message)
        found = np.empty(shape)
        assert count == found.nbytes
        self.connection.receive_into(found.reshape(-1).view("uint8").data)
        return curvature_pb2.ProductInfo.FromString(message), found


@contextlib.contextmanager
def calling(port, caller=None):
    with connected(port) as connection:
        yield Caller(connection, port.tickets.new(caller, "tenant", "ipv4:10.0.0.1:5000", "request"))


def until(condition):
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends


def ends(connection):
    with pytest.raises((ClosedError, ConnectionError)):
        connection.wait()


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
    until(lambda: engine.settled == 3)


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
    """No copy lies between the socket's and the device's: what XLA is given is aligned as it wants it."""
    received, given = [], []
    empty, multiply = _buffers.empty, engine.multiply
    monkeypatch.setattr(_buffers, "empty", lambda *args: received.append(empty(*args)) or received[-1])
    monkeypatch.setattr(engine, "multiply", lambda *args, **rest: given.append(args[2]) or multiply(*args, **rest))
    with calling(port) as caller:
        vectors = np.ones((1, Objective.sizes[block]))
        sending = threading.Thread(target=caller.send, args=(vectors,), kwargs={"block": block})
        sending.start()
        caller.receive(vectors.shape)
        sending.join()
    (room,), (array,) = received, given
    assert np.shares_memory(room, array)
    assert array.ctypes.data % _buffers.ALIGNMENT == 0


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


# What is refused, and what goes on


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


def test_what_the_engine_refuses_says_when_to_come_back_and_which_it_was(port, metrics):
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
        caller.connection.send(_vectors.REQUEST.pack(5, 0, 100, 0) + b"\xff" * 5, bytes(100))
        assert reason(caller.receive()) == "MALFORMED_MESSAGE"
        caller.send(np.ones((1, N)))
        np.testing.assert_array_equal(caller.receive()[1], np.full((1, N), 2.0))


@pytest.mark.parametrize("size", [1 << 20, 2**63, 2**64 - 1])
def test_a_size_that_cannot_be_is_refused_before_it_has_come(port, size):
    with calling(port) as caller:
        caller.send(np.ones((1, N)), announced=size)
        assert reason(caller.receive()) == "SIZE_MISMATCH"


def test_what_is_to_be_0_is_0(port, engine):
    with calling(port) as caller:
        message = curvature_pb2.ProductSpec(operator=curvature_pb2.OPERATOR_HESSIAN, k=1).SerializeToString()
        caller.connection.send(_vectors.REQUEST.pack(len(message), 1, 8 * N, 0) + message, bytes(8 * N))
        ends(caller.connection)
    assert not engine.asked


def test_a_spec_of_any_size_is_not_waited_for(port):
    with calling(port) as caller:
        caller.connection.send(_vectors.REQUEST.pack(_vectors.SPEC_BYTES + 1, 0, 0, 0))
        ends(caller.connection)


def test_arrivals_are_counted_while_they_last(opened):
    """Of one who has nothing else there any size is taken; of a second one that is too much it is refused."""
    arrivals = Arrivals(BIG)
    port = opened(arrivals=arrivals)
    block = np.ones((1, BIG))
    with calling(port) as caller, calling(port) as other:
        half = memoryview(block.tobytes())[: 4 * BIG]
        message = curvature_pb2.ProductSpec(operator=curvature_pb2.OPERATOR_HESSIAN, k=1, block=1).SerializeToString()
        caller.connection.send(_vectors.REQUEST.pack(len(message), 0, block.nbytes, 0) + message, half)
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


# Who hangs up, stops, or does not read


class Waiting(Engine):
    """Multiplies when it is told to, or never, where the product is cancelled."""

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


def test_a_product_whose_caller_hangs_up_is_cancelled(patient, waiting):
    with calling(patient) as caller:
        caller.send(np.ones((1, N)))
        assert waiting.began.acquire(timeout=30)
        assert not waiting.cancelled
    until(lambda: waiting.cancelled == 1)


def test_all_of_one_who_dies_are_all_cancelled(opened, waiting, metrics, streams):
    port = opened(engine=waiting, products=Products(waiting, metrics, None), streams=Streams(200))
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            stack.enter_context(calling(port)).send(np.ones((1, N)))
        for _ in range(64):
            assert waiting.began.acquire(timeout=30)
        assert not waiting.cancelled
    until(lambda: waiting.cancelled == 64)


def test_a_product_that_nobody_takes_any_more_is_a_request_all_the_same(patient, waiting, metrics):
    with calling(patient) as caller:
        caller.send(np.ones((1, N)))
        assert waiting.began.acquire(timeout=30)
        # What is closed so is reset at once: the answer cannot leave.
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


def test_who_stops_in_the_middle_of_a_product_is_ended(opened, engine):
    port = opened(stalled_seconds=0.1)
    with calling(port) as caller:
        caller.connection.send(_vectors.REQUEST.pack(0, 0, 100, 0)[:7])
        ends(caller.connection)
    assert not engine.asked


def test_who_does_not_read_is_ended_and_keeps_nobody_waiting(opened):
    port = opened(stalled_seconds=0.2)
    with calling(port) as deaf, calling(port) as other:
        deaf.connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.send(np.ones((1, BIG)), block=1)
        other.send(np.ones((1, N)))
        other.receive()
        until(lambda: port._open == 1)
        other.send(np.ones((1, N)))
        other.receive()


def test_who_has_nothing_to_ask_may_stay(opened):
    """The time is for what has begun."""
    port = opened(stalled_seconds=0.01)
    with calling(port) as caller:
        for _ in range(3):
            assert not threading.Event().wait(0.05)
            caller.send(np.ones((1, N)))
            caller.receive()


def test_nothing_of_a_product_is_kept_when_it_is_answered(port, engine, monkeypatch):
    """A large one would take its memory a second time while the next one comes."""
    made = []
    empty, multiply = _buffers.empty, engine.multiply

    def tracked(shape, dtype):
        array = empty(shape, dtype)
        made.append(weakref.ref(array))
        return array

    def noted(*args, **settings):
        product, info = multiply(*args, **settings)
        made.append(weakref.ref(product))
        return product, info

    monkeypatch.setattr(_buffers, "empty", tracked)
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
        return (vectors if len(lay) == 2 else product), info  # XLA, too, may give back what it was given, as it lies.

    monkeypatch.setattr(engine, "multiply", noted)
    with calling(port) as caller, calling(port) as other:
        for value, factor in ((1, 2), (2, 1), (3, 2)):
            caller.send(np.full((1, N), value, float))
            np.testing.assert_array_equal(caller.receive()[1], np.full((1, N), factor * value))
        other.send(np.ones((1, N)))
        other.receive()
        caller.send(-np.ones((1, N)))  # It is refused: nobody knows who still has its vectors.
        assert caller.receive().code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        caller.send(np.ones((2, N)))
        np.testing.assert_array_equal(caller.receive((2, N))[1], np.full((2, N), 2))
    own, others = [*lay[:3], lay[4]], lay[3]
    assert len(set(own)) == 1
    assert others not in own


# Waiting for the next product


@pytest.fixture
def looks(monkeypatch):
    """How often a connection was looked at by somebody who stays awake, which is for half a minute here."""
    count = itertools.count()
    readable = Connection.readable.fget
    monkeypatch.setattr(Connection, "readable", property(lambda self: (next(count), readable(self))[1]))
    monkeypatch.setattr(_vector_port, "_AWAKE_SECONDS", 30.0)
    return lambda: int(repr(count)[len("count(") : -1])


def asked(caller):
    caller.send(np.ones((1, N)))
    np.testing.assert_array_equal(caller.receive()[1], np.full((1, N), 2))


def test_the_next_product_of_a_lone_caller_who_is_quick_is_awaited_awake(port, looks):
    with calling(port) as caller:
        for _ in range(2):  # Quick, as is seen with the second.
            asked(caller)
        until(looks)
        asked(caller)
        seen = looks()
        until(lambda: looks() > seen)


def test_of_one_who_is_slow_it_is_not(port, looks, monkeypatch):
    monkeypatch.setattr(_vector_port, "_AWAKE_SECONDS", 0.0)
    with calling(port) as caller:
        for _ in range(5):
            asked(caller)
    assert not looks()


def test_nobody_stays_awake_beside_the_products_of_others(port, engine, looks):
    engine.busy = True
    with calling(port) as caller:
        for _ in range(5):
            asked(caller)
    assert not looks()


def test_what_was_sent_ahead_is_not_looked_for(port, looks):
    with calling(port) as caller:
        for _ in range(20):
            caller.send(np.ones((1, N)))
        for _ in range(20):
            caller.receive()
        until(looks)  # Now there is nothing.


def test_nobody_stays_awake_while_somebody_else_asks(port, looks):
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


def test_a_drain_ends_who_is_awaited_awake(port, looks, streams):
    with calling(port) as caller:
        asked(caller)
        asked(caller)
        until(looks)
        streams.drain()
        with pytest.raises(ClosedError):
            caller.connection.receive(1)


# Who is let in


@pytest.mark.parametrize(
    "opening",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        _vectors.MAGIC + bytes(_vectors.PROOF_BYTES),
        b"\x16\x03\x01\x02\x00\x01" + bytes(100),
        bytes(10_000),
    ],
)
def test_who_has_no_ticket_is_told_nothing(port, opening):
    with connected(port) as connection:
        connection.send(opening)
        connection.socket.shutdown(socket.SHUT_WR)
        ends(connection)


def test_a_ticket_is_good_once(port):
    ticket = port.tickets.new(None, "tenant", "peer", "request")
    with connected(port) as connection:
        Caller(connection, ticket)
    with connected(port) as connection:
        connection.send(_vectors.MAGIC + ticket.id)
        ends(connection)


def test_who_knows_the_id_of_a_ticket_and_not_its_proof_is_not_served(port, engine):
    ticket = port.tickets.new(None, "tenant", "peer", "request")
    with connected(port) as connection:
        connection.send(_vectors.MAGIC + ticket.id)
        connection.receive(_vectors.PROOF_BYTES)
        connection.send(bytes(_vectors.PROOF_BYTES))
        ends(connection)
    assert not engine.asked


def test_tickets_expire():
    now = [0.0]
    tickets = Tickets(lambda: now[0])
    ticket, late = (tickets.new(None, "tenant", "peer", "request") for _ in range(2))
    now[0] = TICKET_SECONDS - 0.1
    assert tickets.use(ticket.id) is ticket
    now[0] = TICKET_SECONDS
    assert tickets.use(late.id) is None


def test_nobody_can_have_tickets_without_end_or_take_those_of_others():
    tickets = Tickets()
    others = tickets.new(None, "other", "peer", "request")
    drawn = [tickets.new(None, "tenant", "peer", "request") for _ in range(100)]
    assert len(tickets._unused) == 65
    assert tickets.use(drawn[35].id) is None
    assert tickets.use(drawn[36].id) is drawn[36]
    assert tickets.use(others.id) is others


def test_all_tenants_together_have_so_many_tickets_and_those_that_expired_go_first():
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


def test_those_who_open_and_say_nothing_are_ended_for_those_who_come(port):
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(port)) for _ in range(100)]
        with calling(port) as caller:
            caller.send(np.ones((1, N)))
            caller.receive()
        for each in silent[:30]:
            ends(each)
        assert len(port._opening) <= 64


def test_connections_count_as_calls(opened, streams):
    port = opened(gate=Gate(None, Calls(1)))
    with calling(port) as caller:
        with connected(port) as connection:
            connection.send(_vectors.MAGIC + port.tickets.new(None, "tenant", "peer", "request").id)
            ends(connection)
        caller.send(np.ones((1, N)))
        caller.receive()
        assert streams.count == 1
    until(lambda: not port._open)
    with calling(port) as caller:
        caller.send(np.ones((1, N)))
        caller.receive()


def test_of_too_many_the_one_that_is_idle_goes(opened):
    port = opened(streams=Streams(2))
    with contextlib.ExitStack() as stack:
        callers = []
        for _ in range(3):
            callers.append(stack.enter_context(calling(port)))
            callers[-1].send(np.ones((1, N)))
            callers[-1].receive()
        ends(callers[0].connection)
        for caller in callers[1:]:
            caller.send(np.ones((1, N)))
            caller.receive()


class Token:
    """A caller whose token can be taken away."""

    right = "use"

    def __init__(self):
        self.grant = type("Grant", (), {"tenant": "vision"})
        self.good = True

    def check(self):
        if not self.good:
            raise ServiceError(Code.UNAUTHENTICATED, "TOKEN_REVOKED", "it was revoked")


def test_who_loses_the_token_gets_no_more_products(port, engine):
    token = Token()
    with calling(port, token) as caller:
        caller.send(np.ones((1, N)))
        caller.receive()
        token.good = False
        caller.send(np.ones((1, N)))
        assert reason(caller.receive()) == "TOKEN_REVOKED"
        with connected(port) as connection:
            connection.send(_vectors.MAGIC + port.tickets.new(token, "tenant", "peer", "request").id)
            ends(connection)
    assert len(engine.asked) == 1


# The end


def listens(port):
    try:
        with connected(port):
            return True
    except OSError:
        return False


def test_a_drain_ends_who_is_idle_and_waits_for_who_is_not(patient, waiting, streams, start):
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


def test_who_comes_while_it_drains_is_sent_away(port, streams, start):
    """With a ticket that was made before, and already connected."""
    with connected(port) as connection:
        until(lambda: port._opening)
        ticket = port.tickets.new(None, "tenant", "peer", "request")
        streams.drain()
        with contextlib.suppress(OSError):
            Caller(connection, ticket)
        ends(connection)
    start(port.stop, 30).result(10)


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
