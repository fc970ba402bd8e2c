"""Kronecker operators and their inverses, against dense matrices."""

import re

import numpy as np
import pytest
import scipy.sparse.linalg

import hvpd
from hvpd._operators.kronecker import KroneckerBlock, KroneckerOperator

N = 30  # Elements 6, 7 and 29 are in no layer; the second layer's lie backwards.
FIRST = KroneckerBlock("a/w", None, np.arange(6).reshape(3, 2), np.zeros((3, 3)), np.zeros((2, 2)))
SECOND = KroneckerBlock("c/w", "c/b", np.arange(8, 29)[::-1].reshape(3, 7), np.zeros((3, 3)), np.zeros((7, 7)))


def factor(rng, size, dtype=np.float64, least=0.5):
    Q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    matrix = (Q * np.linspace(least, 2.0, size)) @ Q.T
    return ((matrix + matrix.T) / 2).astype(dtype)


def block(layer, A, G):
    return KroneckerBlock(layer.kernel, layer.bias, layer.elements, A, G)


def operator(dtype=np.float64, shift=0.0, **factors):
    rng = np.random.default_rng(0)
    sizes = {"A1": 3, "G1": 2, "A2": 3, "G2": 7}
    made = {name: factor(rng, size, dtype) for name, size in sizes.items()} | factors
    layers = block(FIRST, made["A1"], made["G1"]), block(SECOND, made["A2"], made["G2"])
    return KroneckerOperator(layers, np.dtype(dtype), N, shift)


def only(A, G, shift=0.0):
    """Return an operator of one layer."""
    elements = np.arange(len(A) * len(G)).reshape(len(A), len(G))
    layer = KroneckerBlock("w", None, elements, A, G)
    return KroneckerOperator((layer,), A.dtype, elements.size, shift)


def dense(K):
    """Return the matrix by definition: elements (i, o) and (j, p) have A[i,j]
    G[o,p].
    """
    matrix = np.zeros((K.shape[0],) * 2)
    for layer in K.layers:
        for i, row in enumerate(layer.elements):
            for j, column in enumerate(layer.elements):
                matrix[np.ix_(row, column)] = float(layer.A[i, j]) * layer.G.astype(np.float64)
    return matrix + K.shift * np.eye(len(matrix))


