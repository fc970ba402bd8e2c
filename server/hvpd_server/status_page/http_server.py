"""The HTTP server of the metrics and the status page, apart from gRPC's port.

Plain HTTP, without tokens. `page` makes the content. One connection is one request, for
a bounded time. Slow clients cannot slow products down: they wait without the GIL, in
few threads.
"""

import contextlib
import dataclasses
import errno
import gzip
import http.server
import io
import ipaddress
import logging
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, Final
from wsgiref.types import StartResponse

import prometheus_client

_log = logging.getLogger(__name__)

_CONNECTIONS: Final = 32
"""Most connections at once; others wait in the kernel."""
_PATIENCE: Final = 1.0
"""Seconds that a connection too many waits until it is closed."""
_RECEIVE: Final = 2.0
_SEND: Final = 30.0
"""Seconds for a request to arrive, and for its answer to be read."""
_LINGER: Final = 1.0
"""Seconds to read and drop further bytes, otherwise the kernel drops the answer."""
_REQUEST_BYTES: Final = 64 << 10
"""Most bytes of a request. Browsers send the cookies of all ports of a host."""
_WORTH_COMPRESSING: Final = 1024
"""Bytes to read at a time."""

_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Headers of every answer: no other site may read it, and a page loads nothing from
elsewhere.
"""


@dataclasses.dataclass(frozen=True)
class Request:
    """A request."""

    query: str
    """Text after the question mark, as it came."""
    accept: str | None
    """Header; None if there is none."""
    accept_encoding: str | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer."""

    content_type: str
    body: bytes
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Further headers."""
    status: HTTPStatus = HTTPStatus.OK


Page = Callable[[Request], Answer]
"""Answers the requests of one path. Raises ValueError if the query is wrong."""


def metrics_page(registry: prometheus_client.CollectorRegistry) -> Page:
    """Return a page of the metrics, in the format and encoding that the request asks
    for.
    """
    application = prometheus_client.make_wsgi_app(registry)

    def page(request: Request) -> Answer:
        told: dict[str, str] = {}

        def start_response(status: str, headers: list[tuple[str, str]], error: Any = None) -> Any:
            told.update(headers)

        asked = {"HTTP_ACCEPT": request.accept, "HTTP_ACCEPT_ENCODING": request.accept_encoding}
        environment: dict[str, Any] = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": "/metrics",
            "QUERY_STRING": request.query,
            **{name: value for name, value in asked.items() if value is not None},
        }
        start: StartResponse = start_response
        body = b"".join(application(environment, start))
        return Answer(told.pop("Content-Type"), body, told)

    return page


class HttpServer:
    """An HTTP server. It listens from construction on, and answers from `start` on.


    Args:
        host: Name or address to listen on.
        port: Port to listen on; 0 picks a free one.
        pages: Pages by path.

    Raises:
        OSError: The address cannot be listened on.
    """

    def __init__(self, host: str, port: int, pages: Mapping[str, Page]) -> None:
        host = host.strip("[]")
        self._server = _Server(host, port, pages)
        self.port: int = self._server.server_address[1]
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def start(self) -> None:
        """Answer from now on, in daemon threads."""
        threading.Thread(target=self._server.serve_forever, name="hvpd-web", daemon=True).start()

    def close(self) -> None:
        """Stop listening. Call this only after `start`."""
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 2 * _CONNECTIONS

    def __init__(self, host: str, port: int, pages: Mapping[str, Page]) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        self.address_family = family
        self.pages = pages
        self.host = host
        self._slots = threading.BoundedSemaphore(_CONNECTIONS)
        super().__init__(address, _Handler)  # type: ignore[arg-type] # of the family's own form
        self.on_loopback = ipaddress.ip_address(str(self.server_address[0])).is_loopback

    def server_bind(self) -> None:
        """Bind without a look-up of the host's name, which HTTPServer does."""
        socketserver.TCPServer.server_bind(self)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Return the next connection."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                time.sleep(0.1)  # The connection still waits, so the next try would come at once.
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection."""
        if not self._slots.acquire(timeout=_PATIENCE):
            self.close_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def shutdown_request(self, request: Any) -> None:
        """Close a connection so that its answer arrives: unread bytes make the kernel
        drop it.
        """
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            rest = _Incoming(request, _LINGER, _REQUEST_BYTES)
            while rest.readinto(bytearray(4096)):
                pass
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a connection that broke, which is no fault of the server."""
        _log.debug("a request was not answered", exc_info=True)


