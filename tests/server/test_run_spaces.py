"""The operator of a run waits within limits, and ends with its caller; a space goes
back to earlier positions; a run has one request at a time.
"""

import threading
import time

import numpy as np
import pytest

from hvpd.v1 import curvature_pb2
from hvpd_server.engine.plan import Plan
from hvpd_server.errors import Code, ServiceError
from hvpd_server.krylov.host_space import HostSpace
from hvpd_server.krylov.launcher import LAUNCH_SECONDS, Launcher
from hvpd_server.krylov.operator import Operator, Terms, Work
from hvpd_server.krylov.runs import Run

N = 8
A = np.diag(np.arange(1.0, N + 1))


class Objective:
    dtype = np.dtype(np.float64)

    def columns(self, program):
        return N

    def plan_of(self, program):
        return Plan("", has_apply=False, fits=True)


class Point:
    id = "p" * 64
    objective = Objective()


class Engine:
    """An engine that multiplies by A, after the errors of `refusals`."""

    class limits:  # noqa: N801 - an attribute
        max_block_width = 2

    def __init__(self, *refusals):
        self.refusals = list(refusals)
        self.widths = []

    def multiply(self, point, program, block, **settings):
        if self.refusals:
            raise self.refusals.pop(0)
        self.widths.append(len(block))
        return block @ A, curvature_pb2.ProductInfo(compute_duration_ns=10**9, batch_width=2 * len(block))


def operator(engine=None, **terms):
    return Operator(engine or Engine(), Point(), "hvp", terms=Terms(**terms))


def busy(retry_after=0.001):
    return ServiceError(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "full", retry_after=retry_after)


def test_a_product_has_the_terms_of_the_operator_and_is_cut_into_blocks():
    U, C = np.eye(N)[:, :2], np.array([[1.0, 0.5], [0.5, 2.0]])
    made = operator(scale=-2.0, shift=0.5, U=U, C=C)
    V = np.random.default_rng(0).standard_normal((5, N))
    np.testing.assert_allclose(made.multiply(V), V @ (-2 * A + 0.5 * np.eye(N) + U @ C @ U.T))
    assert made.engine.widths == [2, 2, 1]
    assert made.products == 5
    assert made.device_seconds == pytest.approx(1.5)  # Half of each launch was for others.


def test_a_product_waits_while_the_queue_is_full():
    made = operator(Engine(busy(), busy()))
    np.testing.assert_allclose(made.multiply(np.eye(N)[:1]), A[:1])


def test_an_error_that_no_wait_mends_ends_the_run():
    made = operator(Engine(ServiceError(Code.INTERNAL, "INTERNAL", "broken")))
    with pytest.raises(ServiceError, match="broken"):
        made.multiply(np.eye(N)[:1])


def test_a_wait_ends_with_the_caller(start):
    made = operator(Engine(*[busy(3600.0)] * 3))
    running = start(made.multiply, np.eye(N)[:1])
    made.work.gone.set()
    with pytest.raises(ServiceError) as error:
        running.result(10)
    assert error.value.reason == "CANCELLED"


def test_a_wait_ends_at_the_deadline():
    made = operator(Engine(*[busy(3600.0)] * 3))
    made.work = Work(deadline=time.monotonic() + 0.01)
    with pytest.raises(ServiceError) as error:
        made.multiply(np.eye(N)[:1])
    assert error.value.reason == "DEADLINE_EXCEEDED"


def test_a_compile_that_fails_is_not_asked_for_again():
    class Kernels:
        asked = 0

        def ready(self, name, width):
            return False

        def request(self, name, width):
            self.asked += 1

    made = operator()
    made.point.source = Point()
    made.point.source.kernels = Kernels()
    launcher = Launcher(made, "cg_", 64)
    assert not any(launcher.ready(1) for _ in range(3))
    assert made.point.source.kernels.asked == 1


