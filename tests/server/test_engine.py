"""The server without its transport: from uploaded blobs to right products, while others
ask, evict or break.

Truth is a dense `jax.hessian` of the user's own function.
"""

import gc
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvpd._wire import codec
from hvpd.v1 import curvature_pb2, tensor_pb2
from hvpd_server.errors import Code, ServiceError
from tests.support.engine import (
    HESSIAN,
    WAIT,
    block,
    compile_now,
    create_point,
    launches,
    multiply,
    point_spec,
    product_spec,
    refusal,
)

pytestmark = pytest.mark.slow  # Real programs, compiled and run.


def tensor(store, upload, array):
    return tensor_pb2.Tensor(dtype=array.dtype.name, shape=array.shape, digest=upload(store, codec.payload(array)))


# Products and points against the truth


def test_a_point_comes_with_value_and_gradient(open_engine, objective_example):
    example = objective_example
    point = create_point(open_engine(example), example)
    rtol = {"float64": 1e-12, "float32": 1e-5}[example.x.dtype.name]
    np.testing.assert_allclose(point.value, example.value, rtol=rtol)
    np.testing.assert_allclose(point.gradient, example.gradient, rtol=rtol, atol=rtol * np.abs(example.gradient).max())
    message = point.message()
    assert (message.value, message.nonfinite_x) == (point.value, 0)
    assert not message.nonfinite_value
    assert message.nonfinite_gradient == 0


def test_products_of_every_width(open_engine, objective_example, assert_product):
    """This does not depend on the compiled widths. Widths up to 9 go through buckets of
    1 to 16, at first in pieces of one.
    """
    engine = open_engine(objective_example)
    point = create_point(engine, objective_example)
    for width in range(1, 10):
        V = block(objective_example, width)
        products, info = engine.multiply(point, "hvp", V)
        assert_product(products, objective_example.hessian, V)
        assert info.batch_width == width
        assert info.queue_duration_ns >= 0
        assert info.compute_duration_ns > 0


@pytest.mark.parametrize(
    ("compiled", "expected"), [([1], 7), ([1, 2], 4), ([1, 2, 4], 2), ([1, 2, 4, 8], 1), ([1, 8, 16], 1)]
)
def test_a_block_takes_as_few_launches_as_the_compiled_buckets_allow(
    open_engine, logistic, assert_product, monkeypatch, compiled, expected
):
    engine = open_engine(logistic)
    point = create_point(engine, logistic)
    compile_now(point, *(("hvp", width) for width in compiled))
    monkeypatch.setattr(engine.lanes[0].launches, "_have", lambda objective, base, width: None)
    V = block(logistic, 7)
    assert_product(multiply(engine, point, V), logistic.hessian, V)
    assert launches(engine, "hvp") + launches(engine, "apply") == expected
    assert point.objective.kernels.widths("hvp") == compiled


def test_a_bucket_that_is_missing_is_compiled_beside_the_product(open_engine, logistic):
    engine = open_engine(logistic)
    point = create_point(engine, logistic)
    multiply(engine, point, block(logistic, 5))
    point.objective.kernels.request("hvp", 8).result(WAIT)
    before = launches(engine, "hvp")
    multiply(engine, point, block(logistic, 5))
    assert launches(engine, "hvp") == before + 1


def test_other_data_gives_another_point(open_engine, logistic, upload, make_example, assert_product):
    engine = open_engine(logistic)
    other_data = tuple(np.flip(array) * 0.5 for array in logistic.data)
    other = make_example(logistic.fun, logistic.x, *other_data)
    point = create_point(engine, logistic)
    other_point = create_point(engine, logistic, data=[tensor(engine.store, upload, array) for array in other_data])
    assert other_point.id != point.id
    V = block(logistic, 3)
    assert_product(multiply(engine, other_point, V), other.hessian, V)
    assert_product(multiply(engine, point, V), logistic.hessian, V)


def test_the_same_data_said_explicitly_is_the_same_point(open_engine, logistic):
    engine = open_engine(logistic)
    point = create_point(engine, logistic)
    explicit = point_spec(logistic, data=list(logistic.bundle.data))
    assert not explicit.default_data
    assert engine.find_point(engine.locate(explicit)) is point
    assert engine.create_point(engine.locate(explicit), logistic.x) is point
    assert engine.find_point(engine.locate(point_spec(logistic, logistic.x + 1))) is None


def test_concurrent_requests_for_a_point_get_one(open_engine, logistic, start):
    engine = open_engine(logistic)
    together = threading.Barrier(6)

    def create():
        together.wait(WAIT)
        return create_point(engine, logistic)

    points = [future.result(WAIT) for future in [start(create) for _ in range(6)]]
    assert all(point is points[0] for point in points)
    assert engine.metrics.registry.get_sample_value("hvpd_points_total") == 1


def test_a_point_counts_its_values_that_are_not_finite(open_engine, rosen):
    """SciPy's line searches take such steps, so this is an answer, not an error."""
    x = rosen.x.copy()
    x[0], x[3] = np.nan, np.inf
    message = create_point(open_engine(rosen), rosen, x).message()
    assert message.nonfinite_x == 2
    assert message.nonfinite_value
    assert message.nonfinite_gradient > 0


