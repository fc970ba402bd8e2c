"""Programs of several steps equal the iterations in NumPy, and end before a step that
is not a usual one.
"""

import itertools

import jax
import numpy as np
import pytest

from hvpd._errors import InvalidArgumentError
from hvpd._krylov.conjugate_gradients import BlockCG, IndefiniteError
from hvpd._krylov.preconditioning import Described, multiply
from hvpd._krylov.short_recurrence import ShortRecurrence
from hvpd._krylov.space import NotFiniteError
from hvpd_server.derivation import conjugate_gradients, several_steps, short_recurrences
from hvpd_server.derivation.names import Form, Name
from hvpd_server.krylov import packing
from hvpd_server.krylov.operator import Terms

N = 60
METHODS = {conjugate_gradients.PREFIX: conjugate_gradients.METHOD, **short_recurrences.METHODS}
SHIFTS = [0.0, 0.5, 2.0]
ALONE = Terms()


@pytest.fixture(autouse=True)
def _wide():
    with jax.enable_x64(True):
        yield


def dense(dtype=np.float64):
    root = np.random.default_rng(0).standard_normal((N, N))
    return (root @ root.T / N + 0.1 * np.eye(N)).astype(dtype)


def right_hand_sides(rows, dtype=np.float64):
    return np.random.default_rng(1).standard_normal((rows, N)).astype(dtype)


def preconditioner(kind, dtype=np.float64):
    """Return a preconditioner, and the dense matrix of it."""
    rng = np.random.default_rng(2)
    if kind == "low_rank":
        U, weights = 0.1 * rng.standard_normal((N, 5)), np.linspace(0.5, 1, 5)
        arrays, matrix = {"M_U": U, "M_weights": weights}, (U * weights) @ U.T + 1.5 * np.eye(N)
    elif kind == "kronecker":
        arrays, matrix, order = {}, 1.5 * np.eye(N), rng.permutation(N)
        for number, (p, q) in enumerate([(3, 4), (5, 2)]):
            elements, order = order[: p * q].reshape(p, q), order[p * q :]
            a, g = (np.linalg.qr(rng.standard_normal((size, size)))[0] for size in (p, q))
            weights = rng.uniform(0.5, 1, (p, q))
            both = np.einsum("ik,jl->ijkl", a, g).reshape(p * q, p * q)
            matrix[np.ix_(elements.ravel(), elements.ravel())] = (both * weights.ravel()) @ both.T
            parts = {"elements": elements, "a": a, "g": g, "weights": weights}
            arrays |= {f"M_{part}_{number}": array for part, array in parts.items()}
    else:
        return (
            (multiply(Described("diagonal", {"M": np.linspace(0.5, 1, N).astype(dtype)})), None)
            if kind
            else (None, None)
        )
    arrays = {name: array if array.dtype.kind == "i" else array.astype(dtype) for name, array in arrays.items()}
    return multiply(Described(kind, arrays, 1.5)), matrix


def iteration(method, A, B, M=None, shifts=SHIFTS):
    """Return an iteration in NumPy, and the packing of it."""
    if method == "cg":
        state = BlockCG(lambda V: V @ A, M, B)
        return state, packing.PackedCG(state)
    shifts = np.tile(shifts if method == "shifted cg" else [0.25], (len(B), 1))
    state = ShortRecurrence(lambda V: V @ A, M, B, shifts, method.removeprefix("shifted "))
    return state, packing.PackedShortRecurrence(state)


def launch(packed, A, steps, M=None, *, terms=ALONE, targets=0.0, product=lambda A, V: V @ A):
    """Launch steps. Return the norms and the facts. The iteration has the state."""
    dtype = A.dtype
    fixed = packing.fixed(packed.shifts, terms, M, dtype)
    sizes = several_steps.Sizes(packed.width, N, dtype, fixed.form)
    program = jax.jit(several_steps.several(METHODS[packed.prefix], product, sizes))
    systems = packed.rows * (packed.state.shifts.shape[1] if isinstance(packed.state, ShortRecurrence) else 1)
    numbers = [np.array([terms.scale, terms.shift]), packed.targets(np.full(systems, targets)), np.int32(steps)]
    arguments = [*packed.pack(), packed.constant, *fixed.preconditioner, *fixed.low_rank, *numbers]
    specs = itertools.chain(*several_steps.specs_of(METHODS[packed.prefix], sizes))
    assert [(spec.shape, spec.dtype) for spec in specs] == [(each.shape, each.dtype) for each in arguments]
    state, norms, facts = program(A, *arguments)
    packed.unpack(list(map(np.asarray, state)))
    taken, usual, ended = map(int, facts)
    return packed.norms(np.asarray(norms)[:taken]), usual, ended


