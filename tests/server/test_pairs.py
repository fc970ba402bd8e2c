"""Products at several points of one objective share a launch, as pairs (x, v), if that
pays.
"""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvpd._registration import export as _export
from hvpd_server.admission.vetting_process import derive
from hvpd_server.derivation.programs import PAIRS_BYTES
from hvpd_server.engine.plan import Plan
from hvpd_server.errors import Code, ServiceError
from hvpd_server.importer.refusals import Limits
from tests.support.engine import WAIT, create_point, launches

pytestmark = pytest.mark.slow  # Real programs, compiled and run.


@pytest.fixture
def at_once(start, monkeypatch):
    """Return a function that multiplies at many points while the device is held, so
    that all products wait together, and then releases it.
    """

    def at_once(engine, first, rest):
        lane = engine.lanes[0]
        begun, may_go, waiting = threading.Event(), threading.Event(), threading.Semaphore(0)
        blocks, enqueue = lane.launches._launch_blocks, lane.launches._batcher._enqueue

        def held(*args):
            begun.set()
            assert may_go.wait(WAIT)
            return blocks(*args)

        def noted(job):
            enqueue(job)
            waiting.release()

        monkeypatch.setattr(lane.launches, "_launch_blocks", held)
        monkeypatch.setattr(lane.launches._batcher, "_enqueue", noted)
        futures = [start(engine.multiply, first[0], "hvp", first[1])]
        assert begun.wait(WAIT)
        futures += [start(engine.multiply, point, "hvp", V) for point, V in rest]
        for _ in rest:
            assert waiting.acquire(timeout=WAIT)
        may_go.set()
        return [future.result(WAIT) for future in futures]

    return at_once


@pytest.fixture
def points(open_engine, logistic):
    engine = open_engine(logistic)
    rng = np.random.default_rng(5)
    xs = rng.standard_normal((5, logistic.x.size))
    found = [create_point(engine, logistic, x) for x in xs]
    for width in (1, 2, 4, 8):
        found[0].source.kernels.request("hvp", width).result(WAIT)
        found[0].source.kernels.request("hvp_pairs", width).result(WAIT)
    return engine, found, rng


def hessian(example, x):
    with jax.enable_x64(True):
        return np.asarray(jax.hessian(example.fun)(x, *example.data))


def test_products_at_several_points_are_one_launch_and_right(points, logistic, at_once, assert_product):
    engine, found, rng = points
    asked = [(point, rng.standard_normal((1 + index % 2, logistic.x.size))) for index, point in enumerate(found)]
    answers = at_once(engine, asked[0], asked[1:])
    assert launches(engine, "hvp_pairs") == 1
    for (point, V), (product, _) in zip(asked, answers, strict=True):
        assert_product(product, hessian(logistic, np.asarray(point.x)), V)
    assert {info.program for _, info in answers[1:]} == {"hvp_pairs"}
    assert [info.batch_width for _, info in answers[1:]] == [6] * 4


def test_products_at_one_point_remain_a_block(points, logistic, at_once):
    engine, found, rng = points
    asked = [(found[0], rng.standard_normal((1, logistic.x.size))) for _ in range(4)]
    answers = at_once(engine, asked[0], asked[1:])
    assert launches(engine, "hvp_pairs") == 0
    assert [info.batch_width for _, info in answers] == [1, 3, 3, 3]


def test_pairs_that_measured_slower_are_not_launched(points, logistic, at_once, assert_product):
    engine, found, rng = points
    plan = found[0].objective.plan
    for width in (1, 2, 4, 8):
        for _ in range(Plan.SAMPLES):
            plan.add("hvp", 1, 1e-6)
            plan.add("hvp_pairs", width, 1.0)
    asked = [(point, rng.standard_normal((1, logistic.x.size))) for point in found]
    answers = at_once(engine, asked[0], asked[1:])
    assert launches(engine, "hvp_pairs") == 0
    for (point, V), (product, info) in zip(asked, answers, strict=True):
        assert_product(product, hessian(logistic, np.asarray(point.x)), V)
        assert info.batch_width == 1


def test_a_device_without_the_memory_for_pairs_takes_one_point_after_the_other(
    points, logistic, at_once, assert_product, monkeypatch
):
    engine, found, rng = points
    kernels = type(found[0].source.kernels)
    call = kernels.call

    def short(self, name, *args):
        if name == "hvp_pairs":
            raise ServiceError(Code.RESOURCE_EXHAUSTED, "DEVICE_MEMORY", "the device is out of memory")
        return call(self, name, *args)

    monkeypatch.setattr(kernels, "call", short)
    asked = [(point, rng.standard_normal((1, logistic.x.size))) for point in found]
    for (point, V), (product, _) in zip(asked, at_once(engine, asked[0], asked[1:]), strict=True):
        assert_product(product, hessian(logistic, np.asarray(point.x)), V)


def test_points_with_other_data_and_other_objectives_are_no_pairs(open_engine, logistic, logistic32, rosen):
    engine = open_engine(logistic, logistic32, rosen)
    one, other = (create_point(engine, logistic, logistic.x + shift) for shift in (0.0, 1.0))
    assert one.pair_key == other.pair_key
    assert hash(one.pair_key) == hash(other.pair_key)
    assert one.pair_key != create_point(engine, logistic32, logistic32.x).pair_key
    assert one.pair_key != create_point(engine, rosen, rosen.x).pair_key


@pytest.mark.parametrize("options", [{"fixed_bucket": 4}, {"mode": "linearized"}])
def test_objectives_whose_launches_are_fixed_have_no_pairs(open_engine, make_example, options):
    example = make_example(lambda x: jnp.sum(x**4), np.ones(3))
    changed = _export.export(example.fun, example.x, (), platforms=("cpu",), precision="highest", **options)
    example = type(example)(example.fun, example.x, (), changed, example.value, example.gradient, example.hessian)
    assert create_point(open_engine(example), example, example.x).pair_key is None


@pytest.mark.parametrize(("more", "pairs"), [(0, True), (1, False)])
def test_large_points_have_no_pairs(export, more, pairs):
    made = export(jnp.sum, np.ones(PAIRS_BYTES // 8 + more))
    parts = {name: bytes(made.blobs[program.digest]) for name, program in made.bundle.programs.items()}
    derived = derive({"bundle": made.bundle.SerializeToString(), **parts}, "cpu", Limits())
    assert ("hvp_pairs" in derived.programs) == pairs


@pytest.mark.parametrize(("pairs", "worth"), [(3.9, True), (4.1, False)])
def test_a_launch_of_pairs_must_take_less_than_one_launch_for_each_point(pairs, worth):
    plan = Plan("forward_over_reverse", has_apply=False, fits=True)
    assert plan.pairs(4, 2)
    for _ in range(Plan.SAMPLES):
        plan.add("hvp", 1, 1.0)
        plan.add("hvp_pairs", 4, pairs)
    assert plan.pairs(4, 4) == worth
    assert not plan.pairs(4, 2)
    assert plan.pairs_may_pay == worth
    plan.add("hvp_pairs", 8, 1.0)
    assert plan.pairs_may_pay