# Coalescing


def test_eight_threads_at_two_points_get_their_own_products(open_engine, logistic, make_example, assert_product, start):
    engine = open_engine(logistic)
    x = logistic.x + 1
    examples = [logistic, make_example(logistic.fun, x, *logistic.data)]
    points = [create_point(engine, logistic), create_point(engine, logistic, x)]
    together = threading.Barrier(8)

    def caller(seed):
        together.wait(WAIT)
        for number in range(20):
            V = block(logistic, 1 + (seed + number) % 5, seed=100 * seed + number)
            assert_product(multiply(engine, points[seed % 2], V), examples[seed % 2].hessian, V)

    for future in [start(caller, seed) for seed in range(8)]:
        future.result(WAIT)
    assert engine.metrics.registry.get_sample_value("hvpd_products_total") == 160


def test_products_that_arrive_while_the_device_works_share_a_launch(
    open_engine, logistic, assert_product, start, monkeypatch
):
    engine = open_engine(logistic)
    point = create_point(engine, logistic)
    compile_now(point, ("hvp", 1), ("hvp", 8))
    begun, may_go, queued = threading.Event(), threading.Event(), threading.Semaphore(0)
    product, enqueue = engine.lanes[0].launches._product, engine.lanes[0].launches._batcher._enqueue

    def held_product(*args):
        begun.set()
        assert may_go.wait(WAIT)
        return product(*args)

    def noted_enqueue(job):
        enqueue(job)
        queued.release()

    monkeypatch.setattr(engine.lanes[0].launches, "_product", held_product)
    monkeypatch.setattr(engine.lanes[0].launches._batcher, "_enqueue", noted_enqueue)
    blocks = [block(logistic, 1, seed) for seed in range(8)]
    futures = [start(engine.multiply, point, "hvp", blocks[0])]
    assert begun.wait(WAIT)
    futures += [start(engine.multiply, point, "hvp", V) for V in blocks[1:]]
    for _ in blocks[1:]:  # The first one went without a queue.
        assert queued.acquire(timeout=WAIT)
    may_go.set()

    answers = [future.result(WAIT) for future in futures]
    for V, (products, _) in zip(blocks, answers, strict=True):
        assert_product(products, logistic.hessian, V)
    assert [info.batch_width for _, info in answers] == [1] + [7] * 7
    assert launches(engine, "hvp") == 2


def test_tenants_share_the_device_and_priorities_order_one_tenants_products(open_engine, rosen, start, monkeypatch):
    engine = open_engine(rosen)
    points = [create_point(engine, rosen, rosen.x + shift) for shift in range(6)]
    compile_now(points[0], ("hvp", 1))
    begun, may_go, queued, order = threading.Event(), threading.Event(), threading.Semaphore(0), []
    product, enqueue = engine.lanes[0].launches._product, engine.lanes[0].launches._batcher._enqueue

    def held_product(point, *args):
        order.append(points.index(point))
        begun.set()
        assert may_go.wait(WAIT)
        return product(point, *args)

    def noted_enqueue(job):
        enqueue(job)
        queued.release()

    monkeypatch.setattr(engine.lanes[0].launches, "_product", held_product)
    monkeypatch.setattr(engine.lanes[0].launches._batcher, "_enqueue", noted_enqueue)
    futures = [start(engine.multiply, points[0], "hvp", block(rosen, 1), tenant="first")]
    assert begun.wait(WAIT)
    asked = [("a", -1), ("a", 0), ("a", 1), ("b", -100), ("a", 100)]
    for point, (tenant, priority) in zip(points[1:], asked, strict=True):
        futures.append(start(engine.multiply, point, "hvp", block(rosen, 1), tenant=tenant, priority=priority))
        assert queued.acquire(timeout=WAIT)
    may_go.set()
    for future in futures:
        future.result(WAIT)
    assert order == [0, 5, 4, 3, 2, 1]


