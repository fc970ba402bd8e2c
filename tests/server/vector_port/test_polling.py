"""When a connection of the vector port polls for the next product."""

import itertools

import numpy as np
import pytest

from hvpd._wire.vector_socket import Connection
from hvpd_server.rpc import vector_connection
from tests.support.vector_port import N, asked, calling, ends
from tests.support.waiting import until


@pytest.fixture
def looks(monkeypatch):
    """Return how often connections were polled. A poll lasts half a minute here."""
    count = itertools.count()
    readable = Connection.readable.fget
    monkeypatch.setattr(Connection, "readable", property(lambda self: (next(count), readable(self))[1]))
    monkeypatch.setattr(vector_connection, "_SPIN_SECONDS", 30.0)
    return lambda: int(repr(count)[len("count(") : -1])


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
