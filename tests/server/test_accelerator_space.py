"""A basis in the memory of a device equals one in NumPy. The device is a CPU here."""

import numpy as np
import pytest

from hvpd._krylov.space import LocalSpace, NotFiniteError
from hvpd._wire import codec
from hvpd.v1 import curvature_pb2
from hvpd_server.errors import ServiceError
from hvpd_server.krylov.accelerator_space import AcceleratorSpace
from hvpd_server.krylov.operator import Operator, Terms


@pytest.fixture
def made(open_engine, logistic):
    """Return a space at a point of the logistic regression, with its start."""
    engine = open_engine(logistic)
    spec = curvature_pb2.PointSpec(
        objective_digest=logistic.export.digest,
        default_data=True,
        x_digest=codec.digest(codec.payload(logistic.x)),
    )
    point = engine.create_point(engine.locate(spec), logistic.x)
    operator = Operator(engine, point, "hvp", terms=Terms(-2.0, 0.5))
    space = AcceleratorSpace(operator)
    space.reserve(space.room_rows(7)[0])
    start = np.random.default_rng(0).standard_normal((1, 6))
    space.begin(start / np.linalg.norm(start))
    return space


@pytest.fixture
def expected(logistic):
    """Return the same space in NumPy."""
    dense = -2 * logistic.hessian + 0.5 * np.eye(6)
    space = LocalSpace(lambda V: V @ dense, 6, np.dtype(np.float64))
    space.append(np.random.default_rng(0).standard_normal((1, 6)))
    return space


def assert_same(steps, others):
    for step, other in zip(steps, others, strict=True):
        np.testing.assert_allclose(step.alpha, other.alpha, atol=1e-12)
        np.testing.assert_allclose(step.beta, other.beta, atol=1e-12)


def test_steps_and_combinations_equal_those_in_numpy(made, expected):
    assert_same([*made.extend(2), *made.extend(2)], expected.extend(4))
    assert (made.rows, made.waiting, made.products) == (5, 1, 4)
    Y = np.random.default_rng(1).standard_normal((4, 2))
    np.testing.assert_allclose(made.combine(Y), expected.combine(Y), atol=1e-12)


def test_a_space_goes_back_and_takes_the_same_steps_again(made, expected):
    list(made.extend(4))
    assert made.rewind(3, 1)
    assert not made.rewind(6, 1)
    assert_same(made.extend(2), list(expected.extend(4))[2:])


def test_steps_that_nobody_took_have_not_happened(made, expected):
    steps = made.extend(4)
    next(steps)
    steps.close()
    assert made.rows == 2
    assert_same(made.extend(3), list(expected.extend(4))[1:])


@pytest.mark.parametrize("waiting", [True, False])
def test_a_restart_keeps_some_rows(made, expected, waiting):
    Y = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 2)))[0]
    for space in (made, expected):
        list(space.extend(3))
        space.restart(Y, waiting=waiting)
    assert (made.rows, made.waiting) == (2 + waiting, waiting)
    if not waiting:
        V = np.random.default_rng(2).standard_normal((1, 6))
        np.testing.assert_allclose(made.append(V), expected.append(V), atol=1e-12)
    assert_same(made.extend(2), expected.extend(2))
    np.testing.assert_allclose(made.combine(np.eye(4)), expected.combine(np.eye(4)), atol=1e-12)


def test_the_whole_space_is_invariant(made, expected):
    steps = list(made.extend(6))
    assert_same(steps[:5], list(expected.extend(5)))
    assert made.waiting == 0
    assert len(steps[-1].beta) == 0
    assert list(made.extend(1)) == []


def test_a_larger_space_has_the_rows_of_the_smaller(made):
    list(made.extend(3))
    before = made.combine(np.eye(4))
    made.reserve(64)
    np.testing.assert_array_equal(made.combine(np.eye(4)), before)
    assert made.room_rows(1000) == [32]


def test_a_block_is_refused(made):
    with pytest.raises(ServiceError, match="appends one, got 2"):
        made.append(np.eye(6)[:2])
    with pytest.raises(NotFiniteError):
        made.append(np.full((1, 6), np.nan))
    made.close()
    assert made.rows == 0
