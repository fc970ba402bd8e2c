"""The program of several steps of conjugate gradients equals the iteration in NumPy."""

import jax
import numpy as np
import pytest

from hvpd._krylov.conjugate_gradients import BlockCG
from hvpd._krylov.preconditioning import Diagonal
from hvpd_server.derivation import conjugate_gradients

N = 30


@pytest.fixture(autouse=True)
def _wide():
    with jax.enable_x64(True):
        yield


def multiply(x, v):
    return x * v + 0.1 * (jax.numpy.roll(v, 1) + jax.numpy.roll(v, -1))


def launch(state, M, steps, *, product=multiply, x=None, terms=(1.0, 0.0), size=0.0, target=0.0, radius=np.inf):
    """Return the state, the norms, and the facts of a launch."""
    x = np.linspace(1, 3, N) if x is None else x
    X, Q, S, C, *ball = state
    numbers = np.array([*terms, target, radius, size, C, *(ball or (0.0, 0.0, 1.0))])
    program = jax.jit(conjugate_gradients.cg_of(product))
    vectors, norms, facts = program(x, X, Q, S, M, numbers, np.int32(steps))
    return [*map(np.asarray, vectors), *facts[3:]], np.asarray(norms), np.asarray(facts)


def state_of(cg):
    return [cg.X.copy(), cg.Q.copy(), cg.S.copy(), float(cg.C[0, 0])]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_steps_equal_those_in_numpy_in_one_launch_or_two(weighted, dtype, tolerance):
    x, b = np.linspace(1, 3, N).astype(dtype), np.random.default_rng(0).standard_normal((1, N)).astype(dtype)
    M = np.linspace(0.5, 1, N).astype(dtype)[None] if weighted else np.ones((1, N), dtype)
    dense = -2 * jax.vmap(multiply, (None, 0))(x, np.eye(N, dtype=dtype)) + dtype(9) * np.eye(N, dtype=dtype)
    cg = BlockCG(lambda V: V @ np.asarray(dense), Diagonal(M[0]) if weighted else None, b)
    start = state_of(cg)
    expected = [float(next(cg.advance(np.zeros(1), 1))[0]) for _ in range(7)]
    whole, norms, facts = launch(start, M, 7, x=x, terms=(-2.0, 9.0))
    assert facts[:2].tolist() == [7, 1]
    np.testing.assert_allclose(norms[:7], expected, rtol=100 * tolerance)
    for mine, other in zip(whole[:4], state_of(cg), strict=True):
        np.testing.assert_allclose(mine, other, atol=tolerance)
    first, _, facts = launch(start, M, 3, x=x, terms=(-2.0, 9.0))
    rest, more, _ = launch(first, M, 4, x=x, terms=(-2.0, 9.0), size=facts[2])
    np.testing.assert_allclose(more[:4], norms[3:7], rtol=100 * tolerance)
    np.testing.assert_allclose(rest[0], whole[0], atol=tolerance)


def test_the_steps_end_at_the_target():
    start = state_of(BlockCG(None, None, np.ones((1, N))))
    _, norms, facts = launch(start, np.ones((1, N)), 20, target=1e-3)
    taken = int(facts[0])
    assert 1 < taken < 20
    assert norms[taken - 2] > 1e-3 >= norms[taken - 1]
    assert facts[1] == 1


@pytest.mark.parametrize("weighted", [False, True])
def test_the_inner_products_of_the_ball_are_those_of_the_vectors(weighted):
    """A launch ends before the step that leaves the ball."""
    M = np.linspace(0.5, 1, N)[None] if weighted else np.ones((1, N))
    start = state_of(BlockCG(None, Diagonal(M[0]) if weighted else None, np.ones((1, N))))
    (X, _, S, _, *ball), _, _ = launch(start, M, 5)
    np.testing.assert_allclose(ball, [np.sum(U * V / M) for U, V in ((X, X), (X, S), (S, S))], rtol=1e-10)
    radii = [np.sqrt(launch(start, M, steps)[0][4]) for steps in range(1, 6)]
    assert (np.diff(radii) > 0).all()
    for steps in range(5):
        state, _, facts = launch(start, M, 9, radius=radii[steps] * (1 - 1e-9))
        assert facts[:2].tolist() == [steps, 0]
        if steps:
            np.testing.assert_allclose(np.sqrt(state[4]), radii[steps - 1], rtol=1e-12)


@pytest.mark.parametrize("kind", ["not finite", "negative curvature", "zero residual"])
def test_a_launch_ends_before_an_unusual_step(kind):
    """The state is that of the steps before it."""
    product = {
        "not finite": lambda x, v: jax.numpy.where(abs(v[1]) > 1e-9, np.nan, multiply(x, v)),
        "negative curvature": lambda x, v: multiply(x, v) - 2 * v,
        "zero residual": lambda x, v: 3 * v,
    }[kind]
    b = np.zeros((1, N))
    b[0, -1] = 1
    start, M = state_of(BlockCG(None, None, b)), np.ones((1, N))
    state, _, facts = launch(start, M, 20, product=product)
    taken = int(facts[0])
    assert facts[1] == 0
    assert taken < 20
    before, _, same = launch(start, M, taken, product=product) if taken else (start, None, [0, 1])
    assert list(same[:2]) == [taken, 1]
    for mine, other in zip(state[:4], before, strict=False):
        np.testing.assert_array_equal(mine, other)
