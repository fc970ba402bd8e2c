"""A client's connections to the vector port, for products past gRPC.

Here a product takes a fraction of the time that it takes over gRPC. Connections are
opened in the background. Without one, products go over gRPC's streams, so that no
caller waits for a port that a firewall blocks. On the server's own machine, a
connection is a Unix socket if possible.
"""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable

import grpc
from google.protobuf.message import DecodeError

from hvpd._errors import Failure, failure_of_status
from hvpd._transport.stream import RpcFailure
from hvpd._transport.tls import Tls
from hvpd._wire import codec, segment, vector_protocol, vector_socket
from hvpd._wire.segment import Segment
from hvpd._wire.vector_protocol import CallerEnd, CallerEvent, ProtocolError, Response, SegmentAnswer
from hvpd._wire.vector_socket import Connection
from hvpd.v1 import curvature_pb2

_log = logging.getLogger(__name__)

_CODE = grpc.StatusCode

_OPENING_SECONDS = 5.0
"""Seconds for each step of opening a connection."""

_SILENCE = 20.0
"""Seconds without an answer after which a caller asks by gRPC whether the server lives.

The server must take a request within the same time."""

_REPLACED = 1.0
"""Seconds to wait for a new connection after an interrupt has cost one."""

_LOOK = 0.002
"""Seconds between two looks for the new connection."""

_PAUSE, _MOST_PAUSE = 1.0, 300.0
"""Seconds between two failed tries to open a connection: at first, and at most."""

_SHARED_BYTES = 256 << 10
"""Bytes of the smallest block that is sent by shared memory.

Smaller ones take as long by the socket (on two cores)."""

Ticket = Callable[[float], tuple[curvature_pb2.CreateVectorTicketResponse, str]]
"""Asks the server for a ticket within some seconds; returns it and the id of the call.

It raises gRPC's errors."""


