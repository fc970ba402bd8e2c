"""A client's connections to the vector port: products past gRPC, in a fraction of its time. They are opened beside, and until there is one,
or where there can be none, products go over gRPC's streams: nobody waits for a port that no firewall lets through.
"""

import contextlib
import hmac
import logging
import socket
import threading
import time
import weakref
from collections.abc import Callable

import grpc
from google.protobuf.message import DecodeError

from hvpd import _codec, _vectors
from hvpd._errors import Failure, failure_of_status
from hvpd._stream import RpcFailure
from hvpd._tls import Tls
from hvpd._vectors import Connection
from hvpd.v1 import curvature_pb2

_log = logging.getLogger(__name__)

_CODE = grpc.StatusCode

_OPENING_SECONDS = 5.0

_SILENCE = 20.0
"""Seconds without an answer after which a caller asks by gRPC whether the server is there at all; within which it must take a request."""

_REPLACED = 1.0
"""Seconds for which a caller waits for the connection that replaces one which an interrupt cost."""

_LOOK = 0.002
"""Seconds after which it looks again whether there is one."""

_PAUSE, _MOST_PAUSE = 1.0, 300.0
"""Seconds after a connection that could not be opened before the next is tried: at first, and at most."""

Ticket = Callable[[float], tuple[curvature_pb2.CreateVectorTicketResponse, str]]
"""Asks the server for a ticket, within so many seconds; gives the id of that call with it. Raises what gRPC does."""


class VectorStream:
    """One connection, which somebody has to himself.

    Args:
        connection: Opened.
        request_id: Of the call that its ticket came from.
        alive: Asks whether the server is there.
    """

    def __init__(self, connection: Connection, request_id: str, alive: Callable[[], bool]) -> None:
        self.request_id = request_id
        self._alive = alive
        self.tag = 0
        """Of the latest product: the server counts as this does."""
        self._connection = connection
        connection.be_patient(_SILENCE)
        # Also where nobody closes the client: Python warns of sockets that it finds open.
        self._end = weakref.finalize(self, connection.close)

    @property
    def quiet(self) -> bool:
        """Whether nothing has come, as must be while nothing was asked for: an end would have."""
        return not self._connection.readable

    def multiply(
        self, spec: bytes, block: _codec.Array, target: _codec.Array, left: float | None
    ) -> "curvature_pb2.ProductInfo | Failure":
        """Fills `target` with the product of `block`, and tells how it was made, or why it was not.

        Args:
            spec: Of the product: a ProductSpec, encoded.
            block: V[k,n].
            target: HV[k,n], or v'Hv[k].
            left: Seconds that this may take; None: as long as it takes.

        Raises:
            RpcFailure: The connection broke, or time is over: it is of no use any more.
        """
        connection, self.tag = self._connection, self.tag + 1
        payload = _codec.payload(block)
        if left is not None:
            connection.deadline = time.monotonic() + left
        try:
            wait = 0 if left is None else max(int(left * 1e9), 1)
            connection.send(_vectors.REQUEST.pack(len(spec), 0, len(payload), wait) + spec, payload)
            size, kind, count = _vectors.RESPONSE.unpack(self._awaited(_vectors.RESPONSE.size, left))
            if size > _vectors.STATUS_BYTES or count != (target.nbytes if kind == _vectors.ANSWERED else 0):
                said = f"the server answers {target.nbytes} bytes with {count}, after a message of {size}"
                raise RpcFailure(Failure(_CODE.DATA_LOSS, said))
            message = bytes(connection.receive(size))
            answer = curvature_pb2.ProductInfo.FromString(message) if kind == _vectors.ANSWERED else _failure(message)
            if count:
                connection.receive_into(_codec.octets(target))
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

    def _awaited(self, size: int, left: float | None) -> memoryview:
        """The first bytes of an answer, however long it takes, as long as the server is there; or until the deadline."""
        while True:
            try:
                return self._connection.receive(size)
            except TimeoutError:
                if left is not None or not self._alive():
                    raise

    def close(self) -> None:
        """Ends it."""
        self._end()


def _failure(message: bytes) -> Failure:
    from google.rpc import status_pb2

    return failure_of_status(status_pb2.Status.FromString(message))


class VectorPool:
    """Connections that nobody uses at the moment.

    Args:
        host: Of the server.
        tls: How it is spoken to; None: plain text.
        ticket: Asks for one.
        alive: Asks whether the server is there.

    Attributes:
        offered: Whether the server takes products so, as far as is known.
    """

    def __init__(self, host: str, tls: Tls | None, ticket: Ticket, alive: Callable[[], bool]) -> None:
        self._host = host.strip("[]")
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
        """Whether there is a connection for whoever comes next."""
        return bool(self._idle)

    def take(self) -> VectorStream | None:
        """A connection, to be given back, or closed; None where there is none yet, or can be none. Then one is opened, beside."""
        if not self.offered:
            return None
        if self._replacing:
            ends = time.monotonic() + _REPLACED
            # Not by a condition: an interrupt in the middle of its wait would leave as a RuntimeError, of a lock that is not held.
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
        """Opens a connection in place of one that an interrupt has cost; the next caller waits for it, a moment. It would go over gRPC else, which
        the next interrupt would cost more (see `Transport._abandon`).
        """
        with self._lock:
            if self.offered:
                self._replacing = True
                self._begin()

    def _begin(self) -> None:
        """Has a connection opened, unless one is, or none can be."""
        if not (self._opening or self._closed or time.monotonic() < self._not_before):
            self._opening = True
            threading.Thread(target=self._open, name="hvpd-vectors", daemon=True).start()

    def give_back(self, stream: VectorStream) -> None:
        """Lets others have a connection, on which nothing is under way."""
        with self._lock:
            keep = not self._closed
            if keep:
                self._idle.append(stream)
        if not keep:
            stream.close()

    def close(self) -> None:
        """Ends all connections that nobody uses, and the others when they come back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for stream in idle:
            stream.close()

    def _open(self) -> None:
        """Opens one more."""
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
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(socket.create_connection((self._host, ticket.port), _OPENING_SECONDS))
            _vectors.tune(sock)
            if self._tls is not None:
                sock = stack.enter_context(self._tls.context.wrap_socket(sock, server_hostname=self._host))
            connection = Connection(sock, _OPENING_SECONDS)
            # The ticket may lie about the port, and any service may listen there: nothing is sent before this server has spoken.
            self._expect(connection, _vectors.MAGIC + ticket.greeting, ticket.port)
            connection.send(_vectors.MAGIC + ticket.id)
            self._expect(connection, ticket.server_proof, ticket.port)
            connection.send(ticket.client_proof)
            stack.pop_all()
        return VectorStream(connection, request_id, self._alive)

    def _expect(self, connection: Connection, said: bytes, port: int) -> None:
        """Receive what only the server that made the ticket can say."""
        if not hmac.compare_digest(connection.receive(len(said)), said):
            raise ConnectionError(f"port {port} of {self._host} is not the vector port of the server that named it")


def _check(ticket: curvature_pb2.CreateVectorTicketResponse) -> None:
    """Raise ConnectionError if a ticket is not what it must be. An older server, which does not speak first, sends no greeting."""
    sizes = [len(part) for part in (ticket.greeting, ticket.id, ticket.server_proof, ticket.client_proof)]
    if any(size != _vectors.PROOF_BYTES for size in sizes) or not 0 < ticket.port < 1 << 16:
        raise ConnectionError(
            f"a ticket must have four parts of {_vectors.PROOF_BYTES} bytes and a port, got {sizes} bytes and port {ticket.port}"
        )
