"""The metrics have right counts and a bounded number of series, and
docs/reference/metrics.md lists them.
"""

import dataclasses
import re
import threading
import types
from pathlib import Path

import grpc
import numpy as np
import prometheus_client
import pytest
from google.rpc import status_pb2
from prometheus_client.parser import text_string_to_metric_families

from hvpd._wire import codec
from hvpd._wire.frames import Frame
from hvpd.v1 import curvature_pb2
from hvpd_server.device import data_sources, executables
from hvpd_server.errors import Code, ServiceError, to_status
from hvpd_server.rpc.call_context import GrpcCall
from hvpd_server.rpc.curvature import CurvatureService
from hvpd_server.rpc.observer import Observer
from hvpd_server.rpc.streams import Streams
from hvpd_server.telemetry import metrics as _metrics
from hvpd_server.telemetry import usage
from hvpd_server.telemetry.metrics import Metrics, ProductRecord
from hvpd_server.telemetry.readings import Live, Memory
from hvpd_server.tenancy.limits import Limits

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
WAIT = 60


@pytest.fixture
def metrics():
    return Metrics()


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, labels)


def product(digest="a" * 64, tenant="", *, queue=0.0, compute=0.01, columns=1, width=None, end=1000.0):
    width = width or columns
    return ProductRecord(digest, tenant, columns, width, queue, compute, compute * columns / width, end)


def series(metrics, name):
    return [sample.labels for family in metrics.registry.collect() for sample in family.samples if sample.name == name]


def total(metrics, name):
    families = metrics.registry.collect()
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


# Products


def test_a_product_is_counted_in_the_totals_and_for_its_objective_and_tenant(metrics):
    metrics.named("a" * 64, "team/m")
    metrics.product(product(tenant="ann", queue=0.5, compute=0.2, columns=3, width=4))
    assert value(metrics, "hvpd_products_total") == 1
    assert value(metrics, "hvpd_columns_total") == 3
    assert value(metrics, "hvpd_queue_seconds_sum") == pytest.approx(0.5)
    assert value(metrics, "hvpd_compute_seconds_sum") == pytest.approx(0.2)
    assert value(metrics, "hvpd_batch_width_sum") == 4
    who = {"objective": "team/m", "tenant": "ann"}
    assert value(metrics, "hvpd_usage_products_total", **who) == 1
    assert value(metrics, "hvpd_usage_columns_total", **who) == 3
    assert value(metrics, "hvpd_usage_queue_seconds_sum", **who) == pytest.approx(0.5)
    assert value(metrics, "hvpd_usage_compute_seconds_count", **who) == 1
    assert value(metrics, "hvpd_usage_device_seconds_total", **who) == pytest.approx(0.2 * 3 / 4)


@pytest.mark.parametrize("seconds", [0.0, 1e-4, 1.1e-4, 0.25, 59.0, 60.0, 61.0, 1e6])
def test_buckets_are_those_of_the_prometheus_client(seconds, metrics):
    registry = prometheus_client.CollectorRegistry()
    theirs = prometheus_client.Histogram("theirs", "", buckets=usage.SECONDS, registry=registry)
    theirs.observe(seconds)
    metrics.answered("ComputeProduct", seconds)
    for bound in [*map(str, map(float, usage.SECONDS)), "+Inf"]:
        ours = value(metrics, "hvpd_request_seconds_bucket", method="ComputeProduct", le=bound)
        assert ours == registry.get_sample_value("theirs_bucket", {"le": bound})


def test_coarse_buckets_agree_with_the_fine_ones(metrics):
    for seconds in (1e-5, 2e-3, 2.5e-2, 0.3, 100.0):
        metrics.product(product(compute=seconds))
    who = {"objective": "a" * 12, "tenant": "anonymous"}
    for bound in [*map(str, map(float, usage.COARSE)), "+Inf"]:
        ours = value(metrics, "hvpd_usage_compute_seconds_bucket", le=bound, **who)
        assert ours == value(metrics, "hvpd_compute_seconds_bucket", le=bound)


