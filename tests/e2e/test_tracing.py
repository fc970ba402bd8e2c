"""One trace shows the client's call and the server's work for it, with the right
parents and true times.
"""

import concurrent.futures
import contextlib
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

import hvpd
from hvpd._transport import tracing as _tracing
from hvpd._transport.exchange import Asked
from hvpd.v1 import curvature_pb2, curvature_pb2_grpc
from hvpd_server.tenancy import token_file

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="pip install 'hvpd[otel]'")

from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

WAIT = 60
SLACK = 10_000_000
"""Most nanoseconds by which two processes' clocks differ, and by which threads wake
late.
"""

SERVER, INTERNAL = 2, 1
ERROR = 2


def cubic(x, a):
    return (a * x**3).sum()


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Receives the spans that a server exports, as any collector does."""

    def __init__(self):
        self.spans = []
        self.resources = []
        self._changed = threading.Condition()

    def Export(self, request, context):
        with self._changed:
            for each in request.resource_spans:
                self.resources.append({a.key: value(a.value) for a in each.resource.attributes})
                self.spans += [span for scope in each.scope_spans for span in scope.spans]
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def find(self, count=1, **wanted):
        """Return the spans with these fields or attributes, once there are so many."""

        def found():
            return [span for span in self.spans if wanted.items() <= facts(span).items()]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= count, WAIT), (wanted, list(map(facts, self.spans)))
            return found()


def value(any_value):
    return getattr(any_value, any_value.WhichOneof("value"))


def facts(span):
    found = {a.key.removeprefix("hvpd.").replace(".", "_"): value(a.value) for a in span.attributes}
    return found | {"name": span.name, "trace": span.trace_id.hex(), "parent": span.parent_span_id.hex()}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collecting = Collector()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collecting, server)
    collecting.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield collecting
    server.stop(None).wait(WAIT)


@pytest.fixture(scope="module")
def traced(serve_module, collector):
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "20"}
    return serve_module("--log-format", "json", environment=environment)


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter):
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(exporter))
    yield made
    made.shutdown()


@pytest.fixture
def tracing(provider, traced, monkeypatch):
    """Trace clients that connect now. The provider of a process can be set only once,
    so the test passes its own.
    """
    monkeypatch.setattr(_tracing, "of", lambda address: _tracing.Tracing(provider, address))
    return provider.get_tracer("application")


@pytest.fixture
def client(tracing, traced):
    with hvpd.connect(traced.address) as connected:
        yield connected


@pytest.fixture
def point(client):
    return client.register(cubic, np.ones(3), np.ones(3), name="cubic").at(np.ones(3))


def named(exporter, name):
    """Return the spans of that name that the client has ended."""
    return [span for span in exporter.get_finished_spans() if span.name == name]


def hex_ids(span):
    context = span.get_span_context()
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def test_a_span_names_the_server_that_was_chosen(traced, tracing, exporter):
    """Two names of one server look like two servers."""
    list_of_both = f"{traced.address},localhost:{traced.port}"
    with hvpd.connect(list_of_both) as client:
        point = client.register(cubic, np.ones(3), np.ones(3), name="cubic").at(np.ones(3))
        exporter.clear()
        point.hessian() @ np.ones(3)
    (ours,) = named(exporter, "hvpd.product")
    address = f"{ours.attributes['server.address']}:{ours.attributes['server.port']}"
    assert address == point._transport.member.address


def test_a_product_is_a_span_here_and_there_with_queue_and_compute_within(point, exporter, collector, tracing):
    exporter.clear()
    H = point.hessian()
    with tracing.start_as_current_span("newton step") as step:
        H @ np.ones(3)
    (ours,) = named(exporter, "hvpd.product")
    trace_id, span_id = hex_ids(ours)
    assert ours.kind is SpanKind.CLIENT
    assert ours.parent.span_id == step.get_span_context().span_id
    attributes = dict(ours.attributes)
    assert attributes["rpc.system.name"] == "grpc"
    assert attributes["rpc.method"] == "hvpd.v1.CurvatureService/StreamProducts"
    assert attributes["rpc.response.status_code"] == "OK"
    assert (attributes["server.address"], attributes["server.port"]) == tuple(
        kind(part) for kind, part in zip((str, int), point._transport.address.split(":"), strict=True)
    )
    assert attributes["hvpd.objective"] == point.objective.digest
    assert (attributes["hvpd.n"], attributes["hvpd.k"], attributes["hvpd.operator"]) == (3, 1, "hessian")
    assert attributes["hvpd.batch_width"] == 1

    (theirs,) = collector.find(name="hvpd.product", trace=trace_id)
    found = facts(theirs)
    assert theirs.kind == SERVER
    assert found["parent"] == span_id
    assert found["request_id"] == attributes["hvpd.request_id"]
    assert (found["objective"], found["n"], found["k"]) == (point.objective.digest, 3, 1)
    assert found["rpc_response_status_code"] == "OK"
    assert found["queue_seconds"] == attributes["hvpd.queue_seconds"]
    assert found["compute_seconds"] == attributes["hvpd.compute_seconds"]

    (queued,) = collector.find(name="hvpd.queue", trace=trace_id, parent=theirs.span_id.hex())
    (computed,) = collector.find(name="hvpd.compute", trace=trace_id, parent=theirs.span_id.hex())
    assert queued.end_time_unix_nano == computed.start_time_unix_nano
    for stage, seconds in ((queued, "queue_seconds"), (computed, "compute_seconds")):
        assert (stage.end_time_unix_nano - stage.start_time_unix_nano) / 1e9 == pytest.approx(found[seconds])
    moments = [
        ours.start_time,
        theirs.start_time_unix_nano,
        queued.start_time_unix_nano,
        computed.start_time_unix_nano,
        computed.end_time_unix_nano,
        theirs.end_time_unix_nano,
        ours.end_time,
    ]
    assert all(later >= earlier - SLACK for earlier, later in itertools.pairwise(moments))


def test_a_block_too_wide_for_one_launch_is_one_span_here_and_several_there(point, exporter, collector):
    exporter.clear()
    point.multiply(np.ones((200, 3)))
    (ours,) = named(exporter, "hvpd.product")
    trace_id, span_id = hex_ids(ours)
    theirs = collector.find(4, name="hvpd.product", trace=trace_id, parent=span_id)
    assert sorted(facts(span)["k"] for span in theirs) == [8, 64, 64, 64]
    assert ours.attributes["hvpd.k"] == 200
    total = sum(facts(span)["compute_seconds"] for span in theirs)
    assert ours.attributes["hvpd.compute_seconds"] == pytest.approx(total)


def test_a_registration_is_one_trace_of_all_its_calls(client, exporter, collector):
    client.register(cubic, np.ones(4), np.arange(4.0), name="cubic4")
    (whole,) = named(exporter, "hvpd.register")
    trace_id, span_id = hex_ids(whole)
    assert whole.kind is SpanKind.INTERNAL
    assert whole.attributes["hvpd.name"] == "cubic4"
    children = [
        span for span in exporter.get_finished_spans() if span.parent and span.parent.span_id == int(span_id, 16)
    ]
    assert {span.name for span in children} >= {
        "hvpd.v1.BlobService/FindMissingBlobs",
        "hvpd.v1.BlobService/UploadBlob",
        "hvpd.v1.ObjectiveService/CreateObjective",
    }
    for child in children:
        (theirs,) = collector.find(name=child.name, parent=hex_ids(child)[1])
        assert facts(theirs)["trace"] == trace_id
        assert facts(theirs)["request_id"] == child.attributes["hvpd.request_id"]
        assert theirs.kind == SERVER


def test_a_point_is_a_span(point, exporter, collector):
    exporter.clear()
    point.objective.at(np.full(3, 5.0))
    (ours,) = named(exporter, "hvpd.v1.CurvatureService/CreatePoint")
    (theirs,) = collector.find(name=ours.name, parent=hex_ids(ours)[1])
    assert facts(theirs)["objective"] == point.objective.digest == ours.attributes["hvpd.objective"]


def test_a_failure_is_in_both_spans_and_the_log_knows_the_trace(client, exporter, collector, traced):
    with pytest.raises(hvpd.NotFoundError) as error:
        client.objective("nothing")
    (ours,) = named(exporter, "hvpd.v1.ObjectiveService/GetObjective")
    trace_id, span_id = hex_ids(ours)
    assert ours.status.status_code is StatusCode.ERROR
    assert ours.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert ours.attributes["error.type"] == error.value.reason
    assert ours.attributes["hvpd.request_id"] == error.value.request_id
    (theirs,) = collector.find(name=ours.name, parent=span_id)
    found = facts(theirs)
    assert (found["rpc_response_status_code"], found["reason"]) == ("NOT_FOUND", error.value.reason)
    assert theirs.status.code != ERROR  # The error is the caller's.
    (line,) = [line for line in tuple(traced.lines) if error.value.request_id in line]
    assert json.loads(line)["trace_id"] == trace_id
    assert json.loads(line)["span_id"] == theirs.span_id.hex()


def pages_of(server):
    """Return the text of the server's metrics and of its status page."""
    (metrics,) = {line.split(" on ")[1] for line in server.lines if "hvpd: metrics on " in line}
    for address in (metrics, f"{metrics.removesuffix('/metrics')}/status.json"):
        with urllib.request.urlopen(address, timeout=WAIT) as response:
            yield response.read().decode()


