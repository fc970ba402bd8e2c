"""The vector port: products past gRPC, on plain sockets, each connection in a thread of its own. What is said on them is in hvpd._vectors;
who may connect is decided by the gate when it lets a caller have a ticket, and looked at again with every product.
"""

import collections
import contextlib
import hmac
import itertools
import logging
import secrets
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from google.protobuf.message import DecodeError

from hvpd import _codec, _vectors
from hvpd._vectors import Connection
from hvpd.v1 import curvature_pb2
from hvpd_server import _requests
from hvpd_server._arriving import Product, vectors_of
from hvpd_server._calls import STALLED_SECONDS, Arrivals
from hvpd_server._engine import Engine
from hvpd_server._errors import Code, ServiceError
from hvpd_server._gate import Caller, Gate
from hvpd_server._metrics import Metrics
from hvpd_server._products import METHOD, Answer, Products, nothing
from hvpd_server._requests import Request
from hvpd_server._streams import Stream, Streams

_log = logging.getLogger(__name__)

TICKET_SECONDS = 30
"""For which a ticket is good."""

_TICKETS = 64
"""Most tickets of one tenant that were not used yet: of more, the oldest is void."""

_ALL_TICKETS = 4096

_SPARE_BYTES = 64 << 10
"""Most memory that a connection keeps from one product to the next. That of larger vectors takes less time than they do to come."""

_AWAKE_SECONDS = 0.0003
"""For which the next product of a lone caller, who comes back as soon as that, is looked for without going to sleep."""

_OPENING = 64
"""Most connections that have not shown a ticket yet: of more, the oldest is ended."""

_OPENING_SECONDS = 10.0


def available() -> bool:
    """Whether this system has what it takes: Linux does."""
    return hasattr(select, "epoll")


class Ticket(NamedTuple):
    """Lets one connection in."""

    id: bytes
    server_proof: bytes
    client_proof: bytes
    caller: Caller | None
    """Of the call that made it; None where nobody is asked who they are."""
    tenant: str
    """Whose products these will be."""
    peer: str
    """The other end of that call's connection, as gRPC writes it."""
    request_id: str
    """Of that call; the connection goes on with it."""
    expires: float
    """On time.monotonic's clock."""


