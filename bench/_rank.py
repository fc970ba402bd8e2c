"""`python -m bench._rank PORT RANK SIZE SECONDS`: a rank of a group without devices. It
executes orders by dropping what they bring, so that the orders themselves are measured.
Before each order it waits for a random time, of so many seconds on average.
"""

import random
import sys
import threading
from collections.abc import Sequence
from typing import Any

from hvpd_server.group.follower import Follower
from hvpd_server.group.replay import Replay

SECRET = bytes(32)


class _Nothing:
    def __init__(self, rank: int, seconds: float) -> None:
        self._chance = random.Random(rank)
        self._seconds = seconds
        self._never = threading.Event()

    def _wait(self) -> None:
        if self._seconds:
            self._never.wait(self._chance.expovariate(1.0 / self._seconds))

    def load(self, blob: Any) -> object:
        self._wait()
        return bytes(blob)

    def place(self, tensor: Any, rows: slice) -> object:
        return rows

    def put(self, value: Any) -> object:
        self._wait()
        return value

    def launch(self, program: Any, arguments: Sequence[Any]) -> None:
        self._wait()


def main() -> None:
    """Join the leader at a port of this machine, and execute its orders."""
    port, rank, size, seconds = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    print("joining", file=sys.stderr, flush=True)
    follower = Follower(("127.0.0.1", port), rank, size, {}, lambda: SECRET)
    follower.serve(Replay(_Nothing(rank, seconds)))


if __name__ == "__main__":
    main()