class VectorStream:
    """One connection, for one caller at a time.

    Args:
        connection: The open connection.
        request_id: Id of the call that returned the ticket.
        alive: Asks the server whether it lives.
        segment_bytes: Bytes of the largest segment that the server takes; 0: none.
    """

    def __init__(
        self,
        connection: Connection[CallerEvent],
        request_id: str,
        alive: Callable[[], bool],
        segment_bytes: int = 0,
    ) -> None:
        self.request_id = request_id
        self.segment_bytes = segment_bytes
        self._segment: Segment | None = None
        """Shared memory for large vectors. It is kept for later products."""
        self._alive = alive
        self.tag = 0
        """Number of the latest product. The server counts in the same way."""
        self._connection = connection
        connection.be_patient(_SILENCE)
        # Also if the client is never closed, because Python warns of open sockets.
        self._end = weakref.finalize(self, connection.close)

    @property
    def unix(self) -> bool:
        """Return whether the connection is by the server's Unix socket."""
        return self._connection.socket.family == socket.AF_UNIX

    @property
    def quiet(self) -> bool:
        """Return whether nothing has arrived.

        Between products nothing arrives but the end of the connection.
        """
        return not self._connection.readable

    def multiply(
        self, spec: bytes, block: codec.Array, target: codec.Array, left: float | None
    ) -> "curvature_pb2.ProductInfo | Failure":
        """Fill `target` with the product of `block`; return its times, or its failure.

        Args:
            spec: An encoded ProductSpec.
            block: V[k,n].
            target: HV[k,n], or v'Hv[k].
            left: Seconds that the product may take; None for no limit.

        Raises:
            RpcFailure: The connection broke, or the time is over. It cannot be used
                again.
        """
        connection, self.tag = self._connection, self.tag + 1
        payload = codec.payload(block)
        if left is not None:
            connection.deadline = time.monotonic() + left
        try:
            timeout_ns = 0 if left is None else max(int(left * 1e9), 1)
            shared = self._segment_of(len(payload)) if len(payload) >= _SHARED_BYTES else None
            if shared is not None:
                shared.write(payload)
                payload = memoryview(b"")
            size = block.nbytes
            connection.send(vector_protocol.request(spec, size, timeout_ns, shared=shared is not None), payload)
            response = self._awaited(target.nbytes, left)
            message = response.message
            answer = _failure(message) if response.failed else curvature_pb2.ProductInfo.FromString(message)
            self._receive(response, shared, codec.octets(target))
        except ProtocolError as error:
            raise RpcFailure(Failure(_CODE.DATA_LOSS, f"the server's answer is wrong: {error}")) from None
        except DecodeError as error:
            raise RpcFailure(Failure(_CODE.DATA_LOSS, f"the server's answer cannot be read: {error}")) from None
        except TimeoutError as error:
            code = _CODE.DEADLINE_EXCEEDED if left is not None else _CODE.UNAVAILABLE
            raise RpcFailure(Failure(code, f"no answer on the vector port: {error}")) from None
        except OSError as error:
            raise RpcFailure(Failure(_CODE.UNAVAILABLE, f"the connection to the vector port broke: {error}")) from None
        if left is not None:
            connection.deadline = None
            connection.be_patient(_SILENCE)
        return answer

    def _awaited(self, size: int, left: float | None) -> Response:
        """Return the head of an answer, whose result must have `size` bytes.

        Without a deadline, wait as long as the server lives.
        """
        while True:
            try:
                response = self._connection.next_event()
                break
            except TimeoutError:
                if left is not None or not self._alive():
                    raise
        if not isinstance(response, Response):
            raise ProtocolError("an offer is answered that was not made")
        if not response.failed and response.size != size:
            raise ProtocolError(f"the result has {response.size} bytes, expected {size}")
        return response

    def _receive(self, response: Response, shared: Segment | None, target: memoryview) -> None:
        """Fill `target` with the result of a response, if it has one."""
        if not response.shared:
            self._connection.receive_into(target[: response.size])
        elif shared is not None and response.size <= shared.size:
            self._connection.skip()
            shared.read_into(target)
        else:
            raise ProtocolError("the result is said to be in shared memory, which this product does not have")

    def _segment_of(self, size: int) -> Segment | None:
        """Return shared memory of at least `size` bytes; None if there is none.

        Raises:
            OSError: The connection broke.
        """
        if self._segment is not None and self._segment.size >= size:
            return self._segment
        if size > self.segment_bytes:
            return None
        self._segment = None  # Before there is another, so that both do not take memory.
        try:
            found, descriptor = segment.create(size)
        except OSError as error:
            _log.debug("no memory to share with the server: %s", error)
            self.segment_bytes = 0
            return None
        connection = self._connection
        try:
            connection.send(vector_protocol.offer(size))
            taken = self._taken()
            if taken:
                connection.send_descriptor(descriptor)
                taken = self._taken()
        finally:
            os.close(descriptor)
        if not taken:  # Do not ask again on this connection.
            self.segment_bytes = 0
            return None
        self._segment = found
        return found

    def _taken(self) -> bool:
        answer = self._connection.next_event()
        if not isinstance(answer, SegmentAnswer):
            raise ProtocolError("a product is answered that was not asked for")
        return answer.taken

    def interrupt(self) -> None:
        """End the product under way. Other threads may call it.

        The server then drops the product, if it waits for its launch.
        """
        self._connection.interrupt()

    def close(self) -> None:
        """End the connection."""
        self._segment = None
        self._end()


def _failure(message: bytes) -> Failure:
    from google.rpc import status_pb2

    return failure_of_status(status_pb2.Status.FromString(message))