def test_a_token_is_in_no_trace_metric_line_page_or_error(serve, collector, provider, exporter, monkeypatch, tmp_path):
    monkeypatch.setattr(_tracing, "of", lambda address: _tracing.Tracing(provider, address))
    path = tmp_path / "tokens.json"
    publishes, _ = token_file.create(path, "token-test", ["use", "publish"])
    uses, grant = token_file.create(path, "token-test", ["use"])
    wrong = f"{uses[:-4]}AAAA"
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "20"}
    server = serve("--tokens", str(path), "--log-level", "DEBUG", environment=environment)
    errors = []

    def refused(call, *arguments):
        with pytest.raises(hvpd.AccessError) as error:
            call(*arguments)
        errors.append(error.value)
        return error.value.reason

    with hvpd.connect(server.address, token=publishes) as client:
        H = client.register(cubic, np.ones(3), np.ones(3), name="cubic").at(np.ones(3)).hessian()
        np.testing.assert_allclose(H @ np.ones(3), 6 * np.ones(3))
    assert refused(lambda: hvpd.connect(server.address, token=wrong)) == "TOKEN_UNKNOWN"
    with hvpd.connect(server.address, token=uses) as client:
        assert refused(client.delete, "cubic") == "RIGHT_MISSING"
        H = client.objective("cubic").at(np.ones(3)).hessian()
        token_file.revoke(path, grant.id)
        time_is_over = time.monotonic() + WAIT
        assert refused(lambda: [H @ np.ones(3) for _ in iter(lambda: time.monotonic() < time_is_over, False)])
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as doubled:
        twice = [("authorization", f"Bearer {publishes}")] * 2
        curvature_pb2_grpc.CurvatureServiceStub(channel).ComputeProduct(
            curvature_pb2.ComputeProductRequest(), metadata=twice, timeout=WAIT
        )
    for reason in ("TOKEN_UNKNOWN", "RIGHT_MISSING", "TOKEN_MALFORMED"):
        collector.find(reason=reason)
    pages = list(pages_of(server))
    assert server.terminate() == 0
    places = {
        "log": server.lines,
        "pages": pages,
        "server's spans": list(map(str, collector.spans)),
        "client's spans": [span.to_json() for span in exporter.get_finished_spans()],
        "errors": [f"{error} {vars(error)}" for error in errors] + [str(doubled.value)],
    }
    for place, texts in places.items():
        said = "\n".join(texts)
        assert "token-test" in said or "TOKEN_UNKNOWN" in said, place  # These calls are there.
        for token in (publishes, uses, wrong):
            assert token.removeprefix("hvpd_") not in said, place