def solutions(state):
    return state.X if isinstance(state, BlockCG) else state.solutions()


def stepped(state, steps):
    """Return the norms of steps in NumPy."""
    return np.array([next(state.advance(np.zeros(1), 1)) for _ in range(steps)])


EQUAL = [
    *[(method, "", rows, np.float64) for method in ("cg", "minres", "shifted cg") for rows in (1, 3)],
    *[(method, kind, 3, np.float64) for method in ("cg", "minres") for kind in ("diagonal", "low_rank", "kronecker")],
    *[(method, "", 2, np.float32) for method in ("cg", "minres", "shifted cg")],
    ("minres", "low_rank", 1, np.float32),
]


@pytest.mark.parametrize(("method", "kind", "rows", "dtype"), EQUAL)
def test_steps_equal_those_in_numpy_in_one_launch_or_two(method, kind, rows, dtype):
    tolerance = 1e-9 if dtype == np.float64 else 1e-4
    A, B, (M, _) = dense(dtype), right_hand_sides(rows, dtype), preconditioner(kind, dtype)
    here, _ = iteration(method, A, B, M)
    expected = stepped(here, 5)
    state, packed = iteration(method, A, B, M)
    norms, usual, _ = launch(packed, A, 2, M)
    assert usual
    more, usual, _ = launch(packed, A, 3, M)
    assert usual
    np.testing.assert_allclose(np.vstack([norms, more]), expected, rtol=tolerance)
    np.testing.assert_allclose(solutions(state), solutions(here), atol=tolerance)
    np.testing.assert_allclose(stepped(state, 1), stepped(here, 1), rtol=10 * tolerance)


@pytest.mark.parametrize("kind", ["low_rank", "kronecker"])
def test_a_described_preconditioner_is_its_matrix(kind):
    M, matrix = preconditioner(kind)
    B = right_hand_sides(2)
    np.testing.assert_allclose(M(B), B @ matrix, rtol=1e-12)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_program_has_the_terms_of_the_operator(rank):
    U, C = np.random.default_rng(3).standard_normal((N, 3)), np.diag([0.5, 1.0, 2.0])
    terms = Terms(2.0, 0.5, *((U, C) if rank else ()))
    A, B = dense(), right_hand_sides(1)
    whole = 2 * A + 0.5 * np.eye(N) + (U @ C @ U.T if rank else 0)
    here, _ = iteration("minres", whole, B)
    _, packed = iteration("minres", A, B)
    norms, _, _ = launch(packed, A, 5, terms=terms)
    np.testing.assert_allclose(norms, stepped(here, 5), rtol=1e-9)


@pytest.mark.parametrize("method", ["cg", "minres", "shifted cg"])
def test_the_steps_end_when_all_residuals_are_small(method):
    A = dense()
    _, packed = iteration(method, A, right_hand_sides(2))
    norms, usual, ended = launch(packed, A, 64, targets=0.5)
    assert (usual, ended) == (1, 0)
    assert 1 < len(norms) < 64
    assert norms[-1].max() <= 0.5 < norms[-2].max()


@pytest.mark.parametrize("method", ["cg", "minres", "shifted cg"])
def test_a_launch_ends_before_a_product_that_is_not_finite(method):
    """Each step reaches one more element, and the product with element 10 is NaN."""
    A = np.diag(np.full(N, 2.5)) - np.eye(N, k=1) - np.eye(N, k=-1)
    B = np.eye(N)[:1]
    here, _ = iteration(method, A, B)
    expected = stepped(here, 10)
    state, packed = iteration(method, A, B)
    norms, usual, _ = launch(packed, A, 20, product=lambda A, V: jax.numpy.where(V[:, 10:11] == 0, V @ A, np.nan))
    assert not usual
    np.testing.assert_allclose(norms, expected, rtol=1e-12)
    np.testing.assert_allclose(solutions(state), solutions(here), rtol=1e-12)
    state._multiply = lambda V: np.where(V[:, 10:11] == 0, V @ A, np.nan)
    with pytest.raises(NotFiniteError):
        state.step()


