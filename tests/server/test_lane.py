"""A device with its queue: one width whoever else asks, chunks of rows, memory that runs out, and several devices.

Kernels are real, on the CPU, except where a test says what they do; truth is jax's own dense Hessian, and for bits the product of
a vector that nobody stands beside.
"""

import collections
import dataclasses
import gc
import json
import os
import subprocess
import sys
import threading
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from hvpd import _codec
from hvpd._registration import export as _export
from hvpd.v1 import curvature_pb2, tensor_pb2
from hvpd_server import _engine, _kernels, _lane, _store
from hvpd_server._board import Board
from hvpd_server._errors import Code, ServiceError
from hvpd_server._limits import Limits
from hvpd_server._metrics import Metrics

WAIT = 60
N, ROWS = 64, 200
SPEC = curvature_pb2.ProductSpec(operator=curvature_pb2.OPERATOR_HESSIAN)


def logistic(x, features, labels):
    return jnp.mean(jnp.logaddexp(0.0, -labels * (features @ x))) + 0.05 * jnp.sum(x**2)


@pytest.fixture(scope="session")
def problem(make_example):
    rng = np.random.default_rng(4)
    features = rng.normal(size=(ROWS, N))
    return make_example(logistic, rng.normal(size=N) / 8, features, np.sign(features[:, 0]))


@pytest.fixture(scope="session")
def registered(problem):
    """The same problem, registered otherwise: registered(fixed_bucket=8)."""

    def registered(fun=logistic, **options):
        options = {"platforms": ("cpu",), "precision": "highest"} | options
        return dataclasses.replace(problem, export=_export.export(fun, problem.x, problem.data, **options))

    return registered


def create_point(engine, example, x=None):
    x = example.x if x is None else x
    digest = _codec.digest(_codec.payload(x))
    spec = curvature_pb2.PointSpec(objective_digest=example.export.digest, x_digest=digest, default_data=True)
    return engine.create_point(spec, x)


def vectors(width, seed=0, n=N):
    return np.random.default_rng([seed, width]).standard_normal((width, n))


def multiply(engine, point, V, program="hvp"):
    return engine.multiply(point, program, V)[0]


def refused(call, *args):
    with pytest.raises(ServiceError) as error:
        call(*args)
    return error.value


@pytest.fixture
def calls(monkeypatch):
    """Every (program, width) that is run, in order. `calls.instead(name, width, args)`, where set, goes first: it may raise, or give
    a result, for which it has `calls.real`; None: the real one."""

    class Calls(list):
        instead = staticmethod(lambda name, width, args: None)

        def run(self):
            return [(name, width) for name, width in self if name != "value_and_grad"]

    noted, call = Calls(), _kernels.Kernels.call

    def noting(self, name, width, *args):
        noted.append((name, width))
        noted.real = lambda: call(self, name, width, *args)
        found = noted.instead(name, width, args)
        return call(self, name, width, *args) if found is None else found

    monkeypatch.setattr(_kernels.Kernels, "call", noting)
    return noted


def compile_now(point, *programs):
    for name, width in programs:
        point.source.kernels.request(name, width).result()


# One width, and the same bits


@pytest.fixture
def fixed(serve, registered):
    """A point whose launches have eight vectors each, and the engine."""
    engine = serve(example := registered(fixed_bucket=8))
    return engine, create_point(engine, example)


def test_every_launch_has_the_one_width_and_no_other_is_compiled(fixed, calls, problem, assert_product):
    engine, point = fixed
    for width in (1, 3, 8, 11, 16):
        V = vectors(width)
        assert_product(multiply(engine, point, V), problem.hessian, V)
    assert set(calls.run()) == {("hvp", 8)}
    assert point.source.kernels.widths("hvp") == [8]


def test_without_it_bits_depend_on_the_width(serve, problem):
    """What the others here rest on: this program's bits are not the same at every width, on this CPU."""
    engine = serve(problem)
    point = create_point(engine, problem)
    compile_now(point, ("hvp", 1), ("hvp", 8))
    alone, beside = multiply(engine, point, vectors(8)[:1]), multiply(engine, point, vectors(8))[:1]
    assert alone.tobytes() != beside.tobytes()


def test_a_vector_has_the_same_bits_wherever_in_a_block_it_stands(fixed):
    engine, point = fixed
    V = vectors(20)
    alone = [multiply(engine, point, V[row : row + 1]).tobytes() for row in range(20)]
    assert len(set(alone)) == 20
    for start, stop in [(0, 20), (0, 8), (3, 11), (5, 7), (12, 20), (19, 20)]:
        products = multiply(engine, point, V[start:stop])
        assert [row.tobytes() for row in products] == alone[start:stop]