def test_so_is_that_of_a_product_on_a_stream(point, exporter, collector):
    exporter.clear()
    asked = Asked(point._id, curvature_pb2.OPERATOR_GGN)
    with pytest.raises(hvpd.HvpdError) as error:
        point._transport.multiply(asked, np.ones((1, 3)), restore=point._restore)
    (ours,) = named(exporter, "hvpd.product")
    assert ours.status.status_code is StatusCode.ERROR
    (theirs,) = collector.find(name="hvpd.product", parent=hex_ids(ours)[1])
    assert facts(theirs)["reason"] == error.value.reason == ours.attributes["hvpd.reason"]
    assert facts(theirs)["request_id"] == error.value.request_id == ours.attributes["hvpd.request_id"]


def test_a_product_at_a_lost_point_is_one_span_with_its_retry(client, exporter):
    def registered():
        return client.register(cubic, np.ones(3), np.full(3, 2.0), name="forgotten")

    point = registered().at(np.ones(3))
    assert client.delete("forgotten")  # Its points go with it.
    registered()
    exporter.clear()
    np.testing.assert_allclose(point.hessian() @ np.ones(3), np.full(3, 12.0))
    (ours,) = named(exporter, "hvpd.product")
    (event,) = ours.events
    assert (event.name, event.attributes["hvpd.reason"]) == ("retry", "POINT_NOT_RESIDENT")
    (remade,) = named(exporter, "hvpd.v1.CurvatureService/CreatePoint")
    assert remade.parent.span_id == ours.get_span_context().span_id
    assert ours.attributes["rpc.response.status_code"] == "OK"


