"""One connection of the vector port: its products, one after the other."""

import contextlib
import functools
import itertools
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

from google.protobuf.message import DecodeError

from hvpd._wire import codec, vector_protocol
from hvpd._wire.vector_protocol import ProtocolError, Request, ServerEvent
from hvpd._wire.vector_socket import Connection
from hvpd.v1 import curvature_pb2
from hvpd_server.engine.engine import Engine
from hvpd_server.errors import Code, ServiceError
from hvpd_server.rpc.call_context import CallContext
from hvpd_server.rpc.call_limits import Arrivals
from hvpd_server.rpc.incoming import product_of
from hvpd_server.rpc.products import METHOD, Answer, Cancellation, Products
from hvpd_server.rpc.streams import Stream, Streams
from hvpd_server.rpc.tickets import Ticket
from hvpd_server.telemetry import requests
from hvpd_server.telemetry.requests import Failed

_log = logging.getLogger(__name__)

_SPARE_BYTES = 64 << 10
"""Most bytes that a connection keeps from one product to the next. Larger vectors take
longer to arrive than their memory takes to allocate.
"""

_SPIN_SECONDS = 0.0003
"""Seconds to poll for the next product of a lone client."""


def call_of(sock: socket.socket, ticket: Ticket) -> CallContext:
    """Return the call of a connection that has shown its ticket."""
    return CallContext(
        id=ticket.request_id,
        method=METHOD,
        owner=ticket.caller.grant.tenant if ticket.caller is not None else "",
        peer=ticket.peer,
        tenant=ticket.tenant,
        caller=ticket.caller,
        cancel=functools.partial(shut, sock),
    )


class VectorConnection:
    """Answers the products of one connection.

    Args:
        connection: The connection, whose ticket was good.
        call: Its call.
        engine: Knows the points.
        products: Computes.
        arrivals: Counts the memory of vectors and answers.
    """

    def __init__(
        self,
        connection: Connection[ServerEvent],
        call: CallContext,
        engine: Engine,
        products: Products,
        arrivals: Arrivals,
    ) -> None:
        self._connection = connection
        self._call = call
        self._engine = engine
        self._products = products
        self._arrivals = arrivals
        self._cancellation = Cancellation()
        self._encoded: bytes | None = None
        self._spec = curvature_pb2.ProductSpec()  # Parsed from `_encoded`: a client often sends the same spec again.
        self._answered = 0.0  # When the last answer had left, on time.monotonic's clock.
        self._prompt = False  # Whether the client asked again within the spin time, before any other client.
        self._spare: memoryview | None = None  # Memory of the last product's vectors, for the next product's.

    def hung_up(self) -> None:
        """Cancel the product that waits: the client is gone."""
        self._cancellation.gone()

    def serve(self, streams: Streams) -> None:
        """Answer products until either end closes the connection."""
        requests.serve(self._call)
        with streams.opened(self._call) as stream:
            for tag in itertools.count(1):
                arrived = self._await(stream)
                stream.begin()
                self._answer(tag, arrived)
                if stream.end():
                    return

    def _await(self, stream: Stream) -> float:
        """Wait for the next product. Return when it began to arrive, on
        time.monotonic's clock.

        If the client is alone, and asked again at once the last time, this thread polls
        for a moment instead of sleeping. A thread that wakes up begins with cold
        caches, on a processor that slept too. That costs a small product up to a tenth
        of its time. The thread does not poll while another client's product is computed
        or arrives, because that product could use the processor.
        """
        connection = self._connection
        ends = self._answered + _SPIN_SECONDS
        if self._prompt and not self._engine.busy:
            while stream.asked_last and not connection.readable and time.monotonic() < ends:
                pass
        connection.wait()
        arrived = time.monotonic()
        self._prompt = stream.asked_last and arrived < ends
        return arrived

    def _answer(self, tag: int, arrived: float) -> None:
        """Take one product, and answer it."""
        connection, call, spec = self._connection, self._call, None
        try:
            request = connection.next_event()
        except ProtocolError as error:
            raise ServiceError(Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE", str(error)) from None
        assert isinstance(request, Request)
        encoded, timeout_ns = request.spec, request.timeout_ns
        try:
            if call.caller is not None:
                call.caller.check()
            if encoded == self._encoded:  # It was checked before; only the point may be gone.
                spec = self._spec
                point = self._engine.point(spec.point_id, call.owner)
            else:
                spec = _parsed(encoded)
                point = self._engine.resident(spec, call.owner)
                self._encoded, self._spec = encoded, spec
            product = product_of(spec, point, self._arrivals, call.tenant)
            room, self._spare = product.vectors.room(request.size, self._spare), None
        except Exception as error:  # noqa: BLE001 - one product's error, the connection goes on
            failed = self._products.refused(call, tag, error, arrived, spec)
            _refuse(connection, failed)  # At once: the rest of the vectors may never come.
            connection.skip()
            return
        try:
            connection.receive_into(room)
            if request.size > codec.CHUNK_BYTES:
                product.vectors.receiving = time.monotonic() - arrived
            deadline = arrived + timeout_ns / 1e9 if timeout_ns else float("inf")
            answer = self._products.answer(call, tag, product, deadline, self._cancellation.on_queue)
            if not isinstance(answer, Answer):
                _refuse(connection, answer)
                return
            payload, message = codec.payload(answer.result), answer.info.SerializeToString()
            try:
                connection.send(vector_protocol.answer(message, len(payload)), payload)
                self._answered = time.monotonic()
            except TimeoutError:
                _log.info("a connection of %s is ended: its client has not read an answer", call.peer)
                raise
            finally:  # Also if the client does not read the answer.
                self._products.sent(call, product, answer, tag)
        finally:
            product.vectors.release()
        if len(room) <= _SPARE_BYTES:
            self._spare = room


def _parsed(encoded: bytes) -> curvature_pb2.ProductSpec:
    try:
        return curvature_pb2.ProductSpec.FromString(encoded)
    except DecodeError as error:
        raise ServiceError(Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE", f"a message cannot be read: {error}") from None


def _refuse(connection: Connection[ServerEvent], failed: Failed) -> None:
    connection.send(vector_protocol.refusal(failed.status.SerializeToString()))


class Hangups:
    """Notices that a client hung up while its product waits and no thread reads."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._lock = threading.Lock()
        self._tell: dict[int, Callable[[], None]] = {}

    def start(self) -> None:
        """Start to look."""
        threading.Thread(target=self._look, name="hvpd-hangups", daemon=True).start()

    @contextlib.contextmanager
    def watched(self, sock: socket.socket, tell: Callable[[], None]) -> Iterator[None]:
        """Call `tell`, at most once, when the other end hangs up."""
        descriptor = sock.fileno()
        with self._lock:
            self._tell[descriptor] = tell
        self._epoll.register(descriptor, select.EPOLLRDHUP | select.EPOLLET | select.EPOLLONESHOT)
        try:
            yield
        finally:
            # A new socket may get this one's number as soon as this one is closed.
            with self._lock:
                self._epoll.unregister(descriptor)
                del self._tell[descriptor]

    def _look(self) -> None:
        while True:
            for descriptor, _ in self._epoll.poll():
                with self._lock:
                    tell = self._tell.get(descriptor)
                    if tell is not None:
                        tell()


def shut(sock: socket.socket) -> None:
    """End a connection, whichever thread reads or writes it.

    Other threads must not call TLS's own shutdown, because it removes the encryption.
    """
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
