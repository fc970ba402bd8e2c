"""The vector port under any bytes that strangers and faulty callers may send. It serves
others meanwhile, and leaks nothing.
"""

import contextlib
import random
import socket
import struct
import threading
from pathlib import Path

import grpc
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hvpd
from hvpd._wire import vector_protocol
from hvpd._wire.vector_protocol import CallerEnd, ServerEnd
from hvpd._wire.vector_socket import Connection, open_caller, unix_name
from hvpd.v1 import curvature_pb2, curvature_pb2_grpc
from tests.support.waiting import until

N = 30
X = np.arange(1.0, N + 1)


@pytest.fixture(scope="module")
def server(serve_module):
    """Start a server for this module alone, because its open descriptors are
    counted.
    """
    return serve_module()


@pytest.fixture(scope="module")
def point(server):
    with hvpd.connect(server.address) as client:
        yield client.register(lambda x: jnp.sum(x**4) / 12, X).at(X)


@pytest.fixture(scope="module")
def neighbour(point):
    """Run a neighbour that multiplies past gRPC all the while."""
    H, pool = point.hessian(), point.objective._transport._vectors
    until(lambda: np.array_equal(H @ np.ones(N), X**2) and pool.ready)

    def check():
        assert pool.ready
        assert np.array_equal(H @ np.ones(N), X**2)

    return check


@pytest.fixture(scope="module")
def ticket(server):
    """Yield a function that gets tickets, as a caller does."""
    with grpc.insecure_channel(server.address) as channel:
        stub = curvature_pb2_grpc.CurvatureServiceStub(channel)
        yield lambda: stub.CreateVectorTicket(curvature_pb2.CreateVectorTicketRequest())


def descriptors(server):
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def by_tcp(given):
    return socket.create_connection(("127.0.0.1", given.port), 30)


def by_unix_socket(given):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(unix_name(given.unix_id))
    return sock


@contextlib.contextmanager
def connected(ticket, reach=by_unix_socket):
    """Yield a connection that is let in."""
    given = ticket()
    with reach(given) as sock:
        end = CallerEnd(given.greeting, given.id, given.server_proof, given.client_proof)
        connection = Connection(sock, end, 30)
        open_caller(connection)
        yield connection


def until_the_end(sock):
    """Read all answers until the connection ends."""
    sock.shutdown(socket.SHUT_WR)
    with contextlib.suppress(OSError):
        while sock.recv(1 << 16):
            pass


@settings(settings.get_profile("fuzz-calls"))
@given(
    reach=st.sampled_from([by_tcp, by_unix_socket]),
    said=st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda junk: vector_protocol.MAGIC + junk)),
)
def test_strangers_may_say_anything(server, neighbour, ticket, tried, reach, said):
    tried("openings of the vector port of any bytes")
    with reach(ticket()) as sock:
        sock.sendall(said)
        until_the_end(sock)
    neighbour()


SPECS = st.one_of(
    st.binary(max_size=80),
    st.builds(
        lambda **fields: curvature_pb2.ProductSpec(**fields).SerializeToString(),
        point_id=st.sampled_from(["", "0" * 64, "?"]),
        operator=st.integers(-1, 7),
        k=st.sampled_from([-1, 0, 1, 2, 64, 65, 2**31 - 1]),
        block=st.integers(-2, 2),
        priority=st.sampled_from([0, 100, -101, 2**31 - 1]),
        quadratic_form=st.booleans(),
        seed=st.sampled_from([0, 2**64 - 1]),
        traceparent=st.text(max_size=60),
    ),
)
SIZES = st.sampled_from([0, 1, 8 * N - 1, 8 * N, 8 * N + 1, 1 << 20, 1 << 32, 2**64 - 1])


@settings(settings.get_profile("fuzz-calls"))
@given(
    spec=SPECS,
    real=st.booleans(),
    announced=st.one_of(st.none(), st.integers(0, 2**32 - 1)),
    kind=st.one_of(st.integers(0, 2), st.integers(0, 2**32 - 1)),
    size=SIZES,
    wait=st.sampled_from([0, 1, 10**9, 2**64 - 1]),
    payload=st.binary(max_size=8 * N),
)
@example(spec=b"", real=True, announced=None, kind=0, size=8 * N, wait=0, payload=bytes(8 * N))
@example(spec=b"", real=True, announced=None, kind=1, size=8 * N, wait=0, payload=b"")
@example(spec=b"", real=False, announced=None, kind=2, size=8 * N, wait=0, payload=bytes(8 * N))
@example(spec=b"", real=True, announced=None, kind=0, size=2**64 - 1, wait=1, payload=bytes(8 * N))
def test_callers_may_ask_for_anything(
    server, neighbour, ticket, point, tried, spec, real, announced, kind, size, wait, payload
):
    """Requests may also be nearly right, of a point that exists."""
    tried("products of the vector port of any bytes")
    if real:
        spec += curvature_pb2.ProductSpec(point_id=point._id, operator=1, k=1).SerializeToString()
    with connected(ticket) as connection, contextlib.suppress(OSError):
        head = vector_protocol.REQUEST.pack(len(spec) if announced is None else announced, kind, size, wait)
        connection.send(head + spec, payload)
        until_the_end(connection.socket)
    neighbour()
    assert server.process.poll() is None