def test_threads_do_not_mix(point, exporter, collector, tracing):
    H, barrier = point.hessian(), threading.Barrier(4)

    def solve(number):
        barrier.wait(WAIT)
        with tracing.start_as_current_span(f"solve{number}") as whole:
            for _ in range(10):
                H @ np.full(3, float(number))
        return hex_ids(whole)

    exporter.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        wholes = list(pool.map(solve, range(4)))
    assert len({trace_id for trace_id, _ in wholes}) == 4
    products = named(exporter, "hvpd.product")
    assert len(products) == 40
    for trace_id, span_id in wholes:
        ours = [span for span in products if hex_ids(span)[0] == trace_id]
        assert {f"{span.parent.span_id:016x}" for span in ours} == {span_id}
        theirs = collector.find(10, name="hvpd.product", trace=trace_id)
        assert sorted(facts(span)["parent"] for span in theirs) == sorted(hex_ids(span)[1] for span in ours)


# Other clients


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def product(point):
    spec = curvature_pb2.ProductSpec(point_id=point._id, operator=curvature_pb2.OPERATOR_HESSIAN, k=1)
    return curvature_pb2.ComputeProductRequest(spec=spec, vectors=np.ones(3).tobytes())


def test_a_product_of_one_message_goes_on_with_the_trace_of_its_call(point, traced, collector):
    with grpc.insecure_channel(traced.address) as channel:
        curvature_pb2_grpc.CurvatureServiceStub(channel).ComputeProduct(
            product(point), metadata=[("traceparent", PARENT), ("x-request-id", "of-one-message")]
        )
    (theirs,) = collector.find(name="hvpd.v1.CurvatureService/ComputeProduct", request_id="of-one-message")
    assert (facts(theirs)["trace"], facts(theirs)["parent"]) == tuple(PARENT.split("-")[1:3])
    assert facts(theirs)["batch_width"] == 1
    for stage in ("hvpd.queue", "hvpd.compute"):
        assert collector.find(name=stage, parent=theirs.span_id.hex())


@pytest.mark.parametrize("sent", [None, "", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 5000])
def test_a_call_without_a_valid_trace_begins_one_on_the_server(sent, point, traced, collector):
    request_id = f"begins-{len(sent) if sent is not None else 'none'}"
    metadata = [("x-request-id", request_id), *([("traceparent", sent)] if sent is not None else [])]
    with grpc.insecure_channel(traced.address) as channel:
        stub = curvature_pb2_grpc.CurvatureServiceStub(channel)
        stub.ComputeProduct(product(point), metadata=metadata)
        spec = curvature_pb2.ProductSpec()
        spec.CopyFrom(product(point).spec)
        spec.traceparent = sent or ""
        request = curvature_pb2.StreamProductsRequest(tag=3, spec=spec, chunk=np.ones(3).tobytes())
        (answer,) = stub.StreamProducts(iter([request]), metadata=metadata)
        assert not answer.HasField("error")
    for wanted in (request_id, f"{request_id}/3"):
        (theirs,) = collector.find(request_id=wanted)
        assert facts(theirs)["parent"] == ""


