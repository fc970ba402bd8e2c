"""Linear systems: equal to dense solves; honest about what fails."""

import numpy as np
import pytest
import scipy.sparse.linalg
from scipy.sparse.linalg import LinearOperator

import hvpd
from hvpd import krylov
from hvpd._krylov.conjugate_gradients import BlockCG

N = 120
rng = np.random.default_rng(0)
Q = np.linalg.qr(rng.standard_normal((N, N)))[0]
VALUES = np.logspace(0, 3, N)
SIGNS = np.where(np.arange(N) % 3, 1.0, -1.0)
B = rng.standard_normal((N, 4))
SHIFTS = [0.0, 0.1, 1.0, 100.0]


def matrix(values, dtype=np.float64):
    A = (Q * values) @ Q.T
    return ((A + A.T) / 2).astype(dtype)


A = matrix(VALUES)
INVERSE = matrix(np.exp(0.3 * np.sin(np.arange(N))) / VALUES)


def error(x, A, b):
    exact = np.linalg.solve(A, b)
    return np.linalg.norm(x - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("method", ["cg", "minres"])
@pytest.mark.parametrize("M", [None, INVERSE, 1 / np.diag(A)], ids=["none", "operator", "diagonal"])
@pytest.mark.parametrize("b", [B[:, 0], B], ids=["one", "several"])
def test_solutions_equal_dense_ones(method, M, b):
    solution = krylov.solve(A, b, tol=1e-13, M=M, method=method)
    assert solution.x.shape == b.shape
    assert error(solution.x, A, b) < 1e-10
    true = np.linalg.norm(b - A @ solution.x, axis=0)
    assert np.allclose(solution.residual_norms[-1], true, rtol=0.1, atol=1e-12)
    if solution.converged:
        assert (true <= 1.1e-13 * np.linalg.norm(b, axis=0)).all()


def test_cg_takes_as_many_steps_as_scipys():
    steps = []
    scipy.sparse.linalg.cg(A, B[:, 0], rtol=1e-9, callback=steps.append)
    solution = krylov.solve(A, B[:, 0], tol=1e-9)
    assert abs(len(solution.residual_norms) - 1 - len(steps)) <= 2
    assert solution.products == len(solution.residual_norms)  # One for each step, and one to check.
    assert solution.converged


def test_several_right_hand_sides_share_their_space():
    many = krylov.solve(A, np.c_[B, B[:, 0], np.zeros(N)], tol=1e-10)
    one = krylov.solve(A, B[:, 0], tol=1e-10)
    assert many.converged
    assert len(many.residual_norms) < 0.5 * len(one.residual_norms)
    assert error(many.x[:, 4], A, B[:, 0]) < 1e-8
    assert not many.x[:, 5].any()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_right_hand_sides_are_one_row_of_the_block(dtype, seed):
    """Their scales differ, and one is zero. The block multiplies two vectors."""
    b = np.random.default_rng(seed).standard_normal((2, N))
    columns = np.c_[b[0], b[1], -3 * b[0], 1e5 * b[1], np.zeros(N), b[0]].astype(dtype)
    state = BlockCG(lambda V: V @ A.astype(dtype), None, columns.T)
    assert len(state.Q) == 2
    solution = krylov.solve(A.astype(dtype), columns, tol=1e-4)
    assert solution.converged
    assert not solution.x[:, 4].any()


@pytest.mark.parametrize("method", ["cg", "minres"])
@pytest.mark.parametrize("b", [B[:, 0], B[:, :2]], ids=["one", "several"])
def test_all_shifts_come_from_one_space(method, b):
    solution = krylov.solve(A, b, tol=1e-12, shifts=SHIFTS, method=method)
    assert solution.converged
    assert solution.x.shape == (4, *b.shape)
    one = krylov.solve(A, b, tol=1e-12, method="minres")
    for shift, x in zip(SHIFTS, solution.x, strict=True):
        shifted = A + shift * np.eye(N)
        single = krylov.solve(shifted, b, tol=1e-12, method=method)
        assert np.linalg.norm(x - single.x) < 1e-9 * np.linalg.norm(single.x)
        assert error(x, shifted, b) < 1e-9
    assert solution.products < 1.2 * one.products + 4 * b.size // N


def test_minres_solves_indefinite_systems():
    indefinite = matrix(np.linspace(1, 20, N) * SIGNS)
    solution = krylov.solve(indefinite, B[:, 0], tol=1e-11, method="minres")
    assert solution.converged
    assert error(solution.x, indefinite, B[:, 0]) < 1e-9
    reference, _ = scipy.sparse.linalg.minres(indefinite, B[:, 0], rtol=1e-14)
    assert np.linalg.norm(solution.x - reference) < 1e-8 * np.linalg.norm(reference)


@pytest.mark.parametrize("arguments", [{}, {"shifts": [0.0, 1e4]}])
def test_cg_returns_the_direction_of_negative_curvature(arguments):
    indefinite = matrix(VALUES * SIGNS)
    solution = krylov.solve(indefinite, B[:, 0], **arguments)
    assert not solution.converged
    assert "not positive definite" in solution.reason
    d = solution.direction
    assert abs(np.linalg.norm(d) - 1) < 1e-12
    assert np.isclose(d @ indefinite @ d, solution.curvature)
    assert solution.curvature < 0


def test_a_singular_operator():
    singular = matrix(np.r_[0.0, np.linspace(1, 9, N - 1)])
    kernel = Q[:, 0]
    solution = krylov.solve(singular, B[:, 0], tol=1e-10, method="minres")
    assert "no inverse" in solution.reason
    assert np.isclose(solution.residual_norms[-1], abs(kernel @ B[:, 0]), rtol=1e-6)
    inside = B[:, 0] - kernel * (kernel @ B[:, 0])
    for method in ("cg", "minres"):
        assert krylov.solve(singular, inside, tol=1e-10, method=method).converged
    indefinite = krylov.solve(singular, B[:, 0], tol=1e-10)
    assert "no positive curvature" in indefinite.reason
    assert abs(indefinite.direction @ kernel) > 0.99


@pytest.mark.parametrize("M", [None, np.full(N, 0.5)], ids=["none", "diagonal"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_minres_blames_rounding_for_a_right_hand_side_in_the_range(dtype, M):
    singular = matrix(np.r_[np.zeros(40), np.linspace(0.1, 1, 80)], dtype)
    b, eps = singular @ B[:, 0].astype(dtype), np.finfo(dtype).eps
    residuals = []
    for tol in (10 * eps, 0.1 * eps, 0.0):
        solution = krylov.solve(singular, b, tol=tol, M=M, method="minres")
        assert solution.converged or "rounding" in solution.reason
        residuals.append(np.linalg.norm(b - singular.astype(float) @ solution.x) / np.linalg.norm(b))
    assert residuals[2] <= max(1.5 * residuals[0], 2 * eps)  # A smaller tolerance gives no worse iterate.
    assert residuals[1] <= 2 * eps


def test_float32_converges_or_says_that_rounding_forbids_it():
    single = A.astype(np.float32)
    loose = krylov.solve(single, B, tol=1e-3)
    assert loose.converged
    assert loose.x.dtype == np.float32
    tight = krylov.solve(single, B[:, 0], tol=1e-12)
    assert not tight.converged
    assert "rounding" in tight.reason
    assert error(tight.x.astype(float), single.astype(float), B[:, 0]) < 1e-3


def test_a_start_saves_steps_and_zero_needs_none():
    near = np.linalg.solve(A, B[:, 0]) + 1e-9 * B[:, 1]
    cold, warm = krylov.solve(A, B[:, 0]), krylov.solve(A, B[:, 0], x0=near)
    assert warm.converged
    assert warm.products < cold.products
    zero = krylov.solve(A, np.zeros(N))
    assert zero.converged
    assert (zero.products, zero.residual_norms.tolist()) == (0, [0.0])


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_limit_and_a_late_nan_keep_x(method):
    stopped = krylov.solve(A, B[:, 0], maxiter=30, tol=1e-10, method=method)
    assert stopped.reason.startswith("the number of steps is at its limit, maxiter=30: allow more steps, or pass")
    assert "limit" in stopped.reason
    assert len(stopped.residual_norms) == 31
    count = iter(range(1000))
    broken = LinearOperator(A.shape, matvec=lambda v: A @ v * (np.nan if next(count) == 30 else 1), dtype=float)
    solution = krylov.solve(broken, B[:, 0], tol=1e-10, method=method)
    assert "NaN" in solution.reason
    assert not solution.converged
    assert np.allclose(solution.x, stopped.x, rtol=1e-12)


def test_preconditioners_of_hvpd():
    shifted = A + np.eye(N)
    plain = krylov.solve(shifted, B[:, 0], tol=1e-8)
    M = hvpd.nystrom(A, rank=60, shift=1.0)
    preconditioned = krylov.solve(shifted, B[:, 0], tol=1e-8, M=M)
    assert preconditioned.converged
    assert preconditioned.products < 0.6 * plain.products


def test_the_solution_has_the_kind_of_the_right_hand_side(tmp_path):
    import jax.numpy as jnp

    b = jnp.asarray(B[:, 0], jnp.float32)
    solution = krylov.solve(A.astype(np.float32), b, tol=1e-3, x0=b)
    assert isinstance(solution.x, jnp.ndarray)
    assert np.allclose(solution.x, np.linalg.solve(A, B[:, 0]), atol=1e-2)
    solution.save(tmp_path / "a.npz")
    assert np.array_equal(krylov.load(tmp_path / "a.npz").x, solution.x)
    assert krylov.lanczos(A, 3, v0=b).steps == 3


class Curvature:
    shape, dtype = (N, N), np.dtype(float)

    def inverse(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"M": -INVERSE}, "M is not positive definite: v'Mv is -"),
        ({"M": -INVERSE, "method": "minres"}, "M is not positive definite: r'Mr is -"),
        ({"M": -np.ones(N)}, f"must have {N} positive elements"),
        ({"M": np.ones(3)}, f"must have {N} positive elements, got shape \\(3,\\)"),
        ({"M": np.eye(3)}, r"M must have the shape \(120, 120\) of A, got \(3, 3\)"),
        ({"M": Curvature()}, r"pass M.inverse\(\)"),
        ({"M": krylov.diagonal(A, products=N)}, "got its diagonal: pass 1 / M.values"),
        ({"M": "text"}, "M must be an operator, a matrix or a vector"),
        ({"M": np.full((N, N), np.nan)}, "M is not finite"),
        ({"x0": np.ones(3)}, "x0 must be real, of shape"),
        ({"x0": np.ones((N, 2))}, r"x0 must have the shape of b, \(120,\), got \(120, 2\)"),
        ({"shifts": [1.0], "M": INVERSE}, "pass no x0 and no M"),
        ({"shifts": [[1.0]]}, "shifts must be finite real numbers"),
        ({"shifts": [np.nan]}, "shifts must be finite real numbers"),
        ({"method": "gmres"}, "method must be one of cg, minres"),
        ({"tol": -1.0}, "tol must be at least 0"),
        ({"maxiter": -1}, "maxiter must be an integer"),
        ({"b": np.ones(5)}, r"b must be real, of shape \(120,\) or \(120, k\), got float64 of shape \(5,\)"),
        ({"b": np.full(N, np.inf)}, "b holds NaN or infinity"),
        ({"b": np.ones(N) * 1j}, "b must be real"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(hvpd.InvalidArgumentError, match=message):
        krylov.solve(A, **({"b": B[:, 0]} | arguments))


@pytest.mark.parametrize(
    ("dtype", "size"), [("float64", 1e300), ("float64", 1e-300), ("float32", 1e36), ("float32", 1e-30)]
)
@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({}, 1),
        ({}, 3),
        ({"method": "minres"}, 3),
        ({"M": 1 / np.diag(A)}, 1),
        ({"shifts": [0.0, 5.0]}, 1),
        ({"x0": np.ones((N, 1))}, 1),
    ],
    ids=["one", "several", "minres", "M", "shifts", "x0"],
)
def test_right_hand_sides_of_all_sizes(dtype, size, options, columns):
    b = B[:, :columns].astype(dtype)
    one = krylov.solve(A.astype(dtype), b, tol=1e-4, **options)
    large = dict(options, x0=size * options["x0"]) if "x0" in options else options
    found = krylov.solve(A.astype(dtype), b * np.dtype(dtype).type(size), tol=1e-4, **large)
    assert found.converged
    assert found.x.dtype == dtype
    np.testing.assert_allclose(found.x / size, one.x, rtol=1e-2, atol=1e-5)
    np.testing.assert_allclose(found.residual_norms[0] / size, one.residual_norms[0], rtol=1e-4)


@pytest.mark.parametrize("size", [1e100, 1e-100])
def test_a_solution_out_of_range_is_no_solution(size):
    found = krylov.solve(A / size, B[:, 0] * size**2.5)
    assert not found.converged
    assert "too large or too small for float64: scale" in found.reason
    rounded = krylov.solve(A.astype(np.float32), B[:, 0] * 1e-60)
    assert not rounded.converged
    assert "too small for float32" in rounded.reason


def test_a_start_far_beyond_the_right_hand_side_is_refused():
    with pytest.raises(hvpd.InvalidArgumentError, match="x0 is too large beside b"):
        krylov.solve(A, 1e-300 * B[:, 0], x0=1e300 * B[:, 1])


@pytest.mark.parametrize("columns", [1, 2])
def test_a_shift_that_fails_leaves_the_others(columns):
    b, shifts = B[:, :columns], [-10.0, 1.0, -100.0, 0.0]
    found = krylov.solve(A, b, tol=1e-10, shifts=shifts)
    assert not found.converged
    assert "about the shifts -100, -10 of 4" in found.reason
    assert found.curvature <= 0
    for place in (1, 3):
        assert error(found.x[place], A + shifts[place] * np.eye(N), b) < 1e-7
        assert (found.residual_norms[-1, place] <= 1e-10 * np.linalg.norm(b, axis=0)).all()
    for place in (0, 2):
        true = np.linalg.norm(b - (A + shifts[place] * np.eye(N)) @ found.x[place], axis=0)
        np.testing.assert_allclose(found.residual_norms[-1, place], true, rtol=1e-6)
        assert (found.residual_norms[1:, place] > 1e-3).all()


@pytest.mark.parametrize("M", [np.triu(INVERSE), scipy.sparse.csr_array(np.triu(INVERSE))], ids=["array", "sparse"])
def test_a_preconditioner_that_is_not_symmetric_is_refused(M):
    with pytest.raises(hvpd.InvalidArgumentError, match=r"M must be symmetric, and M\[") as raised:
        krylov.solve(A, B[:, 0], M=M)
    assert raised.value.reason == "NOT_SYMMETRIC"
    assert krylov.solve(A, B[:, 0], M=np.linalg.inv(A)).converged  # With its rounding.


@pytest.mark.parametrize("arguments", [{"b": B[:, 0] * 1j}, {"b": B[:, 0], "x0": B[:, 0] * 1j}], ids=["b", "x0"])
def test_complex_vectors_have_the_wrong_dtype(arguments):
    with pytest.raises(hvpd.InvalidArgumentError, match="must be real") as raised:
        krylov.solve(A, **arguments)
    assert raised.value.reason == "DTYPE"