class Tickets:
    """Those that were not used yet."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._unused: collections.OrderedDict[bytes, Ticket] = collections.OrderedDict()

    def new(self, caller: Caller | None, tenant: str, peer: str, request_id: str) -> Ticket:
        """Makes a ticket, good for TICKET_SECONDS."""
        now = self._clock()
        identity, server_proof, client_proof = (secrets.token_bytes(_vectors.PROOF_BYTES) for _ in range(3))
        expires = now + TICKET_SECONDS
        ticket = Ticket(identity, server_proof, client_proof, caller, tenant, peer, request_id, expires)
        with self._lock:
            expired = itertools.takewhile(lambda each: each.expires <= now, self._unused.values())
            own = [each for each in self._unused.values() if each.tenant == tenant]
            for each in [*expired, *own[: max(len(own) + 1 - _TICKETS, 0)]]:
                self._unused.pop(each.id, None)
            if len(self._unused) >= _ALL_TICKETS:
                self._unused.popitem(last=False)
            self._unused[ticket.id] = ticket
        return ticket

    def use(self, identity: bytes) -> Ticket | None:
        """The ticket of that id, once."""
        with self._lock:
            found = self._unused.pop(identity, None)
        return found if found is not None and found.expires > self._clock() else None


class VectorPort:
    """Listens, and serves whoever comes with a ticket.

    Args:
        host: Where to listen.
        port: Likewise; 0 picks a free one.
        gate: Lets callers in.
        engine: Knows the points.
        products: Makes products.
        streams: All that are open, gRPC's and these.
        arrivals: Counts the memory of vectors while they come.
        metrics: Counts.
        encryption: Gives the TLS of the next connection; None: there is none.
        stalled_seconds: For how long the rest of a product is awaited, or that its answer is taken.

    Raises:
        OSError: It cannot be listened on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        gate: Gate,
        engine: Engine,
        products: Products,
        streams: Streams,
        arrivals: Arrivals,
        metrics: Metrics,
        encryption: Callable[[], ssl.SSLContext] | None = None,
        stalled_seconds: float = STALLED_SECONDS,
    ) -> None:
        self.tickets = Tickets()
        self.greeting = secrets.token_bytes(_vectors.PROOF_BYTES)
        """What each connection receives first, after MAGIC: the client sends nothing to a port that does not say it."""
        self._gate = gate
        self._engine = engine
        self._products = products
        self._streams = streams
        self._arrivals = arrivals
        self._metrics = metrics
        self._encryption = encryption
        self._stalled_seconds = stalled_seconds
        self._lock = threading.Lock()
        self._opening: dict[int, socket.socket] = {}
        self._numbers = itertools.count()
        self._open = 0
        self._stopped = False
        self._closed = threading.Condition(self._lock)
        self._hangups = _Hangups()
        host = host.strip("[]")
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(
            found, key=lambda each: each[0] != socket.AF_INET
        )  # Of a name's, one that all have.
        dual = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        self._listener = socket.create_server(address[:2], family=family, backlog=128, dualstack_ipv6=dual)
        self.port: int = self._listener.getsockname()[1]

    def start(self) -> None:
        """Accepts connections."""
        threading.Thread(target=self._accept, name="hvpd-vector-port", daemon=True).start()
        self._hangups.start()

    def stop(self, seconds: float) -> None:
        """Accepts no more, and waits for those that are open to end, which `Streams.drain` has them do."""
        with self._lock:
            self._stopped = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # Wakes who accepts.
        self._listener.close()
        with self._lock:
            opening = list(self._opening.values())
            for each in opening:
                _shut(each)
            self._closed.wait_for(lambda: not self._open, seconds)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._stopped:
                    return
                _log.warning("no connection can be accepted on the vector port: %s", error)
                time.sleep(0.1)  # Out of descriptors: the next try would fail at once.
                continue
            number = next(self._numbers)
            with self._lock:
                if self._stopped:
                    sock.close()
                    return
                self._opening[number] = sock
                self._open += 1
                if len(self._opening) > _OPENING:
                    _shut(self._opening.pop(next(iter(self._opening))))
            try:
                threading.Thread(target=self._serve, args=(number, sock), name="hvpd-vectors", daemon=True).start()
            except RuntimeError as error:  # No more threads are to be had.
                _log.warning("a connection on the vector port cannot be served: %s", error)
                self._ended(number, sock)

    def _ended(self, number: int, sock: socket.socket) -> None:
        with self._lock:
            self._opening.pop(number, None)
            self._open -= 1
            self._closed.notify_all()
            sock.close()

    def _serve(self, number: int, sock: socket.socket) -> None:
        """One connection, from its beginning to its end."""
        try:
            sock.settimeout(_OPENING_SECONDS)
            _vectors.tune(sock)
            if self._encryption is not None:
                sock = self._encrypted(number, sock)
            connection = Connection(sock, _OPENING_SECONDS)
            connection.send(_vectors.MAGIC + self.greeting)
            ticket = self._ticket(connection)
            if ticket is None:
                return
            call = _Call(sock, ticket)
            with self._gate.admitted(call, ticket.caller), contextlib.closing(call):
                connection.send(ticket.server_proof)
                if not hmac.compare_digest(connection.receive(_vectors.PROOF_BYTES), ticket.client_proof):
                    return
                with self._lock:
                    self._opening.pop(number, None)
                connection.be_patient(self._stalled_seconds)
                self._metrics.opened()
                try:
                    with self._hangups.watched(sock, call.hung_up):
                        self._exchange(connection, call)
                finally:
                    self._metrics.closed()
        except ServiceError as error:  # Not let in, or not any more; what is wrong with a product is an answer.
            _log.info("a connection on the vector port is ended: %s", error)
        except OSError as error:
            _log.debug("a connection on the vector port ended: %s", error)
        except Exception as error:  # noqa: BLE001 - of one connection, for the log
            _log.error("a connection on the vector port failed", exc_info=error)
        finally:
            self._ended(number, sock)

    def _encrypted(self, number: int, sock: socket.socket) -> ssl.SSLSocket:
        assert self._encryption is not None
        context = self._encryption()
        with self._lock:  # What is wrapped is detached: whoever ends it must find what took its place.
            if number not in self._opening:
                raise ConnectionAbortedError("there are too many that have not shown a ticket")
            secure = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            self._opening[number] = secure
        try:
            secure.do_handshake()
        except BaseException:
            secure.close()
            raise
        return secure

    def _ticket(self, connection: Connection) -> Ticket | None:
        opening = bytes(connection.receive(_vectors.OPENING_BYTES))
        magic, identity = opening[: len(_vectors.MAGIC)], opening[len(_vectors.MAGIC) :]
        return self.tickets.use(identity) if magic == _vectors.MAGIC else None

    def _exchange(self, connection: Connection, call: "_Call") -> None:
        """Products, one after the other, until either end has had enough."""
        _requests.serve(call.request)
        with self._streams.opened(call) as stream:  # type: ignore[arg-type] # It has what is asked of a context.
            for tag in itertools.count(1):
                self._await(connection, call, stream)
                stream.begin()
                self._answer(connection, call, tag)
                if stream.end():
                    return

    def _await(self, connection: Connection, call: "_Call", stream: Stream) -> None:
        """Waits for the next product. Of a caller who is alone, and asked again at once the last time, it is looked for without going to
        sleep: a thread that is woken begins with cold caches, on a processor that had gone to sleep as well, which costs a small product up
        to a tenth of its time. No longer than a moment, and not while somebody else's product is computed, or comes, who could use the processor.
        """
        ends = call.answered + _AWAKE_SECONDS
        if call.prompt and not self._engine.busy:
            while stream.asked_last and not connection.readable and time.monotonic() < ends:
                pass
        connection.wait()
        call.prompt = stream.asked_last and time.monotonic() < ends

    def _answer(self, connection: Connection, call: "_Call", tag: int) -> None:
        """Takes one product, and answers it."""
        spec_bytes, nothing_yet, payload_bytes, timeout_ns = _vectors.REQUEST.unpack(
            connection.receive(_vectors.REQUEST.size)
        )
        arrived, spec = time.monotonic(), None
        if spec_bytes > _vectors.SPEC_BYTES or nothing_yet:
            said = f"a spec of {spec_bytes} bytes, and {nothing_yet} where 0 is to be"
            raise ServiceError(Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE", said)
        encoded = bytes(connection.receive(spec_bytes))
        try:
            if call.caller is not None:
                call.caller.check()
            if (
                encoded == call.encoded
            ):  # As mostly. What was found possible is so still, where the point is still there.
                spec = call.spec
                point = self._engine.point(spec.point_id, call.owner)
            else:
                spec = _parsed(encoded)
                point = self._engine.resident(spec, call.owner)
                call.encoded, call.spec = encoded, spec
            product = Product(spec, point, vectors_of(spec, point, self._arrivals, call.tenant))
            room, call.spare = product.vectors.room(payload_bytes, call.spare), None
        except Exception as error:  # noqa: BLE001 - one product's error, the connection goes on
            failed = self._products.refused(call.request, tag, error, arrived, spec)
            _refuse(connection, failed)  # At once: nobody knows whether the rest ever comes.
            connection.skip(payload_bytes)
            return
        connection.receive_into(room)
        if payload_bytes > _codec.CHUNK_BYTES:
            product.vectors.receiving = time.monotonic() - arrived
        deadline = arrived + timeout_ns / 1e9 if timeout_ns else float("inf")
        answer = self._products.multiply(call.request, tag, product, call.tenant, deadline, call.on_queue)
        if not isinstance(answer, Answer):
            _refuse(connection, answer)
            return
        payload, message = _codec.payload(answer.result), answer.info.SerializeToString()
        head = _vectors.RESPONSE.pack(len(message), _vectors.ANSWERED, len(payload))
        try:
            connection.send(head + message, payload)
            call.answered = time.monotonic()
        finally:  # Also where nobody takes it any more.
            self._products.sent(call.request, tag, product, answer)
        if len(room) <= _SPARE_BYTES:
            call.spare = room


def _parsed(encoded: bytes) -> curvature_pb2.ProductSpec:
    try:
        return curvature_pb2.ProductSpec.FromString(encoded)
    except DecodeError as error:
        raise ServiceError(Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE", f"a message cannot be read: {error}") from None


def _refuse(connection: Connection, failed: _requests.Failed) -> None:
    status = failed.status.SerializeToString()
    connection.send(_vectors.RESPONSE.pack(len(status), _vectors.FAILED, 0) + status)


class _Call:
    """A connection as all others see it who know calls: in place of gRPC's context.

    Args:
        sock: Of the connection.
        ticket: With which it came.
    """

    def __init__(self, sock: socket.socket, ticket: Ticket) -> None:
        self._socket = sock
        self._ticket = ticket
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] | None = []
        self._gone = False
        self._cancel = nothing
        self.encoded: bytes | None = None
        self.spec = curvature_pb2.ProductSpec()
        """What was asked for last, as it came and as it is."""
        self.answered = 0.0
        """When the last product's answer had left, on time.monotonic's clock."""
        self.prompt = False
        """Whether the caller then asked again within a moment, and nobody else before that."""
        self.spare: memoryview | None = None
        """Memory of the vectors of the last product, for those of the next."""
        self.caller = ticket.caller
        self.tenant = ticket.tenant
        self.owner = ticket.caller.grant.tenant if ticket.caller is not None else ""
        self.hvpd_tenant = self.owner
        self.request = Request(self, ticket.request_id, METHOD)  # type: ignore[arg-type] # Likewise.

    def peer(self) -> str:
        return self._ticket.peer

    def on_queue(self, cancel: Callable[[], None]) -> None:
        """From now on, this is what to do when the caller hangs up."""
        self._cancel = cancel
        if self._gone:
            cancel()

    def hung_up(self) -> None:
        """The caller is gone: what waits for the device does so for nobody."""
        self._gone = True
        self._cancel()

    def cancel(self) -> None:
        """Ends the connection, whatever it waits for."""
        _shut(self._socket)

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Has something done when it ends; False: it has ended."""
        with self._lock:
            if self._callbacks is not None:
                self._callbacks.append(callback)
            return self._callbacks is not None

    def close(self) -> None:
        """It has ended."""
        with self._lock:
            callbacks, self._callbacks = self._callbacks or [], None
        for callback in callbacks:
            callback()


class _Hangups:
    """Sees that a caller hung up while its product waits, and nobody reads."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._lock = threading.Lock()
        self._tell: dict[int, Callable[[], None]] = {}

    def start(self) -> None:
        """Looks from now on."""
        threading.Thread(target=self._look, name="hvpd-hangups", daemon=True).start()

    @contextlib.contextmanager
    def watched(self, sock: socket.socket, tell: Callable[[], None]) -> Iterator[None]:
        """Calls `tell`, at most once, when the other end hangs up."""
        descriptor = sock.fileno()
        with self._lock:
            self._tell[descriptor] = tell
        self._epoll.register(descriptor, select.EPOLLRDHUP | select.EPOLLET | select.EPOLLONESHOT)
        try:
            yield
        finally:
            with self._lock:  # The number is somebody else's as soon as the socket is closed.
                self._epoll.unregister(descriptor)
                del self._tell[descriptor]

    def _look(self) -> None:
        while True:
            for descriptor, _ in self._epoll.poll():
                with self._lock:
                    tell = self._tell.get(descriptor)
                    if tell is not None:
                        tell()


def _shut(sock: socket.socket) -> None:
    """Ends a connection under whoever reads or writes it. TLS's own way is not for other threads: it takes the encryption away."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