@settings(settings.get_profile("fuzz-calls"))
@given(said=st.binary(max_size=400))
def test_callers_may_send_anything(server, neighbour, ticket, tried, said):
    tried("products of the vector port of any bytes")
    with connected(ticket) as connection, contextlib.suppress(OSError):
        connection.send(said)
        until_the_end(connection.socket)
    neighbour()


def test_nothing_of_them_stays(server, neighbour, ticket, point, tried):
    neighbour()
    before = descriptors(server)
    spec = curvature_pb2.ProductSpec(point_id=point._id, operator=1, k=1).SerializeToString()
    for index in range(300):
        with connected(ticket) as connection:
            connection.send(
                (vector_protocol.request(spec, 8 * N, 0) + random.Random(index).randbytes(8 * N))[: 2 * index]
            )
    tried("products of the vector port that are broken off", 300)
    until(lambda: descriptors(server) <= before)
    until(lambda: server.metric("hvpd_open_streams") <= 2)
    neighbour()


def test_a_thousand_silent_connections(server, neighbour, ticket, tried):
    before, port = descriptors(server), ticket().port
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 30)) for _ in range(1000)]
        tried("connections that say nothing", len(opened))
        for _ in range(20):
            neighbour()
        with connected(ticket):  # A newcomer is let in.
            neighbour()
        until(lambda: descriptors(server) < before + 200)
    until(lambda: descriptors(server) <= before)
    neighbour()


class Lying:
    """A server's vector port that answers products as it likes."""

    def __init__(self, answer):
        self._answer = answer
        self.listener = socket.create_server(("127.0.0.1", 0))

    def serve(self, ticket):
        with self.listener, contextlib.suppress(OSError):
            sock, _ = self.listener.accept()
            with sock:
                end = ServerEnd(ticket.greeting)
                connection = Connection(sock, end, 30)
                connection.send(end.greeting)
                connection.next_event()
                connection.send(end.admit(ticket.server_proof, ticket.client_proof))
                connection.next_event()
                connection.next_event()
                connection.send(self._answer)
                until_the_end(sock)


INFO = curvature_pb2.ProductInfo(batch_width=1).SerializeToString()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", None),
        (b"\0" * 7, None),
        (struct.pack("<IIQ", len(INFO), 0, 8 * N) + INFO + bytes(8 * N - 1), None),
        (struct.pack("<IIQ", 2**32 - 1, 0, 8 * N), "a message of 4294967295 bytes, of at most 65536"),
        (struct.pack("<IIQ", len(INFO), 0, 2**64 - 1) + INFO, f"the result has {2**64 - 1} bytes, expected 240"),
        (struct.pack("<IIQ", len(INFO), 0, 0) + INFO, "the result has 0 bytes, expected 240"),
        (struct.pack("<IIQ", 5, 7, 8 * N) + b"\xff" * 5 + bytes(8 * N), "kind 7"),
        (struct.pack("<IIQ", 5, 0, 8 * N) + b"\xff" * 5 + bytes(8 * N), "answer cannot be read"),
        (struct.pack("<IIQ", 5, 1, 0) + b"\xff" * 5, "answer cannot be read"),
        (struct.pack("<IIQ", 0, 1, 8 * N) + bytes(8 * N), "kind 1, and 240 bytes of result"),
        (struct.pack("<IIQ", len(INFO), 2, 8 * N) + INFO, "shared memory, which this product does not have"),
        (struct.pack("<IIQ", 0, 3, 1), "an offer is answered that was not made"),
    ],
)
def test_a_server_that_lies_there_is_an_error_and_one_that_goes_away_is_asked_again(
    server, tried, answer, says, monkeypatch
):
    tried("products of a server that lies")
    lying = Lying(answer)
    with hvpd.connect(server.address, retry_timeout=20) as client:
        client._transport._vectors.unix = False
        H, transport = client.register(lambda x: jnp.sum(x**4) / 12, X).at(X).hessian(), client._transport
        create, connect, tickets = transport.channel.create_vector_ticket, socket.create_connection, []

        def noted(request, **settings):
            tickets.append(create(request, **settings))
            return tickets[-1]

        def elsewhere(address, *rest):
            monkeypatch.setattr(socket, "create_connection", connect)
            threading.Thread(target=lying.serve, args=(tickets[-1],), daemon=True).start()
            return connect(lying.listener.getsockname(), *rest)

        monkeypatch.setattr(transport.channel, "create_vector_ticket", noted)
        monkeypatch.setattr(socket, "create_connection", elsewhere)
        assert np.array_equal(H @ np.ones(N), X**2)
        until(lambda: transport._vectors.ready)
        with pytest.raises(hvpd.HvpdError, match=says) if says else contextlib.nullcontext():
            assert np.array_equal(H @ np.ones(N), X**2)
        assert np.array_equal(H @ np.ones(N), X**2)
