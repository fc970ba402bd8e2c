"""Three real servers and clients that know all of them."""

import asyncio
import collections
import concurrent.futures
import gc
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import scipy.sparse.linalg

import hvpd
from hvpd._cli import main
from hvpd._registration import export
from hvpd._transport import placement
from hvpd.v1 import curvature_pb2
from tests.support import security
from tests.support.objectives import quadratic
from tests.support.waiting import until

N = 60
SOLVERS = 16
WAIT = 120


@pytest.fixture(scope="module")
def spd():
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))
    return (Q * np.geomspace(1, 1e3, N)) @ Q.T


@pytest.fixture
def replicas(serve, tmp_path_factory):
    """Start servers that have one store: replicas(count)."""

    def start(count=3):
        store = tmp_path_factory.mktemp("store")
        return [serve(store=store) for _ in range(count)]

    return start


def register(servers, name, A):
    """Register an objective once, with a client of all servers. Return its digest."""
    with hvpd.connect(addresses(servers)) as client:
        return client.register(quadratic, np.zeros(N), A, name=name, platforms=("cpu",)).digest


def register_at_each(servers, name, A):
    """Register an objective at servers that do not share a store."""
    for server in servers:
        register([server], name, A)


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


@pytest.fixture(scope="module")
def three(serve_module, tmp_path_factory, spd):
    """Return three servers with one store and an objective "fleet". No test stops
    them.
    """
    store = tmp_path_factory.mktemp("store")
    servers = [serve_module(store=store) for _ in range(3)]
    register(servers, "fleet", spd)
    return servers


def test_an_id_outlives_a_restart_and_does_not_state_the_host(serve):
    server = serve()
    with hvpd.connect(server.address) as client:
        before = client.server.id
    server.kill()
    server.start()
    with hvpd.connect(server.address) as client:
        assert client.server.id == before
    assert re.fullmatch("[0-9a-f]{16}", before)


# Where work goes


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


# A server goes away


def test_a_rolling_restart_under_16_solves_is_invisible(replicas, spd):
    """Each product of each solve is requested once, and is right. The last server does
    not drain, but is killed.
    """
    servers = replicas()
    for factor, name in enumerate("abcd", 1):
        register(servers, name, factor * spd)
    done = threading.Event()
    solved = [threading.Semaphore(0) for _ in range(SOLVERS)]

    def solve(number):
        asked = 0
        with hvpd.connect(addresses(servers), retry_timeout=WAIT) as client:
            rng = np.random.default_rng(number)
            A = (number % 4 + 1) * spd
            try:
                while not done.is_set():
                    H = client.objective("abcd"[number % 4]).at(rng.normal(size=N)).hessian()

                    def matvec(v, H=H):
                        nonlocal asked
                        asked += 1
                        product = H @ v
                        np.testing.assert_allclose(product, A @ v, rtol=1e-9, atol=1e-9)
                        return product

                    b = rng.normal(size=N)
                    operator = scipy.sparse.linalg.LinearOperator((N, N), matvec, dtype=float)
                    solution, code = scipy.sparse.linalg.cg(operator, b, rtol=1e-12, maxiter=5000)
                    assert code == 0
                    np.testing.assert_allclose(solution, np.linalg.solve(A, b), rtol=1e-6, atol=1e-9)
                    solved[number].release()
            finally:
                solved[number].release(1000)
            return asked, client.statistics().vectors

    def all_solve():
        for each in solved:
            assert each.acquire(timeout=WAIT)

    with concurrent.futures.ThreadPoolExecutor(SOLVERS) as pool:
        solves = [pool.submit(solve, number) for number in range(SOLVERS)]
        try:
            for server in servers:
                all_solve()
                if server is servers[-1]:
                    server.kill()
                else:
                    assert server.terminate() == 0
                all_solve()
                server.start()
            all_solve()
        finally:
            done.set()
        counts = [each.result(WAIT) for each in solves]
    assert all(asked == had > 0 for asked, had in counts)


