"""Composed operators equal dense matrices, with one round trip for each product."""

import numpy as np
import pytest
import scipy.sparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator

import hvpd
from hvpd.v1 import curvature_pb2


def symmetric(n, seed=0, dtype=np.float64):
    A = np.random.default_rng(seed).standard_normal((n, n))
    return ((A + A.T) / 2).astype(dtype)


def close(found, expected, dtype=np.float64):
    return np.allclose(found, expected, rtol=0, atol=50 * np.finfo(dtype).eps * np.abs(expected).max())


@pytest.fixture
def point(dense_point):
    return dense_point(symmetric(7))


I = scipy.sparse.identity(7)  # noqa: E741 - its name
U = np.random.default_rng(5).standard_normal((7, 2))
C = np.array([[1.0, 0.5], [0.5, -3.0]])

COMPOSED = {
    "2H": (lambda H: 2 * H, lambda A: 2 * A),
    "H2": (lambda H: H * 2, lambda A: 2 * A),
    "numpy's": (lambda H: np.float64(2) * H, lambda A: 2 * A),
    "-H": (lambda H: -H, lambda A: -A),
    "H/4": (lambda H: H / 4, lambda A: A / 4),
    "shifted": (lambda H: H.shifted(0.5), lambda A: A + 0.5 * np.eye(7)),
    "shifted, scaled": (lambda H: -3 * H.shifted(0.5), lambda A: -3 * A - 1.5 * np.eye(7)),
    "scaled, shifted": (lambda H: (-3 * H).shifted(0.5), lambda A: -3 * A + 0.5 * np.eye(7)),
    "H+2I": (lambda H: H + 2 * I, lambda A: A + 2 * np.eye(7)),
    "2I+H": (lambda H: 2 * I + H, lambda A: A + 2 * np.eye(7)),
    "H-I": (lambda H: H - I, lambda A: A - np.eye(7)),
    "I-H": (lambda H: I - H, lambda A: np.eye(7) - A),
    "column": (lambda H: H.updated(U[:, 0]), lambda A: A + np.outer(U[:, 0], U[:, 0])),
    "UU": (lambda H: H.updated(U), lambda A: A + U @ U.T),
    "UdU": (lambda H: H.updated(U, [1, -2]), lambda A: A + (U * [1, -2]) @ U.T),
    "UCU": (lambda H: H.updated(U, C), lambda A: A + U @ C @ U.T),
    "two updates, scaled": (lambda H: 2 * H.updated(U, C).updated(U[:, 0]), lambda A: 2 * A + 2 * U @ (C + np.diag([1, 0])) @ U.T),
    "sum": (lambda H: H.updated(U) + 2 * H.shifted(1.0), lambda A: 3 * A + U @ U.T + 2 * np.eye(7)),
    "difference": (lambda H: 3 * H - H.updated(U), lambda A: 2 * A - U @ U.T),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPOSED)
def test_a_composed_operator_stays_one_operator(point, case):
    compose, dense = COMPOSED[case]
    H, expected = compose(hvpd.HessianOperator(point)), dense(point.matrix)
    assert type(H) is hvpd.HessianOperator
    v, V = np.random.default_rng(1).standard_normal(7), np.random.default_rng(2).standard_normal((7, 5))
    assert close(H @ v, expected @ v)
    assert close(H.rmatvec(v), expected @ v)
    assert close(H @ V, expected @ V)
    assert close(H.T @ V, expected @ V)
    assert close(H.rmatmat(V), expected @ V)
    assert point.products == [1, 1, 5, 5, 5]


def test_float32_stays_float32(dense_point):
    point = dense_point(symmetric(7, dtype=np.float32))
    H = (2 * hvpd.HessianOperator(point, 0.25)).updated(U, C)
    V = np.random.default_rng(2).standard_normal((7, 3))
    assert H.dtype == np.float32
    assert (H @ V).dtype == np.float32
    assert close(H @ V, (2 * point.matrix + 0.5 * np.eye(7) + U @ C @ U.T) @ V, np.float32)


def test_composing_does_not_change_the_operand(point):
    H = hvpd.HessianOperator(point, 0.5)
    2 * H.shifted(1.0).updated(U)
    assert (H.scale, H.shift, H.update) == (1.0, 0.5, None)
    given = U.copy()
    updated = H.updated(given)
    given[:] = np.nan
    assert np.isfinite(updated @ np.ones(7)).all()


def test_everything_else_is_scipys(point, dense_point):
    H, A = hvpd.HessianOperator(point), point.matrix
    other, B = hvpd.HessianOperator(dense_point(symmetric(7, 1))), symmetric(7, 1)
    D = scipy.sparse.diags_array(np.arange(7.0))
    V = np.random.default_rng(2).standard_normal((7, 3))
    for composed, expected in [
        (H + other, A + B),
        (H + aslinearoperator(D), A + D.toarray()),
        (H @ other, A @ B),
        (H**2, A @ A),
        (1j * H, 1j * A),
        (H + H.block("").__mul__(1j), (1 + 1j) * A),
    ]:
        assert isinstance(composed, LinearOperator)
        assert not isinstance(composed, hvpd.CurvatureOperator)
        assert close(composed @ V, expected @ V)
    with pytest.raises(TypeError):
        H + D
    with pytest.raises(ZeroDivisionError):
        H / 0


