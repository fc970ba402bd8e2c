"""Two processes as one server: the cost of an order, the speed of two processes over
one, what a short product loses, and what callers see when a process or the network
fails.
"""

import concurrent.futures
import contextlib
import hashlib
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

import hvpd
from bench import _processes, _rank, _striking, _timing, _warm
from bench._objectives import Problem, mlp
from bench._report import Figure, Goal, measured
from hvpd.v1 import group_pb2
from hvpd_server.group.leader import Leader

BENCH = "group"

PARTS = ("orders", "speed", "failures")
ORDER_BYTES = 24 << 10
MANY_ORDERS = 10_000
SLOW_RANKS = 3
SLOW_SECONDS = 0.001
"""Mean of the random time that a rank waits before an order."""

# A message of 24 KiB is written once and sent: some 20 us of Python, and a copy. Its
# report comes back through two threads of Python in each process. The compute-bound
# product is halved, and a sum of 0.5 MB over loopback takes about 1 ms. A short product
# waits for the order, the rank's Python, and the sum: about 1 ms more.
# A stopped process shows after 5 s of silence, and a group needs 4 s to start on two
# quiet cores. A process that was killed shows at once.
PREDICTED = {"sent": 0.06, "executed": 0.25, "speedup": 1.8, "short": 3.0, "left": 0.0}
PREDICTED_BACK = {"SIGKILL of the rank": 5.0, "SIGKILL of the leader": 5.0, "connection cut": 5.0}
PREDICTED_SILENT = 10.0

_ON_CORE = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
"""Runs Python with the arguments after the first one, on the core of the first one."""


def run(*, quick: bool, part: str | None = None) -> Iterator[Figure]:
    """Measure orders without devices, one process beside a group of two, and groups
    that fail.
    """
    if part in ("orders", None):
        yield from _orders(quick=quick)
        yield _many_orders(200 if quick else MANY_ORDERS)
    if part in ("speed", None):
        yield from _speed(quick=quick)
    if part == "failures" or (part is None and not quick):
        yield from _failures(quick=quick)


def _speed(*, quick: bool) -> Iterator[Figure]:
    """Measure one process and a group of two, each process on one core."""
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="hvpd-bench-", ignore_cleanup_errors=True))
        )
        one = stack.enter_context(_serving(folder / "one", 0))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            leader = f"127.0.0.1:{listener.getsockname()[1]}"
        flags = ["--leader", leader, "--size", "2"]
        stack.enter_context(_serving(folder / "group", 1, *flags, "--rank", "1", ready="waits for the leader"))
        two = stack.enter_context(_serving(folder / "group", 0, *flags, "--rank", "0"))
        clients = [stack.enter_context(hvpd.connect(_processes.address(server))) for server in (one, two)]
        heavy = mlp((64, 32, 10), 64) if quick else mlp((256, 256, 256, 10), 4096)
        yield _ratio(clients, heavy, "compute-bound product, one process over two", "speedup", quick=quick)
        yield _ratio(clients, mlp((64, 82, 10), 500), "short product, two processes over one", "short", quick=quick)


def _serving(
    store: Path, core: int, *flags: str, ready: str = r"^hvpd: serving on (\S+)$"
) -> "contextlib.AbstractContextManager[_processes.Child]":
    """Run a server, or a rank, on one core."""
    arguments = ["-m", "hvpd_server", "--port", "0", "--store", str(store), *flags]
    return _processes.child([sys.executable, "-c", _ON_CORE, str(core), *arguments], ready)


def _orders(*, quick: bool) -> Iterator[Figure]:
    """Yield the times of an order to one rank: until it is sent, and until the rank has
    reported it.
    """
    with _leading(1, 0.0) as leader:
        blob = bytes(ORDER_BYTES)
        digest = hashlib.sha256(blob).digest()
        sent, executed = [], []
        for _ in range(20 if quick else 2000):
            order = group_pb2.GroupOrder(load=group_pb2.GroupOrder.Load(sha256=digest))
            began = time.perf_counter()
            number = leader.order(order, blob, awaited=True)
            sent.append(time.perf_counter() - began)
            leader.done(number)
            executed.append(time.perf_counter() - began)
            leader.drop(number)
    for name, found, goal in (("sent", sent, Goal("<=", 0.2)), ("executed", executed, None)):
        yield measured(
            BENCH,
            f"order of {ORDER_BYTES >> 10} KiB, {name}",
            "ms",
            1e3 * np.array(found),
            predicted=PREDICTED[name],
            goal=goal,
        )