def test_solves_go_on_elsewhere_after_kill_9_and_new_points_return(replicas, spd):
    """The objective is registered once, at the server that is killed."""
    servers = replicas()
    first = home(servers, register(servers, "killed", spd))
    with hvpd.connect(addresses(servers), retry_timeout=WAIT) as client:
        objective = client.objective("killed")
        point = objective.at(np.ones(N))
        H, run = point.hessian(), point.hessian().lanczos(10)
        H @ np.ones(N)
        assert member(point) == first.address
        first.kill()
        began = time.monotonic()
        solution, code = scipy.sparse.linalg.cg(H, np.ones(N), rtol=1e-12, maxiter=5000)
        assert code == 0
        np.testing.assert_allclose(solution, np.linalg.solve(spd, np.ones(N)), rtol=1e-6, atol=1e-9)
        assert time.monotonic() - began < 60
        assert member(point) != first.address
        # The run's basis is made again at the other server.
        run.extend(N - 10)
        assert run.ritz(1).values[0] == pytest.approx(1e3)
        first.start()
        number = iter(range(2, 10_000))
        until(lambda: member(objective.at(np.full(N, float(next(number))))) == first.address)
        H @ np.ones(N)
        assert member(point) != first.address  # A point stays.


def test_all_servers_may_be_away_for_a_while(replicas, spd):
    servers = replicas(2)
    register(servers, "away", spd)
    with hvpd.connect(addresses(servers), retry_timeout=WAIT) as client:
        H = client.objective("away").at(np.ones(N)).hessian()
        H @ np.ones(N)
        for server in servers:
            server.kill()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            product = pool.submit(lambda: H @ np.ones(N))
            until(lambda: client.statistics().retries > 3)
            servers[1].start()
            np.testing.assert_allclose(product.result(WAIT), spd @ np.ones(N), rtol=1e-9)


def test_without_any_server_a_call_ends_after_the_retry_timeout(replicas, spd):
    servers = replicas(2)
    register(servers, "gone", spd)
    with hvpd.connect(addresses(servers), retry_timeout=0.5) as client:
        H = client.objective("gone").at(np.ones(N)).hessian()
        for server in servers:
            server.kill()
        with pytest.raises(hvpd.UnavailableError, match=servers[0].address):
            H @ np.ones(N)
        with pytest.raises(hvpd.UnavailableError):
            client.objective("gone")


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


def test_an_objective_is_used_where_it_is(serve, compiled_programs, spd):
    """Servers that share no store: the home lacks an objective that the others have."""
    servers = [serve(cache=compiled_programs) for _ in range(3)]
    A = next(factor * spd for factor in range(1, 100) if home(servers, digest_of(factor * spd)) is servers[0])
    register_at_each(servers[1:], "some", A)
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


def test_a_server_that_comes_later_is_used(replicas, spd):
    servers = replicas(2)
    late = home(servers, register(servers, "late", spd))
    late.kill()
    with pytest.warns(UserWarning, match="1 of 2 servers cannot be used"):
        client = hvpd.connect(addresses(servers))
    with client:
        objective = client.objective("late")
        assert member(objective.at(np.ones(N))) != late.address
        late.start()
        number = iter(range(2, 10_000))
        until(lambda: member(objective.at(np.full(N, float(next(number))))) == late.address)


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


# Commands


def test_commands_take_a_list(three, capsys, monkeypatch, tmp_path):
    assert main.main(["health", "--address", addresses(three)]) == 0
    monkeypatch.setenv("HVPD_ADDRESS", addresses(three))
    assert main.main(["objectives"]) == 0
    assert "fleet" in capsys.readouterr().out
    monkeypatch.delenv("HVPD_ADDRESS")
    profiles = tmp_path / "config.toml"
    profiles.write_text(f'[profile.many]\naddress = "{addresses(three)}"\n')
    monkeypatch.setenv("HVPD_PROFILES", str(profiles))
    with hvpd.connect(profile="many") as client:
        assert client.address == addresses(three)