@pytest.mark.parametrize("tenant", ["", "ipv4:10.0.0.1:5000", "ipv6:[::1]:5000", "unix:/run/hvpd"])
def test_a_tenant_without_a_name_is_anonymous(tenant, metrics):
    metrics.product(product(tenant=tenant))
    assert series(metrics, "hvpd_usage_products_total") == [{"objective": "a" * 12, "tenant": "anonymous"}]


def test_a_name_that_comes_late_counts_from_then_on(metrics):
    metrics.product(product())
    metrics.named("a" * 64, "")
    metrics.named("a" * 64, "team/m")
    metrics.named("a" * 64, "team/other")
    metrics.product(product())
    assert value(metrics, "hvpd_usage_products_total", objective="a" * 12, tenant="anonymous") == 1
    assert value(metrics, "hvpd_usage_products_total", objective="team/m", tenant="anonymous") == 1


def test_objectives_that_had_a_name_one_after_the_other_are_one_series(metrics):
    for digest in ("a" * 64, "b" * 64):
        metrics.named(digest, "team/m")
        metrics.product(product(digest))
    assert series(metrics, "hvpd_usage_products_total") == [{"objective": "team/m", "tenant": "anonymous"}]
    assert value(metrics, "hvpd_usage_products_total", objective="team/m", tenant="anonymous") == 2


# Many clients


def test_ten_thousand_connections_are_one_series(metrics):
    for port in range(10_000):
        metrics.product(product(tenant=f"ipv4:10.0.0.1:{port}"))
    assert len(series(metrics, "hvpd_usage_products_total")) == 1
    assert value(metrics, "hvpd_products_total") == 10_000


def test_ten_thousand_tenants_are_a_hundred_series_and_the_rest(metrics):
    for number in range(10_000):
        metrics.product(product(tenant=f"tenant{number}"))
    found = series(metrics, "hvpd_usage_products_total")
    assert len(found) == 101
    assert value(metrics, "hvpd_usage_products_total", objective="other", tenant="other") == 9_900
    assert value(metrics, "hvpd_products_total") == 10_000
    assert len(metrics._usage._by_digest) == 100


def test_objectives_in_turn_are_not_one_new_series_after_the_other(metrics):
    """Prometheus keeps every series for weeks."""
    seen = set()
    for number in range(1000):
        metrics.product(product(f"{number % 150:012d}".ljust(64, "0"), end=1000.0 + number))
        if number % 100 == 99:
            seen |= {labels["objective"] for labels in series(metrics, "hvpd_usage_products_total")}
    assert len(seen) == 101


def test_a_pair_that_was_idle_for_an_hour_gives_its_series_away(metrics):
    for number in range(100):
        metrics.product(product(tenant=f"tenant{number}", end=1000.0 + number))
    metrics.product(product(tenant="new", end=1000.0 + 3599))
    assert value(metrics, "hvpd_usage_products_total", objective="a" * 12, tenant="new") is None
    metrics.product(product(tenant="new", end=1000.0 + 3601))
    assert value(metrics, "hvpd_usage_products_total", objective="a" * 12, tenant="new") == 1
    assert value(metrics, "hvpd_usage_products_total", objective="a" * 12, tenant="tenant0") is None
    assert value(metrics, "hvpd_usage_products_total", objective="a" * 12, tenant="tenant1") == 1
    assert value(metrics, "hvpd_usage_products_total", objective="other", tenant="other") == 1
    assert value(metrics, "hvpd_products_total") == 102  # The total counts identities that have no series any more.


def test_a_name_that_stands_for_the_rest_is_counted_with_it(metrics):
    metrics.named("a" * 64, "other")
    metrics.product(product(tenant="other"))
    assert series(metrics, "hvpd_usage_products_total") == [{"objective": "other", "tenant": "other"}]
    assert value(metrics, "hvpd_usage_products_total", objective="other", tenant="other") == 1


