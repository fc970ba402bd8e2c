"""One server with TLS and tokens for all tests of security, and its tenants. trustme
makes the certificates.
"""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest

from hvpd.v1 import (
    blob_pb2_grpc,
    curvature_pb2_grpc,
    objective_pb2_grpc,
)
from tests.support.security import SECRET, N, Place, Tenant, channel, connect
from tests.support.serving import Serving


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("secured"))


@pytest.fixture(scope="session")
def publisher(place):
    return place.token("vision", "use", "publish")[0]


@pytest.fixture(scope="session")
def secured(tmp_path_factory, zygotes, place, publisher):
    """Yield a server with TLS and tokens. At the end, none of its output has a
    token.
    """
    flags = [*place.flags, "--tokens", str(place.tokens), "--log-level", "DEBUG"]
    server = Serving(tmp_path_factory.mktemp("store"), *flags, zygotes=zygotes)
    yield server
    ended = server.process.poll()
    server.kill()
    assert ended is None
    said = "\n".join(server.lines)
    assert not [token for token in place.made if token in said]


@pytest.fixture(scope="session")
def quartic(place, secured, publisher):
    """Return sum(x^4) / 12, whose Hessian is diag(x^2)."""
    with connect(place, secured, publisher) as client:
        client.register(lambda x: jnp.sum(x**4) / 12, np.ones(N), name="quartic", shared=True)
    return "vision/quartic"


@pytest.fixture
def tenants(place, secured):
    """Yield two tenants that no other test has."""
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(channel(place, secured))
        found = []
        for letter in "ab":
            name = f"{letter}-{len(place.made)}"
            token, _ = place.token(name, "use", "publish")
            stubs = (
                blob_pb2_grpc.BlobServiceStub(opened),
                objective_pb2_grpc.ObjectiveServiceStub(opened),
                curvature_pb2_grpc.CurvatureServiceStub(opened),
            )
            client = stack.enter_context(connect(place, secured, token))
            found.append(Tenant(name, client, token, *stubs))
        yield found


@pytest.fixture
def w(place):
    """Return data that no other test has."""
    return SECRET + 10 * len(place.made)
