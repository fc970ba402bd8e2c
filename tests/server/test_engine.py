"""The server without its transport: from uploaded blobs to right products, while others
ask, evict or break.

Truth is a dense `jax.hessian` of the user's own function.
"""

import gc
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvpd._wire import codec
from hvpd.v1 import curvature_pb2, objective_pb2, tensor_pb2
from hvpd_server.engine.plan import Plan
from hvpd_server.errors import Code, ServiceError
from hvpd_server.scheduling import compile_queue

pytestmark = pytest.mark.slow  # Real programs, compiled and run.

WAIT = 60

HESSIAN = curvature_pb2.OPERATOR_HESSIAN


def tensor(store, upload, array):
    return tensor_pb2.Tensor(dtype=array.dtype.name, shape=array.shape, digest=upload(store, codec.payload(array)))


def point_spec(example, x=None, data=None):
    """Return the spec of a point of an example: its own x or another, its own data or
    other tensors.
    """
    return curvature_pb2.PointSpec(
        objective_digest=example.export.digest,
        x_digest=codec.digest(codec.payload(example.x if x is None else x)),
        default_data=data is None,
        data=data or (),
    )


def create_point(engine, example, x=None, data=None):
    return engine.create_point(engine.locate(point_spec(example, x, data)), example.x if x is None else x)


def product_spec(point, k=1, operator=HESSIAN):
    return curvature_pb2.ProductSpec(point_id=point.id, operator=operator, k=k)


def block(example, width, seed=0):
    return np.random.default_rng([seed, width]).standard_normal((width, example.x.size)).astype(example.x.dtype)


def multiply(engine, point, V, **settings):
    products, _ = engine.multiply(point, "hvp", V, **settings)
    return products


def launches(engine, program):
    return engine.metrics.registry.get_sample_value("hvpd_launches_total", {"program": program}) or 0


def compile_programs(point, *programs):
    """Compile (program, width) now, so that the test knows the ready programs."""
    for name, width in programs:
        point.objective.kernels.request(name, width).result(WAIT)


def refusal(code, reason, call, *args, **settings):
    with pytest.raises(ServiceError) as refused:
        call(*args, **settings)
    assert (refused.value.code, refused.value.reason) == (code, reason)
    return refused.value


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
    compile_programs(point, *(("hvp", width) for width in compiled))
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


# Residuals


def test_both_programs_are_tried_and_residuals_stay(open_engine, objective_example, assert_product):
    example = objective_example
    engine = open_engine(example)
    point = create_point(engine, example)
    compile_programs(point, ("hvp", 1), ("prepare", 0), ("apply", 1))
    V = block(example, 1)
    tried = [(hvp, 0) for hvp in range(1, Plan.SAMPLES + 1)] + [(Plan.SAMPLES, 1), (Plan.SAMPLES, 2)]
    for product, programs in enumerate(tried):
        assert_product(multiply(engine, point, V), example.hessian, V)
        assert (launches(engine, "hvp"), launches(engine, "apply")) == programs, product
    assert engine.lanes[0].residency.used_bytes()["residuals"] == point.objective.residual_bytes


def test_blocks_make_and_use_no_residuals(open_engine, logistic):
    engine = open_engine(logistic)
    point = create_point(engine, logistic)
    compile_programs(point, ("hvp", 4), ("prepare", 0), ("apply", 1))
    for seed in range(3):
        multiply(engine, point, block(logistic, 4, seed))
    assert launches(engine, "apply") == 0
    assert "residuals" not in engine.lanes[0].residency.used_bytes()


def test_a_product_does_not_wait_for_the_residual_programs_to_compile(open_engine, rosen):
    engine = open_engine(rosen)
    point = create_point(engine, rosen)
    for _ in range(Plan.SAMPLES + 1):
        multiply(engine, point, block(rosen, 1))
    assert launches(engine, "hvp") == Plan.SAMPLES + 1
    compile_programs(point, ("prepare", 0), ("apply", 1))
    multiply(engine, point, block(rosen, 1))
    assert launches(engine, "apply") == 1


