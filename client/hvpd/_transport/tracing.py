"""Spans of a client's calls, through OpenTelemetry.

Spans are made only if the application has set up OpenTelemetry. Otherwise nothing of it
is imported. Each operation on the wire is a CLIENT span, with all of its tries.
Attributes follow the semantic conventions for RPC
(https://opentelemetry.io/docs/specs/semconv/rpc/grpc/). Those of hvpd begin with
`hvpd.`.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

from hvpd._errors import Failure
from hvpd._transport.address import parts
from hvpd._version import __version__
from hvpd.v1 import curvature_pb2

if TYPE_CHECKING:
    from opentelemetry import trace

PRODUCTS = "hvpd.v1.CurvatureService/StreamProducts"
"""Method of all products, also of those past gRPC."""


def of(address: str) -> "Tracing | None":
    """Return the maker of spans; None if the application has no tracer provider."""
    # An application with a provider has imported this, and `import hvpd` stays quick.
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import trace

    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    return Tracing(provider, address)


def method_of(request: object) -> str:
    """Return the method that takes a request, as "hvpd.v1.Service/Method"."""
    if isinstance(request, Message):
        kind: Any = request.DESCRIPTOR
        for service in kind.file.services_by_name.values():
            for method in service.methods:
                if method.input_type is kind:
                    return f"{service.full_name}/{method.name}"
    return "_OTHER"


class Tracing:
    """Makes the spans of one client.

    Args:
        provider: The application's tracer provider.
        address: "host:port" of the server.
    """

    def __init__(self, provider: "trace.TracerProvider", address: str) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._tracer = provider.get_tracer("hvpd", __version__)
        self._propagator = TraceContextTextMapPropagator()
        host, port = parts(address)
        self._server: Mapping[str, Any] = {
            "rpc.system.name": "grpc",
            "server.address": host,
            "server.port": port,
        }

    @contextlib.contextmanager
    def inside(self, name: str, /, **attributes: Any) -> "Iterator[None]":
        """Make a span around several operations."""
        with self._tracer.start_as_current_span(name, attributes=_named(attributes)):
            yield

    @contextlib.contextmanager
    def call(self, method: str, request_id: str = "", *, name: str = "", **attributes: Any) -> "Iterator[Span]":
        """Make the span of one operation.

        Args:
            method: "hvpd.v1.Service/Method".
            request_id: Id of the call, if it has one of its own.
            name: Name of the span; empty for the method.
            attributes: Attributes of hvpd, without the prefix; empty ones are left out.
        """
        facts = {**self._server, "rpc.method": method, **_named({"request_id": request_id, **attributes})}
        kind = self._api.SpanKind.CLIENT
        with self._tracer.start_as_current_span(name or method, kind=kind, attributes=facts) as span:
            carrier: dict[str, str] = {}
            self._propagator.inject(carrier)
            yield Span(span, carrier)
            span.set_attribute("rpc.response.status_code", "OK")

    def repeated(self, failure: Failure) -> None:
        """Add a retry to the span of the current operation."""
        self._api.get_current_span().add_event("retry", _facts(failure))

    def failed(self, failure: Failure) -> None:
        """Add a failure to the current span; the raised exception ends the span."""
        facts = _facts(failure)
        self._api.get_current_span().set_attributes(facts | {"error.type": failure.reason or failure.code.name})


class Span:
    """The span of one operation.

    Args:
        span: OpenTelemetry's span.
        carrier: The context that lets a server continue the trace.
    """

    def __init__(self, span: "trace.Span", carrier: Mapping[str, str]) -> None:
        self._span = span
        self.metadata = tuple(carrier.items())
        """The context as metadata of a call."""
        self.traceparent = carrier.get("traceparent", "")
        """The context as a product has it."""
        self._queue = self._compute = 0
        self._width = 0

    def sent(self, request_id: str) -> None:
        """Add the id that a product was sent with."""
        self._span.set_attribute("hvpd.request_id", request_id)

    def made(self, info: curvature_pb2.ProductInfo) -> None:
        """Add the times of a product, or of one of several.

        Times are summed; the width is the largest.
        """
        self._queue += info.queue_duration_ns
        self._compute += info.compute_duration_ns
        self._width = max(self._width, info.batch_width)
        self._span.set_attributes(
            {
                "hvpd.queue_seconds": self._queue / 1e9,
                "hvpd.compute_seconds": self._compute / 1e9,
                "hvpd.batch_width": self._width,
            }
        )


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"hvpd.{key}": value for key, value in attributes.items() if value not in ("", None)}


def _facts(failure: Failure) -> dict[str, str]:
    facts = {"rpc.response.status_code": failure.code.name}
    return facts | _named({"reason": failure.reason, "request_id": failure.request_id})
