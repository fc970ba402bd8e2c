"""Servers are replaced on purpose while others work, one after the other, as systemd
and a StatefulSet do.
"""

import contextlib
import socket
import threading

import numpy as np
import pytest

import hvpd
from tests.support.objectives import quadratic
from tests.support.solves import Solves

SOLVERS = 8
RESTARTS = 3
N = 120
WAIT = 120


@pytest.fixture(scope="module")
def spd():
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))
    return (Q * np.geomspace(1, 1e2, N)) @ Q.T


def test_rolling_restarts_under_load_lose_no_product(serve, spd):
    """Each product of each solve is requested once, and is right. Each server drains,
    and the next one has its store and its port.
    """
    server = serve(supervised=True)
    with hvpd.connect(server.address) as client:
        client.register(quadratic, np.zeros(N), spd, name="rolling", platforms=("cpu",))
    with Solves(server.address, {"rolling": spd}, SOLVERS) as solves:
        for _ in range(RESTARTS):
            solves.wait_for_each()  # With this server.
            stopped = server.lines.count("hvpd: stopped")
            assert server.terminate() == 0
            assert server.lines.count("hvpd: stopped") == stopped + 1
            server.start()
        solves.wait_for_each()
    assert all(asked == had > 0 for asked, had, _ in solves.counts)
    assert sum(retries for _, _, retries in solves.counts) > 0
    assert server.terminate() == 0


class Service:
    """An address like a Kubernetes Service: its connections go to the server that is
    chosen now.
    """

    def __init__(self, port):
        self.port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.port), 5)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                self._sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    @staticmethod
    def _pump(source, target):
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                target.sendall(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture
def replicas(serve):
    """Yield two servers that share nothing, and the address of both."""
    first, second = serve(), serve()
    with contextlib.closing(Service(first.port)) as service:
        yield first, second, service


def test_a_solve_goes_on_at_another_replica_where_the_objective_is_registered_too(replicas, spd):
    first, second, service = replicas
    for each in (first, second):
        with hvpd.connect(each.address) as client:
            client.register(quadratic, np.zeros(N), spd, name="everywhere", platforms=("cpu",))
    with hvpd.connect(service.address, retry_timeout=WAIT) as client:
        H = client.objective("everywhere").at(np.ones(N)).hessian()
        np.testing.assert_allclose(H @ np.ones(N), spd @ np.ones(N), rtol=1e-9)
        service.port = second.port
        assert first.terminate() == 0
        np.testing.assert_allclose(H @ np.ones(N), spd @ np.ones(N), rtol=1e-9)
    assert second.metric("hvpd_products_total") >= 1
    assert second.terminate() == 0


def test_a_solve_ends_clearly_at_a_replica_without_the_objective_unless_it_registers(replicas, spd):
    first, second, service = replicas

    def register(client):
        return client.register(quadratic, np.zeros(N), spd, name="here", platforms=("cpu",))

    with hvpd.connect(service.address, retry_timeout=WAIT) as client:
        H = register(client).at(np.ones(N)).hessian()
        H @ np.ones(N)
        service.port = second.port
        assert first.terminate() == 0
        with pytest.raises(hvpd.NotFoundError):
            H @ np.ones(N)
        H = register(client).at(np.ones(N)).hessian()
        np.testing.assert_allclose(H @ np.ones(N), spd @ np.ones(N), rtol=1e-9)
    assert second.terminate() == 0


def test_other_data_is_sent_again_to_a_server_without_it(replicas, spd):
    """`objective.at(x, *data)` uploads data to one server. At another server the client
    sends the data again by itself.
    """
    first, second, service = replicas
    for each in (first, second):
        with hvpd.connect(each.address) as client:
            client.register(quadratic, np.zeros(N), spd, name="everywhere", platforms=("cpu",))
    with hvpd.connect(service.address, retry_timeout=WAIT) as client:
        objective = client.objective("everywhere")
        H = objective.at(np.ones(N), 2 * spd).hessian()
        H @ np.ones(N)
        service.port = second.port
        assert first.terminate() == 0
        np.testing.assert_allclose(H @ np.ones(N), 2 * spd @ np.ones(N), rtol=1e-9)
    assert second.terminate() == 0
