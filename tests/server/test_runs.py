"""Runs are resident: they count for their owner, need their point, and are found by
their owner at their point only.
"""

import threading

import numpy as np
import pytest

from hvpd._wire import codec
from hvpd.v1 import curvature_pb2
from hvpd_server.engine import launches
from hvpd_server.engine.objective import LINEARIZED
from hvpd_server.errors import ServiceError
from hvpd_server.krylov import computation
from hvpd_server.krylov.device_space import LanczosLauncher, capacity
from hvpd_server.krylov.launcher import Launcher
from hvpd_server.krylov.operator import Operator, Terms, Work
from hvpd_server.krylov.runs import Position, Runs
from tests.support.waiting import until

N = 6


@pytest.fixture
def engine(open_engine, logistic):
    return open_engine(logistic)


@pytest.fixture
def point(engine, logistic):
    spec = curvature_pb2.PointSpec(
        objective_digest=logistic.export.digest,
        default_data=True,
        x_digest=codec.digest(codec.payload(logistic.x)),
    )
    return engine.create_point(engine.locate(spec), logistic.x, "ann")


@pytest.fixture
def runs(engine):
    return Runs(engine)


@pytest.fixture
def begin(engine, point, runs):
    def begin(steps=3):
        operator = Operator(engine, point, "hvp", terms=Terms())
        return runs.start(operator, np.eye(1, N), steps, "full", Work(owner="ann"))

    return begin


@pytest.fixture
def residency(engine):
    return engine.lanes[0].residency


def reason(call, *arguments):
    with pytest.raises(ServiceError) as error:
        call(*arguments)
    return error.value.reason


def position(run, **changes):
    return Position(run.point.id, run.id, 0, run.space.rows, run.space.waiting)._replace(**changes)


def test_a_run_counts_for_its_owner_until_it_is_closed(runs, begin, residency):
    before = residency.had_bytes("ann")
    run = begin()
    assert residency.used_bytes()["run"] == residency.had_bytes("ann") - before == run.size_bytes
    assert run.size_bytes >= 4 * N * 8
    runs.close(run)
    assert residency.had_bytes("ann") == before


def test_a_run_is_found_by_its_owner_at_its_point(runs, begin):
    run = begin()
    assert runs.find(position(run), "ann") is run
    assert reason(runs.find, position(run), "ben") == "RUN_NOT_RESIDENT"
    assert reason(runs.find, position(run, run_id="0" * 32), "ann") == "RUN_NOT_RESIDENT"
    assert reason(runs.find, position(run, point_id="0" * 64), "ann") == "RUN_OF_ANOTHER_POINT"


def test_a_run_goes_with_its_point(runs, begin, residency, point):
    run = begin()
    residency.drop(point.id)
    assert reason(runs.find, position(run), "ann") == "RUN_NOT_RESIDENT"
    assert reason(next, run.space.extend(1)) == "RUN_NOT_RESIDENT"


def test_a_run_goes_back_only_within_one_change(runs, begin):
    run = begin()
    list(run.space.extend(3))
    runs.go_to(run, position(run, rows=2, waiting=1))
    assert run.space.rows == 2
    assert reason(runs.go_to, run, position(run, changes=1)) == "RUN_NOT_RESIDENT"
    assert reason(runs.go_to, run, position(run, rows=9)) == "RUN_NOT_RESIDENT"


def test_the_objective_of_a_pinned_run_counts_as_pinned(engine, runs, begin, logistic):
    """Otherwise it would be unloaded before others, and the run with it."""
    run = begin()
    assert engine.lanes[0].pinned() == set()
    runs.pin(run, 60)
    assert engine.lanes[0].pinned() == {logistic.export.digest}


def test_a_computation_counts_while_it_runs(engine, runs, point, residency):
    operator = Operator(engine, point, "hvp", terms=Terms())
    operator.work = Work(owner="ann")
    with runs.holding(operator, 1000, "a solve"):
        assert residency.used_bytes()["run"] == 1000
        operator.multiply(np.eye(1, N))
        residency.drop(point.id)
        assert reason(operator.multiply, np.eye(1, N)) == "MEMORY_BUDGET"
    assert residency.used_bytes()["run"] == 0
    assert reason(runs.holding(operator, 1 << 40, "a solve").__enter__) == "MEMORY_BUDGET"