def test_residuals_that_would_fill_the_budget_are_not_made(open_engine, rosen, assert_product):
    engine = open_engine(rosen)
    needed = create_point(engine, rosen).objective.residual_bytes
    engine = open_engine(memory_budget_bytes=4 * needed - 1)
    point = create_point(engine, rosen)
    compile_programs(point, ("hvp", 1), ("prepare", 0), ("apply", 1))
    for seed in range(Plan.SAMPLES + 1):
        V = block(rosen, 1, seed)
        assert_product(multiply(engine, point, V), rosen.hessian, V)
    assert launches(engine, "apply") == 0


def test_residuals_that_do_not_fit_beside_the_data_are_no_failure_of_the_product(
    open_engine, make_example, assert_product
):
    x = np.linspace(1, 2, 5)
    example = make_example(lambda x, d: jnp.sum(x[1:] ** 4 * x[:-1]) * d.mean(), x, np.ones(1000))
    residuals = create_point(open_engine(example), example).objective.residual_bytes
    budget = example.data[0].nbytes + 2 * x.nbytes + residuals - 1
    assert 0 < residuals <= budget // 4
    engine = open_engine(memory_budget_bytes=budget)
    point = create_point(engine, example)
    compile_programs(point, ("hvp", 1), ("prepare", 0), ("apply", 1))
    for seed in range(Plan.SAMPLES + 1):
        V = block(example, 1, seed)
        assert_product(multiply(engine, engine.resident(product_spec(point)), V), example.hessian, V)


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
    compile_programs(point, ("hvp", 1), ("hvp", 8))
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
    compile_programs(points[0], ("hvp", 1))
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


def test_a_bundle_with_blobs_missing_is_refused_by_their_digests(open_engine, logistic, upload):
    engine = open_engine()
    missing = {logistic.bundle.programs["objective"].digest, logistic.bundle.data[0].digest}
    for digest, content in logistic.export.blobs.items():
        if digest not in missing:
            upload(engine.store, content)
    error = refusal(Code.FAILED_PRECONDITION, "BLOBS_MISSING", engine.registration.register, logistic.export.digest, "")
    assert set(error.metadata["digests"].split(",")) == missing
    assert engine.store.objectives() == []


@pytest.mark.parametrize("name", ["../x", ".", "a b", "f" * 64])
def test_an_objective_of_a_bad_name_is_not_registered(open_engine, rosen, upload, name):
    engine = open_engine()
    for content in rosen.export.blobs.values():
        upload(engine.store, content)
    refusal(Code.INVALID_ARGUMENT, "INVALID_NAME", engine.registration.register, rosen.export.digest, name)
    assert engine.store.objectives() == []


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


# Bundles that cannot be served


def register_changed(engine, example, upload, program=None, **fields):
    """Register the example's bundle with some fields changed; return its digest without
    having it served.
    """
    bundle = objective_pb2.Bundle.FromString(example.bundle.SerializeToString())
    if program is not None:
        bundle.programs["objective"].CopyFrom(program)
    for name, value in fields.items():
        field = getattr(bundle, name)
        if hasattr(field, "CopyFrom"):
            field.CopyFrom(value)
        else:
            setattr(bundle, name, value)
    for content in example.export.blobs.values():
        upload(engine.store, content)
    return upload(engine.store, bundle.SerializeToString(deterministic=True))


def damage(store, digest):
    """Flip a bit of a blob on the disk."""
    path = store.root / "blobs" / digest[:2] / digest
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_program_that_is_corrupt_on_disk_is_refused_and_nothing_is_registered(open_engine, rosen, upload):
    engine = open_engine()
    digest = register_changed(engine, rosen, upload)
    damage(engine.store, rosen.bundle.programs["objective"].digest)
    refusal(Code.DATA_LOSS, "BLOB_CORRUPT", engine.registration.register, digest, "rosen")
    assert engine.store.objectives() == []
    upload(engine.store, rosen.export.blobs[rosen.bundle.programs["objective"].digest])
    assert engine.registration.register(digest, "rosen").n == 7
    assert [(name, digest) for name, digest, _ in engine.store.objectives()] == [("rosen", digest)]


def test_a_blob_that_is_no_program_is_refused_and_nothing_is_registered(open_engine, rosen, upload):
    engine = open_engine()
    junk = upload(engine.store, b"not a program")
    digest = register_changed(engine, rosen, upload, program=objective_pb2.Program(digest=junk, size_bytes=13))
    refusal(Code.INVALID_ARGUMENT, "BUNDLE_INCOMPATIBLE", engine.registration.register, digest, "junk")
    assert engine.store.objectives() == []


