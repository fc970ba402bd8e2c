"""Spans of what the server does, through OpenTelemetry, where it is installed and somebody wants them; else nothing of it is imported.

A call is a SERVER span, from its arrival to its answer. A stream of products lives for hours and is none: each product of it is one, in the
trace that `ProductSpec.traceparent` names. Products have two spans within, `hvpd.queue` and `hvpd.compute`. Attributes follow the semantic
conventions for RPC (https://opentelemetry.io/docs/specs/semconv/rpc/grpc/); those of our own begin with `hvpd.`.
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
from hvpd.v1 import curvature_pb2
from hvpd_server import _requests
from hvpd_server._errors import Code

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
"""Codes with which a span of a server has failed, by the conventions. Other failures are the caller's."""

_CARRIED: Final = ("traceparent", "tracestate")

_FLUSH_SECONDS: Final = 5.0
"""How long an end of the server waits for the last spans to leave."""

_LONGEST: Final = 1024
"""Most characters of what clients send, and of messages."""

_PROTOCOLS: Final = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}


class Tracing:
    """Makes spans.

    Args:
        provider: Where.
    """

    def __init__(self, provider: "trace.TracerProvider") -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._provider = provider
        self._tracer = provider.get_tracer("hvpd_server", hvpd.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def call(self, request: _requests.Request, path: str, metadata: Any) -> "CallSpan":
        """Begins the span of a call.

        Args:
            request: The call.
            path: "/hvpd.v1.Service/Method".
            metadata: That came with it.
        """
        carrier = {key: value for key, value in metadata or () if key in _CARRIED and isinstance(value, str)}
        method = path.removeprefix("/")
        attributes = {"rpc.system.name": "grpc", "rpc.method": method, "hvpd.request_id": request.id}
        span = self._tracer.start_span(
            method, self._parent(carrier), kind=self._api.SpanKind.SERVER, attributes=attributes
        )
        request.span = CallSpan(self, span)
        return request.span

    def product(
        self,
        request: _requests.Request,
        tag: int,
        spec: curvature_pb2.ProductSpec,
        started: float,
        *,
        digest: str = "",
        n: int = 0,
        info: curvature_pb2.ProductInfo | None = None,
        computed: float = 0.0,
        failed: _requests.Failed | None = None,
    ) -> None:
        """Notes a product of a stream that was answered.

        Args:
            request: The stream.
            tag: The product's.
            spec: What was asked for.
            started: When it began to arrive, on time.monotonic's clock.
            digest: Of the objective.
            n: Elements of its vectors.
            info: How it was made; None where it was not.
            computed: When it was there, on the same clock.
            failed: Why there is none.
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
            whole = CallSpan(self, span)
            if info is not None:
                whole.made(info, computed)
            whole.end(request, failed, whole=True)

    def stages(self, parent: "trace.Span", info: curvature_pb2.ProductInfo, computed: float) -> None:
        """The spans within a product's: how long it queued, and computed.

        Args:
            parent: The product's.
            info: How it was made.
            computed: When it was there, on time.monotonic's clock.
        """
        context = self._api.set_span_in_context(parent)
        end = _wall(computed)
        launched = end - info.compute_duration_ns
        for name, begins, ends in (
            ("hvpd.queue", launched - info.queue_duration_ns, launched),
            ("hvpd.compute", launched, end),
        ):
            self._tracer.start_span(name, context, start_time=begins).end(ends)

    def end(self, span: "trace.Span", failed: _requests.Failed | None, *, whole: bool) -> None:
        """Ends a span with how its request ended."""
        if failed is None:
            span.set_attribute("rpc.response.status_code", "OK" if whole else "CANCELLED")
        else:
            name = failed.code.name
            span.set_attributes({"rpc.response.status_code": name, "hvpd.reason": failed.reason})
            if failed.code in _FAULTS:
                span.set_attribute("error.type", failed.reason or name)
                span.set_status(self._api.Status(self._api.StatusCode.ERROR, failed.status.message[:_LONGEST]))
            if failed.cause is not None:
                span.record_exception(failed.cause)
        span.end()

    def _parent(self, carrier: Mapping[str, str]) -> "Context":
        from opentelemetry.context import Context

        # Of what the client says, and of nothing that is current in this thread.
        return self._propagator.extract(carrier, Context())

    def close(self) -> None:
        """Sends what is left, for a few seconds at most."""
        shutdown = getattr(self._provider, "shutdown", None)
        if shutdown is not None:
            # It has no limit of its own that is shorter than an orchestrator's patience.
            last = threading.Thread(target=shutdown, name="hvpd-spans", daemon=True)
            last.start()
            last.join(_FLUSH_SECONDS)


class CallSpan:
    """The span of one call.

    Args:
        tracing: What made it.
        span: OpenTelemetry's.
    """

    def __init__(self, tracing: Tracing, span: "trace.Span") -> None:
        self._tracing = tracing
        self._span = span
        context = span.get_span_context()
        self.ids = {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}
        """For the log."""

    def made(self, info: curvature_pb2.ProductInfo, computed: float, *, n: int = 0, k: int = 0) -> None:
        """Says how a product was made; see `Tracing.product`."""
        self._span.set_attributes(
            {
                "hvpd.batch_width": info.batch_width,
                "hvpd.program": info.program,
                "hvpd.queue_seconds": info.queue_duration_ns / 1e9,
                "hvpd.compute_seconds": info.compute_duration_ns / 1e9,
                **({"hvpd.n": n, "hvpd.k": k} if k else {}),
            }
        )
        self._tracing.stages(self._span, info, computed)

    def end(self, request: _requests.Request, failed: _requests.Failed | None, *, whole: bool) -> None:
        """Ends it.

        Args:
            request: The call.
            failed: How, where it failed.
            whole: Whether all of the answer was taken, where it did not: else the caller went away.
        """
        facts = {"hvpd.objective": request.objective, "hvpd.tenant": request.tenant}
        self._span.set_attributes({key: value[:_LONGEST] for key, value in facts.items() if value})
        self._tracing.end(self._span, failed, whole=whole)


def operator_name(operator: int) -> str:
    """As the contract has it, in small letters: "hessian"."""
    names = curvature_pb2.Operator.keys()
    return names[operator].removeprefix("OPERATOR_").lower() if 0 <= operator < len(names) else str(operator)


def _wall(monotonic: float) -> int:
    """Nanoseconds since 1970 of a moment on time.monotonic's clock."""
    return time.time_ns() - int((time.monotonic() - monotonic) * 1e9)


# Whether there is anything to do


def start(environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """What makes spans; None where nobody wants any, or, which is logged, where they cannot be made: a server serves without them.

    Somebody does who has set a provider up before (`opentelemetry-instrument`), or says by the variables of OpenTelemetry's
    specification where spans go: $OTEL_TRACES_EXPORTER, or $OTEL_EXPORTER_OTLP_ENDPOINT.
    """
    try:
        return _start(environment)
    except Exception as error:  # noqa: BLE001 - exporters are anybody's
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
    # What the variables say wins.
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
    """Entry points of the exporters that are asked for. https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/"""
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