def test_top_shows_a_row_for_each_server(three, capsys):
    assert main.main(["top", "--address", addresses(three), "--count", "1", "--interval", "0.1"]) == 0
    shown = capsys.readouterr().out
    for server in three:
        assert f"{server.address} " in shown
    assert shown.count("serving") == 3
    assert main.main(["top", "--address", addresses(three), "--count", "1", "--interval", "0.1", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert collections.Counter(row["address"] for row in rows) == {server.address: 1 for server in three}


def test_top_shows_a_server_that_is_away(serve, capsys):
    there, away = serve(), serve()
    away.kill()
    with pytest.warns(UserWarning, match="1 of 2 servers cannot be used"):
        assert main.main(["top", "--address", addresses([there, away]), "--count", "1", "--interval", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith(away.address)).split()[1] == "away"


def test_doctor_looks_at_each_server(serve, capsys):
    there, away = serve(), serve()
    assert main.main(["doctor", "--address", there.address]) == 0
    capsys.readouterr()
    away.kill()
    assert main.main(["doctor", "--address", addresses([there, away])]) == 1
    shown = capsys.readouterr().out
    assert f"ok    port         {there.port} accepts connections" in shown
    assert f"FAIL  port         {away.port} refuses connections" in shown
    assert main.main(["doctor", "--address", "a:7070,"]) == 1
    assert "number 2 of 'a:7070,' is empty" in capsys.readouterr().out


# Ends


def test_a_closed_client_says_so_and_leaves_no_thread(three):
    before = set(threading.enumerate())
    client = hvpd.connect(addresses(three))
    H = client.objective("fleet").at(np.ones(N)).hessian()
    client.close()
    for call in (
        lambda: H @ np.ones(N),
        lambda: H.point.moved(0.5, np.ones(N)),
        client.objectives,
        lambda: client.objective("fleet"),
    ):
        with pytest.raises(hvpd.HvpdError) as error:
            call()
        assert error.value.reason == "CLIENT_CLOSED"
    until(lambda: not [each for each in set(threading.enumerate()) - before if each.name == "hvpd-fleet"])


def test_a_cancelled_call_ends_and_marks_no_server(three):
    async def use():
        async with hvpd.aio.connect(addresses(three)) as client:
            H = (await (await client.objective("fleet")).at(np.full(N, 4.0))).hessian()
            await (H @ np.ones(N))
            for _ in range(20):
                task = asyncio.ensure_future(H @ np.ones((N, 64)))
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await (H @ np.ones(N))
            return [each.away for each in client._blocking._transport._fleet.members()]

    assert asyncio.run(use()) == [False] * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_is_told_to_connect_again(three):
    client = hvpd.connect(addresses(three))
    objective = client.objective("fleet")
    H = objective.at(np.ones(N)).hessian()
    fleet = client._transport._fleet
    calls = (lambda: H @ np.ones(N), lambda: objective.at(np.full(N, 5.0)), client.objectives)
    read, write = os.pipe()
    held, done = threading.Event(), threading.Event()

    def hold():
        with fleet._changed:
            held.set()
            done.wait(WAIT)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(WAIT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if not child:
        reasons = []
        for call in calls:
            try:
                call()
            except hvpd.HvpdError as error:
                reasons.append(error.reason)
        client.close()
        os.write(write, " ".join(reasons).encode())
        os._exit(0)
    done.set()
    holder.join()
    os.close(write)
    with os.fdopen(read) as answers:
        assert answers.read().split() == ["CLIENT_FORKED"] * 3
    os.waitpid(child, 0)
    client.close()


def test_a_client_that_is_dropped_ends_its_search(three):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        wrong = f"127.0.0.1:{closed.getsockname()[1]}"
    before = set(threading.enumerate())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = hvpd.connect(f"{wrong},{addresses(three)}")
    assert [each for each in set(threading.enumerate()) - before if each.name == "hvpd-fleet"]
    del client

    def ended():
        gc.collect()
        return not [each for each in set(threading.enumerate()) - before if each.name == "hvpd-fleet"]

    until(ended)
