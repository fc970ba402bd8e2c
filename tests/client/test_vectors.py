"""What goes over the vector port: every byte, in whatever pieces it comes, and nothing that hangs."""

import contextlib
import os
import socket
import ssl
import threading
import time

import numpy as np
import pytest
import trustme

from hvpd import _vectors
from hvpd._vectors import ClosedError, Connection

MIB = 1 << 20


@pytest.fixture(params=["plain", "tls"])
def pair(request):
    """Both ends of a connection."""
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(end) for end in socket.socketpair()]
        if request.param == "tls":
            ca = trustme.CA()
            server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            server.num_tickets = 0
            ca.issue_cert("here").configure_cert(server)
            ca.configure_trust(client)
            wrapped = []
            thread = threading.Thread(target=lambda: wrapped.append(server.wrap_socket(ends[0], server_side=True)))
            thread.start()
            secure = stack.enter_context(client.wrap_socket(ends[1], server_hostname="here"))
            thread.join()
            ends = [stack.enter_context(wrapped[0]), secure]
        yield [Connection(end, 30) for end in ends]


@pytest.mark.parametrize("size", [0, 1, 1000, 64 << 10, 65 << 10, 5 * MIB + 1])
def test_head_and_payload_arrive_whatever_their_size(pair, beside, size):
    here, there = pair
    payload = np.random.default_rng(0).bytes(size)
    beside(here.send, b"head", payload)
    assert bytes(there.receive(4)) == b"head"
    found = bytearray(size)
    there.receive_into(memoryview(found))
    assert found == payload
    assert not there.pending


def test_messages_that_come_together_are_told_apart(pair):
    here, there = pair
    here.send(b"first", b"1" * 100)
    here.send(b"other", b"2" * 100)
    there.wait()
    assert bytes(there.receive(5)) == b"first"
    found = bytearray(100)
    there.receive_into(memoryview(found))
    assert found == b"1" * 100
    there.wait()
    assert bytes(there.receive(105)) == b"other" + b"2" * 100


def test_messages_that_come_byte_by_byte_are_put_together(pair, beside):
    here, there = pair
    said = os.urandom(50)

    def send():
        for index in range(len(said)):
            here.send(said[index : index + 1])

    beside(send)
    found = bytearray(20)
    assert bytes(there.receive(30)) == said[:30]
    there.receive_into(memoryview(found))
    assert found == said[30:]


def test_whether_something_came_is_seen_wherever_it_lies(pair):
    here, there = pair
    assert not there.readable
    here.send(b"123", b"4" * 100)
    assert there.readable  # In the kernel.
    assert bytes(there.receive(1)) == b"1"
    assert there.readable  # Among what was not asked for yet.
    there.receive_into(memoryview(bytearray(102)))
    assert not there.readable
    here.send(b"56", b"7" * 100)
    there.receive_into(memoryview(bytearray(1)))
    assert there.readable  # In the kernel, or with TLS decrypted already.
    there.receive_into(memoryview(bytearray(101)))
    assert not there.readable
    here.close()
    assert there.readable


def test_what_does_not_fit_behind_what_came_before_is_moved(pair, beside):
    """A large message behind the rest of another: the room is used from its beginning again."""
    here, there = pair
    said = os.urandom(60_000 + _vectors.SPEC_BYTES)
    beside(here.send, said)
    position = 0
    for size in (59_000, 1_000, _vectors.SPEC_BYTES):
        assert bytes(there.receive(size)) == said[position : position + size]
        position += size


def test_what_nobody_wants_is_skipped(pair, beside):
    here, there = pair
    beside(here.send, b"x" * 10, b"y" * 3 * MIB)
    there.skip(10 + 3 * MIB - 1)
    assert bytes(there.receive(1)) == b"y"


@pytest.mark.parametrize("call", [lambda end: end.receive(1), lambda end: end.wait(), lambda end: end.skip(1)])
def test_an_end_is_said_as_one(pair, call):
    here, there = pair
    here.close()
    with pytest.raises(ClosedError, match="closed the connection"):
        call(there)


def test_an_end_in_the_middle_is_too(pair):
    here, there = pair
    here.send(b"1234")
    here.close()
    with pytest.raises(ClosedError):
        there.receive_into(memoryview(bytearray(5)))


def test_a_timeout_is_for_a_step_and_a_deadline_for_all(pair, beside):
    """A byte comes now and again: within the timeout each, and too late in the end."""
    here, there = pair
    stop = threading.Event()

    def trickle():
        while not stop.wait(0.01):
            here.send(b"x")

    beside(trickle)
    try:
        there.be_patient(5)
        assert bytes(there.receive(20)) == b"x" * 20
        began = time.monotonic()
        there.deadline = began + 0.2
        with pytest.raises(TimeoutError):
            there.receive(10_000)
        assert 0.2 <= time.monotonic() - began < 5
    finally:
        stop.set()


def test_who_takes_nothing_is_not_waited_for_beyond_the_timeout(pair):
    here, _ = pair
    here.be_patient(0.1)
    with pytest.raises(TimeoutError):
        here.send(b"head", bytes(64 * MIB))


def test_who_waits_for_something_new_waits_as_long_as_it_takes(pair, beside):
    here, there = pair
    there.be_patient(0.01)
    waited = threading.Event()
    beside(lambda: (waited.wait(0.1), here.send(b"x")))
    there.wait()
    assert bytes(there.receive(1)) == b"x"


def test_connections_are_tuned():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        _vectors.tune(sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