def stepping(operator, seconds, vectors=1, most=64):
    """Return the steps of the next launches, whose steps take so many seconds."""
    launcher = Launcher(operator, "lanczos_", most, vectors=vectors)
    rows, found, slowest = 1, [], 0.0
    for _ in range(12):
        steps = launcher.steps(1000, rows, 1)
        taken = sum(seconds(rows + number) for number in range(steps))
        launcher._pace.note(taken, steps, rows, 1)
        rows, slowest = rows + steps, max(slowest, taken)
        found.append(steps)
    return found, slowest


@pytest.fixture
def wide():
    """Return an operator of an engine whose launches have up to 64 vectors."""
    made = operator()
    made.engine.limits = type("Limits", (), {"max_block_width": 64})
    made.point.source = Point()
    made.point.source.kernels = Point()
    return made


@pytest.mark.parametrize("product", [0.0, 1e-4, 1e-3])
@pytest.mark.parametrize("row", [1e-6, 1e-5])
def test_a_launch_takes_its_time_at_most_while_the_basis_grows(wide, product, row):
    steps, slowest = stepping(wide, lambda rows: product + row * rows)
    assert steps[0] == 1
    assert 0.01 < slowest <= LAUNCH_SECONDS * (1 + 1e-9)
    again, slowest = stepping(wide, lambda rows: product + row * rows)
    assert again[0] > 1  # The pace is that of the run before.
    assert slowest <= LAUNCH_SECONDS * (1 + 1e-9)


def test_a_launch_is_planned_by_the_slower_one_of_two(wide):
    launcher = Launcher(wide, "cg_", 64)
    for seconds in (0.039, 0.0099):
        launcher._pace.note(seconds, 10, 1.0, 0.0)
    assert launcher.steps(100) == 5
    launcher._pace.note(0.0099, 10, 1.0, 0.0)
    assert launcher.steps(100) == 20
    assert launcher.steps(7) == 7


def test_a_launch_has_as_many_vectors_as_a_block(wide):
    """The queue has room for them."""
    for vectors, steps in ((1, 64), (16, 4), (64, 1)):
        launcher = Launcher(wide, "cg_", 64, vectors=vectors)
        launcher._pace.note(1e-6, 1, 1.0, 0.0)
        assert launcher.steps(1000) == steps


def space(reorthogonalize="full"):
    made = HostSpace(operator(), reorthogonalize)
    made.begin(np.full((1, N), N**-0.5))
    return made


def test_a_space_goes_back_and_takes_the_same_steps_again():
    made = space()
    first = list(made.extend(5))
    assert (made.rows, made.waiting) == (6, 1)
    assert made.rewind(3, 1)
    again = list(made.extend(3))
    for before, after in zip(first[2:], again, strict=True):
        np.testing.assert_allclose(after.alpha, before.alpha, rtol=1e-14)
    assert not made.rewind(7, 1)
    assert not made.rewind(2, 3)
    assert not made.rewind(-1, 0)


def test_a_space_without_a_basis_cannot_go_back():
    made = space("none")
    list(made.extend(3))
    assert made.rewind(4, 1)
    assert not made.rewind(3, 1)
    assert made.room_rows(100) == [4]


def test_a_space_never_keeps_more_rows_than_the_dimension():
    assert space().room_rows(100) == [N]


def test_a_new_request_ends_the_one_before_it(start):
    """The older one may wait for a client that does not read."""
    run = Run(operator(), space(), "owner")
    entered, ended = threading.Event(), threading.Event()

    def request():
        with run.working(Work(end=ended.set)):
            entered.set()
            return ended.wait(10)

    older = start(request)
    assert entered.wait(10)
    with run.working(Work()):
        assert older.result(10)


def test_a_request_whose_caller_leaves_does_not_wait_for_the_run(start):
    run, second = Run(operator(), space(), "owner"), Work()
    entered, leave = threading.Event(), threading.Event()

    def first():
        with run.working(Work()):
            entered.set()
            leave.wait(10)

    def other():
        with run.working(second):
            raise AssertionError("the run is busy")

    holding = start(first)
    assert entered.wait(10)
    second.gone.set()
    with pytest.raises(ServiceError) as error:
        start(other).result(10)
    assert error.value.reason == "CANCELLED"
    leave.set()
    holding.result(10)
