"""What client and server say to each other on the vector port: products past gRPC. Knows sockets, and neither gRPC nor what the messages are.

A connection is opened with a ticket (CurvatureService.CreateVectorTicket), over TLS where the server speaks it:

    server: MAGIC, the ticket's greeting    caller: MAGIC, the ticket's id
    server: its server_proof                caller: its client_proof

The server speaks first, because a server that lies may name the port of another service: that service must receive nothing.

Then, as often as the caller likes, one product after the other, all integers little-endian:

    caller: REQUEST, a ProductSpec, V       server: RESPONSE, a ProductInfo, HV; or RESPONSE, a google.rpc.Status

docs/vector-port.md says it for those who write another client.
"""

import select
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from hvpd import _codec

_T = TypeVar("_T")

MAGIC: Final = b"hvpd/v1\n"
PROOF_BYTES: Final = 16
"""Of a ticket's greeting and id, and of either proof."""

OPENING_BYTES: Final = len(MAGIC) + PROOF_BYTES
"""Of the first message of either side."""

REQUEST: Final = struct.Struct("<IIQQ")
"""Bytes of the ProductSpec, 0, bytes of V, and for how long the caller waits, in nanoseconds; 0: as long as it takes."""

RESPONSE: Final = struct.Struct("<IIQ")
"""Bytes of the message, which it is, and bytes of what follows: HV, or v'Hv of a quadratic form; nothing of a failure."""

ANSWERED: Final = 0
FAILED: Final = 1
"""Which message of a response: a ProductInfo, or a google.rpc.Status."""

SPEC_BYTES: Final = 16 << 10
STATUS_BYTES: Final = 64 << 10
"""The largest messages."""

_TIMEVAL: Final = struct.Struct("@ll")

_ROOM_BYTES: Final = 64 << 10
"""Of what came and was not asked for yet: a small product arrives in one piece."""

_JOINED_BYTES: Final = 64 << 10
"""Up to which a TLS record of its own for the head costs more than copying the payload behind it."""


class ClosedError(OSError):
    """The other end closed the connection."""


class Connection:
    """One end of a connection.

    Args:
        sock: Connected; closed by `close`.
        patience: Seconds that a single step may take: what goes on may take as long as it likes. None: as long as it takes.

    Attributes:
        deadline: When whatever is under way is of no use any more, on time.monotonic's clock; None where there is none.
    """

    def __init__(self, sock: socket.socket, patience: float | None = None) -> None:
        self.socket = sock
        self.deadline: float | None = None
        self._plain = type(sock) is socket.socket
        self._poll: Any = select.poll() if hasattr(select, "poll") else None
        if self._poll is not None:
            self._poll.register(sock, select.POLLIN)
        self.be_patient(patience)
        self._room = memoryview(bytearray(_ROOM_BYTES))
        self._start = self._end = 0

    def be_patient(self, seconds: float | None) -> None:
        """Has each step take so many seconds from now on."""
        if self._plain and sys.platform == "linux":
            # The kernel's own timeouts: with Python's, each step would be two system calls, and give up the interpreter's lock twice.
            self.socket.settimeout(None)
            whole, part = (0, 0) if seconds is None else divmod(max(int(seconds * 1e6), 1), 10**6)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self.socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, part))
        else:
            self.socket.settimeout(seconds)

    @property
    def pending(self) -> bool:
        """Whether something came that was not asked for yet."""
        return self._start < self._end

    @property
    def readable(self) -> bool:
        """Whether something came by now, be it the end; False where the system has no way to tell."""
        if self._start < self._end or (isinstance(self.socket, ssl.SSLSocket) and self.socket.pending()):
            return True
        return self._poll is not None and bool(self._poll.poll(0))

    def send(self, head: bytes, payload: _codec.Buffer = b"") -> None:
        """Sends all of both.

        Raises:
            OSError: The connection is broken, or nothing of it was taken within the timeout.
        """
        parts: tuple[_codec.Buffer, ...] = (head, payload)
        if self._plain:
            sent = self._step(self.socket.sendmsg, parts)
            if sent == len(head) + len(payload):
                return
            parts = (head[sent:], memoryview(payload)[max(sent - len(head), 0) :])
        elif len(payload) <= _JOINED_BYTES:
            parts = (b"".join(parts),)
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[self._step(self.socket.send, rest) :]

    def receive(self, size: int) -> memoryview:
        """The next bytes, at most what SPEC_BYTES or STATUS_BYTES are; good until the next call.

        Raises:
            ClosedError: The connection ended before them.
            OSError: It is broken, or nothing came within the timeout.
        """
        if self._end - self._start < size:
            if len(self._room) - self._start < size:
                kept = self._end - self._start
                self._room[:kept] = bytes(self._room[self._start : self._end])
                self._start, self._end = 0, kept
            while self._end - self._start < size:
                self._end += self._read(self._room[self._end :])
        found = self._room[self._start : self._start + size]
        self._start += size
        if self._start == self._end:
            self._start = self._end = 0
        return found

    def receive_into(self, target: memoryview) -> None:
        """Fills memory with the next bytes; raises as `receive` does."""
        filled = min(self._end - self._start, len(target))
        if filled:
            target[:filled] = self._room[self._start : self._start + filled]
            self._start += filled
            if self._start == self._end:
                self._start = self._end = 0
        while filled < len(target):
            filled += self._read(target[filled:])

    def skip(self, size: int) -> None:
        """Takes bytes that nobody wants; raises as `receive` does."""
        while size:
            size -= len(self.receive(min(size, len(self._room))))

    def wait(self) -> None:
        """Waits until something comes, for as long as it takes; raises as `receive` does."""
        while not self.pending:
            try:
                self._end = self._read(self._room)
            except TimeoutError:
                continue

    def _step(self, call: Callable[[_T], int], argument: _T) -> int:
        """One call of the socket's, which may take as long as a step may, and no longer than until the deadline."""
        if self.deadline is not None:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self.be_patient(left)
        try:
            return call(argument)
        except BlockingIOError:
            raise TimeoutError("timed out") from None

    def _read(self, into: memoryview) -> int:
        count = self._step(self.socket.recv_into, into)
        if not count:
            raise ClosedError("the other end closed the connection")
        return count

    def close(self) -> None:
        """Ends it."""
        self.socket.close()


def tune(sock: socket.socket) -> None:
    """Small messages leave at once, and a dead network is noticed within half a minute."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, option):  # Each system has its own.
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
