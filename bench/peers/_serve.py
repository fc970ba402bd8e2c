"""`python -m bench.peers._serve PEER PART` serves a size by one peer, until its
standard input ends.
"""

import signal
import sys
from types import FrameType

from bench.peers._peer import peer
from bench.peers._spec import SPECS


def main() -> None:
    """Serve."""
    signal.signal(signal.SIGTERM, _leave)
    name, part = sys.argv[1:]
    with peer(name).serving(SPECS[part]) as address:
        print(f"peer serves on {address}", file=sys.stderr, flush=True)
        for _ in sys.stdin:
            pass


def _leave(number: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that the peer ends its own processes."""
    sys.exit(0)


if __name__ == "__main__":
    main()
