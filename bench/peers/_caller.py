"""Callers of one peer, in the environment of that peer, each with a connection of its
own.

`python -m bench.peers._caller PEER PART ADDRESS FOLDER CALLERS INDEX` takes an order a
line and answers in a line, both in JSON. This file needs only NumPy.
"""

import contextlib
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from bench.peers._peer import peer
from bench.peers._spec import SPECS, Given, Multiply, given, vector

CHECKED = 99
"""Seed of the vector whose product is checked."""

Answer = dict[str, Any]


class Callers:
    """The callers of one process."""

    def __init__(self, name: str, address: str, numbers: Given, folder: Path, callers: int, index: int) -> None:
        self._peer, self._given, self._folder, self._name = peer(name), numbers, folder, name
        self._vectors = [vector(numbers.spec.n, callers * index + caller) for caller in range(callers)]
        self._in_process = self._peer.ABOUT.in_process
        self._connections = [self._connected(address) for _ in range(1 if self._in_process else callers)]
        self._far: Multiply | None = None

    def _connected(self, address: str) -> Multiply:
        return self._peer.connect(address, self._given)

    def check(self) -> Answer:
        """Save the product of the test vector in the folder."""
        v = vector(self._given.spec.n, CHECKED)
        product = self._connections[0](v[None] if self._in_process else v)
        np.save(self._folder / f"{self._name}.npy", np.asarray(product).reshape(-1))
        return {}

    def time(self, count: int, seconds: float) -> Answer:
        """Let callers ask again as soon as they have their answer.

        Returns:
            Products a second, and the seconds of each call. Each caller calls at least
            once. In process all vectors are one block, which is one call.
        """
        if self._in_process:
            calls: list[Callable[[], object]] = [self._call(self._connections[0], np.stack(self._vectors[:count]))]
        else:
            calls = [self._call(*each) for each in zip(self._connections[:count], self._vectors, strict=False)]
        begin = threading.Barrier(len(calls))

        def loop(call: Callable[[], object]) -> tuple[float, list[float]]:
            begin.wait()
            started = end = time.perf_counter()
            taken: list[float] = []
            while end < started + seconds or not taken:
                before = end
                call()
                end = time.perf_counter()
                taken.append(end - before)
            return len(taken) / (end - started), taken

        with ThreadPoolExecutor(len(calls)) as threads:
            found = list(threads.map(loop, calls))
        width = count if self._in_process else 1
        return {
            "rate": width * sum(rate for rate, _ in found),
            "seconds": [each for _, taken in found for each in taken],
        }

    def once(self) -> Answer:
        """Return the median seconds of a caller's product alone."""
        taken = self.time(1, 0.05)["seconds"]
        return {"seconds": statistics.median(taken)}

    def far(self, address: str) -> Answer:
        """Connect by another address, and multiply there, so that all is set up."""
        connect = getattr(self._peer, "connect_far", self._peer.connect)
        self._far = connect(address, self._given)
        return self.again()

    def again(self) -> Answer:
        """Multiply by the other address."""
        assert self._far is not None
        self._far(self._vectors[0])
        return {}

    @staticmethod
    def _call(multiply: Multiply, V: Any) -> Callable[[], object]:
        return lambda: multiply(V)


def _obey(callers: Callers, orders: Iterable[str], answers: TextIO) -> None:
    for line in orders:
        order = json.loads(line)
        answer = getattr(callers, order.pop("do"))(**order)
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    """Connect, and take orders until standard input ends."""
    name, part, address, folder, callers, index = sys.argv[1:]
    # Some clients print. The answers keep the pipe for themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    numbers = given(Path(folder), SPECS[part])
    found = Callers(name, address, numbers, Path(folder), int(callers), int(index))
    print("peer's callers are connected", file=sys.stderr, flush=True)
    with contextlib.suppress(BrokenPipeError):
        _obey(found, sys.stdin, answers)
    os._exit(0)  # Without waiting for the threads of clients.


if __name__ == "__main__":
    main()
