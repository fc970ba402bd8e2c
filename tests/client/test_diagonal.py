"""The diagonal is exact for small n. For larger n it has the stated standard error."""

import numpy as np
import pytest

import hvpd


def test_exact_by_blocks_of_unit_vectors(dense_point, spectrum):
    matrix, _ = spectrum(np.linspace(-3, 5, 40))
    point = dense_point(matrix)
    found = hvpd.HessianOperator(point).diagonal()
    assert np.allclose(found.values, np.diag(matrix), rtol=0, atol=1e-14)
    assert not found.standard_error.any()
    assert found.products == 40
    assert point.products == [40]


def test_terms_of_the_client_are_added_exactly(dense_point, spectrum):
    matrix, _ = spectrum(np.linspace(-3, 5, 40))
    U = np.random.default_rng(1).standard_normal((40, 3))
    point = dense_point(matrix)
    H = hvpd.HessianOperator(point)
    plain = H.diagonal(samples=10, seed=3)
    composed = (-2 * H).shifted(7.0).updated(U, [1.0, -1.0, 2.0]).diagonal(samples=10, seed=3)
    assert np.allclose(composed.values, -2 * plain.values + 7.0 + ((U * [1, -1, 2]) * U).sum(1), rtol=0, atol=1e-12)
    assert np.allclose(composed.standard_error, 2 * plain.standard_error, rtol=1e-12)


def test_large_n_is_estimated_in_bounded_blocks(dense_point):
    diagonal = np.random.default_rng(0).standard_normal(3000)
    point = dense_point(np.diag(diagonal))
    found = hvpd.HessianOperator(point).diagonal()
    assert found.products == sum(point.products) == 256
    assert np.allclose(found.values, diagonal, rtol=0, atol=1e-12)  # Signs see a diagonal matrix exactly.
    assert found.standard_error.max() < 1e-12


def test_the_standard_error_covers_the_truth_with_its_probability(dense_point, spectrum):
    matrix, _ = spectrum(np.linspace(-1, 4, 60))
    H = hvpd.HessianOperator(dense_point(matrix))
    runs = [H.diagonal(samples=50, seed=seed) for seed in range(200)]
    off = np.array([(run.values - np.diag(matrix)) / run.standard_error for run in runs])
    # Student's t of 49 degrees of freedom, for sums of many signs: 95 % within 2.01, 68
    # % within 1.005.
    assert abs((np.abs(off) < 2.01).mean() - 0.95) < 0.01
    assert abs((np.abs(off) < 1.005).mean() - 0.68) < 0.02
    # The closed form: the variance of a sample is the squares of the row without its
    # diagonal.
    variance = ((matrix**2).sum(1) - np.diag(matrix) ** 2) / 50
    estimated = np.mean([run.standard_error**2 for run in runs], axis=0)
    assert np.allclose(estimated, variance, rtol=0.1)


def test_blocks_of_samples_merge_to_one_sample(dense_point, spectrum, monkeypatch):
    matrix, _ = spectrum(np.linspace(-1, 4, 60))
    point = dense_point(matrix)
    H = hvpd.HessianOperator(point)
    whole = H.diagonal(samples=50, seed=1)
    monkeypatch.setattr("hvpd._wire.codec._BLOCK_BYTES", 16 * 60 * 8)
    merged = H.diagonal(samples=50, seed=1)
    assert point.products == [50, 16, 16, 16, 2]
    assert np.allclose(merged.values, whole.values, rtol=1e-12)
    assert np.allclose(merged.standard_error, whole.standard_error, rtol=1e-12)


def test_seeds_repeat_and_differ(dense_point, spectrum):
    H = hvpd.HessianOperator(dense_point(spectrum(np.arange(50.0))[0]))
    once, again, other = (H.diagonal(samples=9, seed=seed).values for seed in (4, 4, 5))
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)


def test_n_samples_give_the_exact_diagonal(dense_point, spectrum):
    matrix, _ = spectrum(np.arange(12.0), dtype=np.float32)
    found = hvpd.HessianOperator(dense_point(matrix)).diagonal(samples=500)
    assert found.products == 12
    assert found.values.dtype == found.standard_error.dtype == np.float32
    assert np.array_equal(found.values, np.diag(matrix))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 1}, "samples must be an integer of at least 2, got 1"),
        ({"samples": 2.5}, "samples must be an integer"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_bad_arguments(dense_point, arguments, message):
    with pytest.raises(hvpd.InvalidArgumentError, match=message):
        hvpd.HessianOperator(dense_point(np.eye(5))).diagonal(**arguments)


@pytest.mark.parametrize("samples", [2, 5])
def test_products_that_are_not_finite_are_refused(dense_point, samples):
    with pytest.raises(hvpd.InvalidArgumentError, match="NaN or infinity") as caught:
        hvpd.HessianOperator(dense_point(np.full((5, 5), np.nan))).diagonal(samples=samples)
    assert caught.value.reason == "NOT_FINITE"