def test_programs_and_reasons_are_bounded(metrics):
    for number in range(1000):
        metrics.launched(f"program{number}", 1, 0)
        metrics.failed(to_status(ServiceError(Code.NOT_FOUND, f"REASON_{number}", "")))
    for name in ("hvpd_launches_total", "hvpd_failures_total"):
        assert len(series(metrics, name)) == 101
        assert total(metrics, name) == 1000


def test_all_blocks_of_an_operator_are_one_series(metrics):
    for block in ("[0]", "[0,2]", "[1]"):
        metrics.launched(f"ggn{block}", 1, 0)
    assert value(metrics, "hvpd_launches_total", program="ggn[]") == 3


def test_points_that_are_made_again_are_counted_and_few_are_remembered(metrics, monkeypatch):
    monkeypatch.setattr(_metrics, "_REMEMBERED", 3)
    for identity in "abab":
        metrics.made(identity)
    assert value(metrics, "hvpd_points_remade_total") == 2
    for identity in "cda":  # The last of these was forgotten.
        metrics.made(identity)
    assert value(metrics, "hvpd_points_remade_total") == 2
    assert value(metrics, "hvpd_points_total") == 7
    assert len(metrics._made) == 3


def test_counts_from_many_threads_are_all_there(metrics, start):
    together = threading.Barrier(8)

    def count():
        together.wait(WAIT)
        for _ in range(500):
            metrics.product(product(columns=2))
            metrics.answered("StreamProducts", 0.1, 0.1, 0.1)

    for future in [start(count) for _ in range(8)]:
        future.result(WAIT)
    assert value(metrics, "hvpd_products_total") == 4000
    assert value(metrics, "hvpd_columns_total") == 8000
    assert value(metrics, "hvpd_request_seconds_count", method="StreamProducts") == 4000
    assert value(metrics, "hvpd_compute_seconds_bucket", le="+Inf") == 4000


# Everything else


def test_failures_have_their_code_and_reason(metrics):
    metrics.failed(to_status(ServiceError(Code.NOT_FOUND, "POINT_NOT_RESIDENT", "gone")))
    metrics.failed(status_pb2.Status(code=2, message="who knows"))
    assert value(metrics, "hvpd_failures_total", code="NOT_FOUND", reason="POINT_NOT_RESIDENT") == 1
    assert value(metrics, "hvpd_failures_total", code="UNKNOWN", reason="UNKNOWN") == 1


def test_compiles_tell_where_they_came_from_and_failures_take_no_time(metrics):
    for outcome in ("compiled", "cached", "cached", "failed"):
        metrics.compiled(1.0, outcome)
    counts = [value(metrics, "hvpd_compiles_total", outcome=outcome) for outcome in ("compiled", "cached", "failed")]
    assert counts == [1, 2, 1]
    assert value(metrics, "hvpd_compile_seconds_count") == 3


def test_the_memory_of_programs_is_exported(metrics):
    metrics.observe(lambda: Live({}, program_bytes=5, program_budget_bytes=8))
    metrics.unloaded()
    assert value(metrics, "hvpd_program_bytes") == 5
    assert value(metrics, "hvpd_program_budget_bytes") == 8
    assert value(metrics, "hvpd_unloaded_objectives_total") == 1


def test_the_memory_of_a_device_is_exported(metrics):
    metrics.observe(lambda: Live({"data": 3}, budget_bytes=9, memory=[Memory("cuda:0", 5, 8)]))
    assert value(metrics, "hvpd_device_memory_in_use_bytes", device="cuda:0") == 5
    assert value(metrics, "hvpd_device_memory_limit_bytes", device="cuda:0") == 8
    assert value(metrics, "hvpd_resident_bytes", kind="data") == 3
    assert value(metrics, "hvpd_resident_bytes", kind="point") == 0
    assert value(metrics, "hvpd_budget_bytes") == 9


