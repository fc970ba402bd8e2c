"""Which connections the vector port accepts: tickets, tokens and limits."""

import contextlib
import socket

import numpy as np
import pytest

from hvpd._wire import vector_protocol
from hvpd_server.errors import Code, ServiceError
from hvpd_server.rpc.call_limits import Calls
from hvpd_server.rpc.gate import Gate
from hvpd_server.rpc.streams import Streams
from hvpd_server.rpc.tickets import TICKET_SECONDS, Tickets
from hvpd_server.rpc.vector_port import is_same_host
from tests.support.vector_port import (
    Caller,
    N,
    calling,
    connected,
    ends,
    hears_nothing,
    reason,
)
from tests.support.waiting import until


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