@pytest.mark.parametrize("program", ["hvp", "ggn", "sampled_fisher"])
def test_bits_are_the_same_under_a_load_of_sixteen_threads_with_blocks_of_all_widths(
    serve, problem, start, calls, program
):
    """With buckets that would compile meanwhile, if there were any: eight products alone, then under load."""
    import hvpd

    composite = hvpd.composite(
        lambda x, features: features @ x.reshape(N, 1),
        lambda z, labels: jnp.mean(jnp.logaddexp(0.0, -labels * z[:, 0])),
        distribution="normal",
    )
    options = {"platforms": ("cpu",), "precision": "highest", "fixed_bucket": 8}
    example = dataclasses.replace(problem, export=_export.export(composite, problem.x, problem.data, **options))
    engine = serve(example)
    point = create_point(engine, example)
    V = vectors(16, seed=7)
    alone = [multiply(engine, point, row[None], program).tobytes() for row in V]
    together, widths = threading.Barrier(16), collections.Counter()

    def caller(seed):
        rng = np.random.default_rng(seed)
        together.wait(WAIT)
        for _ in range(12):
            rows = rng.permutation(16)[: rng.integers(1, 17)]
            products, info = engine.multiply(point, program, V[rows])
            widths[info.batch_width > len(rows)] += 1
            assert [row.tobytes() for row in products] == [alone[row] for row in rows]

    for future in [start(caller, seed) for seed in range(16)]:
        future.result(WAIT)
    assert widths[True] > 0  # Launches were shared.
    assert set(calls.run()) == {(program, 8)}


def unsteady(calls):
    """From now on, what is not in the first row of a block has another last bit."""

    def instead(name, width, args):
        if name != "hvp":
            return None
        found = np.array(calls.real())
        found[1:, 0] = np.nextafter(found[1:, 0], np.inf)
        return found

    calls.instead = instead


def test_where_the_place_changes_the_bits_each_vector_goes_alone_in_the_first_row(
    serve, registered, calls, problem, assert_product, start
):
    engine = serve(example := registered(fixed_bucket=8))
    point = create_point(engine, example)
    unsteady(calls)
    V = vectors(5)
    alone = [multiply(engine, point, row[None]).tobytes() for row in V]
    calls.clear()
    products = multiply(engine, point, V)
    assert [row.tobytes() for row in products] == alone
    assert_product(products, problem.hessian, V)
    assert calls.run() == [("hvp", 8)] * 5
    together = threading.Barrier(8)

    def caller(row):
        together.wait(WAIT)
        return [multiply(engine, point, V[row : row + 1]).tobytes() for _ in range(5)]

    rows = [0, 1, 2, 3, 4, 0, 1, 2]
    for row, future in [(row, start(caller, row)) for row in rows]:
        assert future.result(WAIT) == [alone[row]] * 5


@pytest.mark.parametrize("first", ["zero", "nan"])
def test_what_cannot_be_told_at_one_point_is_found_out_at_the_next(serve, registered, calls, first):
    """At 0 the Hessian of x^4 is 0: every product has the same bits, wherever it stands."""
    engine = serve(example := registered(lambda x, features, labels: jnp.sum((features @ x) ** 4), fixed_bucket=8))
    silent = create_point(engine, example, np.full(N, {"zero": 0.0, "nan": np.nan}[first]))
    V = vectors(3)
    assert not np.nan_to_num(multiply(engine, silent, V)).any()
    unsteady(calls)
    assert silent.objective.steady == {}
    point = create_point(engine, example)
    alone = [multiply(engine, point, row[None]).tobytes() for row in V]
    assert [row.tobytes() for row in multiply(engine, point, V)] == alone
    assert list(silent.objective.steady.values()) == [False]


def test_a_device_that_adds_in_another_order_each_time_has_no_fixed_bucket(fixed, calls):
    engine, point = fixed
    rng = np.random.default_rng(0)
    calls.instead = lambda name, width, args: rng.normal(size=(width, N))
    with pytest.raises(ServiceError, match="register it without fixed_bucket") as refused:
        multiply(engine, point, vectors(2))
    assert (refused.value.code, refused.value.reason) == (Code.FAILED_PRECONDITION, "NOT_DETERMINISTIC")


def test_it_is_found_out_once_however_many_ask_at_once(fixed, calls, start):
    engine, point = fixed
    together = threading.Barrier(8)

    def caller(seed):
        together.wait(WAIT)
        return multiply(engine, point, vectors(8, seed))

    for future in [start(caller, seed) for seed in range(8)]:
        future.result(WAIT)
    assert len(calls.run()) == 8 + 8  # Eight of them to find out.