def test_the_export_parses_and_keeps_the_rules_of_names(metrics):
    metrics.build({"version": "1"})
    metrics.product(product())
    text = prometheus_client.generate_latest(metrics.registry).decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert re.fullmatch(r"(hvpd|process)(_[a-z]+)+", family.name)
        if family.type == "histogram" and family.name != "hvpd_batch_width":
            assert family.name.endswith("_seconds")
    assert 'hvpd_build_info{version="1"} 1.0' in text
    assert "_created" not in text


def test_a_scrape_may_ask_for_some_names(metrics):
    some = metrics.registry.restricted_registry(["hvpd_products_total"])
    assert [sample.name for family in some.collect() for sample in family.samples] == ["hvpd_products_total"]


def test_the_docs_list_exactly_the_exported_metrics(metrics):
    rows = re.findall(r"^\| `(hvpd_\w+)", DOCS.read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows))
    suffix = {"counter": "_total", "info": "_info"}
    exported = {
        family.name + suffix.get(family.type, "")
        for family in metrics.registry.collect()
        if family.name.startswith("hvpd_")
    }
    assert set(rows) == exported


def test_the_docs_list_the_labels_that_there_are(metrics):
    metrics.product(product())
    metrics.launched("hvp", 1, 0)
    metrics.failed(to_status(ServiceError(Code.NOT_FOUND, "R", "")))
    metrics.answered("ComputeProduct", 1.0)
    metrics.observe(lambda: Live({}, memory=[Memory("cuda:0", 5, 8)]))
    told = dict(re.findall(r"^\| `(hvpd_\w+)(?:\{([a-z, ]*)\})?`", DOCS.read_text(), re.MULTILINE))
    suffix = {"counter": "_total", "info": "_info"}
    for family in metrics.registry.collect():
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        if family.name.startswith("hvpd_") and family.type != "info":
            assert set(re.findall(r"[a-z]+", told[family.name + suffix.get(family.type, "")])) == labels, family.name


# Places of counting


def create(engine, example, x=None):
    x = example.x if x is None else x
    spec = curvature_pb2.PointSpec(
        objective_digest=example.export.digest, x_digest=codec.digest(codec.payload(x)), default_data=True
    )
    place = engine.locate(spec)
    return engine.find_point(place) or engine.create_point(place, x)


def test_an_engine_counts_its_work(open_engine, logistic):
    engine = open_engine(logistic)
    metrics, point = engine.metrics, create(engine, logistic)
    assert create(engine, logistic) is point
    vectors = np.eye(logistic.x.size)[:3]
    for width in (1, 4):
        point.source.kernels.request("hvp", width).result(WAIT)
    before = value(metrics, "hvpd_launched_columns_total")
    engine.multiply(point, "hvp", vectors)
    assert value(metrics, "hvpd_points_total") == 1
    assert value(metrics, "hvpd_points_found_total") == 1
    launched = value(metrics, "hvpd_launched_columns_total") - before
    assert launched - value(metrics, "hvpd_padding_columns_total") == 3
    assert value(metrics, "hvpd_transfer_seconds_count", direction="to_device") == 3  # Two of data, and x.
    assert value(metrics, "hvpd_residency_misses_total", kind="data") == 2
    assert value(metrics, "hvpd_residency_misses_total", kind="point") == 1
    assert value(metrics, "hvpd_residency_hits_total", kind="point") >= 1
    assert value(metrics, "hvpd_resident_bytes", kind="point") == point.objective.vector_bytes * 2
    assert value(metrics, "hvpd_resident_entries", kind="point") == 1
    assert value(metrics, "hvpd_resident_entries", kind="data") == 2
    assert value(metrics, "hvpd_budget_bytes") == 1 << 30
    assert value(metrics, "hvpd_pending_limit_vectors") == 4096
    assert value(metrics, "hvpd_in_flight_vectors") == 0
    assert value(metrics, "hvpd_usage_products_total", objective=logistic.export.digest[:12], tenant="anonymous") == 1
    compiled = value(metrics, "hvpd_compiles_total", outcome="compiled")
    cached = value(metrics, "hvpd_compiles_total", outcome="cached")
    assert compiled + cached == value(metrics, "hvpd_compile_seconds_count") >= 3


