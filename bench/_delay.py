"""A distance on one machine: a proxy that delays all bytes, lets a limited rate of them
through, and counts them.

`python -m bench._delay HOST:PORT SECONDS RATE` forwards connections until its standard
input ends. Each line of input is answered by the bytes so far: to the server, and back.
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
def distance(address: str, seconds: float, rate: float = 0.0) -> Iterator[Distance]:
    """Start a proxy in front of a server.

    Args:
        address: Host and port of the server.
        seconds: Seconds by which a round trip is delayed.
        rate: Bytes a second in each direction, for all connections together; 0 for no
            limit.
    """
    argv = [sys.executable, "-m", "bench._delay", address, str(seconds), str(rate)]
    with _processes.child(argv, r"delaying on (\d+)$", talks=True) as found:
        yield Distance(found)


# The proxy's process


class Line:
    """One direction of the link, which all connections share.

    Args:
        rate: Bytes a second; 0 for no limit.
    """

    def __init__(self, rate: float) -> None:
        self.counted = 0
        self.piece_bytes = max(4096, min(_BUFFER_BYTES, int(rate / 500))) if rate else _BUFFER_BYTES
        """Most bytes of a piece: what takes 2 ms at this rate."""
        self._rate = rate
        self._lock = threading.Lock()
        self._free = 0.0

    def due(self, size: int, arrived: float) -> float:
        """Return when the last byte of a piece leaves the link. Pieces follow each
        other.
        """
        if not self._rate:
            return arrived
        with self._lock:
            self._free = max(self._free, arrived) + size / self._rate
            return self._free


def _forward(source: socket.socket, target: socket.socket, seconds: float, line: Line) -> None:
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
            piece = source.recv(line.piece_bytes)
        except OSError:
            piece = b""
        line.counted += len(piece)
        pieces.put((line.due(len(piece), time.perf_counter()) + seconds, piece))


def _serve(address: str, seconds: float, rate: float) -> None:
    host, _, port = address.rpartition(":")
    listener, lines = socket.create_server(("127.0.0.1", 0)), (Line(rate), Line(rate))

    def accept() -> None:
        while True:
            near, _ = listener.accept()
            far = socket.create_connection((host, int(port)))
            for each in (near, far):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for line, pair in zip(lines, ((near, far), (far, near)), strict=True):
                threading.Thread(target=_forward, args=(*pair, seconds / 2, line), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    print(f"delaying on {listener.getsockname()[1]}", file=sys.stderr, flush=True)
    for _ in sys.stdin:
        print(*(line.counted for line in lines), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]))