@pytest.mark.parametrize(
    ("format_", "says"), [(1, "register the objective again with a newer client"), (3, "upgrade the server")]
)
def test_a_bundle_of_another_format_is_refused_and_nothing_is_registered(open_engine, rosen, upload, format_, says):
    engine = open_engine()
    digest = register_changed(engine, rosen, upload, format=format_)
    error = refusal(Code.FAILED_PRECONDITION, "BUNDLE_INCOMPATIBLE", engine.registration.register, digest, "other")
    assert f"the bundle has format {format_}" in str(error)
    assert "this server reads format 2" in str(error)
    assert says in str(error)
    assert engine.store.objectives() == []


def test_a_program_of_a_newer_stablehlo_is_refused_and_nothing_is_registered(open_engine, rosen, upload):
    engine = open_engine()
    artifact = rosen.read(rosen.bundle.programs["objective"].digest)
    assert artifact[4] & 1  # The version of the bytecode, in one byte.
    newer = artifact[:4] + bytes([99 * 2 + 1]) + artifact[5:]
    program = objective_pb2.Program(digest=upload(engine.store, newer), size_bytes=len(newer))
    digest = register_changed(engine, rosen, upload, program=program, jax_version="9.9.9")
    error = refusal(Code.INVALID_ARGUMENT, "BUNDLE_INCOMPATIBLE", engine.registration.register, digest, "future")
    assert "objective " in str(error)
    assert "version 99 is newer" in str(error)
    assert engine.store.objectives() == []


def test_programs_of_another_objective_are_refused(open_engine, rosen, logistic, upload):
    engine = open_engine(logistic)
    digest = register_changed(engine, rosen, upload, program=logistic.bundle.programs["objective"])
    refusal(Code.INVALID_ARGUMENT, "BUNDLE_INVALID", engine.registration.register, digest, "")
    assert [(name, digest) for name, digest, _ in engine.store.objectives()] == [("", logistic.export.digest)]


def test_registering_again_changes_nothing(open_engine, rosen):
    engine = open_engine(rosen)
    before = engine.objectives.load(rosen.export.digest)
    assert engine.registration.register(rosen.export.digest, "") is before
    assert engine.registration.register(rosen.export.digest, "digits/rosen") is before
    assert [(name, digest) for name, digest, _ in engine.store.objectives()] == [("digits/rosen", rosen.export.digest)]


# Restarts


def test_after_a_restart_all_is_warm_and_right_without_registering(open_engine, rosen, logistic, assert_product):
    open_engine(rosen, logistic)
    engine = open_engine()
    engine.objectives.warm_all()
    for example in (rosen, logistic):
        kernels = engine.objectives.load(example.export.digest).kernels
        assert kernels.ready("value_and_grad")
        assert kernels.ready("hvp", 1)
        V = block(example, 3)
        assert_product(multiply(engine, create_point(engine, example), V), example.hessian, V)


class Turns:
    """Keeps both of a tenant's turns in the compile queue until it is closed."""

    def __init__(self, engine):
        self._open = threading.Event()
        self._engine = engine

    def __enter__(self):
        for _ in range(compile_queue.EACH):
            self._engine.objectives._compiles.submit("", lambda: self._open.wait(WAIT))

    def __exit__(self, *error):
        self._open.set()


def uploaded(engine, example, upload):
    for content in example.export.blobs.values():
        upload(engine.store, content)
    return example.export.digest


def test_a_registration_that_was_given_up_leaves_the_queue(open_engine, rosen, upload, monkeypatch):
    engine = open_engine()
    digest = uploaded(engine, rosen, upload)
    read = []
    monkeypatch.setattr(engine.objectives._vetting, "known", lambda digest: None)
    monkeypatch.setattr(engine.objectives._vetting, "admit", lambda digest, bundle, part: read.append(digest))
    with Turns(engine), pytest.raises(ServiceError, match="gave up the registration") as error:
        engine.registration.register(digest, "", on_wait=lambda cancel: cancel())
    engine.objectives._compiles.close(wait=True)
    assert error.value.reason == "CANCELLED"
    assert read == []