def test_a_device_that_hangs_at_a_point_is_exported(open_engine, logistic, start, monkeypatch):
    engine = open_engine(logistic)
    create(engine, logistic)
    assert value(engine.metrics, "hvpd_oldest_work_seconds") == 0
    hangs, finish = threading.Event(), threading.Event()
    inner = data_sources.Resident.call

    def call(*args, **settings):
        hangs.set()
        assert finish.wait(WAIT)
        return inner(*args, **settings)

    monkeypatch.setattr(data_sources.Resident, "call", call)
    made = start(create, engine, logistic, logistic.x + 1)
    assert hangs.wait(WAIT)
    first = value(engine.metrics, "hvpd_oldest_work_seconds")
    assert 0 < first < value(engine.metrics, "hvpd_oldest_work_seconds") < WAIT
    assert value(engine.metrics, "hvpd_in_flight_vectors") == 0
    finish.set()
    made.result(WAIT)
    assert value(engine.metrics, "hvpd_oldest_work_seconds") == 0


def test_vectors_in_flight_are_exported(open_engine, logistic, start, monkeypatch):
    engine = open_engine(logistic)
    point = create(engine, logistic)
    launching, finish = threading.Event(), threading.Event()
    inner = engine.lanes[0].launches._product

    def product(*args):
        launching.set()
        assert finish.wait(WAIT)
        return inner(*args)

    monkeypatch.setattr(engine.lanes[0].launches, "_product", product)
    future = start(engine.multiply, point, "hvp", np.eye(logistic.x.size)[:1])
    assert launching.wait(WAIT)
    assert value(engine.metrics, "hvpd_in_flight_vectors") == 1
    finish.set()
    future.result(WAIT)
    assert value(engine.metrics, "hvpd_in_flight_vectors") == 0


def test_programs_that_were_compiled_before_come_from_the_cache(open_engine, make_example):
    example = make_example(lambda x: (x**4).sum() + 3 * x[0], np.arange(1.0, 4.0))
    first = open_engine(example)
    create(first, example)
    assert value(first.metrics, "hvpd_compiles_total", outcome="compiled") >= 1
    again = open_engine(example)
    create(again, example)
    assert value(again.metrics, "hvpd_compiles_total", outcome="cached") >= 1
    assert value(again.metrics, "hvpd_compiles_total", outcome="compiled") == 0


def raise_(error):
    raise error


def test_a_compile_that_fails_is_counted(open_engine, logistic, monkeypatch):
    engine = open_engine(logistic)
    point = create(engine, logistic)
    refusal = ServiceError(Code.INVALID_ARGUMENT, "COMPILE_FAILED", "the server cannot compile hvp")
    monkeypatch.setattr(engine.vetter, "compile", lambda *args: raise_(refusal))
    # Otherwise a program that another file has compiled is not compiled here.
    monkeypatch.setattr(executables.Executables, "_cached", lambda self, path: (None, 0))
    with pytest.raises(ServiceError, match="cannot compile"):
        point.source.kernels.request("hvp", 8).result(WAIT)
    assert value(engine.metrics, "hvpd_compiles_total", outcome="failed") == 1


def test_a_full_queue_is_counted(open_engine, logistic, monkeypatch):
    engine = open_engine(logistic)
    point = create(engine, logistic)
    monkeypatch.setattr(engine.lanes[0].launches._batcher, "_max_pending", 1)
    with pytest.raises(ServiceError) as refused:
        engine.multiply(point, "hvp", np.eye(logistic.x.size)[:2])
    assert refused.value.reason == "QUEUE_FULL"
    assert value(engine.metrics, "hvpd_refused_products_total") == 1