def test_the_bucket_is_no_wider_than_the_server_launches(serve, registered, calls, problem, assert_product):
    engine = serve(example := registered(fixed_bucket=64), max_block_width=4)
    point = create_point(engine, example)
    V = vectors(4)
    assert_product(multiply(engine, point, V), problem.hessian, V)
    assert set(calls.run()) == {("hvp", 4)}


def test_a_linearized_product_is_made_by_apply_with_and_without_room_for_its_residuals(serve, registered, calls):
    """Else its bits would depend on what else is resident."""
    example = registered(mode="linearized", fixed_bucket=4)
    roomy = serve(example)
    point = create_point(roomy, example)
    V = vectors(4)
    expected = multiply(roomy, point, V).tobytes()
    assert {name for name, _ in calls.run()} == {"prepare", "apply"}
    # Residuals are a quarter of the budget at most; what is pinned leaves no room for them.
    residency = roomy.lanes[0].residency
    for key in ("one", "two"):
        residency.put(key, "data", key, residency.budget_bytes // 4 - 10**5)
        residency.pin(key, 100)
    residency.drop(("residuals", point.id))
    residency.put("three", "data", 3, residency.free_bytes())
    residency._entries["three"].leases[""] = residency._entries["three"].pinned_until = float("inf")
    residency._leased.add("three")
    calls.clear()
    assert multiply(roomy, point, V).tobytes() == expected
    assert {name for name, _ in calls.run()} == {"prepare", "apply"}
    assert residency.get(("residuals", point.id)) is None


# Chunks of rows


def chunked(registered, **options):
    return registered(row_reduction="mean", **options)


BUDGET = ROWS * N * 8 // 4
"""A quarter of the data."""


def test_data_that_does_not_fit_goes_through_the_device_and_all_is_right(serve, registered, problem, assert_product):
    engine = serve(example := chunked(registered), memory_budget_bytes=BUDGET)
    point = create_point(engine, example)
    np.testing.assert_allclose(point.value, problem.value, rtol=1e-12)
    np.testing.assert_allclose(point.gradient, problem.gradient, rtol=1e-10, atol=1e-13)
    for width in (1, 3, 8):
        V = vectors(width)
        assert_product(multiply(engine, point, V), problem.hessian, V)
    assert sum(engine.lanes[0].residency.used_bytes().values()) <= BUDGET


def test_its_points_share_their_room_and_can_be_pinned(serve, registered):
    engine = serve(example := chunked(registered), memory_budget_bytes=BUDGET)
    points = [create_point(engine, example, example.x + shift) for shift in range(6)]
    residency = engine.lanes[0].residency
    assert all(residency.get(point.id) is point for point in points)
    engine.pin(points[0], 100)
    engine.pin(points[1], 100)
    assert residency.used_bytes()["point"] == 6 * 2 * N * 8


def test_a_block_waits_for_its_width_since_each_launch_goes_through_all_data(serve, registered, calls):
    engine = serve(example := chunked(registered), memory_budget_bytes=BUDGET)
    point = create_point(engine, example)
    calls.clear()
    multiply(engine, point, vectors(16))
    assert calls.run() == [("hvp", 16)] * len(point.source.spans)
    assert 16 in point.source.kernels.widths("hvp")


def test_a_fixed_bucket_of_chunks_is_probed_on_two_of_them(serve, registered, calls):
    engine = serve(example := chunked(registered, fixed_bucket=4), memory_budget_bytes=BUDGET)
    point = create_point(engine, example)
    chunks = len(point.source.spans)
    assert chunks > 10
    calls.clear()
    alone = multiply(engine, point, vectors(4)[:1]).tobytes()
    assert calls.run() == [("hvp", 4)] * (8 * 2 + chunks)
    assert multiply(engine, point, vectors(4))[:1].tobytes() == alone


@pytest.mark.parametrize(
    ("fun", "reduction"),
    [
        (lambda x, features, labels: jnp.sum(jnp.logaddexp(0.0, -labels * (features @ x))) + jnp.sum(x**2), "sum"),
        (lambda x, features, labels: jnp.sum(jnp.logaddexp(0.0, -labels * (features @ x))), "mean"),
        (logistic, "sum"),
        (lambda x, features, labels: jnp.mean(features @ x) ** 2, "mean"),
        (lambda x, features, labels: jnp.std(features @ x), "mean"),
    ],
    ids=["a sum with a penalty", "a sum called a mean", "a mean called a sum", "a square of a mean", "a deviation"],
)
def test_what_is_no_such_mean_or_sum_is_refused_where_it_would_go_in_chunks(serve, registered, fun, reduction):
    example = registered(fun, row_reduction=reduction)
    whole = serve(example)
    assert create_point(whole, example, np.zeros(N)).launches == 0  # With all of its data there, it is what it is.
    engine = serve(memory_budget_bytes=BUDGET)
    for x in (example.x, np.zeros(N), example.x):
        error = refused(create_point, engine, example, x)
        assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, "ROW_REDUCTION")
        assert f"row_reduction '{reduction}'" in str(error)
        assert "--memory-budget" in str(error)


