"""The vector port's protocol on sockets, plain and with TLS: nothing hangs."""

import contextlib
import socket
import ssl
import threading
import time

import numpy as np
import pytest
import trustme

from hvpd._wire import vector_socket
from hvpd._wire.vector_protocol import CallerEnd, ClosedError, Opened, Opening, Request, ServerEnd, request
from hvpd._wire.vector_socket import Connection
from tests.support.waiting import until

MIB = 1 << 20
PARTS = [bytes([each]) * 16 for each in range(1, 5)]


@pytest.fixture(params=["plain", "tls"])
def pair(request):
    """Yield both ends of an open connection: the caller's and the server's."""
    with contextlib.ExitStack() as stack:
        here, there = (stack.enter_context(end) for end in socket.socketpair())
        if request.param == "tls":
            ca = trustme.CA()
            server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            server.num_tickets = 0
            ca.issue_cert("here").configure_cert(server)
            ca.configure_trust(client)
            wrapped = []
            thread = threading.Thread(target=lambda: wrapped.append(server.wrap_socket(there, server_side=True)))
            thread.start()
            here = stack.enter_context(client.wrap_socket(here, server_hostname="here"))
            thread.join()
            there = stack.enter_context(wrapped[0])
        caller, end = Connection(here, CallerEnd(*PARTS), 30), ServerEnd(PARTS[0])
        served = Connection(there, end, 30)
        thread = threading.Thread(target=vector_socket.open_caller, args=(caller,))
        thread.start()
        served.send(end.greeting)
        assert served.next_event() == Opening(PARTS[1])
        served.send(end.admit(*PARTS[2:]))
        assert served.next_event() == Opened()
        thread.join()
        yield caller, served


@pytest.mark.parametrize("size", [0, 1, 1000, 64 << 10, 65 << 10, 5 * MIB + 1])
def test_head_and_payload_of_any_size_arrive(pair, beside, size):
    here, there = pair
    payload = np.random.default_rng(0).bytes(size)
    beside(here.send, request(b"head", size, 0), payload)
    assert there.next_event() == Request(b"head", size, 0)
    found = bytearray(size)
    there.receive_into(memoryview(found))
    assert found == payload
    assert not there.readable


def test_messages_that_come_together_are_told_apart(pair):
    here, there = pair
    here.send(request(b"first", 100, 0), b"1" * 100)
    here.send(request(b"other", 0, 0))
    there.wait()
    assert there.next_event() == Request(b"first", 100, 0)
    found = bytearray(100)
    there.receive_into(memoryview(found))
    assert found == b"1" * 100
    there.wait()
    assert there.next_event() == Request(b"other", 0, 0)


def test_whether_something_came_is_seen_wherever_it_lies(pair):
    here, there = pair
    assert not there.readable
    here.send(request(b"", 100, 0), b"1" * 100)
    assert there.readable  # In the kernel.
    here.send(request(b"", 0, 0))
    assert there.next_event() == Request(b"", 100, 0)
    there.receive_into(memoryview(bytearray(100)))
    assert there.readable  # In the kernel, in the buffer, or with TLS decrypted already.
    assert there.next_event() == Request(b"", 0, 0)
    there.skip()
    assert not there.readable
    here.send(b"1")
    there.wait()
    assert there.readable  # The byte is in the buffer.
    here.close()
    assert there.readable


def test_an_unwanted_payload_is_skipped(pair, beside):
    here, there = pair
    beside(here.send, request(b"x", 3 * MIB, 0) + b"y" * 3 * MIB, request(b"next", 0, 0))
    assert there.next_event() == Request(b"x", 3 * MIB, 0)
    there.skip()
    assert there.next_event() == Request(b"next", 0, 0)


@pytest.mark.parametrize("call", [Connection.next_event, Connection.wait])
def test_an_end_raises_its_own_error(pair, call):
    here, there = pair
    here.close()
    with pytest.raises(ClosedError, match="closed the connection"):
        call(there)


@pytest.mark.parametrize("call", [Connection.skip, lambda end: end.receive_into(memoryview(bytearray(5)))])
def test_an_end_in_the_middle_of_a_payload_does_too(pair, call):
    here, there = pair
    here.send(request(b"", 5, 0), b"1234")
    here.close()
    assert there.next_event() == Request(b"", 5, 0)
    with pytest.raises(ClosedError, match="closed the connection"):
        call(there)


def test_a_timeout_is_for_a_step_and_a_deadline_for_all(pair, beside):
    """Bytes come now and then: each within the timeout, and all of them too late."""
    here, there = pair
    stop = threading.Event()

    def trickle():
        here.send(request(b"x" * 20, 10_000, 0))
        while not stop.wait(0.01):
            here.send(b"x")

    beside(trickle)
    try:
        there.be_patient(5)
        assert there.next_event() == Request(b"x" * 20, 10_000, 0)
        began = time.monotonic()
        there.deadline = began + 0.2
        with pytest.raises(TimeoutError):
            there.receive_into(memoryview(bytearray(10_000)))
        assert 0.2 <= time.monotonic() - began < 5
    finally:
        stop.set()


def test_a_blocked_send_ends_at_the_timeout(pair):
    here, _ = pair
    here.be_patient(0.1)
    with pytest.raises(TimeoutError):
        here.send(b"head", bytes(64 * MIB))


def test_a_wait_for_new_bytes_has_no_limit(pair, beside):
    here, there = pair
    there.be_patient(0.01)
    waited = threading.Event()
    beside(lambda: (waited.wait(0.1), here.send(request(b"x", 0, 0))))
    there.wait()
    assert there.next_event() == Request(b"x", 0, 0)


def test_another_thread_ends_a_wait_and_the_other_end_sees_it(pair, beside):
    caller, served = pair
    caller.be_patient(60)
    failures = []

    def wait():
        with pytest.raises((OSError, ClosedError)) as caught:
            caller.next_event()
        failures.append(caught.value)

    beside(wait)
    caller.interrupt()
    caller.interrupt()
    with pytest.raises((OSError, ClosedError)):
        served.next_event()
    until(lambda: failures)
    assert not isinstance(failures[0], TimeoutError)


def test_a_unix_socket_is_not_tuned_as_tcp_is(pair):
    vector_socket.tune(pair[0].socket)
    assert pair[0].socket.family == socket.AF_UNIX


def test_connections_are_tuned():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        vector_socket.tune(sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
