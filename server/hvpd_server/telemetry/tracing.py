"""Spans of the server's work, through OpenTelemetry. Without it, or without a wish for
spans, nothing of it is imported.

A call is a SERVER span, from its arrival to its answer. A stream of products lives for
hours, so it has no span. Each of its products has one, in the trace that
`ProductSpec.traceparent` names. Products have two spans within, `hvpd.queue` and
`hvpd.compute`. Attributes follow the semantic conventions for RPC
(https://opentelemetry.io/docs/specs/semconv/rpc/grpc/). Our own attributes begin with
`hvpd.`.
"""

import importlib.metadata
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import hvpd
from hvpd import _text
from hvpd.v1 import curvature_pb2
from hvpd_server.errors import Code
from hvpd_server.telemetry import requests

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter

_log = logging.getLogger(__name__)

_FAULTS: Final = {
    Code.UNKNOWN,
    Code.DEADLINE_EXCEEDED,
    Code.UNIMPLEMENTED,
    Code.INTERNAL,
    Code.UNAVAILABLE,
    Code.DATA_LOSS,
}
"""Codes that make a server's span an error, by the conventions. Other failures are the
client's.
"""

_CARRIED: Final = ("traceparent", "tracestate")

_FLUSH_SECONDS: Final = 5.0
"""Seconds that the server's end waits for the last spans to leave."""

_LONGEST: Final = 1024
"""Most characters of texts that clients send, and of messages."""

_PROTOCOLS: Final = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}