def test_that_it_is_one_is_found_out_once(serve, registered, calls):
    engine = serve(example := chunked(registered), memory_budget_bytes=BUDGET)
    chunks = len(create_point(engine, example).source.spans)
    assert len(calls) == chunks + 3
    create_point(engine, example, example.x + 1)
    assert len(calls) == 2 * chunks + 3


def test_the_same_array_as_data_and_closed_over_is_cut_as_data_only(serve, problem, registered, assert_product):
    """They have the same digest, dtype and shape."""
    features = problem.data[0]

    def total(x, *data):
        return logistic(x, *data) + jnp.sum(jnp.asarray(features)) * 1e-3

    example = chunked(lambda **options: registered(total, **options))
    assert [tensor.digest for tensor in example.bundle.captured] == [example.bundle.data[0].digest]
    engine = serve(example, memory_budget_bytes=features.nbytes + 2 * N * 8 + 2 * (N + 1) * 8)
    point = create_point(engine, example)
    assert len(point.source.spans) > 1
    np.testing.assert_allclose(point.value, problem.value + features.sum() * 1e-3, rtol=1e-12)
    V = vectors(2)
    assert_product(multiply(engine, point, V), problem.hessian, V)


def test_a_budget_that_is_too_small_for_two_rows_says_what_a_row_takes(serve, registered):
    engine = serve(example := chunked(registered), memory_budget_bytes=2 * N * 8 + 1000)
    error = refused(create_point, engine, example)
    assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, "MEMORY_BUDGET")
    assert "--memory-budget" in str(error)
    assert f"1 rows of {N * 8 + 8} bytes" in str(error)


def test_data_that_does_not_fit_and_may_not_be_cut_says_how_it_could_be(serve, problem):
    engine = serve(problem, memory_budget_bytes=BUDGET)
    assert "register it with row_reduction" in str(refused(create_point, engine, problem))


def test_a_file_that_is_lost_in_the_middle_of_a_product_is_told(serve, registered, calls):
    engine = serve(example := chunked(registered), memory_budget_bytes=BUDGET)
    point = create_point(engine, example)
    digest = example.bundle.data[0].digest
    calls.clear()

    def instead(name, width, args):
        if len(calls) == 3:
            (engine.store.root / "blobs" / digest[:2] / digest).unlink()

    calls.instead = instead
    error = refused(multiply, engine, point, vectors(1))
    assert (error.code, error.reason) == (Code.DATA_LOSS, "BLOB_CORRUPT")
    assert error.metadata == {"digests": digest}


# Several launches in flight


@pytest.fixture
def several_launches(serve, problem, rosen):
    """Points of two objectives, warm, and an engine that has two launches in flight."""
    engine = serve(problem, rosen, max_launches=2)
    points = create_point(engine, problem), create_point(engine, rosen)
    for point, n in zip(points, (N, 7), strict=True):
        compile_now(point, ("hvp", 1), ("hvp", 2))
        multiply(engine, point, vectors(2, n=n))
    return engine, *points


def test_a_launch_begins_before_another_has_ended(several_launches, calls, start, problem, rosen, assert_product):
    engine, *points = several_launches
    together = threading.Barrier(2)

    def instead(name, width, args):
        together.wait(WAIT)  # Each launch goes on when the other is there.

    calls.instead = instead
    blocks = [vectors(2, n=N), vectors(2, n=7)]
    futures = [start(multiply, engine, point, block) for point, block in zip(points, blocks, strict=True)]
    for future, example, block in zip(futures, (problem, rosen), blocks, strict=True):
        assert_product(future.result(WAIT), example.hessian, block)