def test_memory_of_a_device_comes_from_its_driver(device, monkeypatch):
    def part(stats):
        return types.SimpleNamespace(memory_stats=lambda: stats)

    monkeypatch.setattr(device, "parts", [part({"bytes_in_use": 3, "bytes_limit": 4})])
    assert device.memory_use() == (3, 4)
    monkeypatch.setattr(device, "parts", [part(None)])
    assert device.memory_use() is None


# Calls


@dataclasses.dataclass(frozen=True)
class Details:
    """A fake of gRPC's details of a call."""

    method: str
    invocation_metadata: tuple[()] = ()


class Context:
    """A fake of gRPC's context of a call."""

    def peer(self):
        return "ipv4:10.0.0.1:5000"

    def time_remaining(self):
        return float("inf")

    def add_callback(self, callback):
        return True

    def cancel(self):
        pass

    def abort_with_status(self, status):
        raise RuntimeError(status.details)


def call(metrics, behaviour, make, method="/hvpd.v1.CurvatureService/ComputeProduct"):
    handler = Observer(metrics).intercept_service(lambda details: make(behaviour), Details(method))
    kind = ("unary", "stream")
    return getattr(handler, f"{kind[handler.request_streaming]}_{kind[handler.response_streaming]}")


UNARY = (grpc.unary_unary_rpc_method_handler, grpc.stream_unary_rpc_method_handler)
STREAMING = (grpc.unary_stream_rpc_method_handler, grpc.stream_stream_rpc_method_handler)


@pytest.mark.parametrize("make", UNARY)
def test_a_call_is_open_while_it_runs_and_then_counted(make, metrics):
    def behaviour(request, context):
        assert value(metrics, "hvpd_open_calls") == 1
        return request + 1

    assert call(metrics, behaviour, make)(1, Context()) == 2
    assert value(metrics, "hvpd_open_calls") == 0
    assert value(metrics, "hvpd_request_seconds_count", method="ComputeProduct") == 1


@pytest.mark.parametrize("make", STREAMING)
def test_a_stream_is_open_until_its_last_answer(make, metrics):
    answers = call(metrics, lambda request, context: iter([1, 2]), make)(1, Context())
    assert next(answers) == 1
    assert value(metrics, "hvpd_open_calls") == 1
    assert list(answers) == [2]
    assert value(metrics, "hvpd_open_calls") == 0
    assert value(metrics, "hvpd_request_seconds_count", method="ComputeProduct") == 1


@pytest.mark.parametrize("make", [*UNARY, *STREAMING])
def test_a_call_that_is_refused_is_counted_with_its_reason(make, metrics):
    def behaviour(request, call):
        call.abort(ServiceError(Code.UNAVAILABLE, "WARMING_UP", "soon"))

    with pytest.raises(RuntimeError, match="soon"):
        list(call(metrics, behaviour, make)(1, Context()))
    assert value(metrics, "hvpd_failures_total", code="UNAVAILABLE", reason="WARMING_UP") == 1
    assert value(metrics, "hvpd_open_calls") == 0
    assert value(metrics, "hvpd_request_seconds_count", method="ComputeProduct") == 1


def test_a_client_that_goes_away_is_no_failure(metrics):
    def behaviour(request, context):
        raise grpc.RpcError

    with pytest.raises(grpc.RpcError):
        call(metrics, behaviour, UNARY[0])(1, Context())
    assert total(metrics, "hvpd_failures_total") == 0
    assert value(metrics, "hvpd_open_calls") == 0


