"""Three servers with one store, and servers that a test may stop."""

import pytest

from tests.support.fleet import register, spd_matrix
from tests.support.serving import Serving


@pytest.fixture(scope="session")
def spd():
    return spd_matrix()


@pytest.fixture(scope="session")
def three(tmp_path_factory, zygotes, spd):
    """Yield three servers with one store and an objective "fleet". No test stops
    them.
    """
    store = tmp_path_factory.mktemp("store")
    servers = [Serving(store, zygotes=zygotes) for _ in range(3)]
    register(servers, "fleet", spd)
    yield servers
    for server in servers:
        server.kill()


@pytest.fixture
def replicas(serve):
    """Return a function that starts servers with one store: replicas(count)."""

    def start(count=3):
        first = serve()
        return [first, *(serve(store=first.store) for _ in range(count - 1))]

    return start
