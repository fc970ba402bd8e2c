"""Which of several servers a client uses: by objective, by room, and by address."""

import asyncio
import concurrent.futures
import pickle
import re
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import hvpd
from hvpd._transport import placement
from hvpd.v1 import curvature_pb2
from tests.support import security
from tests.support.fleet import WAIT, N, addresses, digest_of, home, member, products, register
from tests.support.objectives import quadratic
from tests.support.waiting import until


def test_an_id_outlives_a_restart_and_does_not_state_the_host(serve):
    server = serve()
    with hvpd.connect(server.address) as client:
        before = client.server.id
    server.kill()
    server.start()
    with hvpd.connect(server.address) as client:
        assert client.server.id == before
    assert re.fullmatch("[0-9a-f]{16}", before)


def test_products_of_an_objective_go_to_one_server_by_every_client(three, spd):
    """Clients write the addresses in another order, and still meet at one point."""
    digest = register(three, "fleet", spd)
    before = [products(server) for server in three]
    begin = threading.Barrier(8)

    def use(number):
        listed = [three[place] for place in np.random.default_rng(number).permutation(3)]
        with hvpd.connect(addresses(listed)) as client:
            H = client.objective("fleet").at(np.full(N, 7.0)).hessian()
            H @ np.ones(N)
            begin.wait(WAIT)
            for v in np.random.default_rng(number).normal(size=(40, N)):
                np.testing.assert_allclose(H @ v, spd @ v, rtol=1e-9, atol=1e-9)
            return member(H.point)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(use, range(8)))
    assert set(found) == {home(three, digest).address}
    grown = dict(zip(three, [products(server) - was for server, was in zip(three, before, strict=True)], strict=True))
    assert sum(grown.values()) >= 8 * 41
    assert grown[home(three, digest)] >= 0.95 * sum(grown.values())


def test_objectives_are_spread_as_placement_says(three, spd):
    digests = {name: register(three, name, spd * factor) for factor, name in enumerate("abcdef", 2)}
    with hvpd.connect(addresses(three)) as client:
        for factor, name in enumerate("abcdef", 2):
            point = client.objective(name).at(np.ones(N))
            np.testing.assert_allclose(point.hessian() @ np.ones(N), factor * spd @ np.ones(N), rtol=1e-9)
            assert member(point) == home(three, digests[name]).address


def test_a_registration_goes_to_the_home_and_is_known_to_all(three, spd):
    with hvpd.connect(addresses(three)) as client:
        objective = client.register(quadratic, np.zeros(N), spd * 100, name="new", platforms=("cpu",))
        assert member(objective) == home(three, objective.digest).address
    for server in three:
        with hvpd.connect(server.address) as client:
            assert client.objective("new").digest == objective.digest


def test_points_and_runs_and_other_data_work(three, spd):
    with hvpd.connect(addresses(three)) as client:
        objective = client.objective("fleet")
        point = objective.at(np.ones(N), 3 * spd)
        step = point.moved(0.5, np.ones(N))
        assert step.value == pytest.approx(1.5 * 2.25 * np.ones(N) @ spd @ np.ones(N))
        assert point.hessian().eigsh(1).values[0] == pytest.approx(3e3)
        solution = step.hessian().solve(np.ones(N))
        np.testing.assert_allclose(solution.x, np.linalg.solve(3 * spd, np.ones(N)), rtol=1e-3, atol=1e-6)
        assert point.quadratic_form(np.eye(N)[:5]) == pytest.approx(3 * np.diag(spd)[:5])


def test_pickles_find_the_fleet(three, spd):
    with hvpd.connect(addresses(three)) as client:
        H = client.objective("fleet").at(np.ones(N)).hessian()
        parts = pickle.dumps((client, H))
    program = (
        "import pickle, sys, numpy as np; client, H = pickle.loads(sys.stdin.buffer.read()); "
        f"print(client.address, H.point._transport.member.address, *(H @ np.ones({N})))"
    )
    done = subprocess.run([sys.executable, "-c", program], input=parts, capture_output=True, check=True)
    address, where, *numbers = done.stdout.decode().split()
    assert address == addresses(three)
    assert where == member(H.point)
    np.testing.assert_allclose(list(map(float, numbers)), spd @ np.ones(N), rtol=1e-9)


