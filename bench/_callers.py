"""Many callers at one point, each of which asks again as soon as it has its answer.

The callers are threads that share one client, or have clients of their own in several
processes.

`python -m bench._callers SERVER ECHO DIGEST CALLERS INDEX` is one of those processes:
it takes an order a line and answers in JSON.
"""

import contextlib
import dataclasses
import functools
import json
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

import hvpd
from bench import _floor, _processes, _timing

_PROCESSES = 4


@dataclasses.dataclass(frozen=True)
class Rate:
    """The rate of products, and the width of their launches."""

    vectors: float
    """Vectors a second."""
    width: float
    """Mean number of vectors in the callers' launches."""


class Callers(Protocol):
    """A group of callers, of which any number can run at once."""

    def products(self, count: int, seconds: float) -> Rate:
        """Measure products H @ v, each caller with a v of its own."""

    def echoes(self, count: int, seconds: float) -> float:
        """Measure bare stream echoes of as many bytes, and return their number a
        second.
        """


class Threads:
    """Callers in this process.

    Args:
        clients: Clients that the callers take in turn; one a caller gives each its own.
        channels: Channels to the echo, taken in turn.
        digest: The objective's digest.
        most: Number of callers.
        first: Number of the first caller. A caller's number determines its v.
    """

    def __init__(
        self,
        clients: Sequence[hvpd.Client],
        channels: Sequence["_floor.Channel"],
        digest: str,
        most: int,
        first: int = 0,
    ) -> None:
        self._clients = clients
        objectives = [client.objective(digest) for client in clients]
        hessians = [objective.at(start(objective.n)).hessian() for objective in objectives]
        n = objectives[0].n
        vectors = [start(n, seed=1 + first + caller) for caller in range(most)]
        self._products = [
            functools.partial(operator.matmul, hessians[caller % len(hessians)], v) for caller, v in enumerate(vectors)
        ]
        self._echoes = [
            _floor.StreamEcho(channels[caller % len(channels)], v.tobytes()) for caller, v in enumerate(vectors)
        ]

    def products(self, count: int, seconds: float) -> Rate:
        before = [client.statistics() for client in self._clients]
        vectors = _timing.rate(self._products[:count], seconds=seconds)
        found = [client.statistics() - earlier for client, earlier in zip(self._clients, before, strict=True)]
        launched, products = sum(each.launched_vectors for each in found), sum(each.products for each in found)
        return Rate(vectors, launched / max(products, 1))

    def echoes(self, count: int, seconds: float) -> float:
        return _timing.rate(self._echoes[:count], seconds=seconds)


class Processes:
    """Callers in several processes, each with a client of its own."""

    def __init__(self, children: Sequence[_processes.Child]) -> None:
        self._children = children

    def products(self, count: int, seconds: float) -> Rate:
        answers = [Rate(**answer) for answer in self._order("products", count, seconds)]
        vectors = sum(answer.vectors for answer in answers)
        return Rate(vectors, sum(answer.vectors * answer.width for answer in answers) / vectors)

    def echoes(self, count: int, seconds: float) -> float:
        return sum(answer["vectors"] for answer in self._order("echoes", count, seconds))

    def _order(self, what: str, count: int, seconds: float) -> list[dict[str, float]]:
        """Let `count` callers run, spread over the processes."""
        of_each = [len(range(index, count, len(self._children))) for index in range(len(self._children))]
        busy = [(child.process, own) for child, own in zip(self._children, of_each, strict=True) if own]
        for process, own in busy:
            assert process.stdin is not None
            process.stdin.write(f"{what} {own} {seconds}\n")
            process.stdin.flush()
        answers = []
        for process, _ in busy:
            assert process.stdout is not None
            answers.append(json.loads(process.stdout.readline()))
        return answers


def start(n: int, seed: int = 0) -> "np.typing.NDArray[np.float32]":
    """Return a vector of shape (n,), the same on each call; with seed 0, the callers'
    point.
    """
    return np.random.default_rng(seed).standard_normal(n, np.float32) * np.float32(0.1)


@contextlib.contextmanager
def threads(server: str, echo: str, digest: str, most: int) -> Iterator[Callers]:
    """Callers that share one client."""
    with hvpd.connect(server) as client, _floor.channel(echo) as channel:
        yield Threads([client], [channel], digest, most)


@contextlib.contextmanager
def processes(server: str, echo: str, digest: str, most: int) -> Iterator[Callers]:
    """Callers that share nothing but the server."""
    count = min(_PROCESSES, most)
    with contextlib.ExitStack() as stack:
        argv = [sys.executable, "-m", "bench._callers", server, echo, digest, str(-(-most // count))]
        yield Processes(
            [stack.enter_context(_processes.child([*argv, str(i)], r"^calling$", talks=True)) for i in range(count)]
        )


def _obey(server: str, echo: str, digest: str, most: int, index: int, orders: Iterable[str]) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(hvpd.connect(server)) for _ in range(most)]
        channels = [stack.enter_context(_floor.channel(echo)) for _ in range(most)]
        callers = Threads(clients, channels, digest, most, first=index * most)
        print("calling", file=sys.stderr, flush=True)
        for order in orders:
            what, count, seconds = order.split()
            if what == "products":
                answer = dataclasses.asdict(callers.products(int(count), float(seconds)))
            else:
                answer = {"vectors": callers.echoes(int(count), float(seconds))}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _obey(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.stdin)
