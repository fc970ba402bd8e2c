"""The end of a call in its span, and the settings that ask for spans."""

import logging

import pytest

from hvpd.v1 import curvature_pb2
from hvpd_server.errors import Code, ServiceError
from hvpd_server.telemetry import requests
from hvpd_server.telemetry import tracing as _tracing
from hvpd_server.telemetry.requests import Request

pytest.importorskip("opentelemetry.sdk", reason="pip install 'hvpd[otel]'")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

PATH = "/hvpd.v1.ObjectiveService/CreateObjective"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield _tracing.Tracing(provider)
    provider.shutdown()


def ended(tracing, exporter, error, *, whole=False):
    """Return the span of a call that ended with an error, or without one."""
    request = Request(id="3f2a", method="CreateObjective", owner="vision", objective="o" * 10_000)
    tracing.call(request, PATH, [("hvpd-protocol", "1"), ("traceparent", b"bytes")])
    request.error = None if error is None else requests.failed(request, error)
    request.span.end(request, request.error, whole=whole)
    (span,) = exporter.get_finished_spans()
    return span


def test_a_call_that_is_answered_is_ok(tracing, exporter):
    span = ended(tracing, exporter, None, whole=True)
    assert span.name == "hvpd.v1.ObjectiveService/CreateObjective"
    assert span.attributes["rpc.response.status_code"] == "OK"
    assert span.attributes["hvpd.tenant"] == "vision"
    assert len(span.attributes["hvpd.objective"]) <= 1024
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
def test_faults_of_the_server_are_errors_and_others_are_not(code, tracing, exporter):
    span = ended(tracing, exporter, ServiceError(code, "SOME_REASON", "what to do"))
    assert (span.status.status_code is StatusCode.ERROR) == (code in _tracing._FAULTS)
    assert span.attributes["rpc.response.status_code"] == code.name
    assert span.attributes["hvpd.reason"] == "SOME_REASON"


def test_an_unexpected_error_is_recorded(tracing, exporter):
    span = ended(tracing, exporter, ZeroDivisionError("by zero"))
    (event,) = span.events
    assert event.attributes["exception.type"] == "ZeroDivisionError"
    assert (span.attributes["error.type"], span.status.status_code) == ("INTERNAL", StatusCode.ERROR)


def test_a_call_whose_client_went_away_is_cancelled(tracing, exporter):
    assert ended(tracing, exporter, None).attributes["rpc.response.status_code"] == "CANCELLED"


def test_no_spans_are_made_unless_they_are_asked_for():
    assert _tracing.start({}) is None
    assert _tracing.start({"OTEL_TRACES_EXPORTER": "none"}) is None
    assert _tracing.start({"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "true"}) is None
    assert _tracing.start({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}) is None


@pytest.mark.parametrize(
    ("environment", "exporters"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, ["otlp_proto_grpc"]),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, ["otlp_proto_grpc"]),
        ({"OTEL_TRACES_EXPORTER": "otlp, console"}, ["otlp_proto_grpc", "console"]),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, ["otlp_proto_http"]),
        (
            {
                "OTEL_TRACES_EXPORTER": "otlp",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
            },
            ["otlp_proto_grpc"],
        ),
        ({}, []),
    ],
)
def test_the_variables_of_the_specification_say_where_spans_go(environment, exporters):
    assert _tracing._exporters(environment) == exporters


def test_a_missing_exporter_is_logged_with_the_package_to_install(caplog):
    with caplog.at_level(logging.WARNING):
        assert _tracing.start({"OTEL_TRACES_EXPORTER": "zipkin"}) is None
    assert "no exporter zipkin of spans is installed" in caplog.text


def test_operators_have_names():
    assert _tracing.operator_name(curvature_pb2.OPERATOR_HESSIAN) == "hessian"
    assert _tracing.operator_name(curvature_pb2.OPERATOR_SAMPLED_FISHER) == "sampled_fisher"
    assert _tracing.operator_name(77) == "77"
    assert _tracing.operator_name(-1) == "-1"
