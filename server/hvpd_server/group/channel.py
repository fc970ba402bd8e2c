"""A connection between the leader of a group and another rank: whole messages over a
socket, with TLS if the server has a certificate.
"""

import contextlib
import hashlib
import hmac
import socket
import ssl
import struct
import threading
from pathlib import Path
from typing import Any, Protocol

from hvpd._wire import frames, vector_socket
from hvpd._wire.codec import Buffer
from hvpd.v1 import group_pb2

ORDERS = frames.codec(group_pb2.GroupOrder)
"""Writes and reads the leader's messages, as frames with a chunk."""

REPORTS = frames.codec(group_pb2.GroupReport)
"""Writes and reads the messages of other ranks."""

NONCE_BYTES = 32
"""Bytes of a nonce, and of the secret of a start."""

FIRST_BYTES = 1 << 16
"""Most bytes of a message before both sides have shown that they know the secret."""

_SIZE = struct.Struct("<Q")
_PIECE = 1 << 18
_TOGETHER = 1 << 16
"""Most bytes of a message that is copied, to go out with its size in one packet."""


class _Pipe(Protocol):
    def send(self, data: Buffer) -> None: ...
    def receive_into(self, target: memoryview) -> int: ...


class Channel:
    """Sends and receives whole messages. One thread sends at a time, and one receives.

    Args:
        connection: A connected socket.
        context: TLS; None for a plain connection.
        server: Whether this side accepted the connection.

    Raises:
        OSError: The TLS handshake failed.
    """

    def __init__(
        self, connection: socket.socket, context: ssl.SSLContext | None = None, *, server: bool = False
    ) -> None:
        self._socket = connection
        vector_socket.tune(connection)
        self._pipe: _Pipe = _Plain(connection) if context is None else _Encrypted(connection, context, server=server)

    def fileno(self) -> int:
        """Return the socket's descriptor, for `select`."""
        return self._socket.fileno()

    def send(self, message: Buffer) -> None:
        """Send a message.

        Raises:
            OSError: The connection broke, or the timeout passed.
        """
        size = _SIZE.pack(len(message))
        if len(message) <= _TOGETHER:
            self._pipe.send(b"".join((size, message)))
        else:
            self._pipe.send(size)
            self._pipe.send(message)

    def receive(self, most: int | None = None) -> bytearray:
        """Receive a message.

        Args:
            most: Most bytes of the message; None for no limit.

        Raises:
            OSError: The connection broke, or the timeout passed.
        """
        (size,) = _SIZE.unpack(self._exactly(_SIZE.size))
        if most is not None and size > most:
            raise ConnectionError(f"a message of {size} bytes arrived, and at most {most} were expected")
        return self._exactly(size)

    def _exactly(self, size: int) -> bytearray:
        found = bytearray(size)
        view, position = memoryview(found), 0
        while position < size:
            count = self._pipe.receive_into(view[position:])
            if not count:
                raise ConnectionError("the connection was closed")
            position += count
        return found

    def timeout(self, seconds: float | None) -> None:
        """Set the most seconds to wait for the other side; None for no limit."""
        self._socket.settimeout(seconds)

    def close(self) -> None:
        """Close the connection, also for a thread that waits for it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class _Plain:
    def __init__(self, connection: socket.socket) -> None:
        self.send = connection.sendall
        self._socket = connection

    def receive_into(self, target: memoryview) -> int:
        return self._socket.recv_into(target)


class _Encrypted:
    """TLS between a socket and two buffers. One thread may send while another receives,
    which a socket of Python's ssl does not allow.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, *, server: bool) -> None:
        self._socket = connection
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._leaving, server_side=server)
        self._lock = threading.Lock()
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._read()
            else:
                self._flush()
                return

    def send(self, data: Buffer) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _PIECE):
            with self._lock:
                self._tls.write(view[start : start + _PIECE])
            self._flush()

    def receive_into(self, target: memoryview) -> int:
        while True:
            try:
                with self._lock:
                    data = self._tls.read(len(target))
                target[: len(data)] = data
                return len(data)
            except ssl.SSLWantReadError:
                self._read()
            except ssl.SSLZeroReturnError:
                return 0

    def _flush(self) -> None:
        with self._lock:
            data = self._leaving.read()
        if data:
            self._socket.sendall(data)

    def _read(self) -> None:
        data = self._socket.recv(_PIECE)
        if not data:
            raise ConnectionError("the connection was closed")
        with self._lock:
            self._arrived.write(data)


def proof(secret: bytes, side: str, *nonces: bytes) -> bytes:
    """Return a proof that a side knows the secret. The proof does not reveal it.

    Args:
        secret: The secret of this start.
        side: "leader" or "rank".
        nonces: The nonce of the leader, then that of the rank.
    """
    return hmac.digest(secret, b"\0".join([side.encode(), *nonces]), hashlib.sha256)


def is_proof(found: bytes, expected: bytes) -> bool:
    """Compare proofs in a time that does not depend on them."""
    return hmac.compare_digest(found, expected)


def contexts(cert: Path, key: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the TLS contexts of the leader and of another rank, which accepts the same
    certificate only.

    Raises:
        OSError: The files cannot be used.
    """
    leader = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leader.load_cert_chain(cert, key, password="")
    leader.num_tickets = 0
    rank = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    rank.check_hostname = False  # The certificate itself is compared, and not a name in it.
    rank.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    rank.load_verify_locations(cert)
    return leader, rank


def written(order: group_pb2.GroupOrder, chunk: Buffer = b"") -> bytes:
    """Return the bytes of a message of the leader."""
    return ORDERS.write(frames.Frame(order, chunk))


def read(data: bytearray) -> "frames.Frame[Any]":
    """Return a message of the leader, with its chunk.

    Raises:
        DecodeError: The bytes are no such message.
    """
    found: frames.Frame[Any] = ORDERS.read(bytes(data))
    return found