class _TooLargeError(OSError):
    """A request is too large."""


class _Incoming(io.RawIOBase):
    """The bytes of a connection, within a total time and a total size."""

    def __init__(self, connection: socket.socket, seconds: float, most: int) -> None:
        self._connection = connection
        self._ends = time.monotonic() + seconds
        self._left = most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._left <= 0:
            raise _TooLargeError
        remaining = self._ends - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._connection.settimeout(remaining)
        count = self._connection.recv_into(buffer)
        self._left -= count
        return count


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    default_request_version = request_version = "HTTP/1.0"
    command = requestline = ""

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Incoming(self.connection, _RECEIVE, _REQUEST_BYTES))

    def handle(self) -> None:
        self.close_connection = True
        try:
            self.handle_one_request()
        except _TooLargeError:
            self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def do_GET(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) > 1:
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        if self.server.on_loopback and hosts and not _is_local(hosts[0], self.server.host):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return
        path, _, query = self.path.partition("?")
        page = self.server.pages.get(path)
        if page is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        request = Request(query, self.headers.get("Accept"), self.headers.get("Accept-Encoding"))
        try:
            answer = page(request)
        except ValueError:
            self.send_error(HTTPStatus.BAD_REQUEST)
        except Exception as error:  # noqa: BLE001 - the next request may be answered again
            _log.error("%s cannot be shown", path, exc_info=error)
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)
        else:
            self._send(_compressed(answer, request))

    do_HEAD = do_GET  # noqa: N815 - the base class calls it so

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with a status and its name; the text has nothing of the request."""
        headers = {}
        if code == HTTPStatus.NOT_IMPLEMENTED:
            code, headers = HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET, HEAD"}
        status = HTTPStatus(code)
        text = f"{status.value} {status.phrase}\n"
        if status == HTTPStatus.MISDIRECTED_REQUEST:
            text += "On loopback only localhost and IP addresses are answered to: a proxy in front must set the Host header.\n"
        self._send(Answer("text/plain; charset=utf-8", text.encode(), headers, status))

    def _send(self, answer: Answer) -> None:
        self.connection.settimeout(_SEND)
        self.send_response(answer.status)
        own = {"Content-Type": answer.content_type, "Content-Length": str(len(answer.body)), "Connection": "close"}
        for name, value in {**_HEADERS, **answer.headers, **own}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def version_string(self) -> str:
        return "hvpd"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        """Log nothing about requests."""


def _is_local(host: str, listening: str) -> bool:
    """Return whether a Host header means this machine.

    A page of another site can point its own name here, and then read the answers (DNS
    rebinding). A browser sends that name. An address cannot be pointed elsewhere.
    """
    found = _HOST.fullmatch(host.strip(" \t").lower())
    if found is None or int(found["port"] or 0) > 65535:
        return False
    if found["ipv6"] is None and found["name"].removesuffix(".") in ("localhost", listening.lower()):
        return True
    try:
        if found["ipv6"] is None:
            ipaddress.IPv4Address(found["name"])
        else:
            ipaddress.IPv6Address(found["ipv6"])
    except ValueError:
        return False
    return True


_HOST: Final = re.compile(r"(?:\[(?P<ipv6>[0-9a-f:.]+)\]|(?P<name>[0-9a-z._-]+))(?::(?P<port>[0-9]{0,5}))?")
"""A Host header: an IPv6 address in brackets, or a name or an IPv4 address, and perhaps
a port (RFC 9110, 7.2).
"""


def _compressed(answer: Answer, request: Request) -> Answer:
    accepted = [part.partition(";")[0].strip().lower() for part in (request.accept_encoding or "").split(",")]
    if "gzip" not in accepted or "Content-Encoding" in answer.headers or len(answer.body) < _WORTH_COMPRESSING:
        return answer
    body = gzip.compress(answer.body, compresslevel=3)
    return dataclasses.replace(answer, body=body, headers={**answer.headers, "Content-Encoding": "gzip"})
