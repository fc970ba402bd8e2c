"""Errors of the whole path: the published spectra are those of their matrices, and each
part yields errors, with the name of the worst problem.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from bench import _cutest, accuracy


@pytest.mark.parametrize("made", [accuracy.rosser(), accuracy.wilkinson(), accuracy.chain(30)])
def test_the_published_eigenvalues_are_those_of_the_matrix(made):
    A, eigenvalues = made
    np.testing.assert_array_equal(A, A.T)
    np.testing.assert_allclose(np.linalg.eigvalsh(A)[-len(eigenvalues) :], eigenvalues, atol=1e-12 * np.abs(A).max())


def test_an_error_is_relative_to_the_truth_or_to_one():
    assert accuracy.error([3.0, 4.5], [3.0, 4.0]) == pytest.approx(0.1)
    assert accuracy.error(1e-3, 0.0) == 1e-3


def test_eigenvalues_of_a_server_are_the_published_ones(client):
    with jax.enable_x64(True):
        (figure,) = accuracy.spectra(client, quick=True)
    assert figure.value < 1e-12
    assert figure.goal == accuracy.GOAL


class Quartic:
    """A problem in the form of sif2jax's."""

    args = None

    def __init__(self):
        self.y0 = jnp.arange(1.0, 4.0)

    def objective(self, x, args):
        return jnp.sum(x**4)


class Infinite(Quartic):
    def objective(self, x, args):
        return jnp.sum(jnp.log(-(x**2)))


def test_the_worst_problem_is_named_and_one_without_derivatives_is_counted(client, monkeypatch):
    monkeypatch.setattr(_cutest, "problems", lambda kind: iter([Quartic, Infinite]))
    with jax.enable_x64(True):
        figures = list(accuracy.cutest(client, quick=True))
    product = next(each for each in figures if each.figure == "CUTEst, bounded: worst error of the product")
    assert product.value < 1e-14
    assert product.note == "Quartic, of 1 problems"
    failed = next(each for each in figures if each.figure == "CUTEst, bounded: problems that could not be compared")
    assert failed.value == 1
    assert failed.note == "Infinite: jax finds no finite derivatives"


@pytest.mark.skipif(importlib.util.find_spec("sif2jax") is None, reason="needs sif2jax")
def test_a_class_of_problems_has_those_of_its_folder():
    first = next(_cutest.problems("quadratic"))
    assert first.__module__.startswith("bare_sif2jax.cutest._quadratic_problems.")
    with jax.enable_x64(True):
        assert first().y0.dtype == np.float64


def test_a_refused_problem_is_counted(client, monkeypatch):
    def refused(client, problem):
        raise hvpd.InvalidArgumentError("the program has an effect", reason="EFFECTS")

    monkeypatch.setattr(_cutest, "problems", lambda kind: iter([Quartic, Quartic]))
    calls = iter([accuracy.of_problem, refused] * 4)
    monkeypatch.setattr(accuracy, "of_problem", lambda *each: next(calls)(*each))
    with jax.enable_x64(True):
        figures = list(accuracy.cutest(client, quick=True))
    assert [each.note for each in figures if "could not" in each.figure] == ["Quartic: the program has an effect"] * 4