def relative(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(("dtype", "accuracy"), [(np.float64, 1e-14), (np.float32, 1e-6)])
@pytest.mark.parametrize("shift", [0.0, 0.25, -3.0])
def test_products_are_those_of_the_dense_matrix(dtype, accuracy, shift):
    K, V = operator(dtype, shift), np.random.default_rng(1).normal(size=(N, 5)).astype(dtype)
    for found, expected in [
        (K @ V, dense(K) @ V),
        (K @ V[:, 0], dense(K) @ V[:, 0]),
        (K.T @ V, dense(K) @ V),
        (K.H @ V[:, 1], dense(K) @ V[:, 1]),
        (V.T @ K, V.T @ dense(K)),
        (K @ V[:, :0], np.zeros((N, 0))),
    ]:
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert not expected.size or relative(found, expected) < accuracy
    assert (K @ np.arange(N)).dtype == dtype
    assert relative(K @ np.arange(N), dense(K) @ np.arange(N)) < accuracy


@pytest.mark.parametrize(("dtype", "accuracy"), [(np.float64, 1e-13), (np.float32, 1e-5)])
@pytest.mark.parametrize("shift", [1e-2, 1.0, 100.0])
def test_the_inverse_is_the_dense_matrix_s_inverse(dtype, accuracy, shift):
    K = operator(dtype, shift)
    inverse = K.inverse()
    assert inverse.dtype == dtype
    assert inverse.shift == shift
    assert relative(inverse @ np.eye(N), np.linalg.inv(dense(K))) < accuracy
    v = np.random.default_rng(2).normal(size=N)
    assert relative(inverse @ (K @ v), v) < 10 * accuracy
    assert relative(inverse.T @ v, inverse @ v) == 0


def test_no_shift_is_needed_if_all_elements_are_in_layers():
    rng = np.random.default_rng(3)
    for shift in (0.0, -0.1):
        K = only(factor(rng, 4), factor(rng, 3), shift)
        assert relative(K.inverse() @ np.eye(12), np.linalg.inv(dense(K))) < 1e-13


def test_shifts_add_up_and_do_not_change_the_original():
    K = operator(shift=0.5)
    more = K.shifted(0.25).shifted(1)
    assert (K.shift, more.shift) == (0.5, 1.75)
    assert np.allclose(more @ np.eye(N) - K @ np.eye(N), 1.25 * np.eye(N), rtol=0, atol=1e-14)
    assert more.layers is K.layers


@pytest.mark.parametrize("shift", [np.nan, np.inf, "1", None, 1j, np.ones(2)])
def test_shifts_that_are_no_numbers_are_refused(shift):
    with pytest.raises(hvpd.InvalidArgumentError, match="shift must be a finite real number"):
        operator(shift=shift)
    with pytest.raises(hvpd.InvalidArgumentError, match="shift must be a finite real number"):
        operator().shifted(shift)


def test_complex_vectors_are_refused_and_not_cut():
    K = operator(shift=1.0)
    for A in (K, K.inverse()):
        with pytest.raises(hvpd.InvalidArgumentError, match="real vectors, got dtype complex128"):
            A @ np.full(N, 1j)


def test_elements_outside_of_all_layers_need_a_positive_shift():
    for shift in (0.0, -0.01):
        with pytest.raises(hvpd.InvalidArgumentError, match=r"3 elements of x are in no dense layer.*that is positive"):
            operator(shift=shift).inverse()
    tiny = operator(shift=1e-10)
    assert relative(tiny.inverse() @ np.eye(N), np.linalg.inv(dense(tiny))) < 1e-13


def suggested(K):
    """Return the shift that the refusal suggests."""
    with pytest.raises(hvpd.InvalidArgumentError, match=r"not positive definite: .* use a shift of ") as refused:
        K.inverse()
    return float(re.search(r"use a shift of (\S+)$", str(refused.value))[1]), str(refused.value)


@pytest.mark.parametrize("least", [-1.049, -3.0, -1e-6, -123.456])
def test_an_indefinite_operator_names_its_block_and_a_sufficient_shift(least):
    rng = np.random.default_rng(4)
    A, G = factor(rng, 3, least=1.0), factor(rng, 7, least=least)
    A /= np.linalg.eigvalsh(A)[-1]
    shift, message = suggested(operator(A2=A, G2=G, shift=1e-9))
    assert "'c/w'" in message
    assert f"{np.linalg.eigvalsh(dense(operator(A2=A, G2=G)))[0]:.3g}" in message
    assert -least < shift < -1.2 * least
    enough = operator(A2=A, G2=G, shift=shift)
    assert relative(enough.inverse() @ np.eye(N), np.linalg.inv(dense(enough))) < 1e-8  # cond 2e7
    with pytest.raises(hvpd.InvalidArgumentError, match="not positive definite"):
        operator(A2=A, G2=G, shift=-0.99 * least).inverse()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_singular_one_is_found_although_rounding_makes_it_definite(dtype):
    """Rounding makes small positive and negative eigenvalues of zeros."""
    rows = np.random.default_rng(5).normal(size=(3, 6)).astype(dtype)
    A = rows.T @ rows / 3
    for G in (np.eye(2, dtype=dtype), np.diag([1.0, 1e-42]).astype(dtype), np.diag([1.0, 0.0]).astype(dtype)):
        shift, _ = suggested(only(A, G))
        assert 0 < shift < 1e3 * np.finfo(dtype).eps * np.linalg.norm(A, 2)
        K = only(A, G, shift)
        assert np.isfinite(K.inverse() @ np.ones(12)).all()
    K = only(A, np.eye(2, dtype=dtype), 1e-2)
    assert relative(K.inverse() @ np.eye(12), np.linalg.inv(dense(K))) < 1e3 * np.finfo(dtype).eps


def test_a_large_block_needs_no_larger_shift_of_a_small_block():
    """Each block's rounding is its own."""
    rng = np.random.default_rng(6)
    K = operator(A1=1e-9 * factor(rng, 3), A2=1e12 * factor(rng, 3), shift=1e-9)
    for elements in (FIRST.elements, SECOND.elements):
        inside = np.ix_(elements.reshape(-1), elements.reshape(-1))
        assert relative((K.inverse() @ np.eye(N))[inside], np.linalg.inv(dense(K)[inside])) < 1e-10


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["A1", "G2"])
def test_factors_that_are_not_finite_have_no_inverse(which, bad):
    K = operator(**{which: np.full((3, 3) if which == "A1" else (7, 7), bad)}, shift=1.0)
    layer = "a/w" if which == "A1" else "c/w"
    with pytest.raises(hvpd.InvalidArgumentError, match=f"factors of '{layer}' hold NaN or infinity"):
        K.inverse()


def test_it_is_a_preconditioner_for_scipys_solvers():
    K = operator(shift=0.1)
    b = np.random.default_rng(7).normal(size=N)
    solution, failed = scipy.sparse.linalg.cg(K, b, rtol=1e-12, M=K.inverse(), maxiter=2)
    assert not failed
    assert relative(solution, np.linalg.solve(dense(K), b)) < 1e-10


def test_repr_describes_the_kronecker_operators():
    K = operator(np.float32, shift=0.5)
    assert repr(K) == "<KroneckerOperator 30x30 float32, 2 dense layers, shift=0.5>"
    assert repr(K.inverse()) == "<KroneckerInverse 30x30 float32, 2 dense layers, shift=0.5>"
    assert repr(operator()) == "<KroneckerOperator 30x30 float64, 2 dense layers>"
