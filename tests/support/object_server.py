"""A server of S3 by HTTP, moto's, which fails when a test says so."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import moto.server
from werkzeug.serving import BaseWSGIServer, make_server

BUCKET = "bucket"

_MOST_SILENCE = 120.0

_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"

FAULTS = {
    "throttled": ("503 Slow Down", "SlowDown"),
    "broken": ("500 Internal Server Error", "InternalError"),
    "expired": ("400 Bad Request", "ExpiredToken"),
    "denied": ("403 Forbidden", "AccessDenied"),
    "torn": ("", ""),
    "silent": ("", ""),
}
"""The status and the code of each fault. A torn request is read in part, and its
connection is closed. A silent one gets its answer when the fault ends.
"""


class ObjectServer:
    """A server on a free port.

    Args:
        prefix: Keys begin with it. All servers of a process have the same buckets.
    """

    def __init__(self, prefix: str = "prefix") -> None:
        self.requests: list[str] = []
        self._faults: Callable[[str, str], str | None] = lambda method, path: None
        self._silence = threading.Event()
        self._app = moto.server.DomainDispatcherApplication(moto.server.create_backend_app)
        self._server: BaseWSGIServer = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"s3://{BUCKET}/{prefix}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a process uses this server."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false",
        }

    def _answer(self, environ: dict[str, Any], respond: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append(f"{method} {path}")
        fault = self._faults(method, path)
        if fault == "silent":
            self._silence.wait(_MOST_SILENCE)
        if fault in (None, "silent"):
            answer: Iterable[bytes] = self._app(environ, respond)
            return answer
        status, code = FAULTS[fault]
        length = int(environ.get("CONTENT_LENGTH") or 0)
        if fault == "torn":
            environ["wsgi.input"].read(length // 2)
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError
        environ["wsgi.input"].read(length)
        respond(status, [("Content-Type", "application/xml")])
        return [_ERROR.format(code=code, message=fault).encode()]

    @contextlib.contextmanager
    def failing(self, fault: str, *, times: int = 10**9, method: str = "", path: str = "") -> Iterator[list[str]]:
        """Fail the next requests of a method whose path has a text. Yield those that
        failed.
        """
        failed: list[str] = []

        def choose(its_method: str, its_path: str) -> str | None:
            if len(failed) >= times or method not in its_method or path not in its_path:
                return None
            failed.append(f"{its_method} {its_path}")
            return fault

        self._silence.clear()
        self._faults = choose
        try:
            yield failed
        finally:
            self._faults = lambda method, path: None
            self._silence.set()

    def close(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
