"""The HTTP server of UM-Bridge: plain, without tokens, a thread for a connection."""

import contextlib
import http.server
import ipaddress
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from hvpd import _text
from hvpd._errors import HvpdError, NotFoundError
from hvpd._umbridge import requests, segments
from hvpd._umbridge.model import Asked, Model
from hvpd._umbridge.requests import RefusedError

_BODY_BYTES: Final = 1 << 30
"""Most bytes of a request."""

_IDLE: Final = 60.0
"""Seconds that a connection may wait for its next bytes."""

_VERSION: Final = 1.0
"""Version of the protocol."""

_OPERATIONS: Final[Mapping[str, Callable[[Model, Asked], Any]]] = {
    "Evaluate": Model.evaluate,
    "Gradient": Model.gradient,
    "ApplyJacobian": Model.apply_jacobian,
    "ApplyHessian": Model.apply_hessian,
}

_ENDPOINTS: Final = ("InputSizes", "OutputSizes", "ModelInfo", "TestShMem")
"""Further endpoints."""


class UmbridgeServer(http.server.ThreadingHTTPServer):
    """Serves models until `shutdown`.

    Attributes:
        models: The models by name.
    """

    def __init__(self, models: Sequence[Model], host: str, port: int) -> None:
        self.models = {model.name: model for model in models}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """Return the URL that clients take."""
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}" if self.address_family == socket.AF_INET6 else f"http://{host!s}:{port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about a client that went away."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: UmbridgeServer
    protocol_version = "HTTP/1.1"
    server_version = "hvpd"
    sys_version = ""
    timeout = _IDLE
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path.rstrip("/") == "/Info":
            self._answer(200, {"protocolVersion": _VERSION, "models": list(self.server.models)})
        else:
            self._fail(
                404, "NotFound", f"there is no {_text.cut(self.path, 100)}: GET /Info, and POST the other endpoints"
            )

    def do_HEAD(self) -> None:
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self._body()
        if body is None:
            return
        try:
            self._answer(200, self._reply(self.path.strip("/"), requests.parsed(body)))
        except HvpdError as error:
            self._fail(*requests.refused(error), str(error))

    def _body(self) -> bytes | None:
        """Return the body; None if the request was answered with an error."""
        length = self.headers.get("Content-Length", "")
        size = int(length) if length.isdecimal() and len(length) < 16 else -1
        if 0 <= size <= _BODY_BYTES:
            body = self.rfile.read(size)
            return body if len(body) == size else None
        self.close_connection = True
        if size < 0:
            self._fail(411, "InvalidInput", "the request must state the size of its body: send Content-Length")
        else:
            self._fail(
                413, "InvalidInput", f"the body has {size} bytes, and at most {_BODY_BYTES} are read: use shared memory"
            )
        return None

    def _reply(self, endpoint: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        shared = endpoint.endswith("ShMem")
        operation = endpoint.removesuffix("ShMem")
        if endpoint not in _ENDPOINTS and operation not in _OPERATIONS:
            raise RefusedError(
                "UnsupportedFeature", f"there is no {_text.cut(endpoint, 100)}: there are {', '.join(_OPERATIONS)}", 404
            )
        model = requests.model_of(request, self.server.models)
        if endpoint == "InputSizes":
            return {"inputSizes": model.input_sizes}
        if endpoint == "OutputSizes":
            return {"outputSizes": model.output_sizes}
        if endpoint == "ModelInfo":
            return {"support": dict.fromkeys(_OPERATIONS, True)}
        if endpoint == "TestShMem":
            # The client sees by the number that comes back whether memory is shared.
            with contextlib.suppress(segments.SegmentError):
                self._check_local()
                segments.echo(request)
            return {}
        if shared:
            self._check_local()
        asked = requests.asked(request, model, operation, shared=shared)
        try:
            output = _OPERATIONS[operation](model, asked)
        except NotFoundError as error:
            raise RefusedError(
                "ModelNotFound", f"the objective {model.name!r} is not on the hvpd server any more: {error}"
            ) from None
        if shared:
            segments.write(request, output if operation == "Evaluate" else [output])
            return {}
        return {"output": [part.tolist() for part in output] if operation == "Evaluate" else output.tolist()}

    def _check_local(self) -> None:
        """Raise SegmentError for a client on another machine."""
        address = ipaddress.ip_address(self.client_address[0].partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        if not (mapped or address).is_loopback:
            raise segments.SegmentError("shared memory is for clients on this machine: send the vectors in the request")

    def _answer(self, status: int, content: Mapping[str, Any]) -> None:
        body = json.dumps(content, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, kind: str, message: str) -> None:
        self._answer(status, {"error": {"type": kind, "message": _text.printable(message)}})

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Log no request: the server of the objectives does."""