@pytest.mark.parametrize("method", ["cg", "shifted cg"])
def test_a_launch_ends_before_a_direction_without_positive_curvature(method):
    A = dense() - 0.3 * np.eye(N)
    here, _ = iteration(method, A, right_hand_sides(2))
    state, packed = iteration(method, A, right_hand_sides(2))
    norms, usual, _ = launch(packed, A, 64)
    assert not usual
    np.testing.assert_allclose(
        solutions(state), solutions(here) if not len(norms) else _after(here, len(norms)), rtol=1e-7
    )
    if method == "cg":
        with pytest.raises(IndefiniteError) as raised:
            state.step()
        found, shift = raised.value, 0.0
    else:  # The other shifts go on, in launches again.
        state.step()
        assert state.indefinite is not None
        found, shift = state.indefinite, SHIFTS[0]
        before, (norms, _, _) = solutions(state), launch(packed, A, 5)
        while not len(norms):  # The right-hand sides fail one after the other.
            state.step()
            before, (norms, _, _) = solutions(state), launch(packed, A, 5)
        failed = state.failed.T.reshape(-1)
        assert 0 < failed.sum() < len(failed)
        assert np.array_equal(solutions(state)[failed], before[failed])
        assert not (norms[:, failed]).any()
        assert np.isfinite(solutions(state)).all()
    direction = found.direction
    assert direction @ (A + shift * np.eye(N)) @ direction == pytest.approx(found.curvature, abs=1e-9)


def _after(state, steps):
    stepped(state, steps)
    return solutions(state)


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_launch_ends_before_a_step_whose_preconditioner_is_not_positive_definite(method):
    A, B = dense(), np.eye(N)[:1]
    weights = np.ones(N)
    weights[1:] = -1
    M = multiply(Described("diagonal", {"M": weights}))
    state, packed = iteration(method, A, B, M)
    norms, usual, _ = launch(packed, A, 5, M)
    assert (len(norms), usual) == (0, 0)
    with pytest.raises(InvalidArgumentError, match="M is not positive definite"):
        state.step()


def test_minres_says_when_no_step_can_follow():
    """A has no inverse, and b is not in its range."""
    A = np.diag(np.r_[0.0, 0.0, np.linspace(1, 2, N - 2)]) - 0.25 * np.eye(N)  # The iteration adds 0.25.
    here, _ = iteration("minres", A, np.ones((1, N)))
    state, packed = iteration("minres", A, np.ones((1, N)))
    norms, usual, ended = launch(packed, A, 64)
    assert (usual, ended) == (1, 1)
    assert state.solved.least_squares.all()
    np.testing.assert_allclose(norms[-1], np.sqrt(2), rtol=1e-9)
    np.testing.assert_allclose(stepped(here, len(norms))[-1], np.sqrt(2), rtol=1e-9)
    assert here.finished


def test_right_hand_sides_that_depend_on_each_other_are_a_step_of_numpy():
    A, B = dense(), right_hand_sides(3)
    B[2] = B[0] + B[1] + 1e-9 * B[2]
    state, packed = iteration("cg", A, B)
    assert len(state.Q) == 3
    reached = []
    for _ in range(100):
        norms, usual, _ = launch(packed, A, 64, targets=1e-9)
        reached += list(norms)
        if usual:
            break
        reached += list(state.advance(np.zeros(3), 1))
    np.testing.assert_allclose(solutions(state) @ A, B, atol=1e-8)
    assert reached[-1].max() <= 1e-9


def test_a_block_is_narrower_without_a_right_hand_side_of_zeros():
    A, B = dense(), right_hand_sides(3)
    B[2] = 0
    state, packed = iteration("cg", A, B)
    assert len(state.Q) == 2
    _, usual, _ = launch(packed, A, 64, targets=1e-9)
    assert usual
    np.testing.assert_allclose(state.X @ A, B, atol=1e-8)


@pytest.mark.parametrize(
    "form", [Form(), Form(4), Form(1, 2, "low_rank", (8,)), Form(M="kronecker", sizes=(3, 4, 5, 2))]
)
def test_a_form_is_part_of_a_name(form):
    name = Name("minres_hvp", "reverse_over_reverse", "default", (0, 2), form)
    assert Name.parse(str(name)) == name
    assert Name.parse(f"cg_hvp{form}").form == form