def test_a_stream_of_products_is_no_request(metrics):
    method = "/hvpd.v1.CurvatureService/StreamProducts"
    assert list(call(metrics, lambda request, context: iter([1]), STREAMING[1], method)(1, Context())) == [1]
    assert series(metrics, "hvpd_request_seconds_count") == []


class Engine:
    """An engine that multiplies by one. At width two there is no room."""

    def resident(self, spec, *owner):
        bundle = types.SimpleNamespace(dtype="float64")
        return types.SimpleNamespace(
            objective=types.SimpleNamespace(
                digest="d" * 64, columns=lambda program: 4, dtype=np.dtype("float64"), bundle=bundle
            )
        )

    def record_deferred(self):
        pass

    def multiply(self, point, program, vectors, **settings):
        if len(vectors) == 2:
            raise ServiceError(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "full", retry_after=0.1)
        return vectors, curvature_pb2.ProductInfo()


def product_messages(tag, k, chunks=1):
    spec = curvature_pb2.ProductSpec(operator=curvature_pb2.OPERATOR_HESSIAN, k=k)
    payload = np.ones((k, 4)).tobytes()
    size = len(payload) // chunks
    yield Frame(curvature_pb2.StreamProductsRequest(tag=tag, spec=spec), payload[:size])
    for start in range(size, len(payload), size):
        yield Frame(curvature_pb2.StreamProductsRequest(tag=tag), payload[start : start + size])


def test_each_product_of_a_stream_is_a_request(metrics):
    service = CurvatureService(Engine(), Streams(4), metrics)
    metrics.observe_streams(lambda: service.streams.count)
    requests = [*product_messages(1, 1), *product_messages(2, 4, chunks=4), *product_messages(3, 2)]
    answers = service.StreamProducts(iter(requests), GrpcCall(Context()))
    next(answers)
    assert value(metrics, "hvpd_open_streams") == 1
    errors = [answer.message.error.message for answer in answers]
    assert errors == ["", "full"]
    assert value(metrics, "hvpd_open_streams") == 0
    assert value(metrics, "hvpd_request_seconds_count", method="StreamProducts") == 3
    assert value(metrics, "hvpd_transfer_seconds_count", direction="receive") == 1
    assert value(metrics, "hvpd_transfer_seconds_count", direction="send") == 2
    assert value(metrics, "hvpd_failures_total", code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL") == 1


def test_a_product_refused_with_its_first_chunk_is_a_request(metrics):
    service = CurvatureService(Engine(), Streams(4), metrics)
    spec = curvature_pb2.ProductSpec(operator=curvature_pb2.OPERATOR_HESSIAN, k=1)
    too_long = Frame(curvature_pb2.StreamProductsRequest(tag=1, spec=spec), bytes(1000))
    (answer,) = service.StreamProducts(iter([too_long]), GrpcCall(Context()))
    assert answer.message.error.code == Code.INVALID_ARGUMENT.value[0]
    assert value(metrics, "hvpd_request_seconds_count", method="StreamProducts") == 1
    assert value(metrics, "hvpd_failures_total", code="INVALID_ARGUMENT", reason="SIZE_MISMATCH") == 1


def test_other_services_are_left_alone(metrics):
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: 1)
    observer = Observer(metrics)
    assert observer.intercept_service(lambda details: handler, Details("/grpc.health.v1.Health/Check")) is handler
    assert observer.intercept_service(lambda details: None, Details("/hvpd.v1.CurvatureService/Nothing")) is None


def test_limits_of_a_server_are_exported_for_all_its_devices(device, tmp_path, vetter):
    from hvpd_server.engine.engine import Engine
    from hvpd_server.store.store import Store

    store = Store(tmp_path / "store")
    engine = Engine(store, [device, device], Limits(3000, 16, max_pending=10), Metrics(), vetter=vetter)
    assert value(engine.metrics, "hvpd_budget_bytes") == 6000
    assert value(engine.metrics, "hvpd_pending_limit_vectors") == 30
    engine.close()
    store.close()
