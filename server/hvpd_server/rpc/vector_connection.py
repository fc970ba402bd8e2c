"""One connection of the vector port: its products, one after the other."""

import contextlib
import functools
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

from google.protobuf.message import DecodeError

from hvpd._wire import codec, segment, vector_protocol
from hvpd._wire.segment import Segment
from hvpd._wire.vector_protocol import Offer, ProtocolError, Request, ServerEvent
from hvpd._wire.vector_socket import Connection
from hvpd.v1 import curvature_pb2
from hvpd_server.engine.engine import Engine
from hvpd_server.errors import invalid
from hvpd_server.rpc.call_context import CallContext
from hvpd_server.rpc.call_limits import Arrivals, Segments
from hvpd_server.rpc.incoming import Product, product_of
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
        segments: Counts shared memory; None if the connection may share none.
    """

    def __init__(
        self,
        connection: Connection[ServerEvent],
        call: CallContext,
        engine: Engine,
        products: Products,
        arrivals: Arrivals,
        segments: Segments | None = None,
    ) -> None:
        self._connection = connection
        self._segments = segments
        self._segment: Segment | None = None
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
        tag = 0
        try:
            with streams.opened(self._call) as stream:
                while True:
                    arrived = self._await(stream)
                    stream.begin()
                    event = self._next_event()
                    if isinstance(event, Offer):
                        self._attach(event.size)
                    else:
                        tag += 1
                        self._answer(tag, event, arrived)
                    if stream.end():
                        return
        finally:
            self._detach()

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

    def _next_event(self) -> Request | Offer:
        try:
            event = self._connection.next_event()
        except ProtocolError as error:
            raise invalid("MALFORMED_MESSAGE", str(error)) from None
        assert isinstance(event, Request | Offer)
        if isinstance(event, Request) and event.shared and (self._segment is None or event.size > self._segment.size):
            raise invalid(
                "MALFORMED_MESSAGE",
                f"{event.size} bytes of vectors are said to be in shared memory, and the connection has "
                f"{self._segment.size if self._segment is not None else 0}",
            )
        return event

    def _attach(self, size: int) -> None:
        """Take the segment that the client offers, in place of an earlier one."""
        self._detach()
        taken = self._segments is not None and self._segments.take(self._call.tenant, size)
        self._connection.send(vector_protocol.segment_answer(taken=taken))
        if not taken:
            return
        try:
            self._segment = self._received_segment(size)
        finally:
            if self._segment is None and self._segments is not None:
                self._segments.give_back(self._call.tenant, size)
        self._connection.send(vector_protocol.segment_answer(taken=self._segment is not None))

    def _received_segment(self, size: int) -> Segment | None:
        descriptor = self._connection.receive_descriptor()
        if descriptor is None:
            _log.info("%s sent no descriptor, or several, for shared memory", self._call.peer)
            return None
        try:
            return segment.attach(descriptor, size)
        except OSError as error:
            _log.info("memory that %s shares is not used: %s", self._call.peer, error)
            return None
        finally:
            os.close(descriptor)

    def _detach(self) -> None:
        """Give up the segment. A product that still computes keeps its memory."""
        if self._segment is not None and self._segments is not None:
            self._segments.give_back(self._call.tenant, self._segment.size)
        self._segment = None

    def _answer(self, tag: int, request: Request, arrived: float) -> None:
        """Take one product, and answer it."""
        connection, call, spec = self._connection, self._call, None
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
            spare, self._spare = self._spare, None
            room = product.vectors.room(request.size, self._place(request, product, spare))
        except Exception as error:  # noqa: BLE001 - one product's error, the connection goes on
            failed = self._products.refused(call, tag, error, arrived, spec)
            _refuse(connection, failed)  # At once: the rest of the vectors may never come.
            connection.skip()
            return
        try:
            self._receive(request, product, room)
            if request.size > codec.CHUNK_BYTES:
                product.vectors.receiving = time.monotonic() - arrived
            deadline = arrived + timeout_ns / 1e9 if timeout_ns else float("inf")
            answer = self._products.answer(call, tag, product, deadline, self._cancellation.on_queue)
            if not isinstance(answer, Answer):
                _refuse(connection, answer)
                return
            try:
                self._send(request, answer)
                self._answered = time.monotonic()
            except TimeoutError:
                _log.info("a connection of %s is ended: its client has not read an answer", call.peer)
                raise
            finally:  # Also if the client does not read the answer.
                self._products.sent(call, product, answer, tag)
        finally:
            product.vectors.release()
        if not request.shared and len(room) <= _SPARE_BYTES:
            self._spare = room

    def _place(self, request: Request, product: Product, spare: memoryview | None) -> memoryview | None:
        """Return memory for V: the segment if V may stay there, or else `spare`.

        V may change there while the device reads it. XLA checks an index, and may then
        read it again. So if an index can depend on V, V is copied.
        """
        if not request.shared or self._segment is None or product.point.objective.own_rules:
            return spare
        return self._segment.memory[: request.size].data

    def _receive(self, request: Request, product: Product, room: memoryview) -> None:
        """Fill `room` with V, unless V is there."""
        if not request.shared:
            self._connection.receive_into(room)
            return
        self._connection.skip()
        if self._segment is not None and product.point.objective.own_rules:
            self._segment.read_into(room)

    def _send(self, request: Request, answer: Answer) -> None:
        """Send HV as V came, and the numbers of a quadratic form by the socket."""
        payload, message = codec.payload(answer.result), answer.info.SerializeToString()
        size = len(payload)
        shared = request.shared and size == request.size
        if shared and self._segment is not None:
            self._segment.write(payload)
            payload = memoryview(b"")
        self._connection.send(vector_protocol.answer(message, size, shared=shared), payload)


def _parsed(encoded: bytes) -> curvature_pb2.ProductSpec:
    try:
        return curvature_pb2.ProductSpec.FromString(encoded)
    except DecodeError as error:
        raise invalid("MALFORMED_MESSAGE", f"a message cannot be read: {error}") from None


def _refuse(connection: Connection[ServerEvent], failed: Failed) -> None:
    connection.send(vector_protocol.refusal(failed.status.SerializeToString()))


class Hangups:
    """Notices that a client hung up while its product waits and no thread reads."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._running, self._stopped = socket.socketpair()
        self._epoll.register(self._stopped, select.EPOLLRDHUP)
        self._lock = threading.Lock()
        self._tell: dict[int, Callable[[], None]] = {}
        self._thread = threading.Thread(target=self._look, name="hvpd-hangups", daemon=True)

    def start(self) -> None:
        """Start to look."""
        self._thread.start()

    def stop(self) -> None:
        """Stop to look. The epoll stays, for connections that did not end in time."""
        self._running.close()
        if self._thread.ident is not None:
            self._thread.join()
        self._stopped.close()

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
        stopped = self._stopped.fileno()
        while True:
            for descriptor, _ in self._epoll.poll():
                if descriptor == stopped:
                    return
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