def test_where_memory_does_not_suffice_for_two_launches_there_is_one_at_a_time(
    several_launches, calls, start, problem, rosen, assert_product
):
    engine, *points = several_launches
    blocks = [vectors(2, n=N), vectors(2, n=7)]
    together, first_two = threading.Barrier(2), threading.Semaphore(2)

    def one_is_too_many(name, width, args):
        if first_two.acquire(blocking=False) and together.wait(WAIT) == 0:
            out_of_memory()

    calls.instead = one_is_too_many
    futures = [start(multiply, engine, point, block) for point, block in zip(points, blocks, strict=True)]
    for future, example, block in zip(futures, (problem, rosen), blocks, strict=True):
        assert_product(future.result(WAIT), example.hessian, block)
    assert calls.run() == [("hvp", 2)] * 3
    assert all(engine.lanes[0].residency.get(point.id) is point for point in points)  # Nothing gave way.

    calls.clear()
    begun, may_end = threading.Event(), threading.Event()

    def instead(name, width, args):
        begun.set()
        assert may_end.wait(WAIT)

    calls.instead = instead
    futures = [start(multiply, engine, points[0], blocks[0])]
    assert begun.wait(WAIT)
    futures.append(start(multiply, engine, points[1], blocks[1]))
    while engine.lanes[0].pending < 2:
        assert not futures[1].done()
    assert len(calls) == 1
    may_end.set()
    for future, example, block in zip(futures, (problem, rosen), blocks, strict=True):
        assert_product(future.result(WAIT), example.hessian, block)


def test_a_launch_that_is_alone_and_has_no_memory_has_caches_give_way_and_two_stay_possible(
    several_launches, calls, problem, assert_product
):
    engine, *points = several_launches
    failures = iter([True, True])
    calls.instead = lambda *_: out_of_memory() if next(failures, False) else None
    assert_product(multiply(engine, points[0], vectors(2, n=N)), problem.hessian, vectors(2, n=N))
    assert calls.run() == [("hvp", 2)] * 3
    assert engine.lanes[0].residency.get(points[1].id) is None
    assert engine.lanes[0].launches._batcher.overlaps


def test_an_accelerator_by_itself_overlaps_and_a_cpu_does_not(device):
    assert not device.overlaps


# Memory that runs out


def out_of_memory(*args):
    raise ServiceError(Code.RESOURCE_EXHAUSTED, "DEVICE_MEMORY", "the device is out of memory: 123 bytes wanted")


@pytest.fixture
def crowded(serve, problem, rosen):
    """A point that is asked for, and beside it another with its residuals, and one of another objective; and the engine."""
    engine = serve(problem, rosen)
    point, other = create_point(engine, problem), create_point(engine, problem, problem.x + 1)
    compile_now(point, ("hvp", 1), ("hvp", 2), ("hvp", 4), ("hvp", 8), ("prepare", 0), ("apply", 1))
    for seed in range(6):
        multiply(engine, other, vectors(1, seed))
    residency = engine.lanes[0].residency
    assert residency.used_bytes()["residuals"] > 0
    return engine, point, other, create_point(engine, rosen)


def test_residuals_give_way_first_and_then_a_product_goes_on(crowded, calls, problem, assert_product):
    engine, point, other, stranger = crowded
    residency = engine.lanes[0].residency
    failures = iter([True])
    calls.instead = lambda *_: out_of_memory() if next(failures, False) else None
    V = vectors(8)
    assert_product(multiply(engine, point, V), problem.hessian, V)
    assert calls.run() == [("hvp", 8)] * 2
    assert residency.used_bytes()["residuals"] == 0
    assert all(residency.get(each.id) is each for each in (point, other, stranger))


def test_then_all_gives_way_that_is_not_needed_and_then_launches_get_narrower(crowded, calls, problem, assert_product):
    engine, point, other, stranger = crowded
    residency = engine.lanes[0].residency
    calls.instead = lambda name, width, args: out_of_memory() if width > 2 else None
    V = vectors(8)
    assert_product(multiply(engine, point, V), problem.hessian, V)
    assert calls.run() == [("hvp", 8)] * 3 + [("hvp", 4)] + [("hvp", 2)] * 4
    assert residency.get(point.id) is point
    assert residency.get(other.id) is residency.get(stranger.id) is None
    calls.clear()
    assert_product(multiply(engine, point, V), problem.hessian, V)
    assert calls.run() == [("hvp", 2)] * 4  # It is remembered.


def test_what_is_pinned_does_not_give_way(crowded, calls):
    engine, point, other, stranger = crowded
    engine.pin(other, 100)
    calls.instead = lambda name, width, args: out_of_memory() if width > 2 else None
    multiply(engine, point, vectors(8))
    assert engine.lanes[0].residency.get(other.id) is other
    assert engine.lanes[0].residency.get(stranger.id) is None