def test_the_server_does_not_sample_a_call_that_the_client_does_not_sample(point, traced, collector):
    with grpc.insecure_channel(traced.address) as channel:
        stub = curvature_pb2_grpc.CurvatureServiceStub(channel)
        unsampled = [("traceparent", PARENT[:-1] + "0"), ("x-request-id", "not-sampled")]
        stub.ComputeProduct(product(point), metadata=unsampled)
        stub.ComputeProduct(product(point), metadata=[("x-request-id", "after-it")])
    assert collector.find(request_id="after-it")
    assert not [span for span in collector.spans if facts(span).get("request_id") == "not-sampled"]


def test_a_call_of_a_client_that_leaves_is_cancelled(point, traced, collector):
    with grpc.insecure_channel(traced.address) as channel:
        requests = queue.SimpleQueue()
        call = curvature_pb2_grpc.CurvatureServiceStub(channel).CreatePoint(
            iter(requests.get, None), metadata=[("x-request-id", "goes-away")]
        )
        spec = curvature_pb2.PointSpec(objective_digest=point.objective.digest, default_data=True, x_digest="a" * 64)
        requests.put(curvature_pb2.CreatePointRequest(spec=spec))
        assert next(call).x_wanted
        call.cancel()
        requests.put(None)
    (theirs,) = collector.find(request_id="goes-away")
    assert facts(theirs)["rpc_response_status_code"] == "CANCELLED"


# Processes


def test_the_service_is_called_hvpd_and_the_last_spans_leave_before_it_ends(serve, collector):
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "600000"}
    before = len(collector.resources)
    server = serve(environment=environment)
    with hvpd.connect(server.address) as client:
        client.objectives()
    assert server.terminate() == 0
    assert len(collector.resources) > before
    assert collector.resources[-1]["service.name"] == "hvpd"
    assert collector.resources[-1]["service.version"] == hvpd.__version__


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"OTEL_TRACES_EXPORTER": "nowhere"}, "no traces are made: no exporter nowhere of spans is installed"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "pigeon"},
            "no traces are made: $OTEL_EXPORTER_OTLP_PROTOCOL: expected grpc or http/protobuf, got 'pigeon'",
        ),
    ],
)
def test_a_wrong_trace_setting_is_logged_and_the_server_serves(serve, environment, said):
    server = serve(environment=environment)
    assert [line for line in server.lines if said in line]
    with hvpd.connect(server.address) as client:
        assert client.objectives() == []


def test_an_absent_collector_delays_no_call(serve, closed_port):
    server = serve(environment={"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{closed_port}"})
    with hvpd.connect(server.address) as client:
        assert client.objectives() == []
    began = time.monotonic()
    assert server.terminate() == 0
    assert time.monotonic() - began < 30


@pytest.fixture
def closed_port():
    """Yield a port on which nothing listens."""
    import socket

    with contextlib.closing(socket.socket()) as bound:
        bound.bind(("127.0.0.1", 0))  # The port is taken, and nothing listens on it.
        yield bound.getsockname()[1]


@pytest.fixture
def absent(tmp_path):
    """Return an environment in which OpenTelemetry cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['opentelemetry'] = None\n")
    return {"PYTHONPATH": str(tmp_path)}


def test_without_the_packages_everything_works(serve, absent):
    server = serve(environment={**absent, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"})
    assert [line for line in server.lines if "pip install 'hvpd[otel]'" in line]
    program = f"""
import sys, numpy as np, hvpd
assert sys.modules["opentelemetry"] is None
with hvpd.connect({server.address!r}) as client:
    objective = client.register(lambda x, a: (a * x**3).sum(), np.ones(3), np.ones(3))
    print(objective.at(np.ones(3)).hessian() @ np.ones(3))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env=os.environ | absent,
        capture_output=True,
        text=True,
        timeout=WAIT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[6. 6. 6.]"


def test_a_client_imports_nothing_of_it_by_itself_and_uses_the_provider_of_its_process(traced):
    program = f"""
import sys, hvpd
with hvpd.connect({traced.address!r}) as client:
    client.objectives()
    assert client._transport._tracing is None
    assert "opentelemetry" not in sys.modules
import opentelemetry.trace
with hvpd.connect({traced.address!r}) as client:
    assert client._transport._tracing is None
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
opentelemetry.trace.set_tracer_provider(provider)
with hvpd.connect({traced.address!r}) as client:
    client.objectives()
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "hvpd.v1.ObjectiveService/ListObjectives"


def test_nothing_here_has_set_a_provider_for_other_tests():
    assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
