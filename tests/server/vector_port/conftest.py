"""The vector port alone, by TCP and by its Unix socket, with an engine that doubles."""

import functools

import pytest

from hvpd_server.rpc.call_limits import Arrivals, Calls, Segments
from hvpd_server.rpc.gate import Gate
from hvpd_server.rpc.products import Products
from hvpd_server.rpc.streams import Streams
from hvpd_server.rpc.vector_port import VectorPort
from hvpd_server.telemetry.metrics import Metrics
from tests.support.vector_port import (
    Engine,
    Waiting,
    by_tcp,
    by_unix_socket,
)


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


@pytest.fixture
def waiting():
    return Waiting()


@pytest.fixture
def patient(opened, waiting, metrics):
    return opened(engine=waiting, products=Products(waiting, metrics, None))


@pytest.fixture
def here(starting):
    return functools.partial(starting, by_unix_socket)
