"""Servers of a fleet, or clients of it, end."""

import asyncio
import concurrent.futures
import gc
import os
import socket
import threading
import time
import warnings

import numpy as np
import pytest
import scipy.sparse.linalg

import hvpd
from tests.support.fleet import WAIT, N, addresses, home, member, register
from tests.support.solves import Solves
from tests.support.waiting import until


def test_a_rolling_restart_under_16_solves_is_invisible(replicas, spd):
    """Each product of each solve is requested once, and is right. The last server does
    not drain, but is killed.
    """
    servers = replicas()
    hessians = {name: factor * spd for factor, name in enumerate("abcd", 1)}
    for name, A in hessians.items():
        register(servers, name, A)
    with Solves(addresses(servers), hessians, 16) as solves:
        for server in servers:
            solves.wait_for_each()
            if server is servers[-1]:
                server.kill()
            else:
                assert server.terminate() == 0
            solves.wait_for_each()
            server.start()
        solves.wait_for_each()
    assert all(asked == had > 0 for asked, had, _ in solves.counts)


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


# A client ends


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
