"""A network between two programs of one machine that can be slow, cut, or black."""

import contextlib
import socket
import threading
from typing import Final, Literal

Way = Literal["there", "back"]
"""A direction: to the port of the network's end, or back."""

WAYS: Final[tuple[Way, ...]] = ("there", "back")


class Network:
    """A path to a port that can be slow, cut, or black. When it is black, it takes
    bytes and passes none on.

    Args:
        port: The port on this machine.
        delay: Seconds of delay for each piece.
        rate: Bytes a second, each way of each connection; 0 for no limit.
    """

    def __init__(self, port: int, *, delay: float = 0.0, rate: int = 0) -> None:
        self._target = port
        self._delay, self._rate = delay, rate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._open: list[tuple[socket.socket, socket.socket]] = []
        self._ends: list[socket.socket] = []
        self._light: dict[Way, threading.Event] = {way: threading.Event() for way in WAYS}
        self.lighten()
        self.cuts = 0
        self.passed = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._listener.accept()
                try:
                    theirs = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    ours.close()
                    continue
                with self._lock:
                    self._open.append((ours, theirs))
                    self._ends += [ours, theirs]
                for way, pair in zip(WAYS, ((ours, theirs), (theirs, ours)), strict=True):
                    self._threads.append(threading.Thread(target=self._pass, args=(*pair, self._light[way])))
                    self._threads[-1].start()

    def _pass(self, source: socket.socket, target: socket.socket, light: threading.Event) -> None:
        pause = threading.Event()
        with contextlib.suppress(OSError):
            while piece := source.recv(4096 if self._rate else 1 << 16):
                light.wait()
                pause.wait(self._delay + (len(piece) / self._rate if self._rate else 0))
                target.sendall(piece)
                self.passed += len(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self, how: int = socket.SHUT_RDWR) -> None:
        """End every connection, in the middle of its messages."""
        with self._lock:
            opened, self._open = self._open, []
        for pair in opened:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(how)
        self.cuts += bool(opened)

    def darken(self, *ways: Way) -> None:
        """Pass nothing on from now on, without telling the ends.

        Args:
            *ways: The directions; none for both.
        """
        for way in ways or WAYS:
            self._light[way].clear()

    def lighten(self) -> None:
        """Pass the held bytes on."""
        for light in self._light.values():
            light.set()

    def close(self) -> None:
        """End every connection, and take no further ones."""
        self.lighten()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        for end in self._ends:
            end.close()