class VectorPool:
    """The idle connections of a client.

    Args:
        host: Host of the server.
        tls: Certificates; None for plain text.
        ticket: Asks for a ticket.
        alive: Asks the server whether it lives.
        local: Whether the host is this machine.

    Attributes:
        offered: Whether the server has a vector port that the client may use.
        unix: Whether the server's Unix socket is tried before its port.
        shares_memory: Whether large vectors are shared on connections by that socket.
    """

    def __init__(
        self, host: str, tls: Tls | None, ticket: Ticket, alive: Callable[[], bool], *, local: bool = False
    ) -> None:
        self._host = host.strip("[]")
        self.unix = local and sys.platform == "linux"
        self.shares_memory = segment.available()
        self._tls = tls
        self._ticket = ticket
        self._alive = alive
        self.offered = False
        self._lock = threading.Lock()
        self._replacing = False
        self._idle: list[VectorStream] = []
        self._opening = False
        self._closed = False
        self._pause = _PAUSE
        self._not_before = 0.0

    @property
    def ready(self) -> bool:
        """Return whether there is an idle connection."""
        return bool(self._idle)

    def take(self) -> VectorStream | None:
        """Return a connection, which the caller gives back or closes.

        Return None if there is none. Then one is opened in the background, if it can
        be.
        """
        if not self.offered:
            return None
        if self._replacing:
            ends = time.monotonic() + _REPLACED
            # Without a condition, because an interrupt during its wait would become a
            # RuntimeError about a lock that is not held.
            while self._opening and not self._idle and time.monotonic() < ends:
                time.sleep(_LOOK)
            self._replacing = False
        with self._lock:
            while self._idle:
                stream = self._idle.pop()
                if stream.quiet:
                    return stream
                stream.close()
            self._begin()
        return None

    def replace(self) -> None:
        """Open a connection in place of one that an interrupt has cost.

        The next caller waits for it for a moment. Otherwise its product would go over
        gRPC, where the next interrupt costs more (see `interrupts`).
        """
        with self._lock:
            if self.offered:
                self._replacing = True
                self._begin()

    def _begin(self) -> None:
        """Start to open a connection, unless one is being opened, or none can be."""
        if not (self._opening or self._closed or time.monotonic() < self._not_before):
            try:
                threading.Thread(target=self._open, name="hvpd-vectors", daemon=True).start()
            except RuntimeError:  # The system has no more threads. Products go over gRPC.
                self._not_before = time.monotonic() + self._pause
                return
            self._opening = True

    def give_back(self, stream: VectorStream) -> None:
        """Give back a connection without a product under way."""
        with self._lock:
            keep = not self._closed
            if keep:
                self._idle.append(stream)
        if not keep:
            stream.close()

    def by_unix_socket(self) -> bool:
        """Open a connection; return whether it is by the server's Unix socket."""
        if not (self.unix and self.offered):
            return False
        try:
            stream = self._connected()
        except (OSError, grpc.RpcError, ValueError):
            return False
        self.give_back(stream)
        return stream.unix

    def close(self) -> None:
        """End idle connections now, and the others when they come back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for stream in idle:
            stream.close()

    def _open(self) -> None:
        """Open one connection."""
        stream = None
        try:
            stream = self._connected()
        except (OSError, grpc.RpcError, ValueError) as error:
            _log.debug("no connection to the vector port, products go over gRPC: %s", error)
        finally:
            if stream is not None:
                self.give_back(stream)
            with self._lock:
                self._opening = False
                self._pause = _PAUSE if stream is not None else min(4 * self._pause, _MOST_PAUSE)
                self._not_before = time.monotonic() + (0 if stream is not None else self._pause)

    def _connected(self) -> VectorStream:
        ticket, request_id = self._ticket(_OPENING_SECONDS)
        _check(ticket)
        if self.unix and ticket.unix_id:
            try:
                return self._opened("the server's Unix socket", self._unix_socket(ticket.unix_id), ticket, request_id)
            except OSError as error:  # The server may be in a container, or at the other end of a tunnel.
                _log.debug("the server's Unix socket cannot be used: %s", error)
        return self._opened(f"port {ticket.port} of {self._host}", self._tcp_socket(ticket.port), ticket, request_id)

    def _unix_socket(self, unix_id: bytes) -> socket.socket:
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.settimeout(_OPENING_SECONDS)
            sock.connect(vector_socket.unix_name(unix_id))
            stack.pop_all()
        return sock

    def _tcp_socket(self, port: int) -> socket.socket:
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(socket.create_connection((self._host, port), _OPENING_SECONDS))
            vector_socket.tune(sock)
            if self._tls is not None:
                sock = self._tls.context.wrap_socket(sock, server_hostname=self._tls.server_name or self._host)
            stack.pop_all()
        return sock

    def _opened(
        self, where: str, sock: socket.socket, ticket: curvature_pb2.CreateVectorTicketResponse, request_id: str
    ) -> VectorStream:
        """Open a connection on a socket, which is closed if that fails."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(sock)
            end = CallerEnd(ticket.greeting, ticket.id, ticket.server_proof, ticket.client_proof)
            connection = Connection(sock, end, _OPENING_SECONDS)
            try:
                vector_socket.open_caller(connection)
            except ProtocolError as error:
                raise ConnectionError(f"{where}: {error}") from None
            stack.pop_all()
        segments = ticket.segment_bytes if connection.shares_memory and self.shares_memory else 0
        return VectorStream(connection, request_id, self._alive, segments)


def _check(ticket: curvature_pb2.CreateVectorTicketResponse) -> None:
    """Raise ConnectionError if a ticket is not valid.

    An older server, which does not speak first, sends no greeting. A server without a
    Unix socket sends no id of it.
    """
    parts = (ticket.greeting, ticket.id, ticket.server_proof, ticket.client_proof)
    sizes = [len(part) for part in (*parts, *([ticket.unix_id] if ticket.unix_id else []))]
    if any(size != vector_protocol.PROOF_BYTES for size in sizes) or not 0 < ticket.port < 1 << 16:
        raise ConnectionError(
            f"a ticket must have parts of {vector_protocol.PROOF_BYTES} bytes and a port, got {sizes} bytes and port {ticket.port}"
        )
