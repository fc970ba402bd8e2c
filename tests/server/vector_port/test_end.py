"""How the vector port starts and ends."""

import contextlib
from pathlib import Path

import numpy as np
import pytest

from hvpd._wire import vector_socket
from hvpd_server.rpc.call_limits import Arrivals
from hvpd_server.rpc.gate import Gate
from hvpd_server.rpc.products import Products
from hvpd_server.rpc.vector_port import VectorPort
from tests.support.vector_port import (
    Caller,
    N,
    asked,
    by_tcp,
    calling,
    connected,
    ends,
    hears_nothing,
)
from tests.support.waiting import until


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