class Tracing:
    """Makes spans.

    Args:
        provider: Takes the spans.
    """

    def __init__(self, provider: "trace.TracerProvider") -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._provider = provider
        self._tracer = provider.get_tracer("hvpd_server", hvpd.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def call(self, request: requests.Request, path: str, metadata: Any) -> "CallSpan":
        """Begin the span of a call.

        Args:
            request: The call.
            path: The method's path, such as "/hvpd.v1.Service/Method".
            metadata: The call's metadata.
        """
        carrier = {key: value for key, value in metadata or () if key in _CARRIED and isinstance(value, str)}
        method = path.removeprefix("/")
        attributes = {"rpc.system.name": "grpc", "rpc.method": method, "hvpd.request_id": request.id}
        span = self._tracer.start_span(
            method, self._parent(carrier), kind=self._api.SpanKind.SERVER, attributes=attributes
        )
        found = request.span = CallSpan(self._api, self._tracer, span)
        return found

    def product(
        self,
        request: requests.Request,
        tag: int,
        spec: curvature_pb2.ProductSpec,
        started: float,
        *,
        digest: str = "",
        n: int = 0,
        info: curvature_pb2.ProductInfo | None = None,
        computed: float = 0.0,
        failed: requests.Failed | None = None,
    ) -> None:
        """Make the span of a product of a stream that was answered.

        Args:
            request: The stream.
            tag: The product's tag.
            spec: The client's spec of the product.
            started: When the product began to arrive, on time.monotonic's clock.
            digest: The objective's digest.
            n: The number of elements of its vectors.
            info: How the product was computed; None if it failed.
            computed: When the result was there, on the same clock.
            failed: The failure, if it failed.
        """
        attributes: dict[str, str | int | float] = {
            "rpc.system.name": "grpc",
            "rpc.method": "hvpd.v1.CurvatureService/StreamProducts",
            "hvpd.request_id": f"{request.id}/{tag}",
            "hvpd.k": spec.k,
            "hvpd.operator": operator_name(spec.operator),
        }
        if digest:
            attributes |= {"hvpd.objective": digest, **({"hvpd.n": n} if n else {})}
        span = self._tracer.start_span(
            "hvpd.product",
            self._parent({"traceparent": spec.traceparent}),
            kind=self._api.SpanKind.SERVER,
            attributes=attributes,
            start_time=_wall(started),
        )
        if span.is_recording():
            whole = CallSpan(self._api, self._tracer, span)
            if info is not None:
                whole.made(info, computed)
            whole.end(request, failed, whole=True)

    def _parent(self, carrier: Mapping[str, str]) -> "Context":
        from opentelemetry.context import Context

        # The parent is the client's span, not the current span of this thread.
        return self._propagator.extract(carrier, Context())

    def close(self) -> None:
        """Send the last spans, for a few seconds at most."""
        shutdown = getattr(self._provider, "shutdown", None)
        if shutdown is not None:
            # The shutdown has no time limit of its own that is short enough for an
            # orchestrator.
            last = threading.Thread(target=shutdown, name="hvpd-spans", daemon=True)
            last.start()
            last.join(_FLUSH_SECONDS)


class CallSpan:
    """The span of one call.

    Args:
        api: OpenTelemetry's module `trace`.
        tracer: Makes the spans within.
        span: OpenTelemetry's span.
    """

    def __init__(self, api: Any, tracer: "trace.Tracer", span: "trace.Span") -> None:
        self._api = api
        self._tracer = tracer
        self._span = span
        context = span.get_span_context()
        self.ids = {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}
        """The ids that the log has."""

    def made(self, info: curvature_pb2.ProductInfo, computed: float, *, n: int = 0, k: int = 0) -> None:
        """Note how a product was computed; see `Tracing.product`."""
        self._span.set_attributes(
            {
                "hvpd.batch_width": info.batch_width,
                "hvpd.program": info.program,
                "hvpd.queue_seconds": info.queue_duration_ns / 1e9,
                "hvpd.compute_seconds": info.compute_duration_ns / 1e9,
                **({"hvpd.n": n, "hvpd.k": k} if k else {}),
            }
        )
        # Two spans within it: its time in the queue, and its computation.
        context, end = self._api.set_span_in_context(self._span), _wall(computed)
        launched = end - info.compute_duration_ns
        for name, begins, ends in (
            ("hvpd.queue", launched - info.queue_duration_ns, launched),
            ("hvpd.compute", launched, end),
        ):
            self._tracer.start_span(name, context, start_time=begins).end(ends)

    def end(self, request: requests.Request, failed: requests.Failed | None, *, whole: bool) -> None:
        """End the span.

        Args:
            request: The call.
            failed: The failure, if the call failed.
            whole: Whether the client took the whole answer. Otherwise it went away.
        """
        facts = {"hvpd.objective": request.objective, "hvpd.tenant": request.owner}
        self._span.set_attributes({key: value[:_LONGEST] for key, value in facts.items() if value})
        if failed is None:
            self._span.set_attribute("rpc.response.status_code", "OK" if whole else "CANCELLED")
        else:
            name = failed.code.name
            self._span.set_attributes({"rpc.response.status_code": name, "hvpd.reason": failed.reason})
            if failed.code in _FAULTS:
                self._span.set_attribute("error.type", failed.reason or name)
                message = _text.cut(failed.status.message, _LONGEST)
                self._span.set_status(self._api.Status(self._api.StatusCode.ERROR, message))
            if failed.cause is not None:
                self._span.record_exception(failed.cause)
        self._span.end()


def operator_name(operator: int) -> str:
    """Return the contract's name of an operator in small letters, such as "hessian"."""
    names = curvature_pb2.Operator.keys()
    return names[operator].removeprefix("OPERATOR_").lower() if 0 <= operator < len(names) else str(operator)


def _wall(monotonic: float) -> int:
    """Return a moment on time.monotonic's clock as nanoseconds since 1970."""
    return time.time_ns() - int((time.monotonic() - monotonic) * 1e9)


# The start


def start(environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """Return the maker of spans, or None if no spans are asked for.

    Spans are asked for by a provider that was set up before
    (`opentelemetry-instrument`), or by the variables of OpenTelemetry's specification:
    $OTEL_TRACES_EXPORTER, or $OTEL_EXPORTER_OTLP_ENDPOINT. If they cannot be made, that
    is logged, and the server serves without them.
    """
    try:
        return _start(environment)
    except Exception as error:  # noqa: BLE001 - exporters are other packages' code
        _log.warning("no traces are made: %s", error)
        return None


def _start(environment: Mapping[str, str]) -> Tracing | None:
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry import trace

        provider = trace.get_tracer_provider()
        if not isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
            return Tracing(provider)
    exporters = _exporters(environment)
    if not exporters:
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ValueError(
            f"OpenTelemetry's variables ask for traces, and it is not installed: pip install 'hvpd[otel]' ({error})"
        ) from None
    made = [_exporter(name) for name in exporters]
    # The variables take precedence.
    resource = Resource.create()
    ours = {"service.version": hvpd.__version__}
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "hvpd"}))
    sdk = TracerProvider(resource=Resource(ours).merge(resource))
    for exporter in made:
        sdk.add_span_processor(BatchSpanProcessor(exporter))
    _log.info("spans go to %s", ", ".join(exporters))
    return Tracing(sdk)


def _exporters(environment: Mapping[str, str]) -> list[str]:
    """Return the entry points of the exporters that are asked for.
    https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
    """
    asked = environment.get("OTEL_TRACES_EXPORTER", "").strip()
    if not asked:
        endpoints = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
        asked = "otlp" if any(environment.get(name) for name in endpoints) else "none"
    names = [name.strip() for name in asked.split(",") if name.strip() not in ("", "none")]
    protocol = (
        environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or "grpc"
    )
    if "otlp" in names and protocol not in _PROTOCOLS:
        raise ValueError(f"$OTEL_EXPORTER_OTLP_PROTOCOL: expected {' or '.join(_PROTOCOLS)}, got {protocol!r}")
    return [_PROTOCOLS[protocol] if name == "otlp" else name for name in names]


def _exporter(name: str) -> "SpanExporter":
    for entry in importlib.metadata.entry_points(group="opentelemetry_traces_exporter", name=name):
        found: SpanExporter = entry.load()()
        return found
    package = f"opentelemetry-exporter-{name.replace('_', '-')}"
    raise ValueError(f"no exporter {name} of spans is installed: pip install 'hvpd[otel]', or {package}")