def test_where_nothing_helps_the_sizes_are_told_and_others_go_on(crowded, calls, rosen, problem, assert_product):
    engine, point, _, _ = crowded
    calls.instead = lambda name, width, args: out_of_memory() if args[0].size == N else None
    error = refused(multiply, engine, point, vectors(8))
    assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, "DEVICE_MEMORY")
    data_bytes = sum(array.nbytes for array in problem.data)
    for said in (
        "123 bytes wanted",
        "hvp of 1 vectors at once",
        f"{data_bytes} bytes of data",
        f"{2 * N * 8} bytes of point",
        f"memory budget of {1 << 30} bytes",
    ):
        assert said in str(error)
    assert error.metadata == {"data_bytes": str(data_bytes), "point_bytes": str(2 * N * 8)}
    V = vectors(3, n=7)
    assert_product(multiply(engine, create_point(engine, rosen), V), rosen.hessian, V)
    # And so does this one, when there is memory again.
    calls.instead = lambda *_: None
    V = vectors(3)
    assert_product(multiply(engine, point, V), problem.hessian, V)
    assert all(compile_.width > 0 for compile_ in point.source.kernels.compiles() if compile_.program == "hvp")


def test_a_narrow_launch_of_much_data_does_not_make_those_of_little_narrow(serve, registered, calls, upload):
    """With any number of rows, each is compiled, and remembered, for itself."""
    engine = serve(example := registered(any_rows=True))
    point = create_point(engine, example)
    less = [array[:20] for array in example.data]
    digests = [upload(engine.store, _codec.payload(array)) for array in less]
    data = [
        tensor_pb2.Tensor(dtype="float64", shape=array.shape, digest=digest)
        for array, digest in zip(less, digests, strict=True)
    ]
    x_digest = _codec.digest(_codec.payload(example.x))
    small = engine.create_point(
        curvature_pb2.PointSpec(objective_digest=example.export.digest, x_digest=x_digest, data=data), example.x
    )
    for each in (point, small):
        compile_now(each, ("hvp", 1), ("hvp", 4))
    calls.instead = lambda name, width, args: out_of_memory() if width > 1 and args[2].shape[0] == ROWS else None
    multiply(engine, point, vectors(4))
    calls.clear()
    multiply(engine, small, vectors(4))
    multiply(engine, point, vectors(4))
    assert calls.run() == [("hvp", 4)] + [("hvp", 1)] * 4


def test_a_width_that_is_too_wide_is_not_compiled_again_and_again(crowded, calls):
    engine, point, _, _ = crowded
    calls.instead = lambda name, width, args: out_of_memory() if width > 2 else None
    multiply(engine, point, vectors(8))
    multiply(engine, point, vectors(16))
    assert 16 not in point.source.kernels.widths("hvp")


def test_a_fixed_width_stays_and_fails(serve, registered, calls):
    engine = serve(example := registered(fixed_bucket=8))
    point = create_point(engine, example)
    multiply(engine, point, vectors(1))
    calls.instead = lambda name, width, args: out_of_memory() if name == "hvp" else None
    calls.clear()
    assert refused(multiply, engine, point, vectors(1)).reason == "DEVICE_MEMORY"
    assert set(calls.run()) == {("hvp", 8)}
    calls.instead = lambda *_: None
    multiply(engine, point, vectors(1))


def test_what_failed_holds_nothing_on_the_device_when_it_is_tried_again(crowded, calls):
    """An error keeps the arguments of all calls that it came through: residuals that gave way would still be there."""
    engine, _, other, _ = crowded
    found = engine.lanes[0].residency.get(("residuals", other.id))
    made = [
        weakref.ref(array)
        for array, residual in zip(found, other.objective.described.residuals, strict=True)
        if residual.WhichOneof("source") == "result"
    ]
    del found
    assert made
    gc.disable()
    try:
        failures = iter([True])
        alive = []

        def instead(name, width, args):
            if next(failures, False):
                out_of_memory()
            alive.append(sum(array() is not None for array in made))

        calls.instead = instead
        multiply(engine, other, vectors(1))
        assert alive[0] == 0
    finally:
        gc.enable()


def test_residuals_that_the_device_has_no_memory_for_are_done_without(serve, problem, calls, assert_product):
    engine = serve(problem)
    point = create_point(engine, problem)
    compile_now(point, ("hvp", 1), ("prepare", 0), ("apply", 1))
    calls.instead = lambda name, width, args: out_of_memory() if name == "prepare" else None
    for seed in range(8):
        V = vectors(1, seed)
        assert_product(multiply(engine, point, V), problem.hessian, V)
    assert calls.run().count(("prepare", 0)) == 1
    assert point.objective.plan.choose(1).program == "hvp"


