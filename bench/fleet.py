"""Three servers, and clients that know all of them: where an objective's products go,
what moves when a server joins, what the choice costs, and how long `kill -9` lasts.
"""

import concurrent.futures
import contextlib
import hashlib
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import hvpd
from bench import _processes, _timing, _warm
from bench._objectives import mlp
from bench._report import Figure, Goal, measured
from hvpd._transport import placement

BENCH = "fleet"

SERVERS = 3
CLIENTS = 8
OBJECTIVES = 10_000

# All clients compute the same order. A fourth server of the same weight gets a quarter.
# A product finds its server by two attributes and one more Python call: 0.002 ms of
# 0.4. After kill -9, the next server makes the point and multiplies: some 30 ms, with
# the connections that are opened.
PREDICTED = {"share": 1.0, "moved": 0.25, "overhead": 1.01, "killed": 0.03}


def run(*, quick: bool) -> Iterator[Figure]:
    """Start servers with one store, warm one problem at each, and measure."""
    problem = mlp((64, 82, 10), 500)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hvpd-bench-", ignore_cleanup_errors=True))
        servers = [stack.enter_context(_processes.serving(Path(folder))) for _ in range(SERVERS + 1)]
        addresses = [_processes.address(server) for server in servers]
        ids = []
        for address in addresses:
            with hvpd.connect(address) as client:
                objective = _warm.registered(client, problem, name="bench/fleet")
                _warm.vectors(objective, objective.at(problem.x).hessian())
                ids.append(client.server.id)
        yield _share(addresses[:SERVERS], problem.x, problem.n, 20 if quick else 500)
        yield _moved(ids)
        yield from _overhead(addresses[:SERVERS], problem.x, problem.n, quick=quick)
        yield _killed(servers[:SERVERS], problem.x, problem.n)


def _share(addresses: Sequence[str], x: object, n: int, products: int) -> Figure:
    """Return the part of the products that the busiest server multiplied."""
    with contextlib.ExitStack() as stack:
        single = [stack.enter_context(hvpd.connect(address)) for address in addresses]
        before = [client.load().products for client in single]

        def use(number: int) -> None:
            order = random.Random(number).sample(addresses, len(addresses))
            with hvpd.connect(",".join(order)) as client:
                H = client.objective("bench/fleet").at(x).hessian()
                for _ in range(products):
                    H @ np.ones(n, np.float32)

        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(use, range(CLIENTS)))
        grown = [client.load().products - was for client, was in zip(single, before, strict=True)]
    return measured(
        BENCH,
        f"products of one objective at one of {SERVERS} servers",
        "",
        [max(grown) / sum(grown)],
        n=n,
        k=CLIENTS,
        predicted=PREDICTED["share"],
        goal=Goal(">=", 0.95),
    )


def _moved(ids: Sequence[str]) -> Figure:
    """Return the part of the objectives that the last server gets when it joins."""
    servers = np.array([placement.key(each) for each in ids])
    objectives = np.array([placement.key(hashlib.sha256(b"%d" % each).hexdigest()) for each in range(OBJECTIVES)])
    found = [placement.scores(objectives, servers[:size], np.ones(size)).argmax(1) for size in (SERVERS, SERVERS + 1)]
    return measured(
        BENCH,
        f"of {OBJECTIVES:,} objectives, moved by a fourth server",
        "",
        [float(np.mean(found[0] != found[1]))],
        predicted=PREDICTED["moved"],
        goal=Goal("<=", 0.3),
    )


def _overhead(addresses: Sequence[str], x: object, n: int, *, quick: bool) -> Iterator[Figure]:
    """Yield the time of a product by the list, over that by its server's address."""
    v = np.ones(n, np.float32)
    with contextlib.ExitStack() as stack:
        many = stack.enter_context(hvpd.connect(",".join(addresses)))
        by_list = many.objective("bench/fleet").at(x).hessian()
        link = by_list.point._transport._link()  # noqa: SLF001 - the server is not public
        one = stack.enter_context(hvpd.connect(link.address))
        by_address = one.objective("bench/fleet").at(x).hessian()
        contenders: dict[str, _timing.Call] = {"list": lambda: by_list @ v, "address": lambda: by_address @ v}
        times = _timing.interleave(contenders, rounds=3 if quick else 41, seconds=0.02 if quick else 0.2)
    ratio = np.array(times["list"]) / np.array(times["address"])
    yield measured(
        BENCH,
        "product by a list over one address",
        "",
        ratio,
        n=n,
        k=1,
        predicted=PREDICTED["overhead"],
        goal=Goal("<=", 1.03),
    )
    yield measured(BENCH, "product by one address", "ms", np.array(times["address"]) * 1e3, n=n, k=1)


def _killed(servers: Sequence[_processes.Child], x: object, n: int) -> Figure:
    """Return the seconds of the product after each `kill -9` of the server that has the
    point, until one server is left.
    """
    addresses = [_processes.address(server) for server in servers]
    v, seconds = np.ones(n, np.float32), []
    with hvpd.connect(",".join(addresses)) as client:
        H = client.objective("bench/fleet").at(x).hessian()
        for _ in range(len(servers) - 1):
            H @ v
            victim = H.point._transport._link().address  # noqa: SLF001 - as above
            process = servers[addresses.index(victim)].process
            process.kill()
            process.wait()
            began = time.perf_counter()
            H @ v
            seconds.append(time.perf_counter() - began)
    return measured(BENCH, "first product after kill -9", "s", seconds, n=n, predicted=PREDICTED["killed"])
