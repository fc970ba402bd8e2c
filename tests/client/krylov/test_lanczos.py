"""Lanczos runs equal dense matrices, can be extended, and say why they stop."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy.linalg import eigh_tridiagonal

import hvpd
from hvpd._krylov.lanczos import INVARIANT, NOT_FINITE, Lanczos, start_block
from hvpd._krylov.space import LocalSpace


def symmetric(n, seed=0, dtype=np.float64):
    A = np.random.default_rng(seed).standard_normal((n, n))
    return ((A + A.T) / 2).astype(dtype)


def lanczos(A, steps, *, block=1, v0=None, reorthogonalize="full", seed=0):
    space = LocalSpace(lambda rows: rows @ A, len(A), A.dtype, reorthogonalize=reorthogonalize)
    return Lanczos(space, start_block(len(A), A.dtype, v0, seed, block)).extend(steps)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize(("dtype", "orthogonal", "exact"), [("float64", 1e-12, 1e-12), ("float32", 1e-6, 1e-5)])
def test_the_basis_is_orthonormal_and_projects_the_operator(dtype, orthogonal, exact, block):
    A = symmetric(200, dtype=np.dtype(dtype))
    run = lanczos(A, 160 // block, block=block)
    Q = run.combine(np.eye(run.size)).astype(np.float64)
    assert Q.shape == (200, 160)
    assert abs(Q.T @ Q - np.eye(160)).max() < orthogonal
    assert abs(Q.T @ A.astype(np.float64) @ Q - run.projected).max() < exact * np.linalg.norm(A, 2)


def test_a_vector_that_is_almost_in_the_space_becomes_orthogonal_to_it():
    """One pass leaves rounding that is large relative to the rest of the vector."""
    A = symmetric(60)
    space = LocalSpace(lambda rows: rows @ A, 60, A.dtype)
    space.append(start_block(60, A.dtype, None, 0, 1))
    list(space.extend(20))
    within = space.combine(np.eye(space.rows)).sum(axis=0)
    space.append(within[None] + 1e-10 * np.random.default_rng(1).standard_normal((1, 60)))
    Q = space.combine(np.eye(space.rows))
    assert len(Q) == 22
    assert abs(Q @ Q.T - np.eye(22)).max() < 1e-13


def test_all_steps_give_all_eigenvalues_and_vectors():
    A = symmetric(60)
    pairs = lanczos(A, 60).ritz()
    values, _ = np.linalg.eigh(A)
    assert abs(pairs.values - values).max() < 1e-12 * abs(values).max()
    assert abs(A @ pairs.vectors - pairs.vectors * pairs.values).max() < 1e-12 * abs(values).max()
    assert pairs.converged.all()


def test_alphas_and_betas_are_the_tridiagonal_matrix():
    run = lanczos(symmetric(50), 20)
    assert run.alphas.shape == (20,)
    assert run.betas.shape == (19,)
    values = eigh_tridiagonal(run.alphas, run.betas, eigvals_only=True)
    assert abs(values - run.ritz().values).max() < 1e-13 * abs(values).max()


def test_residuals_are_the_true_ones():
    A = symmetric(80)
    pairs = lanczos(A, 25).ritz(6, which="BE")
    true = np.linalg.norm(A @ pairs.vectors - pairs.vectors * pairs.values, axis=0)
    assert np.allclose(pairs.residuals, true, rtol=1e-6, atol=1e-12)
    assert not pairs.converged.all()


@pytest.mark.parametrize("block", [1, 3])
def test_an_extended_run_is_the_longer_run(block):
    A = symmetric(70)
    whole, parts = lanczos(A, 20, block=block), lanczos(A, 7, block=block).extend(13)
    assert np.array_equal(whole.projected, parts.projected)
    assert np.array_equal(whole.combine(np.eye(whole.size)), parts.combine(np.eye(parts.size)))
    assert parts.products == 20 * block


@pytest.mark.parametrize("block", [1, 3])
def test_an_invariant_space_is_data(block):
    A = np.diag(np.repeat([1.0, 2.0, 5.0], [40, 30, 10]))
    run = lanczos(A, 20, block=block)
    assert run.breakdown
    assert run.reason == INVARIANT
    assert run.products == 3 * block
    assert np.allclose(run.ritz().values, np.repeat([1.0, 2.0, 5.0], block))
    assert run.extend(5).products == 3 * block


def test_a_block_that_loses_rank_goes_on_with_fewer_rows():
    A = np.diag(np.r_[np.arange(1.0, 31.0), np.zeros(30)])
    start = np.eye(60)[:, [0, 40]] + 0  # An eigenvector, and a vector of the kernel ...
    start[:30, 1] = 1.0  # ... with a part of all others.
    run = lanczos(A, 10, block=2, v0=start)
    assert run.size < 20
    Q = run.combine(np.eye(run.size))
    assert abs(Q.T @ Q - np.eye(run.size)).max() < 1e-12
    assert abs(Q.T @ A @ Q - run.projected).max() < 1e-12


def test_without_reorthogonalization_ghosts_are_marked():
    A = np.diag(np.r_[np.linspace(0, 1, 199), 10.0])
    run = lanczos(A, 120, reorthogonalize="none")
    pairs = run.ritz()
    assert pairs.vectors is None
    assert abs(pairs.values[-1] - 10) < 1e-10
    copies = pairs.values > 9
    assert copies.sum() > 1
    assert pairs.ghosts[copies].sum() == copies.sum() - 1
    with pytest.raises(hvpd.InvalidArgumentError, match="keeps no basis"):
        run.combine(np.eye(3))


@pytest.mark.parametrize("block", [1, 3])
def test_a_run_that_keeps_no_basis_may_have_more_than_n_steps(block):
    A = symmetric(40)
    run = lanczos(A, 100, block=block, reorthogonalize="none")
    assert run.size == 100 * block
    short = [lanczos(A, 5, block=block, reorthogonalize=each).ritz().values for each in ("full", "none")]
    assert np.allclose(*short, atol=1e-10)
    pairs = run.ritz()
    assert np.allclose(pairs.values[~pairs.ghosts][[0, -1]], np.linalg.eigvalsh(A)[[0, -1]])


def test_a_product_that_is_not_finite_keeps_the_state():
    A = symmetric(60)
    count = iter(range(100))
    space = LocalSpace(lambda rows: rows @ A * (np.nan if next(count) == 12 else 1.0), 60, A.dtype)
    run = Lanczos(space, start_block(60, A.dtype, None, 0, 1)).extend(30)
    assert run.reason == NOT_FINITE
    assert (run.steps, run.products) == (12, 12)
    assert np.array_equal(run.projected, lanczos(A, 12).projected)
    assert np.array_equal(run.extend(8).projected, lanczos(A, 20).projected)


@pytest.mark.parametrize(
    ("v0", "block", "message"),
    [
        (np.zeros(9), 1, "v0 is zero"),
        (np.full(9, np.nan), 1, "v0 holds NaN"),
        (np.ones(8), 1, r"of shape \(9,\), got float64 of shape \(8,\)"),
        (np.ones((9, 2)), 2, "2 start vectors span a space of dimension 1"),
        (np.ones(9) * 1j, 1, "must be real"),
    ],
)
def test_bad_start_vectors(v0, block, message):
    with pytest.raises(hvpd.InvalidArgumentError, match=message):
        lanczos(symmetric(9), 3, v0=v0, block=block)


def test_a_basis_that_is_here_has_no_id_and_needs_no_pin():
    run = lanczos(symmetric(9), 5)
    run.pin(10)
    assert run.id == ""
    with pytest.raises(hvpd.InvalidArgumentError, match="seconds must be an integer"):
        run.pin(-1)


def test_more_steps_than_dimensions_are_refused_and_change_nothing():
    run = lanczos(symmetric(9), 5)
    with pytest.raises(
        hvpd.InvalidArgumentError, match=r"at most n = 9 .* got 4 \* 3: take at most n // block = 3 steps"
    ):
        hvpd.krylov.lanczos(symmetric(9), 4, block=3)
    with pytest.raises(hvpd.InvalidArgumentError, match=r"the run has 5 vectors of n = 9; take at most 4 steps"):
        run.extend(5)
    assert run.steps == 5
    with pytest.raises(hvpd.InvalidArgumentError, match="k must be an integer from 1 to 5"):
        run.ritz(6)
    with pytest.raises(hvpd.InvalidArgumentError, match=r"m up to 6, got float64 \(7, 1\)"):
        run.combine(np.ones((7, 1)))


@pytest.mark.parametrize(
    "call",
    [
        lambda run: run.extend(1),
        lambda run: run.ritz(),
        lambda run: run.ritz(2),
        lambda run: run.combine(np.eye(5)),
        lambda run: run.pin(5),
        lambda run: run.restart(np.arange(2)),
        lambda run: run.enlarge(1),
    ],
    ids=["extend", "ritz", "two pairs", "combine", "pin", "restart", "enlarge"],
)
def test_a_closed_run_says_so(call):
    A = symmetric(9)
    with lanczos(A, 5) as run:
        assert not run.closed
    assert run.closed
    with pytest.raises(
        hvpd.HvpdError, match=r"this run is closed, and its basis is gone: call \w+\(\) before"
    ) as raised:
        call(run)
    assert raised.value.reason == "RUN_CLOSED"
    run.close()
    pairs = run.ritz(2, vectors=False)
    assert np.array_equal(pairs.values, lanczos(A, 5).ritz(2).values)
    assert np.array_equal(run.projected, lanczos(A, 5).projected)


@pytest.mark.parametrize("keep", [[9], [-1], [1, 1], [0.5], [[1]]])
def test_a_restart_keeps_positions_that_there_are(keep):
    run = lanczos(symmetric(9), 5)
    with pytest.raises(hvpd.InvalidArgumentError, match="keep must be different positions from 0 to 4 among"):
        run.restart(keep)
    run.restart(np.arange(3, 5))
    assert run.extend(2).size == 4


def test_a_restart_has_its_ritz_pairs_before_the_next_step():
    A = symmetric(40)
    run = lanczos(A, 20)
    before = run.ritz(3)
    run.restart(np.arange(15, 20))
    after = run.ritz(3)
    np.testing.assert_allclose(after.values, before.values, rtol=1e-12)
    np.testing.assert_allclose(after.residuals, before.residuals, rtol=1e-9)
    np.testing.assert_allclose(abs(np.sum(after.vectors * before.vectors, axis=0)), 1.0, rtol=1e-12)
    run.restart([3, 4])
    np.testing.assert_allclose(run.ritz().values, before.values[1:], rtol=1e-12)
    run.extend(20)
    np.testing.assert_allclose(run.ritz(1).values, np.linalg.eigvalsh(A)[-1:], rtol=1e-9)


def test_too_few_dimensions_are_explained():
    with pytest.raises(hvpd.InvalidArgumentError, match=r"no Ritz pairs: all steps .* are done; extend\(\) takes more"):
        lanczos(symmetric(9), 0).ritz(1)
    broken = lanczos(np.full((9, 9), np.nan), 3)
    with pytest.raises(hvpd.InvalidArgumentError, match=f"has taken no step, .*: {NOT_FINITE}"):
        broken.ritz(3)
    empty = broken.ritz()
    assert (empty.values.shape, empty.vectors.shape, empty.reason) == ((0,), (9, 0), NOT_FINITE)
    with pytest.raises(
        hvpd.InvalidArgumentError, match=f"from 1 to 1, got 3: the run has 1 dimension, and {INVARIANT}$"
    ):
        lanczos(np.eye(9), 5).ritz(3)
    with pytest.raises(hvpd.InvalidArgumentError, match="k must be an integer from 1 to 5, got 0"):
        lanczos(symmetric(9), 5).ritz(0)


def test_threads_that_share_a_run_take_turns():
    A = symmetric(60)
    both, second = threading.Barrier(2), threading.Event()
    multiplying = threading.Lock()

    def multiply(rows):
        if not multiplying.acquire(blocking=False):
            second.set()
            return rows @ A
        try:
            second.wait(0.02)  # Without turns, the other thread comes here meanwhile.
            return rows @ A
        finally:
            multiplying.release()

    run = Lanczos(LocalSpace(multiply, 60, A.dtype), start_block(60, A.dtype, None, 0, 1))

    def extend():
        both.wait()
        for _ in range(5):
            run.extend(1).ritz()

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(extend) for _ in range(2)]:
            each.result()
    assert not second.is_set()
    assert np.array_equal(run.projected, lanczos(A, 10).projected)


def test_a_run_cannot_be_pickled_and_says_what_can():
    run = lanczos(symmetric(9), 5)
    with pytest.raises(hvpd.HvpdError, match=r"take run.ritz\(k\).*\.save writes") as raised:
        pickle.dumps(run)
    assert raised.value.reason == "NOT_PICKLABLE"
    pairs = pickle.loads(pickle.dumps(run.ritz(2)))
    assert np.array_equal(pairs.values, run.ritz(2).values)


def test_a_projected_matrix_is_decomposed_once_until_it_changes(monkeypatch):
    A = symmetric(60)
    count = 0
    decompose = Lanczos._decompose

    def counted(run):
        nonlocal count
        count += 1
        return decompose(run)

    monkeypatch.setattr(Lanczos, "_decompose", counted)
    run = lanczos(A, 20)
    values, Y, couplings = run.decomposed()
    values[:], Y[:], couplings[:] = 0, 0, 0  # Copies.
    first = run.ritz(3, vectors=False)
    run.restart(np.arange(15, 20))
    assert count == 1
    np.testing.assert_allclose(run.ritz(3).values, first.values, rtol=1e-12)
    sizes = []
    run.extend(10, progress=lambda *_: sizes.append(len(run.decomposed()[0])))
    assert sizes == list(range(6, 16))
    assert run.ritz().values.size == 15
    run.enlarge(1)
    np.testing.assert_allclose(run.ritz(3).values, np.linalg.eigvalsh(run.projected)[-3:], rtol=1e-12)