def test_a_product_of_no_use_any_more_is_not_made(open_engine, rosen):
    engine = open_engine(rosen)
    point = create_point(engine, rosen)
    V = block(rosen, 1)
    refusal(Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", multiply, engine, point, V, deadline=time.monotonic())
    refusal(Code.CANCELLED, "CANCELLED", multiply, engine, point, V, on_queue=lambda cancel: cancel())
    assert launches(engine, "hvp") == 0


# Memory


def test_an_evicted_point_is_not_resident_until_it_is_created_again(open_engine, rosen, assert_product):
    engine = open_engine(rosen, memory_budget_bytes=3 * rosen.x.nbytes)
    point = create_point(engine, rosen)
    assert engine.resident(product_spec(point)) is point
    create_point(engine, rosen, rosen.x + 1)
    error = refusal(Code.NOT_FOUND, "POINT_NOT_RESIDENT", engine.resident, product_spec(point))
    assert "create it again" in str(error)
    assert engine.find_point(engine.locate(point_spec(rosen))) is None
    assert engine.metrics.registry.get_sample_value("hvpd_evictions_total", {"kind": "point"}) == 1

    again = create_point(engine, rosen)
    assert again.id == point.id
    V = block(rosen, 2)
    assert_product(multiply(engine, again, V), rosen.hessian, V)


def test_a_product_under_way_outlives_the_eviction_of_its_point(open_engine, rosen, assert_product):
    engine = open_engine(rosen, memory_budget_bytes=3 * rosen.x.nbytes)
    point = create_point(engine, rosen)
    create_point(engine, rosen, rosen.x + 1)
    V = block(rosen, 2)
    assert_product(multiply(engine, point, V), rosen.hessian, V)


def test_a_point_larger_than_the_budget_is_refused(open_engine, rosen, logistic):
    engine = open_engine(rosen, logistic, memory_budget_bytes=2 * rosen.x.nbytes - 1)
    for example in (rosen, logistic):
        error = refusal(Code.RESOURCE_EXHAUSTED, "MEMORY_BUDGET", create_point, engine, example)
        assert "--memory-budget" in str(error)


def test_the_budget_holds_for_the_arrays_that_jax_counts(open_engine, make_example, upload):
    """jax counts the bytes. Points in use keep their data alive, so evicting that data
    frees nothing.
    """
    example = make_example(lambda x, d: jnp.sum((x * d.sum()) ** 4), np.ones(2), np.zeros(10_000))
    budget = 3 * example.data[0].nbytes
    engine = open_engine(example, memory_budget_bytes=budget)
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    used = []
    for seed in range(8):
        data = np.random.default_rng(seed).standard_normal(10_000)
        used.append(create_point(engine, example, data=[tensor(engine.store, upload, data)]).id)
        for identity in used:
            engine.lanes[0].residency.get(identity)
    gc.collect()
    assert sum(array.nbytes for array in jax.live_arrays()) - before <= budget


def test_data_that_fits_one_by_one_but_not_together_is_refused(open_engine, make_example):
    example = make_example(
        lambda x, a, b: jnp.sum((x * a.sum() * b.sum()) ** 2), np.ones(2), np.ones(1000), np.zeros(1000)
    )
    engine = open_engine(example, memory_budget_bytes=example.data[0].nbytes * 3 // 2)
    refusal(Code.RESOURCE_EXHAUSTED, "MEMORY_BUDGET", create_point, engine, example)


# Refusals


def test_a_product_is_checked_before_its_vectors_come(open_engine, rosen):
    engine = open_engine(rosen, max_block_width=8)
    point = create_point(engine, rosen)
    for k in (0, -1, 9):
        refusal(Code.INVALID_ARGUMENT, "BLOCK_WIDTH", engine.resident, product_spec(point, k))
    for operator in (curvature_pb2.OPERATOR_UNSPECIFIED, 99):
        refusal(Code.INVALID_ARGUMENT, "UNKNOWN_OPERATOR", engine.resident, product_spec(point, 1, operator))
    nowhere = curvature_pb2.ProductSpec(point_id="0" * 64, operator=HESSIAN, k=1)
    refusal(Code.NOT_FOUND, "POINT_NOT_RESIDENT", engine.resident, nowhere)
    assert engine.resident(product_spec(point, 8)) is point


def test_an_x_that_is_not_the_one_of_the_spec_is_refused(open_engine, rosen):
    engine = open_engine(rosen)
    place = engine.locate(point_spec(rosen))
    refusal(Code.INVALID_ARGUMENT, "DIGEST_MISMATCH", engine.create_point, place, np.nextafter(rosen.x, np.inf))
    assert engine.find_point(engine.locate(point_spec(rosen))) is None


def test_data_that_does_not_fit_or_is_not_stored_is_refused(open_engine, logistic, upload):
    engine = open_engine(logistic)
    features, labels = logistic.bundle.data
    wrong = tensor(engine.store, upload, np.ones((30, 7)))
    refusal(Code.INVALID_ARGUMENT, "DATA_MISMATCH", create_point, engine, logistic, data=[wrong, labels])
    absent = tensor_pb2.Tensor(dtype="float64", shape=(30,), digest="0" * 64)
    error = refusal(Code.FAILED_PRECONDITION, "BLOBS_MISSING", create_point, engine, logistic, data=[features, absent])
    assert error.metadata == {"digests": "0" * 64}


def test_a_point_of_an_unknown_objective_is_not_found(open_engine, rosen, logistic):
    engine = open_engine(rosen)
    refusal(Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND", create_point, engine, logistic)


def test_digests_that_are_paths_lead_nowhere(open_engine, tmp_path, logistic):
    """Such digests come from clients, in a registration and in a point's data."""
    engine = open_engine(logistic)
    outside = tmp_path / "outside"
    outside.write_bytes(b"0" * 240)
    data = [logistic.bundle.data[0], tensor_pb2.Tensor(dtype="float64", shape=(30,), digest=str(outside))]
    for call in (
        lambda: engine.registration.register(str(outside), "stolen"),
        lambda: create_point(engine, logistic, data=data),
    ):
        with pytest.raises(ServiceError):
            call()
        assert outside.read_bytes() == b"0" * 240
