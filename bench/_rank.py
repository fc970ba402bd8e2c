"""`python -m bench._rank PORT`: a rank of a group without devices. It executes orders
by dropping what they bring, so that the orders themselves are measured.
"""

import sys
from collections.abc import Sequence
from typing import Any

from hvpd_server.group.follower import Follower
from hvpd_server.group.replay import Replay

SECRET = bytes(32)


class _Nothing:
    def load(self, blob: Any) -> object:
        return bytes(blob)

    def place(self, tensor: Any, rows: slice) -> object:
        return rows

    def put(self, value: Any) -> object:
        return value

    def launch(self, program: Any, arguments: Sequence[Any]) -> None:
        pass


def main() -> None:
    """Join the leader at a port of this machine, and execute its orders."""
    print("joining", file=sys.stderr, flush=True)
    follower = Follower(("127.0.0.1", int(sys.argv[1])), 1, 2, {}, lambda: SECRET)
    follower.serve(Replay(_Nothing()))


if __name__ == "__main__":
    main()