def test_other_curvature_is_asked_for_by_its_kind(dense_point):
    point = dense_point(symmetric(4), kind=curvature_pb2.OPERATOR_UNSPECIFIED)
    G = 2 * hvpd.CurvatureOperator(point, curvature_pb2.OPERATOR_UNSPECIFIED, shift=1.0)
    assert close(G @ np.eye(4), 2 * point.matrix + 2 * np.eye(4))
    assert "OPERATOR_UNSPECIFIED" in repr(G)
    H = hvpd.HessianOperator(point)
    assert not isinstance(G + H, hvpd.CurvatureOperator)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda H: H.shifted(np.nan), "shift must be a finite real number, got nan"),
        (lambda H: H.shifted("1"), "shift must be a finite real number, got '1'"),
        (lambda H: np.inf * H, "finite real number, got inf"),
        (lambda H: H.updated(np.ones((6, 2))), r"U must have the shape \(7, r\), got \(6, 2\)"),
        (lambda H: H.updated(np.ones((7, 2)), np.eye(3)), r"C must have the shape \(2, 2\) or \(2,\)"),
        (lambda H: H.updated(U, [[0, 1], [0, 0]]), "C must be symmetric"),
        (lambda H: H.updated(U * 1j), "U must hold finite real numbers"),
        (lambda H: H.updated(U, [np.nan, 1]), "C must hold finite real numbers"),
        (lambda H: H @ np.full(7, 1j), "multiply the real and the imaginary part"),
        (
            lambda H: H @ np.ones(6),
            r"shape \(7, 7\) multiplies vectors of shape \(7,\) and blocks of shape \(7, k\), got \(6,\)",
        ),
        (lambda H: H @ [1, 2], r"got \(2,\)"),
        (lambda H: H @ np.ones((6, 3)), r"got \(6, 3\)"),
        (lambda H: H.matvec(np.ones(8)), r"got \(8,\)"),
        (lambda H: H.matmat(np.ones((3, 7))), r"got \(3, 7\)"),
    ],
)
def test_bad_arguments(point, call, message):
    with pytest.raises(hvpd.InvalidArgumentError, match=message):
        call(hvpd.HessianOperator(point))


SLICES = {"hidden/b": slice(0, 2), "hidden/w": slice(2, 4), "hidden2": slice(4, 5), "out": slice(5, 7)}


@pytest.mark.parametrize(
    ("names", "indices"),
    [
        (("out",), [5, 6]),
        (("hidden",), [0, 1, 2, 3]),
        (("hidden/w",), [2, 3]),
        (("out", "hidden/b", "out"), [0, 1, 5, 6]),
        (("",), range(7)),
    ],
)
def test_a_block_is_the_principal_submatrix(dense_point, names, indices):
    point = dense_point(symmetric(7), slices=SLICES)
    dense = 2 * point.matrix + 0.5 * np.eye(7) + U @ C @ U.T
    H = (2 * hvpd.HessianOperator(point)).shifted(0.5).updated(U, C).block(*names)
    expected = dense[np.ix_(indices, indices)]
    V = np.random.default_rng(3).standard_normal((len(indices), 4))
    assert H.shape == expected.shape
    assert list(H.indices) == list(indices)
    assert close(H @ V, expected @ V)
    assert close(H @ V[:, 0], expected @ V[:, 0])
    assert point.products == [4, 1]
    assert close(H.diagonal().values, np.diag(expected))


def test_a_block_composes_and_has_blocks(dense_point):
    point = dense_point(symmetric(7), slices=SLICES)
    H = hvpd.HessianOperator(point)
    B = (H.block("hidden", "out") + 2 * H.block("out", "hidden")).shifted(1.0).updated(U[[0, 1, 2, 3, 5, 6]])
    inner = [2, 3, 5, 6]
    expected = (3 * point.matrix + np.eye(7) + U @ U.T)[np.ix_(inner, inner)]
    assert close(B.block("hidden/w", "out") @ np.eye(4), expected)
    assert B.block("out").leaves == ("out",)
    assert not isinstance(H.block("hidden/w") + H.block("out"), hvpd.CurvatureOperator)


def test_an_unknown_leaf_lists_those_there_are(dense_point):
    H = hvpd.HessianOperator(dense_point(symmetric(7), slices=SLICES))
    with pytest.raises(
        hvpd.InvalidArgumentError, match=r"named 'hid'.*there are 'hidden/b', 'hidden/w', 'hidden2', 'out'"
    ):
        H.block("out", "hid")
    with pytest.raises(hvpd.InvalidArgumentError, match=r"'hidden/b', 'hidden/w'$"):
        H.block("hidden").block("out")
    with pytest.raises(hvpd.InvalidArgumentError, match="name the leaves"):
        H.block()


def test_repr_describes_the_operator(dense_point):
    H = hvpd.HessianOperator(dense_point(symmetric(7), slices=SLICES))
    assert repr(H) == "<HessianOperator 7x7 float64 of dense>"
    composed = (2 * H).block("hidden").shifted(0.1).updated(np.ones((4, 1)))
    assert repr(composed) == (
        "<HessianOperator 4x4 float64 of dense, hidden/b, hidden/w, scale=2, shift=0.1, rank-1 update>"
    )