def test_a_point_is_made_when_caches_have_given_way(crowded, calls, problem):
    engine, point, other, stranger = crowded
    residency = engine.lanes[0].residency
    failures = iter([True, True])
    calls.instead = lambda *_: out_of_memory() if next(failures, False) else None
    new = create_point(engine, problem, problem.x + 2)
    assert residency.get(new.id) is new
    assert [residency.get(each.id) for each in (point, other, stranger)] == [None] * 3
    assert residency.used_bytes()["data"] == sum(array.nbytes for array in problem.data)  # What it needs has stayed.


def test_a_point_that_has_no_memory_even_so_says_what_was_asked_for_and_what_is_there(crowded, calls, problem):
    engine, _, _, stranger = crowded
    engine.pin(stranger, 100)
    calls.instead = out_of_memory
    error = refused(create_point, engine, problem, problem.x + 2)
    assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, "DEVICE_MEMORY")
    data_bytes = sum(array.nbytes for array in problem.data)
    assert f"Asked for: a point of {2 * N * 8} bytes, with data of {data_bytes}" in str(error)
    assert f"Resident: {data_bytes} bytes of data, {2 * 7 * 8} bytes of point" in str(error)
    calls.instead = lambda *_: None
    assert create_point(engine, problem, problem.x + 2).value


def test_data_that_does_not_go_onto_the_device_at_first(crowded, monkeypatch, make_example, upload):
    engine, point, _, _ = crowded
    put, failures = _kernels.Device.put, iter([True])

    def failing(self, array, **rest):
        if rest.get("data") and next(failures, False):
            out_of_memory()
        return put(self, array, **rest)

    monkeypatch.setattr(_kernels.Device, "put", failing)
    example = make_example(lambda x, d: jnp.sum(x**2) * d.sum(), np.ones(3), np.ones(4))
    for content in example.export.blobs.values():
        upload(engine.store, content)
    engine.register(example.export.digest, "")
    assert create_point(engine, example).value == 12.0
    assert engine.lanes[0].residency.get(point.id) is point  # Residuals were enough.


def test_an_error_of_another_kind_is_no_reason_to_drop_anything(crowded, calls, problem):
    engine, point, other, _ = crowded

    def instead(*args):
        raise ServiceError(Code.INTERNAL, "INTERNAL", "broken")

    calls.instead = instead
    assert refused(multiply, engine, point, vectors(8)).reason == "INTERNAL"
    assert refused(create_point, engine, problem, problem.x + 2).reason == "INTERNAL"
    assert engine.lanes[0].residency.used_bytes()["residuals"] > 0
    assert engine.lanes[0].residency.get(other.id) is other


# Several devices


@pytest.fixture
def several(tmp_path, device, upload, vetter, monkeypatch):
    """An engine of three devices, which are all the one CPU; and how to register with it: the lane that it went to, by number."""
    monkeypatch.setattr(_kernels.Device, "together", lambda devices: devices[0])
    monkeypatch.setattr(_store.os, "fsync", lambda descriptor: None)
    engine = _engine.Engine(
        _store.Store(tmp_path / "store"), [device] * 3, Limits(3000, 16, max_pending=4096), Metrics(), vetter=vetter
    )

    def register(x, *data, **options):
        export = _export.export(
            lambda x, *data: jnp.sum(x**2) * sum(map(jnp.sum, data)),
            x,
            data,
            platforms=("cpu",),
            precision="highest",
            **options,
        )
        for content in export.blobs.values():
            upload(engine.store, content)
        return engine.lanes.index(engine.lane(engine.register(export.digest, "")))

    yield engine, register
    engine.close()
    engine.store.close()


def test_each_device_has_half_of_its_memory_and_the_other_halves_are_for_all_together(several):
    engine, _ = several
    assert [lane.budget_bytes for lane in engine.lanes] == [1500, 1500, 1500, 4500]
    assert [lane.residency.budget_bytes for lane in engine.lanes] == [1500, 1500, 1500, 4500]


def test_one_device_has_all_of_its_memory(tmp_path, device):
    store = _store.Store(tmp_path / "store")
    (lane,) = _lane.lanes([device], store, Limits(3000, 16, max_pending=1), Metrics(), Board())
    assert lane.budget_bytes == 3000
    lane.close()
    store.close()


def test_objectives_go_where_least_data_is(several):
    _, register = several
    sizes = [100, 60, 50, 10, 11, 61]
    assert [register(np.ones(2), np.arange(size) + size) for size in sizes] == [0, 1, 2, 2, 1, 2]


def test_objectives_with_the_same_data_share_it_on_one_device(several):
    _, register = several
    data = np.arange(100.0)
    assert [register(np.ones(size), data) for size in (1, 2, 3, 4)] == [0, 0, 0, 0]
    assert register(np.ones(1), np.arange(50.0)) == 1


