"""The vector port: products past gRPC, on plain sockets, each connection in a thread of
its own. Clients on the server's machine reach it by a Unix socket, too.

hvpd._wire.vector_protocol has the protocol. The gate lets a client have a ticket, and
its token is checked again with every product.
"""

import contextlib
import ipaddress
import itertools
import logging
import secrets
import select
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable

from hvpd._wire import segment, vector_protocol, vector_socket
from hvpd._wire.vector_protocol import Opening, ServerEnd
from hvpd._wire.vector_socket import Connection
from hvpd_server.engine.engine import Engine
from hvpd_server.errors import ServiceError
from hvpd_server.rpc.call_limits import STALLED_SECONDS, Arrivals, Segments
from hvpd_server.rpc.gate import Gate
from hvpd_server.rpc.products import Products
from hvpd_server.rpc.streams import Streams
from hvpd_server.rpc.tickets import Tickets
from hvpd_server.rpc.vector_connection import Hangups, VectorConnection, call_of, shut
from hvpd_server.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)

_OPENING = 64
"""Most connections that have not shown a ticket. One connection more ends the oldest.
"""

_OPENING_SECONDS = 10.0
"""Seconds for a connection to show its ticket."""

_BACKLOG = 128
"""Most connections of a listener that the server has not accepted yet."""


def available() -> bool:
    """Return whether this system can have a vector port. Linux can."""
    return hasattr(select, "epoll")


def is_same_host(peer: str) -> bool:
    """Return whether a client, as gRPC writes its end of a call, is on this machine."""
    kind, _, rest = peer.partition(":")
    if kind == "unix":
        return True
    host = urllib.parse.unquote(rest).rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class VectorPort:
    """Listens, and serves each connection that has a ticket.

    Args:
        host: The address to listen on.
        port: The port to listen on; 0 picks a free one.
        gate: Lets connections in.
        engine: Knows the points.
        products: Computes products.
        streams: The open product streams, gRPC's too.
        arrivals: Counts the bytes in transit.
        metrics: Counts.
        encryption: Returns the TLS context of the next connection by TCP. None leaves
            connections unencrypted. Connections by the Unix socket never are encrypted,
            because only root could read them.
        segments: Counts the memory that connections by the Unix socket share; None for
            none.
        stalled_seconds: Seconds to wait for the rest of a product, or until the client
            takes an answer.

    Raises:
        OSError: The address cannot be listened on.
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
        segments: Segments | None = None,
        stalled_seconds: float = STALLED_SECONDS,
    ) -> None:
        self.tickets = Tickets()
        self.greeting = secrets.token_bytes(vector_protocol.PROOF_BYTES)
        """The bytes that each connection receives first, after MAGIC. A client sends
        nothing to a port that does not send them.
        """
        self._gate = gate
        self._engine = engine
        self._products = products
        self._streams = streams
        self._arrivals = arrivals
        self._metrics = metrics
        self._encryption = encryption
        self._segments = segments if segment.available() else None
        self._stalled_seconds = stalled_seconds
        self._lock = threading.Lock()
        self._opening: dict[int, socket.socket] = {}
        self._numbers = itertools.count()
        self._open = 0
        self._stopped = False
        self._closed = threading.Condition(self._lock)
        host = host.strip("[]")
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # A name may have several addresses. Clients without IPv6 need the IPv4 one.
        family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        dual = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=dual)
        self.port: int = listener.getsockname()[1]
        self._listeners = [listener]
        self.unix_id = secrets.token_bytes(vector_protocol.PROOF_BYTES)
        """Names the Unix socket. Empty if the system lets the server have none."""
        try:
            self._listeners.append(_unix_listener(self.unix_id))
        except OSError as error:
            self.unix_id = b""
            _log.warning("clients on this machine cannot use a Unix socket: %s", error)
        self._hangups = Hangups()

    @property
    def segment_bytes(self) -> int:
        """Return the bytes of the largest segment of a connection; 0 for none."""
        return self._segments.largest if self._segments is not None and self.unix_id else 0

    def start(self) -> None:
        """Accept connections."""
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), name="hvpd-vector-port", daemon=True).start()
        self._hangups.start()

    def stop(self, seconds: float) -> None:
        """Accept no more connections, and wait until the open ones end. `Streams.drain`
        makes them end.
        """
        with self._lock:
            self._stopped = True
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # Wakes the thread that accepts.
            listener.close()
        with self._lock:
            opening = list(self._opening.values())
            for each in opening:
                shut(each)
            self._closed.wait_for(lambda: not self._open, seconds)
        self._hangups.stop()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if self._stopped:
                    return
                _log.warning("no connection can be accepted on the vector port: %s", error)
                time.sleep(0.1)  # Without a free descriptor the next try would fail at once.
                continue
            number = next(self._numbers)
            with self._lock:
                if self._stopped:
                    sock.close()
                    return
                self._opening[number] = sock
                self._open += 1
                if len(self._opening) > _OPENING:
                    shut(self._opening.pop(next(iter(self._opening))))
            try:
                threading.Thread(target=self._serve, args=(number, sock), name="hvpd-vectors", daemon=True).start()
            except RuntimeError as error:  # The system has no more threads.
                _log.warning("a connection on the vector port cannot be served: %s", error)
                self._ended(number, sock)

    def _ended(self, number: int, sock: socket.socket) -> None:
        with self._lock:
            self._opening.pop(number, None)
            self._open -= 1
            self._closed.notify_all()
            sock.close()

    def _serve(self, number: int, sock: socket.socket) -> None:
        """Serve one connection, from its beginning to its end."""
        try:
            sock.settimeout(_OPENING_SECONDS)
            vector_socket.tune(sock)
            if self._encryption is not None and sock.family != socket.AF_UNIX:
                sock = self._encrypted(number, sock)
            end = ServerEnd(self.greeting)
            connection = Connection(sock, end, _OPENING_SECONDS)
            connection.send(end.greeting)
            opening = connection.next_event()
            assert isinstance(opening, Opening)
            ticket = self.tickets.use(opening.ticket)
            if ticket is None:
                return
            call = call_of(sock, ticket)
            with self._gate.admitted(call):
                connection.send(end.admit(ticket.server_proof, ticket.client_proof))
                connection.next_event()
                with self._lock:
                    self._opening.pop(number, None)
                connection.be_patient(self._stalled_seconds)
                segments = self._segments if connection.shares_memory else None
                served = VectorConnection(connection, call, self._engine, self._products, self._arrivals, segments)
                self._metrics.opened()
                try:
                    with self._hangups.watched(sock, served.hung_up):
                        served.serve(self._streams)
                finally:
                    self._metrics.closed()
        except ServiceError as error:  # From the gate: a product's error is an answer.
            _log.info("a connection on the vector port is ended: %s", error)
        except OSError as error:
            _log.debug("a connection on the vector port ended: %s", error)
        except Exception as error:  # noqa: BLE001 - one connection's error, the port goes on
            _log.error("a connection on the vector port failed", exc_info=error)
        finally:
            self._ended(number, sock)

    def _encrypted(self, number: int, sock: socket.socket) -> ssl.SSLSocket:
        assert self._encryption is not None
        context = self._encryption()
        # The wrapped socket is detached: a thread that ends it must find the new one.
        with self._lock:
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


def _unix_listener(unix_id: bytes) -> socket.socket:
    """Listen on the Unix socket of an id, which leaves no file behind.

    Raises:
        OSError: The system does not allow it.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(vector_socket.unix_name(unix_id))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
