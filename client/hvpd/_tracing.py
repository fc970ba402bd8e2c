"""Spans of what a client asks for, through OpenTelemetry, where the application has set it up; else nothing of it is imported.

Each operation that goes over the wire is a CLIENT span, its repetitions included. Attributes follow the semantic conventions for RPC
(https://opentelemetry.io/docs/specs/semconv/rpc/grpc/); those of our own begin with `hvpd.`.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

from hvpd._errors import Failure
from hvpd._version import __version__
from hvpd.v1 import curvature_pb2

if TYPE_CHECKING:
    from opentelemetry import trace

PRODUCTS = "hvpd.v1.CurvatureService/StreamProducts"


def of(address: str) -> "Tracing | None":
    """What makes the spans of a client; None where nobody wants any: the application has set up no tracer provider."""
    # Whoever has one has imported this, and `import hvpd` stays quick.
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import trace

    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    return Tracing(provider, address)


def method_of(request: object) -> str:
    """Which of our methods takes a request: "hvpd.v1.Service/Method"."""
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
        provider: Of the application.
        address: "host:port" of the server.
    """

    def __init__(self, provider: "trace.TracerProvider", address: str) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._tracer = provider.get_tracer("hvpd", __version__)
        self._propagator = TraceContextTextMapPropagator()
        host, _, port = address.rpartition(":")
        self._server: Mapping[str, Any] = {
            "rpc.system.name": "grpc",
            "server.address": host.strip("[]"),
            "server.port": int(port),
        }

    @contextlib.contextmanager
    def inside(self, name: str, /, **attributes: Any) -> "Iterator[None]":
        """A span around several operations."""
        with self._tracer.start_as_current_span(name, attributes=_named(attributes)):
            yield

    @contextlib.contextmanager
    def call(self, method: str, request_id: str = "", *, name: str = "", **attributes: Any) -> "Iterator[Span]":
        """The span of one operation.

        Args:
            method: "hvpd.v1.Service/Method".
            request_id: Of the call, where it has one of its own.
            name: Of the span, where it is not the method.
            attributes: Of ours, without the prefix; empty ones are left out.
        """
        facts = {**self._server, "rpc.method": method, **_named({"request_id": request_id, **attributes})}
        kind = self._api.SpanKind.CLIENT
        with self._tracer.start_as_current_span(name or method, kind=kind, attributes=facts) as span:
            carrier: dict[str, str] = {}
            self._propagator.inject(carrier)
            yield Span(span, carrier)
            span.set_attribute("rpc.response.status_code", "OK")

    def repeated(self, failure: Failure) -> None:
        """Notes, in the span of the current operation, that it is tried again."""
        self._api.get_current_span().add_event("retry", _facts(failure))

    def failed(self, failure: Failure) -> None:
        """Notes there how it failed; the exception that is raised ends it."""
        facts = _facts(failure)
        self._api.get_current_span().set_attributes(facts | {"error.type": failure.reason or failure.code.name})


class Span:
    """The span of one operation.

    Args:
        span: OpenTelemetry's.
        carrier: What a server needs to know to go on with the trace.
    """

    def __init__(self, span: "trace.Span", carrier: Mapping[str, str]) -> None:
        self._span = span
        self.metadata = tuple(carrier.items())
        """For the metadata of a call."""
        self.traceparent = carrier.get("traceparent", "")
        """For a product."""
        self._queue = self._compute = 0
        self._width = 0

    def sent(self, request_id: str) -> None:
        """With which id."""
        self._span.set_attribute("hvpd.request_id", request_id)

    def made(self, info: curvature_pb2.ProductInfo) -> None:
        """How a product, or one of several, was made: times are sums, the width is the largest."""
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
