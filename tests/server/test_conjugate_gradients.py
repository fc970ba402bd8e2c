"""Conjugate gradients within a ball, as a step of a trust region takes them, and blocks
that are wider than their right-hand sides.
"""

import jax
import numpy as np
import pytest

from hvpd._krylov.conjugate_gradients import BlockCG
from hvpd._krylov.preconditioning import Described, multiply
from hvpd_server.derivation import conjugate_gradients, several_steps
from hvpd_server.derivation.names import Form
from hvpd_server.krylov.packing import PackedCG

N = 30
A = np.diag(np.linspace(1, 3, N)) + 0.1 * (np.eye(N, k=1) + np.eye(N, k=-1))


@pytest.fixture(autouse=True)
def _wide():
    with jax.enable_x64(True):
        yield


def program(M=None, rows=1):
    form = Form(M="diagonal") if M is not None else Form()
    sizes = several_steps.Sizes(rows, N, np.dtype(np.float64), form)
    compiled = jax.jit(several_steps.several(conjugate_gradients.METHOD, lambda x, V: V @ x, sizes))
    arrays = [] if M is None else [np.array(0.0), M]

    def launch(state, steps, radius=np.inf):
        numbers = np.array([1.0, 0.0]), np.zeros((rows, 1)), np.int32(steps)
        found, norms, facts = compiled(A, *state, np.array(radius), *arrays, *numbers)
        return conjugate_gradients.State(*map(np.asarray, found)), np.asarray(norms), facts[:2].tolist()

    return launch


def start(M=None, rows=1):
    precondition = None if M is None else multiply(Described("diagonal", {"M": M}))
    return PackedCG(BlockCG(lambda V: V @ A, precondition, np.ones((rows, N)))).pack()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_inner_products_of_the_ball_are_those_of_the_vectors(weighted):
    """A launch ends before the step that leaves the ball."""
    M = np.linspace(0.5, 1, N) if weighted else None
    launch, begun, weights = program(M), start(M), np.ones(N) if M is None else M
    found, _, _ = launch(begun, 5)
    ball = found.XX, found.XS, found.SS
    pairs = (found.X, found.X), (found.X, found.S), (found.S, found.S)
    np.testing.assert_allclose(np.ravel(ball), [np.sum(U * V / weights) for U, V in pairs], rtol=1e-10)
    radii = [np.sqrt(launch(begun, steps)[0].XX[0, 0]) for steps in range(1, 6)]
    assert (np.diff(radii) > 0).all()
    for steps in range(5):
        state, _, facts = launch(begun, 9, radius=radii[steps] * (1 - 1e-9))
        assert facts == [steps, 0]
        if steps:
            np.testing.assert_allclose(np.sqrt(state.XX[0, 0]), radii[steps - 1], rtol=1e-12)


def test_a_step_to_a_residual_of_zero_is_not_usual():
    """The state is that of the steps before it."""
    begun = PackedCG(BlockCG(None, None, np.eye(N)[4:5])).pack()
    sizes = several_steps.Sizes(1, N, np.dtype(np.float64))
    product = lambda x, V: 3 * V  # noqa: E731
    compiled = jax.jit(several_steps.several(conjugate_gradients.METHOD, product, sizes))
    state, _, facts = compiled(A, *begun, np.array(np.inf), np.array([1.0, 0.0]), np.zeros((1, 1)), np.int32(5))
    assert facts[:2].tolist() == [0, 0]
    for mine, other in zip(state, begun, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_block_has_zeros_in_rows_without_a_right_hand_side():
    """Three equal right-hand sides are one, in a block of four."""
    found, norms, facts = program(rows=4)(start(rows=3), 6)
    assert facts == [6, 1]
    alone, expected, _ = program()(start(), 6)
    np.testing.assert_allclose(norms[:6, :3, 0], np.repeat(expected[:6, 0], 3, axis=1), rtol=1e-9)
    assert not norms[:6, 3].any()
    assert not found.S[1:].any()
    assert not found.X[3].any()
    np.testing.assert_allclose(found.X[:3], np.repeat(alone.X, 3, axis=0), rtol=1e-9)