def test_objectives_without_data_are_spread_too(several):
    _, register = several
    assert [register(np.ones(size)) for size in range(1, 7)] == [0, 1, 2, 0, 1, 2]


def test_registering_again_moves_nothing_and_counts_nothing(several):
    _, register = several
    assert [register(np.ones(2), np.arange(100.0)) for _ in range(3)] == [0, 0, 0]
    assert register(np.ones(2), np.arange(99.0)) == 1
    assert register(np.ones(2), np.arange(98.0)) == 2
    assert register(np.ones(2), np.arange(10.0)) == 2


def test_what_is_to_be_split_goes_to_all_together(several):
    _, register = several
    assert register(np.ones(2), np.arange(100.0), sharded=True) == 3
    assert register(np.ones(2), np.arange(100.0)) == 0


def test_a_point_is_found_on_whichever_device_it_is(several, upload):
    engine, register = several
    for size in range(1, 4):
        assert register(np.ones(size)) == size - 1
    found = []
    for _, digest, _ in engine.store.objectives():
        x = np.ones(engine.objective(digest).n)
        spec = curvature_pb2.PointSpec(
            objective_digest=digest, x_digest=_codec.digest(_codec.payload(x)), default_data=True
        )
        found.append(engine.create_point(spec, x))
    for point in found:
        product = curvature_pb2.ProductSpec(point_id=point.id, operator=SPEC.operator, k=1)
        assert engine.resident(product) is point
    assert [lane.residency.used_bytes().get("point", 0) > 0 for lane in engine.lanes] == [True] * 3 + [False]
    assert engine._used_bytes()["point"] == 2 * 8 * (1 + 2 + 3)


def test_what_one_device_lacks_another_does_not(several, calls):
    """Out of memory on one: caches of the others stay."""
    engine, register = several
    points = []
    for size in range(1, 4):
        register(np.ones(size))
    for _, digest, _ in engine.store.objectives():
        x = np.ones(engine.objective(digest).n)
        spec = curvature_pb2.PointSpec(
            objective_digest=digest, x_digest=_codec.digest(_codec.payload(x)), default_data=True
        )
        points.append(engine.create_point(spec, x))
    (point,) = [point for point in points if point.objective.n == 2]
    calls.instead = lambda name, width, args: out_of_memory() if args[0].size == 2 else None
    assert refused(multiply, engine, point, np.ones((1, 2))).reason == "DEVICE_MEMORY"
    for lane, each in zip(engine.lanes, sorted(points, key=lambda point: point.objective.n), strict=False):
        assert lane.residency.get(each.id) is each


SPLIT = """
import json, pathlib, sys
import numpy as np
from hvpd_server import _kernels

devices = _kernels.devices(pathlib.Path(sys.argv[1]))
together = _kernels.Device.together(devices)
found = {}
for rows in (8, 9, 3):
    placed = together.put(np.arange(3.0 * rows).reshape(rows, 3), data=True)
    shards = sorted(placed.addressable_shards, key=lambda shard: shard.device.id)
    assert np.array_equal(placed, np.arange(3.0 * rows).reshape(rows, 3))
    found[rows] = [shard.data.shape for shard in shards], together.copies((rows, 3), data=True)
x = together.put(np.arange(8.0))
compiled = together.target.compile(
    lambda x, data: (x @ data, data.sum()),
    [together.target.spec((8,), x.dtype, data=False), together.target.spec((8, 3), x.dtype, data=True)],
)
product, total = together.run(compiled, [x, together.put(np.ones((8, 3)), data=True)])
text = compiled.as_text()
print(json.dumps([len(devices), found, np.asarray(product).tolist(), float(total), "all-reduce" in text, "f64[2,3]" in text]))
"""


def test_data_that_is_split_really_is_and_so_is_the_work(tmp_path):
    """In a process of its own: how many devices the CPU is must be said before jax begins."""
    done = subprocess.run(
        [sys.executable, "-c", SPLIT, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"},
    )
    count, found, product, total, reduced, quarters = json.loads(done.stdout)
    assert count == 4
    assert found == {"8": [[[2, 3]] * 4, 1], "9": [[[9, 3]] * 4, 4], "3": [[[3, 3]] * 4, 4]}
    assert (product, total) == ([28.0] * 3, 24.0)
    assert reduced
    assert quarters


def test_nobody_pins_for_ever(crowded):
    """Whatever the client says that asks for it."""
    engine, point, _, _ = crowded
    engine.pin(point, 2**31 - 1)
    assert engine.lanes[0].residency._entries[point.id].leases == {"": 7 * 24 * 3600}