def test_asyncio_uses_the_fleet(three, spd):
    async def use():
        async with hvpd.aio.connect(addresses(three)) as client:
            H = (await (await client.objective("fleet")).at(np.full(N, 3.0))).hessian()
            return await asyncio.gather(*(H @ v for v in np.eye(N)[:20]))

    np.testing.assert_allclose(asyncio.run(use()), spd[:20], rtol=1e-9, atol=1e-9)


# A server is full, or lacks an objective


def test_a_full_server_is_left_for_some_time(three, serve, spd, monkeypatch):
    """The data of a point is larger than the memory budget of its home."""
    small = serve("--memory-budget", "20K", store=three[0].store)
    servers = [*three[:2], small]
    A = next(factor * spd for factor in range(3000, 3100) if home(servers, digest_of(factor * spd)) is small)
    register(servers, "full", A)
    with hvpd.connect(small.address) as client, pytest.raises(hvpd.OverloadedError) as error:
        client.objective("full").at(np.ones(N))
    assert error.value.reason == "MEMORY_BUDGET"
    later = 0

    def asked():
        """Return whether a new point asks the home first."""
        nonlocal number
        number += 1
        before = client.statistics().retries
        point = objective.at(np.full(N, float(number)))
        np.testing.assert_allclose(point.hessian() @ np.ones(N), A @ np.ones(N), rtol=1e-9)
        assert member(point) != small.address
        return client.statistics().retries > before

    number = 0
    with hvpd.connect(addresses(servers)) as client:
        monkeypatch.setattr(client._transport._fleet, "_clock", lambda: time.monotonic() + later)
        objective = client.objective("full")
        assert [asked() for _ in range(3)] == [True, False, False]
        later += 8
        assert [asked() for _ in range(3)] == [True, False, False]
        later += 8  # The second absence is twice as long.
        assert not asked()
        later += 8
        assert asked()


def test_an_objective_is_used_where_it_is(serve, spd):
    """Servers that share no store: the home lacks an objective that the others have."""
    servers = [serve() for _ in range(3)]
    A = next(factor * spd for factor in range(1, 100) if home(servers, digest_of(factor * spd)) is servers[0])
    for server in servers[1:]:
        register([server], "some", A)
    with hvpd.connect(addresses(servers[1:])) as client:
        objective = client.objective("some")
        assert objective.digest == digest_of(A)
    with hvpd.connect(addresses(servers)) as client:
        objective._transport = client._transport.placed(objective.digest)
        point = objective.at(np.ones(N))
        np.testing.assert_allclose(point.hessian() @ np.ones(N), A @ np.ones(N), rtol=1e-9)
        assert member(point) in {server.address for server in servers[1:]}


def test_an_objective_that_no_server_has_is_not_found(three, spd):
    digest = register(three, "deleted", spd * 2000)
    with hvpd.connect(addresses(three)) as client:
        objective = client.objective("deleted")
        assert client.delete("deleted")
        with pytest.raises(hvpd.NotFoundError, match=digest[:12]):
            objective.at(np.ones(N))


def test_a_wrong_argument_is_wrong_at_one_server_only(three):
    """A client does not ask the next server."""
    with hvpd.connect(addresses(three)) as client:
        point = client.objective("fleet").at(np.full(N, 9.0))
        before = client.statistics().retries
        with pytest.raises(hvpd.HvpdError, match="has no ggn"):
            point.multiply(np.ones((1, N)), curvature_pb2.OPERATOR_GGN)
        assert client.statistics().retries == before


# Addresses


def test_a_wrong_address_is_one_warning(three):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        wrong = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.warns(UserWarning, match=rf"1 of 4 servers cannot be used: .*{wrong}.*refuses") as found:
        client = hvpd.connect(f"{wrong},{addresses(three)}")
    with client:
        assert len(found) == 1
        assert client.objective("fleet").n == N


