"""A client whose server lies: nothing goes to other services, every call ends, and each lie that costs the caller its result is an HvpdError."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

import hvpd
from hvpd import _vectors
from hvpd.v1 import curvature_pb2, server_pb2
from tests.fuzz.liar import Liar, N, X

PART = b"chosen by a liar"
assert len(PART) == _vectors.PROOF_BYTES


class Listener:
    """Another service on the client's machine: says what it is told to when somebody connects, and notes what it receives."""

    def __init__(self, banner=b""):
        self._banner = banner
        self.connections = 0
        self.received = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                other, _ = self._socket.accept()
                self.connections += 1
                with other, contextlib.suppress(OSError):
                    other.sendall(self._banner)
                    while piece := other.recv(1000):
                        self.received += piece

    def close(self):
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(30)


class Tunnelled(Liar):
    """A liar that states ports as if the client's own address were its own, which it is told in each call."""

    def __init__(self):
        super().__init__()
        self.vector_port = 0
        self.ticket = curvature_pb2.CreateVectorTicketResponse()
        self.port = 0

    def honest(self, method, requests):
        if method == "GetServer":
            yield server_pb2.GetServerResponse(
                min_protocol=1,
                max_protocol=1,
                platform="cpu",
                max_block_width=64,
                port=self.port,
                vector_port=self.vector_port,
            ).SerializeToString()
        elif method == "CreateVectorTicket":
            yield self.ticket.SerializeToString()
        else:
            yield from super().honest(method, requests)


@pytest.fixture
def liar():
    handler, server = Tunnelled(), grpc.server(ThreadPoolExecutor(16))
    server.add_generic_rpc_handlers((handler,))
    handler.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield handler
    server.stop(None).wait()


@pytest.fixture
def connect(liar):
    """Connects clients that wait a minute for each call: a call that hangs is a DeadlineError, which no test here expects."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(
            hvpd.connect(f"127.0.0.1:{liar.port}", **{"retry_timeout": 0.01, "timeout": 60.0} | settings)
        )


@pytest.fixture
def listening():
    """Makes listeners, which end with the test."""
    with contextlib.ExitStack() as stack:

        def listen(banner=b""):
            listener = Listener(banner)
            stack.callback(listener.close)
            return listener

        yield listen


def tried(client, liar):
    """Multiply until the client has asked for a ticket and done with it what it will."""
    H = client.objective("quartic").at(X).hessian()
    ends = time.monotonic() + 30
    while not liar.asked["CreateVectorTicket"] or client._transport._vectors._opening:
        np.testing.assert_array_equal(H @ np.ones(N), X**2)
        assert time.monotonic() < ends
    np.testing.assert_array_equal(H @ np.ones(N), X**2)
    return client._transport._vectors.ready


def ticket(port, **parts):
    whole = {"greeting": PART, "id": PART, "server_proof": PART, "client_proof": PART}
    return curvature_pb2.CreateVectorTicketResponse(port=port, valid_seconds=30, **whole | parts)


# The vector port


def test_no_vector_port_is_used_past_a_proxy_of_the_environment(liar, connect, monkeypatch):
    transport = connect()._transport
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    transport._local = False
    assert not transport._proxied("gpu-box")
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    assert transport._proxied("gpu-box")
    monkeypatch.setenv("no_proxy", "gpu-box")
    assert not transport._proxied("gpu-box")


@pytest.mark.parametrize(
    ("banner", "parts"),
    [
        (b"", {"id": b"\r\nFLUSHALL\r\n" * 1000}),
        (b"", {"greeting": b"", "id": b"\r\nFLUSHALL\r\n" * 1000}),
        (b"", {"greeting": b""}),
        (b"220 mail.example ", {"greeting": b"220 mail.example "}),
        (b"220 mail.example ESMTP server", {"greeting": b"220 mail.example"}),
        (PART + PART + PART, {}),
        (_vectors.MAGIC + bytes(_vectors.PROOF_BYTES), {}),
        (_vectors.MAGIC + PART, {"id": PART * 2}),
        (_vectors.MAGIC + PART, {"id": b""}),
        (_vectors.MAGIC + PART, {"server_proof": b""}),
        (_vectors.MAGIC + PART, {"client_proof": PART * 1000}),
    ],
)
def test_a_service_that_a_ticket_points_at_receives_nothing(liar, connect, listening, monkeypatch, banner, parts):
    monkeypatch.setattr(
        "hvpd._vector_pool._OPENING_SECONDS", 1.0
    )  # A service that waits for the client to speak first.
    listener = listening(banner)
    liar.vector_port, liar.ticket = listener.port, ticket(listener.port, **parts)
    assert not tried(connect(), liar)
    listener.close()
    assert listener.received == b""
    assert listener.connections == all(len(part) == _vectors.PROOF_BYTES for part in parts.values())


def test_a_listener_that_knows_the_greeting_and_not_the_proof_receives_no_secret_and_no_vector(
    liar, connect, listening
):
    listener = listening(_vectors.MAGIC + PART + bytes(_vectors.PROOF_BYTES))
    liar.vector_port, liar.ticket = listener.port, ticket(listener.port)
    assert not tried(connect(), liar)
    listener.close()
    assert listener.received == _vectors.MAGIC + PART


def test_a_port_that_the_server_does_not_state_is_not_connected_to(liar, connect, listening):
    stated, other = listening(), listening(_vectors.MAGIC + PART)
    liar.vector_port, liar.ticket = stated.port, ticket(other.port)
    assert not tried(connect(), liar)
    for listener in (stated, other):
        listener.close()
        assert listener.connections == 0


@pytest.mark.parametrize("port", [-1, 0, 65536, 65536 + 22, 2**31 - 1, -(2**31)])
def test_a_port_that_is_none_is_not_connected_to(liar, connect, port):
    client = connect()
    liar.vector_port, liar.ticket = port, ticket(port)
    client._transport._vectors.offered = True  # As if the first answer had been another.
    assert not tried(client, liar)


def test_past_a_tunnel_there_is_no_vector_port(liar, connect, listening):
    """The client's port is another than the one that the server states."""
    listener = listening(_vectors.MAGIC + PART)
    client = connect()
    liar.vector_port, liar.ticket, liar.port = listener.port, ticket(listener.port), 1
    with pytest.raises(ConnectionError, match="not for the vector port that the server states"):
        client._transport._ticket(30)
    assert listener.connections == 0
