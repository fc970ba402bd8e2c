"""Results say what they come from, and save to .npz."""

import dataclasses

import numpy as np
import pytest

import hvpd
from hvpd import krylov

A = np.diag(np.arange(1.0, 41.0))

RESULTS = {
    "Eigenpairs": lambda: krylov.eigsh(A, 3, seed=5),
    "Solution": lambda: krylov.solve(A, np.ones(40)),
    "Spectrum": lambda: krylov.spectrum(A, 3, 10, seed=5),
    "Estimate": lambda: krylov.trace(A, products=12, seed=5),
    "DiagonalEstimate": lambda: krylov.diagonal(A, products=12, seed=5),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_a_result_can_be_saved_and_read(kind, tmp_path):
    result = RESULTS[kind]()
    result.save(tmp_path / "result")
    again = krylov.load(tmp_path / "result")
    assert type(again) is type(result)
    assert type(again).__name__ == kind
    for field in dataclasses.fields(result):
        found, expected = getattr(again, field.name), getattr(result, field.name)
        assert type(found) is type(expected), field.name
        assert np.array_equal(found, expected), field.name
    assert repr(again) == repr(result)


def test_no_vectors_stay_none(tmp_path):
    run = krylov.lanczos(A, 10)
    run.ritz(3, vectors=False).save(tmp_path / "a.npz")
    assert krylov.load(tmp_path / "a.npz").vectors is None


def test_results_name_their_seed_program_and_dtype():
    for name in ("Eigenpairs", "Spectrum", "Estimate", "DiagonalEstimate"):
        result = RESULTS[name]()
        assert (result.seed, result.program, result.digest, result.precision) == (5, "ndarray", "", "")
        assert result.origin.dtype == "float64"
    assert RESULTS["Solution"]().seed is None
    assert krylov.lanczos(A, 3, v0=np.ones(40)).ritz().seed is None


def test_equal_seeds_give_equal_results():
    for make in RESULTS.values():
        first, second = make(), make()
        assert all(
            np.array_equal(getattr(first, field.name), getattr(second, field.name))
            for field in dataclasses.fields(first)
            if field.name != "origin"
        )
    assert krylov.trace(A, products=12, seed=6).value != krylov.trace(A, products=12, seed=5).value


def test_they_unpack_as_scipys_and_numpys():
    pairs = RESULTS["Eigenpairs"]()
    values, vectors = pairs
    assert values is pairs[0]
    assert vectors is pairs[1]
    assert len(pairs) == 2
    found, error, products = RESULTS["DiagonalEstimate"]()
    assert found.shape == error.shape == (40,)
    assert products == 12


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, a=1)
    with pytest.raises(hvpd.InvalidArgumentError, match="holds no result of"):
        krylov.load(path)
    np.savez(path, kind="Estimate", value=1.0)
    with pytest.raises(hvpd.InvalidArgumentError, match="a result of another version"):
        krylov.load(path)
    path.write_text("no zip")
    with pytest.raises(hvpd.InvalidArgumentError, match="holds no result"):
        krylov.load(path)
    with path.open("wb") as file:
        np.save(file, A)
    with pytest.raises(hvpd.InvalidArgumentError, match="holds no result"):
        krylov.load(path)
    RESULTS["Estimate"]().save(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:40] + bytes(40) + whole[80:]):
        path.write_bytes(damaged)
        with pytest.raises(hvpd.InvalidArgumentError, match="holds no result"):
            krylov.load(path)
    np.savez(path, kind=np.array([object()], dtype=object))
    with pytest.raises(hvpd.InvalidArgumentError, match="holds no result"):
        krylov.load(path)


def test_files_have_the_suffix_of_numpy(tmp_path):
    result = RESULTS["Estimate"]()
    result.save(f"{tmp_path}/a")
    result.save(tmp_path / "b.npz")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.npz", "b.npz"]
    assert krylov.load(tmp_path / "a") == krylov.load(tmp_path / "a.npz") == result
    for path in (tmp_path / "c", tmp_path / "c.npz", str(tmp_path)):
        with pytest.raises(hvpd.InvalidArgumentError, match=r"cannot read '.*': (No such file|Is a directory)"):
            krylov.load(path)


def test_a_spectrum_draws_on_axes_only():
    with pytest.raises(hvpd.InvalidArgumentError, match="ax must be axes of matplotlib, or None for new ones, got 3"):
        RESULTS["Spectrum"]().plot(3)
