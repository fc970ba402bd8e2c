"""Several launches are in flight on a lane, as far as memory allows."""

import threading

import pytest

from tests.support.engine import WAIT, N, compile_now, create_point, multiply, out_of_memory, vectors

pytestmark = pytest.mark.slow  # Real programs, compiled and run.


@pytest.fixture
def several_launches(open_engine, problem, rosen):
    """Yield warm points of two objectives, and an engine that has two launches in
    flight.
    """
    engine = open_engine(problem, rosen, max_launches=2)
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


def test_launches_go_one_at_a_time_if_memory_does_not_suffice_for_two(
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
    assert all(engine.lanes[0].residency.get(point.id) is point for point in points)  # Nothing was evicted.

    calls.clear()
    begun, may_end = threading.Event(), threading.Event()

    def instead(name, width, args):
        begun.set()
        assert may_end.wait(WAIT)

    calls.instead = instead
    futures = [start(multiply, engine, points[0], blocks[0])]
    assert begun.wait(WAIT)
    futures.append(start(multiply, engine, points[1], blocks[1]))
    while engine.lanes[0].launches.pending < 2:
        assert not futures[1].done()
    assert len(calls) == 1
    may_end.set()
    for future, example, block in zip(futures, (problem, rosen), blocks, strict=True):
        assert_product(future.result(WAIT), example.hessian, block)


def test_a_launch_that_is_alone_and_has_no_memory_evicts_caches_and_two_stay_possible(
    several_launches, calls, problem, assert_product
):
    engine, *points = several_launches
    failures = iter([True, True])
    calls.instead = lambda *_: out_of_memory() if next(failures, False) else None
    assert_product(multiply(engine, points[0], vectors(2, n=N)), problem.hessian, vectors(2, n=N))
    assert calls.run() == [("hvp", 2)] * 3
    assert engine.lanes[0].residency.get(points[1].id) is None
    assert engine.lanes[0].launches._batcher.in_flight.max_launches == 2


def test_an_accelerator_by_itself_overlaps_and_a_cpu_does_not(device):
    assert not device.overlaps
