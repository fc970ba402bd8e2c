"""The program of several Lanczos steps equals the iteration in NumPy."""

import jax
import numpy as np
import pytest

from hvpd._krylov.space import LocalSpace
from hvpd_server.derivation import lanczos


@pytest.fixture(autouse=True)
def _wide():
    with jax.enable_x64(True):
        yield


def multiply(x, v):
    return x * v + 0.1 * (jax.numpy.roll(v, 1) + jax.numpy.roll(v, -1))


def run(x, Q, rows, count, *, terms=(1.0, 0.0, 0.0), product=multiply, platform="cpu"):
    steps = lanczos.steps_of(x.size)
    program = jax.jit(lanczos.lanczos_of(product, steps, platform))
    return [np.asarray(part) for part in program(x, Q, np.array(terms), np.array([rows, count], np.int32))]


def problem(n, dtype, rows=12):
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal(n).astype(dtype), rng.standard_normal(n)
    Q = np.full((rows, n), 7.0, dtype)  # Rows that do not count, such as those of an earlier position.
    Q[0] = v / np.linalg.norm(v)
    return x, Q


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize(("n", "dtype", "tolerance"), [(40, np.float64, 1e-12), (20_000, np.float32, 1e-5)])
def test_steps_equal_those_of_a_space_here(n, dtype, tolerance, platform):
    x, Q = problem(n, dtype)
    new, alphas, betas, facts = run(x, Q, 1, 8, terms=(-2.0, 0.5, 0.0), platform=platform)
    dense = jax.vmap(multiply, (None, 0))
    space = LocalSpace(lambda V: -2 * np.asarray(dense(x, V)) + dtype(0.5) * V, n, np.dtype(dtype))
    space.append(Q[:1])
    steps = list(space.extend(8))
    assert facts[0] == 8
    assert facts[1] == 1
    np.testing.assert_allclose(alphas[:8], [step.alpha[0, 0] for step in steps], rtol=0, atol=tolerance)
    np.testing.assert_allclose(betas[:8], [step.beta[0, 0] for step in steps], rtol=0, atol=tolerance)
    rows = np.vstack([Q[:1], new[:8]]).astype(np.float64)
    np.testing.assert_allclose(rows @ rows.T, np.eye(9), atol=tolerance / 10)


def test_a_second_launch_goes_on_where_the_first_ended():
    x, Q = problem(40, np.float64)
    whole, alphas, _, _ = run(x, Q, 1, 8)
    first, _, _, facts = run(x, Q, 1, 3)
    Q[1:4] = first[:3]
    rest, more, _, _ = run(x, Q, 4, 5, terms=(1.0, 0.0, facts[2]))
    np.testing.assert_allclose(rest[:5], whole[3:8], atol=1e-12)
    np.testing.assert_allclose(more[:5], alphas[3:8], atol=1e-12)


@pytest.mark.parametrize("rows", [3, 12, 32])
def test_the_basis_may_be_larger_than_its_rows_that_count(rows):
    x, Q = problem(40, np.float64, rows=32)
    _, alphas, _, _ = run(x, Q, 1, 2)
    _, expected, _, _ = run(x, problem(40, np.float64, rows)[1], 1, 2)
    np.testing.assert_allclose(alphas[:2], expected[:2], rtol=1e-13)


def test_an_invariant_space_ends_the_iteration_with_beta_zero():
    x, Q = np.ones(30), problem(30, np.float64)[1]
    new, alphas, betas, facts = run(x, Q, 1, 8, product=lambda x, v: 3 * v)
    assert facts.tolist() == pytest.approx([1, 1, 3], rel=1e-14)
    assert (alphas[0], betas[0]) == (pytest.approx(3, rel=1e-14), 0)
    assert not new.any()


def test_a_product_that_is_not_finite_ends_the_iteration_before_it():
    x, Q = problem(30, np.float64)

    def product(x, v):
        return jax.numpy.where(abs(v[0]) < 0.2, multiply(x, v), np.nan)

    Q[0] = 0
    Q[0, 2] = 1  # v[0] is 0 here, and grows with each step.
    new, _, _, facts = run(x, Q, 1, 8, product=product)
    taken = int(facts[0])
    assert 0 < taken < 8
    assert facts[1] == 0
    assert np.isfinite(new[:taken]).all()
    assert not new[taken:].any()


@pytest.mark.parametrize(("n", "steps"), [(1, 64), (6_000, 64), (270_000, 3), (1_900_000, 1), (1 << 40, 1)])
def test_a_launch_adds_rows_of_a_few_megabytes(n, steps):
    assert lanczos.steps_of(n) == steps


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("n", [40, 20_000])
def test_inner_products_of_blocks_accumulate_in_float64(rows, n):
    U, V = np.random.default_rng(0).standard_normal((2, rows, n)).astype(np.float32)
    expected = U.astype(np.float64) @ V.astype(np.float64).T
    np.testing.assert_allclose(lanczos.gram(U, V), expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(lanczos.dots(U, V), np.diag(expected), rtol=1e-11, atol=1e-11)
