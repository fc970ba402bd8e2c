"""An end of the vector port's protocol on a socket that blocks, with timeouts."""

import array
import contextlib
import os
import select
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from hvpd._wire import codec
from hvpd._wire.vector_protocol import CallerEvent, ClosedError, End, ProtocolError, Reply

_T = TypeVar("_T")
_E = TypeVar("_E")

_TIMEVAL: Final = struct.Struct("@ll")

_JOINED_BYTES: Final = 64 << 10
"""Bytes of the largest payload that is copied behind its head.

For these, a TLS record for the head alone costs more than the copy."""


class Connection(Generic[_E]):
    """One end of a connection.

    Args:
        sock: A connected socket, which `close` closes.
        end: The end of the protocol.
        patience: Seconds that a single step may take. A message of several steps may
            take longer. None for no limit.

    Attributes:
        deadline: End of the current product, on time.monotonic's clock; None for none.
    """

    def __init__(self, sock: socket.socket, end: End[_E], patience: float | None = None) -> None:
        self.socket = sock
        self.deadline: float | None = None
        self._end = end
        self._plain = type(sock) is socket.socket
        self._poll: Any = select.poll() if hasattr(select, "poll") else None
        if self._poll is not None:
            self._poll.register(sock, select.POLLIN)
        self.be_patient(patience)

    def be_patient(self, seconds: float | None) -> None:
        """Let each step take so many seconds from now on."""
        if self._plain and sys.platform == "linux":
            # The kernel's own timeouts, because with Python's, each step takes two
            # system calls, and gives up the interpreter's lock twice.
            self.socket.settimeout(None)
            whole, part = (0, 0) if seconds is None else divmod(max(int(seconds * 1e6), 1), 10**6)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self.socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, part))
        else:
            self.socket.settimeout(seconds)

    @property
    def readable(self) -> bool:
        """Return whether bytes or the end have arrived; False if it is not known."""
        if self._end.pending or (isinstance(self.socket, ssl.SSLSocket) and self.socket.pending()):
            return True
        return self._poll is not None and bool(self._poll.poll(0))

    def send(self, head: bytes, payload: codec.Buffer = b"") -> None:
        """Send head and payload.

        Raises:
            OSError: The connection is broken, or took nothing within the timeout.
        """
        parts: tuple[codec.Buffer, ...] = (head, payload)
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

    def next_event(self) -> _E:
        """Receive until there is an event, and return it.

        Raises:
            ClosedError: The connection ended before.
            ProtocolError: The other end broke the protocol.
            OSError: The connection is broken, or nothing came within the timeout.
        """
        end = self._end
        while (event := end.next_event()) is None:
            end.received(self._step(self.socket.recv_into, end.receive_buffer()))
        return event

    def receive_into(self, target: memoryview) -> None:
        """Fill memory with the payload of the last event; raise as `next_event`."""
        self._end.fill(target)
        if self._end.missing:
            self._finish()

    def skip(self) -> None:
        """Discard the payload of the last event; raise as `next_event`."""
        self._end.skip()
        self._finish()

    def _finish(self) -> None:
        end = self._end
        while end.missing:
            end.received(self._step(self.socket.recv_into, end.receive_buffer()))

    def wait(self) -> None:
        """Wait without limit until bytes arrive; raise as `next_event`."""
        end = self._end
        if end.pending:
            return None
        while True:
            try:
                return end.received(self._step(self.socket.recv_into, end.receive_buffer()))
            except TimeoutError:
                continue

    def _step(self, call: Callable[[_T], int], argument: _T) -> int:
        """Call a method of the socket, at most until the deadline."""
        if self.deadline is not None:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self.be_patient(left)
        try:
            return call(argument)
        except BlockingIOError:
            raise TimeoutError("timed out") from None

    @property
    def shares_memory(self) -> bool:
        """Return whether descriptors can be passed: the socket is a Unix socket."""
        return self._plain and self.socket.family == socket.AF_UNIX

    def send_descriptor(self, descriptor: int) -> None:
        """Send a byte with a descriptor; raise as `send`."""
        self._step(lambda fds: socket.send_fds(self.socket, [b"\0"], fds), [descriptor])

    def receive_descriptor(self) -> int | None:
        """Receive a byte with one descriptor, which the caller closes.

        The kernel closes descriptors that come with any other byte, because nothing
        else here makes room for them.

        Returns:
            None if there is not exactly one.

        Raises:
            ClosedError: The connection ended before.
            ProtocolError: Other bytes came first.
            OSError: The connection is broken, or nothing came within the timeout.
        """
        if self._end.pending:
            raise ProtocolError("a descriptor was expected, and other bytes came")
        found = array.array("i")
        flags = 0

        def receive(room: int) -> int:
            nonlocal flags
            said, parts, flags, _ = self.socket.recvmsg(1, room, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
            for level, kind, content in parts:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    found.frombytes(content[: len(content) - len(content) % found.itemsize])
            return len(said)

        if not self._step(receive, socket.CMSG_LEN(found.itemsize)):
            raise ClosedError("the other end closed the connection")
        if len(found) == 1 and not flags & socket.MSG_CTRUNC:
            return found[0]
        for descriptor in found:
            os.close(descriptor)
        return None

    def interrupt(self) -> None:
        """Let steps of other threads fail. The connection cannot be used again."""
        with contextlib.suppress(OSError):  # The other end was faster.
            # Not the method of a TLS socket, which is for one thread only.
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection."""
        self.socket.close()


def open_caller(connection: Connection[CallerEvent]) -> None:
    """Open a caller's connection; raise as `Connection.next_event`.

    The ticket may lie about the port, and another service may listen there. So nothing
    is sent before the server has proved itself.
    """
    while isinstance(event := connection.next_event(), Reply):
        connection.send(event.content)


def unix_name(unix_id: bytes) -> str:
    """Return the name of a server's Unix socket, in Linux's abstract namespace.

    Such a name is no file. It is free again when the server ends, however it ends.
    """
    return f"\0hvpd/vectors/{unix_id.hex()}"


def tune(sock: socket.socket) -> None:
    """Set a TCP socket to send small messages at once, and to find a dead network.

    A dead network ends the connection within half a minute. A Unix socket needs neither
    setting.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, option):  # Each system has its own.
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