def test_wrong_addresses_only_are_an_error():
    with pytest.raises(hvpd.UnavailableError, match=r"none of the 2 servers .*127\.0\.0\.1:1: .*no\.invalid") as error:
        hvpd.connect("127.0.0.1:1,no.invalid:7070")
    assert error.value.reason in ("CONNECTION_REFUSED", "HOST_NOT_FOUND")


def test_a_name_without_an_address_is_an_error():
    with pytest.raises(hvpd.UnavailableError, match=r"dns:///no\.invalid:7070 has no address") as error:
        hvpd.connect("dns:///no.invalid:7070")
    assert error.value.reason == "HOST_NOT_FOUND"


def test_a_silent_server_does_not_delay_connecting(three):
    """A port that accepts connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.warns(UserWarning, match="has not answered yet"):
            client = hvpd.connect(f"127.0.0.1:{silent.getsockname()[1]},{addresses(three)}")
        assert time.monotonic() - began < 8
        with client:
            assert client.objective("fleet").n == N


def test_an_unprotected_token_is_refused_for_each_server(three):
    with pytest.raises(hvpd.InvalidArgumentError) as error:
        hvpd.connect(f"{three[0].address},192.0.2.1:7070", token="hvpd_x", connect_timeout=1)
    assert error.value.reason == "TOKEN_UNPROTECTED"


@pytest.fixture
def names(monkeypatch):
    """Let "fleet.test" have the hosts of a list."""
    hosts, resolve = [], socket.getaddrinfo

    def getaddrinfo(host, port, *arguments, **options):
        if host != "fleet.test":
            return resolve(host, port, *arguments, **options)
        if not hosts:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in hosts]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return hosts


def test_a_name_with_several_addresses_is_a_fleet(serve, spd, names, monkeypatch):
    """Servers that join and leave are seen after half a minute."""
    first = serve()
    second = serve("--port", str(first.port), host="127.0.0.2", store=first.store)
    servers = [first, second]
    # Addresses count, because both have one id: one host name, and one port.
    keys = np.array([placement.key(server.address) for server in servers])
    homes = {placement.order(digest_of(factor * spd), keys, np.ones(2))[0]: factor for factor in range(1, 30)}
    assert len(homes) == 2
    for factor in homes.values():
        register(servers, f"name{factor}", factor * spd)
    names += ["127.0.0.1"]
    later = 0
    x = iter(range(1, 100_000))

    def used(client):
        objectives = [client.objective(f"name{factor}") for factor in homes.values()]
        return {member(objective.at(np.full(N, float(next(x))))) for objective in objectives}

    with hvpd.connect(f"dns:///fleet.test:{first.port}") as client:
        monkeypatch.setattr(client._transport._fleet, "_clock", lambda: time.monotonic() + later)
        assert used(client) == {first.address}
        names += ["127.0.0.2"]
        assert used(client) == {first.address}
        later += 60
        until(lambda: used(client) == {first.address, second.address})
        del names[0]
        later += 60
        until(lambda: used(client) == {second.address})
        del names[0]  # An empty answer of DNS ends nothing.
        later += 60
        for _ in range(3):
            assert used(client) == {second.address}


def test_certificates_are_for_the_name(serve, tmp_path, names):
    place = security.Place(tmp_path)
    leaf = place.ca.issue_cert("fleet.test")
    place.write("server.pem", b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
    place.write("server.key", leaf.private_key_pem.bytes())
    server = serve(*place.flags)
    names += ["127.0.0.1"]
    with hvpd.connect(f"dns:///fleet.test:{server.port}", ca=place.trust, connect_timeout=60) as client:
        assert client.objectives() == []
        pool = client._transport._link()._vectors
        pool.unix = False
        pool.take()
        until(lambda: pool.ready)
    with pytest.raises(hvpd.UnavailableError, match="certificate is not accepted"):
        hvpd.connect(f"127.0.0.1:{server.port},localhost:{server.port}", ca=place.trust)