def test_compiles_of_a_given_up_registration_leave_the_queue_and_can_be_repeated(open_engine, rosen, upload):
    engine = open_engine()
    digest = uploaded(engine, rosen, upload)
    engine.objectives._vetting.admit(digest, rosen.export.bundle, engine.store.read)
    with Turns(engine), pytest.raises(ServiceError, match="gave up the registration"):
        engine.registration.register(digest, "", on_wait=lambda cancel: cancel())
    assert not engine.store.registered(digest)
    assert engine.registration.register(digest, "").kernels.ready("value_and_grad")


def test_two_register_a_bundle_and_one_gives_up(open_engine, rosen, upload):
    engine = open_engine()
    digest = uploaded(engine, rosen, upload)
    engine.objectives._vetting.admit(digest, rosen.export.bundle, engine.store.read)
    staying, leaving = queue.SimpleQueue(), queue.SimpleQueue()
    with ThreadPoolExecutor(2) as pool:
        with Turns(engine):
            stays = pool.submit(engine.registration.register, digest, "", on_wait=staying.put)
            leaves = pool.submit(engine.registration.register, digest, "", on_wait=leaving.put)
            staying.get(timeout=WAIT)
            leaving.get(timeout=WAIT)()
        with pytest.raises(ServiceError, match="gave up the registration"):
            leaves.result(WAIT)
        assert stays.result(WAIT).digest == digest


def _corrupt_bundle(engine, example):
    damage(engine.store, example.export.digest)


def uncached(engine):
    """Drop the compiled programs, so that the next start needs the objectives' own."""
    engine.objectives._compiles.close(wait=True)
    engine.vetter.sweep(-1.0)
    for path in engine.store.cache.iterdir():
        path.unlink()


def _corrupt_program(engine, example):
    damage(engine.store, example.bundle.programs["objective"].digest)


def _lost_program(engine, example):
    digest = example.bundle.programs["objective"].digest
    (engine.store.root / "blobs" / digest[:2] / digest).unlink()


def _unreadable_program(engine, example):
    """Make reads of the program fail with another OSError than FileNotFoundError, like
    a failing disk.
    """
    _lost_program(engine, example)
    digest = example.bundle.programs["objective"].digest
    (engine.store.root / "blobs" / digest[:2] / digest).mkdir()


@pytest.mark.parametrize("break_", [_corrupt_bundle, _corrupt_program, _lost_program, _unreadable_program])
def test_a_store_with_a_broken_objective_serves_the_rest(open_engine, rosen, logistic, assert_product, caplog, break_):
    broken = open_engine(rosen, logistic)
    break_(broken, rosen)
    uncached(broken)
    engine = open_engine()
    engine.objectives.warm_all()
    assert rosen.export.digest[:12] in caplog.text
    V = block(logistic, 2)
    assert_product(multiply(engine, create_point(engine, logistic), V), logistic.hessian, V)
    with pytest.raises((ServiceError, OSError)):
        create_point(engine, rosen)


@pytest.mark.parametrize("break_", [_corrupt_bundle, _corrupt_program, _lost_program])
def test_a_broken_objective_is_served_once_it_is_registered_again(open_engine, rosen, upload, assert_product, break_):
    """It is served at once, although failed compiles are not repeated for a while."""
    broken = open_engine(rosen)
    break_(broken, rosen)
    uncached(broken)
    engine = open_engine()
    engine.objectives.warm_all()
    refusal(Code.DATA_LOSS, "BLOB_CORRUPT", create_point, engine, rosen)
    for content in rosen.export.blobs.values():
        upload(engine.store, content)
    engine.registration.register(rosen.export.digest, "")
    V = block(rosen, 2)
    assert_product(multiply(engine, create_point(engine, rosen), V), rosen.hessian, V)


def test_a_bundle_of_a_newer_server_does_not_stop_this_one(
    open_engine, rosen, logistic, upload, caplog, assert_product
):
    engine = open_engine(logistic)
    newer = register_changed(engine, rosen, upload, format=3)
    engine.store.add_objective(newer, "newer")
    engine = open_engine()
    engine.objectives.warm_all()
    assert newer in caplog.text
    V = block(logistic, 2)
    assert_product(multiply(engine, create_point(engine, logistic), V), logistic.hessian, V)
