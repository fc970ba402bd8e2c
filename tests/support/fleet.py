"""What the tests of several servers share: registrations, addresses, and places."""

import numpy as np

import hvpd
from hvpd._registration import export
from hvpd._transport import placement
from tests.support.objectives import quadratic

N = 60
WAIT = 120


def spd_matrix():
    """Return a positive definite matrix with eigenvalues from 1 to 1000."""
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))
    return (Q * np.geomspace(1, 1e3, N)) @ Q.T


def register(servers, name, A):
    """Register an objective once, with a client of all servers. Return its digest."""
    with hvpd.connect(addresses(servers)) as client:
        return client.register(quadratic, np.zeros(N), A, name=name, platforms=("cpu",)).digest


def digest_of(A):
    """Return the digest that `register` returns for a matrix."""
    return export.export(quadratic, np.zeros(N), (A,), platforms=("cpu",), precision="highest").digest


def addresses(servers):
    return ",".join(server.address for server in servers)


def member(thing):
    """Return the address that took the latest try of a point or an objective."""
    return thing._transport.member.address


def home(servers, digest):
    """Return the server that has the highest score for an objective."""
    ids = []
    for server in servers:
        with hvpd.connect(server.address) as client:
            ids.append(client.server.id)
    assert len(set(ids)) == len(ids)
    return servers[placement.order(digest, np.array([*map(placement.key, ids)]), np.ones(len(ids)))[0]]


def products(server):
    return server.metric("hvpd_products_total")
