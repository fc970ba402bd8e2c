"""A lane whose device is out of memory evicts caches, then narrows its launches."""

import gc
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from hvpd._wire import codec
from hvpd.v1 import curvature_pb2, tensor_pb2
from hvpd_server.device.device import Device
from hvpd_server.errors import Code, ServiceError
from tests.support.engine import ROWS, N, compile_now, create_point, multiply, out_of_memory, refused, vectors

pytestmark = pytest.mark.slow  # Real programs, compiled and run.


@pytest.fixture
def crowded(open_engine, problem, rosen):
    """Yield a point, another point with its residuals, a point of another objective,
    and the engine.
    """
    engine = open_engine(problem, rosen)
    point, other = create_point(engine, problem), create_point(engine, problem, problem.x + 1)
    compile_now(point, ("hvp", 1), ("hvp", 2), ("hvp", 4), ("hvp", 8), ("prepare", 0), ("apply", 1))
    for seed in range(6):
        multiply(engine, other, vectors(1, seed))
    residency = engine.lanes[0].residency
    assert residency.used_bytes()["residuals"] > 0
    return engine, point, other, create_point(engine, rosen)


def test_residuals_are_evicted_first_and_then_a_product_goes_on(crowded, calls, problem, assert_product):
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
    assert calls.run() == [("hvp", 2)] * 4  # The engine remembers the width.


def test_a_pinned_point_is_not_evicted(crowded, calls):
    engine, point, other, stranger = crowded
    engine.pin(other, 100)
    calls.instead = lambda name, width, args: out_of_memory() if width > 2 else None
    multiply(engine, point, vectors(8))
    assert engine.lanes[0].residency.get(other.id) is other
    assert engine.lanes[0].residency.get(stranger.id) is None


def test_a_product_that_never_fits_fails_with_its_sizes_and_others_go_on(
    crowded, calls, rosen, problem, assert_product
):
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
    # This one goes on, too, when there is memory again.
    calls.instead = lambda *_: None
    V = vectors(3)
    assert_product(multiply(engine, point, V), problem.hessian, V)
    assert all(compile_.width > 0 for compile_ in point.source.kernels.compiles() if compile_.program == "hvp")


def test_a_narrow_launch_of_much_data_does_not_make_those_of_little_narrow(open_engine, registered, calls, upload):
    """Each number of rows has its own compiled programs and its own remembered
    width.
    """
    engine = open_engine(example := registered(any_rows=True))
    point = create_point(engine, example)
    less = [array[:20] for array in example.data]
    digests = [upload(engine.store, codec.payload(array)) for array in less]
    data = [
        tensor_pb2.Tensor(dtype="float64", shape=array.shape, digest=digest)
        for array, digest in zip(less, digests, strict=True)
    ]
    x_digest = codec.digest(codec.payload(example.x))
    spec = curvature_pb2.PointSpec(objective_digest=example.export.digest, x_digest=x_digest, data=data)
    small = engine.create_point(engine.locate(spec), example.x)
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


def test_a_fixed_width_stays_and_fails(open_engine, registered, calls):
    engine = open_engine(example := registered(fixed_bucket=8))
    point = create_point(engine, example)
    multiply(engine, point, vectors(1))
    calls.instead = lambda name, width, args: out_of_memory() if name == "hvp" else None
    calls.clear()
    assert refused(multiply, engine, point, vectors(1)).reason == "DEVICE_MEMORY"
    assert set(calls.run()) == {("hvp", 8)}
    calls.instead = lambda *_: None
    multiply(engine, point, vectors(1))


def test_a_failed_launch_holds_no_arrays_while_it_is_tried_again(crowded, calls):
    """An error keeps the arguments of all calls on its stack, so evicted residuals
    would still be in memory.
    """
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


def test_residuals_that_the_device_has_no_memory_for_are_done_without(open_engine, problem, calls, assert_product):
    engine = open_engine(problem)
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
    assert residency.used_bytes()["data"] == sum(array.nbytes for array in problem.data)  # Its data has stayed.


def test_a_point_without_memory_reports_the_requested_and_resident_sizes(crowded, calls, problem):
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
    put, failures = Device.put, iter([True])

    def failing(self, array, **rest):
        if rest.get("data") and next(failures, False):
            out_of_memory()
        return put(self, array, **rest)

    monkeypatch.setattr(Device, "put", failing)
    example = make_example(lambda x, d: jnp.sum(x**2) * d.sum(), np.ones(3), np.ones(4))
    for content in example.export.blobs.values():
        upload(engine.store, content)
    engine.registration.register(example.export.digest, "")
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