def test_a_computation_takes_a_quarter_of_what_there_is(engine, runs, point):
    operator = Operator(engine, point, "hvp", terms=Terms())
    assert runs.room_bytes(operator) == engine.lanes[0].residency.budget_bytes // 4


@pytest.mark.parametrize("room", [True, False])
def test_launches_take_residuals_if_there_is_room(engine, point, residency, monkeypatch, room):
    if not room:
        monkeypatch.setattr(launches, "residuals_of", lambda *_: None)
    operator, rows = Operator(engine, point, "hvp", terms=Terms()), capacity(1)
    found = LanczosLauncher(operator).launch(np.eye(rows, N), rows, 1, 1, 0.0)
    assert found.alphas[0] == pytest.approx(operator.multiply(np.eye(1, N))[0, 0], rel=1e-12)
    programs = {each.program for each in point.source.kernels.compiles()}
    assert programs >= {"prepare", "lanczos_apply"}
    assert ("lanczos_hvp" in programs) is not room
    assert ("residuals" in residency.used_bytes()) is room


def test_few_steps_take_no_residuals(engine, point):
    names = []
    for program, options in (("hvp", {}), ("hvp", {"brief": True}), ("hvp", {"vectors": 2}), (LINEARIZED, {})):
        names.append(Launcher(Operator(engine, point, program, terms=Terms()), "cg_", 64, **options)._name)
    assert names == ["cg_apply", "cg_hvp", "cg_hvp", "cg_apply"]


@pytest.mark.parametrize(("seconds", "fixed", "compiled"), [(0.0, 0, True), (60.0, 0, False), (0.0, 4, False)])
def test_a_long_quadrature_gets_a_program_for_its_blocks(engine, point, monkeypatch, fixed, seconds, compiled):
    """Blocks of 3 are padded to 4 otherwise."""
    monkeypatch.setattr(computation, "_LONG_SECONDS", seconds)
    point.objective.fixed_bucket = fixed
    operator = Operator(engine, point, "hvp", terms=Terms())
    compute = computation.quadrature(seed=0, probes_count=3, steps=2, basis_bytes=1 << 20, width=3)
    result = list(computation.events(operator, compute))[-1]
    assert result.arrays["sizes"].tolist() == [2] * 3
    assert (("hvp", 3) in {(each.program, each.width) for each in point.source.kernels.compiles()}) is compiled


def products(operator):
    """Return a function that multiplies once."""
    return lambda: operator.multiply(np.eye(1, N))


def several_steps(operator):
    """Return a function that launches two steps."""
    launcher, rows = LanczosLauncher(operator), capacity(1)
    operator.point.source.kernels.request(launcher._launcher._name, rows).result()
    return lambda: launcher.launch(np.eye(rows, N), rows, 1, 2, 0.0)


@pytest.mark.parametrize("steps", [products, several_steps])
@pytest.mark.parametrize("neighbour", ["ann", "ben"])
def test_a_neighbour_waits_for_one_launch_of_a_run_at_most(engine, point, start, monkeypatch, steps, neighbour):
    """A product that arrives during a launch of a run is launched before the next
    launch of the run.
    """
    operator = Operator(engine, point, "hvp", terms=Terms())
    operator.work = Work("ann", "ann")
    step = steps(operator)
    batcher, launches = engine.lanes[0].launches._batcher, []
    begun, may_end, ended = threading.Semaphore(0), threading.Semaphore(0), threading.Event()
    execute = batcher._execute

    def executed(key, jobs):
        launches.append([bool(job.block.all()) and job.block.size > 0 for job in jobs])
        begun.release()
        assert may_end.acquire(timeout=60)
        return execute(key, jobs)

    def steps_of_a_run():
        while not ended.is_set():
            step()

    monkeypatch.setattr(batcher, "_execute", executed)
    run = start(steps_of_a_run)
    for _ in range(3):
        assert begun.acquire(timeout=60)
        assert launches[-1] == [False]  # A launch of the run ...
        product = start(engine.multiply, point, "hvp", np.ones((1, N)), tenant=neighbour)
        until(lambda: engine.lanes[0].launches.pending)
        may_end.release()
        assert begun.acquire(timeout=60)
        assert True in launches[-1]  # ... and then that of the neighbour, which a step may join.
        may_end.release()
        product.result(60)
    ended.set()
    may_end.release()
    run.result(60)
