"""A distance on one machine: a proxy that delays all bytes and counts them.

`python -m bench._delay HOST:PORT SECONDS` forwards connections until its standard input
ends. Each line of input is answered by the bytes so far: to the server, and back.
"""

import contextlib
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from bench import _processes

_BUFFER_BYTES = 1 << 20


class Bytes(NamedTuple):
    """The bytes that went through."""

    up: int
    """Bytes to the server."""
    down: int
    """Bytes back."""


class Distance:
    """A running proxy."""

    def __init__(self, child: _processes.Child) -> None:
        self._child = child
        self.address = f"127.0.0.1:{child.ready[1]}"

    def counted(self) -> Bytes:
        """Return the bytes so far."""
        process = self._child.process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return Bytes(*map(int, process.stdout.readline().split()))


@contextlib.contextmanager
def distance(address: str, seconds: float) -> Iterator[Distance]:
    """Start a proxy in front of a server, which delays a round trip by so many
    seconds.
    """
    argv = [sys.executable, "-m", "bench._delay", address, str(seconds)]
    with _processes.child(argv, r"delaying on (\d+)$", talks=True) as found:
        yield Distance(found)


# The proxy's process


class _Counts:
    def __init__(self) -> None:
        self.of = [0, 0]


def _forward(source: socket.socket, target: socket.socket, seconds: float, counts: _Counts, index: int) -> None:
    """Send on what comes, each piece after a delay. Two threads, so that a delay does
    not reduce the rate.
    """
    pieces: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def send() -> None:
        with contextlib.suppress(OSError):
            while True:
                due, piece = pieces.get()
                time.sleep(max(due - time.perf_counter(), 0.0))
                if not piece:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(piece)

    threading.Thread(target=send, daemon=True).start()
    piece = b"-"
    while piece:
        try:
            piece = source.recv(_BUFFER_BYTES)
        except OSError:
            piece = b""
        counts.of[index] += len(piece)
        pieces.put((time.perf_counter() + seconds, piece))


def _serve(address: str, seconds: float) -> None:
    host, _, port = address.rpartition(":")
    listener, counts = socket.create_server(("127.0.0.1", 0)), _Counts()

    def accept() -> None:
        while True:
            near, _ = listener.accept()
            far = socket.create_connection((host, int(port)))
            for each in (near, far):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for index, pair in enumerate(((near, far), (far, near))):
                threading.Thread(target=_forward, args=(*pair, seconds / 2, counts, index), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    print(f"delaying on {listener.getsockname()[1]}", file=sys.stderr, flush=True)
    for _ in sys.stdin:
        print(*counts.of, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]))