def _many_orders(count: int) -> Figure:
    """Order from four threads, some of which wait for the ranks. Return the orders that
    are left when all threads have ended.
    """
    with _leading(SLOW_RANKS, SLOW_SECONDS) as leader:

        def ordering(number: int) -> None:
            program = _loaded(leader)
            for step in range(count // 4 - 1):
                if (step + number) % 10 == 0:
                    leader.drop(_loaded(leader))
                else:
                    leader.order(group_pb2.GroupOrder(launch=group_pb2.GroupOrder.Launch(program=program)))

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(ordering, range(4)))
        leader.done(leader.order(group_pb2.GroupOrder(load=group_pb2.GroupOrder.Load(sha256=_DIGEST)), awaited=True))
        left = leader.pending
    return measured(
        BENCH,
        f"of {count:,} orders to {SLOW_RANKS} slow ranks, left",
        "",
        [left],
        predicted=PREDICTED["left"],
        goal=Goal("<=", 0.0),
    )


_DIGEST = hashlib.sha256(b"").digest()


def _loaded(leader: Leader) -> int:
    """Order a program without bytes, and wait until all ranks have it."""
    number = leader.order(group_pb2.GroupOrder(load=group_pb2.GroupOrder.Load(sha256=_DIGEST)), awaited=True)
    if why := leader.done(number):
        raise RuntimeError(why)
    return number


@contextlib.contextmanager
def _leading(ranks: int, seconds: float) -> Iterator[Leader]:
    """Lead so many ranks without devices, each of which waits before an order."""
    leader = Leader(("127.0.0.1", 0), ranks + 1, {}, _rank.SECRET, end=_ended)
    gathering = threading.Thread(target=leader.gather, args=("nowhere:1",), daemon=True)
    gathering.start()
    with contextlib.ExitStack() as stack:
        for rank in range(1, ranks + 1):
            argv = [sys.executable, "-m", "bench._rank", *map(str, (leader.port, rank, ranks + 1, seconds))]
            stack.enter_context(_processes.child(argv, "^joining$"))
        gathering.join()
        yield leader


def _ended(reason: str, code: int) -> NoReturn:
    """End the thread that notices the end of the rank."""
    sys.exit()


def _failures(*, quick: bool) -> Iterator[Figure]:
    """Yield what callers see of each failure; of one only, in a quick run."""
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="hvpd-bench-", ignore_cleanup_errors=True) as folder:
        for number, fault in enumerate(list(_striking.FAULTS)[: 1 if quick else None]):
            found = outcomes[fault] = _striking.strike(fault, Path(folder) / str(number))
            predicted = PREDICTED_BACK.get(fault, PREDICTED_SILENT)
            yield measured(
                BENCH,
                f"{fault}, until all solves go on",
                "s",
                [found.seconds],
                k=_striking.SOLVES,
                predicted=predicted,
                goal=Goal("<=", 15.0),
            )
        if not quick:
            outcomes["slow"] = _striking.slow(Path(folder) / "slow")
    for name, seen in (("wrong answers", "wrong"), ("errors that a caller saw", "errors")):
        total = sum(getattr(outcome, seen) for outcome in outcomes.values())
        label = f"{name}, in {len(outcomes)} failures"
        yield measured(BENCH, label, "", [total], k=_striking.SOLVES, predicted=0.0, goal=Goal("<=", 0.0))


def _ratio(clients: list[hvpd.Client], problem: Problem, name: str, key: str, *, quick: bool) -> Figure:
    """Return the time of a product by one process over that by two, or its inverse."""
    calls: dict[str, _timing.Call] = {}
    v = np.ones(problem.n, np.float32)
    for size, client in zip(("one", "two"), clients, strict=True):
        objective = _warm.registered(client, problem, sharded=True)
        H = objective.at(problem.x).hessian()
        _warm.vectors(objective, H)
        calls[size] = lambda H=H: H @ v  # type: ignore[misc]
    times = _timing.interleave(calls, rounds=3 if quick else 21, seconds=0.02 if quick else 0.3)
    one, two = np.array(times["one"]), np.array(times["two"])
    faster = key == "speedup"
    return measured(
        BENCH,
        name,
        "",
        one / two if faster else two / one,
        n=problem.n,
        k=1,
        predicted=PREDICTED[key],
        goal=Goal(">=", 1.6) if faster else None,
    )
