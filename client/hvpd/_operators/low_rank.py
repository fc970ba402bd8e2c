"""Randomized eigendecompositions, and the Nyström preconditioner."""

from typing import Any

import numpy as np
import scipy.sparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from hvpd import _text
from hvpd._arguments import integer
from hvpd._errors import InvalidArgumentError
from hvpd._krylov.preconditioning import Described
from hvpd._krylov.symmetry import check_symmetric
from hvpd._operators import blocks
from hvpd._operators.curvature import CurvatureOperator
from hvpd._operators.symmetric import SymmetricOperator
from hvpd._wire import codec


class _LowRank(SymmetricOperator):
    """The operator U diag(weights) U^T + shift I, which the client multiplies."""

    def __init__(self, U: codec.Array, weights: codec.Array, shift: float) -> None:
        super().__init__(U.dtype, len(U))
        self._U, self._weights, self._shift = U, weights[:, None].astype(U.dtype), U.dtype.type(shift)

    def _described(self) -> Described:
        """Return the arrays that describe this operator as a preconditioner."""
        return Described("low_rank", {"M_U": self._U, "M_weights": self._weights[:, 0]}, float(self._shift))

    def _matmat(self, X: Any) -> codec.Array:
        X = np.asarray(X)
        product: codec.Array = self._U @ (self._weights * (self._U.T @ X)) + self._shift * X
        return product


class LowRankOperator(_LowRank):
    """The operator U diag(eigenvalues) U^T + shift I, multiplied without round trips.

    Made by `CurvatureOperator.low_rank`.

    Attributes:
        eigenvalues: Ritz values of the operator without its shift, float64 of shape
            (rank,), largest magnitude first.
        eigenvectors: U, of shape (n, rank), orthonormal columns.
        residuals: |A u - eigenvalue u| of each pair, of shape (rank,). A has an
            eigenvalue within this distance.
        shift: The operator's own shift.

    Example:
        >>> low_rank = H.low_rank(10)
        >>> low_rank.eigenvalues[0], low_rank.residuals[0]
    """

    def __init__(
        self, eigenvalues: codec.Array, eigenvectors: codec.Array, residuals: codec.Array, shift: float
    ) -> None:
        super().__init__(eigenvectors, eigenvalues, shift)
        self.eigenvalues = eigenvalues
        self.eigenvectors = eigenvectors
        self.residuals = residuals
        self.shift = shift

    def __repr__(self) -> str:
        n, rank = self.eigenvectors.shape
        return f"<LowRankOperator {n}x{n} {self.dtype}, rank {rank}" + (
            f", shift={self.shift:g}>" if self.shift else ">"
        )


class NystromPreconditioner(_LowRank):
    """An approximate inverse, up to a factor, for `M=` of SciPy's solvers.

    It is d_r U D^-1 U^T + (I - U U^T), where the diagonal D holds the shifted
    eigenvalues d_1 >= ... >= d_r. It is positive definite. Made by `hvpd.nystrom`.

    Attributes:
        eigenvalues: Nyström's eigenvalues of the operator without its shift, float64 of
            shape (rank,), largest first.
        eigenvectors: U, of shape (n, rank), orthonormal columns.
        shift: Shift of the system to solve, including the operator's own.

    Example:
        >>> M = hvpd.nystrom(H, rank=20, shift=1e-3)
        >>> step, info = scipy.sparse.linalg.cg(H.shifted(1e-3), b, M=M)
    """

    def __init__(self, eigenvalues: codec.Array, eigenvectors: codec.Array, shift: float) -> None:
        shifted = eigenvalues + shift
        super().__init__(eigenvectors, shifted[-1] / shifted - 1.0, 1.0)
        self.eigenvalues = eigenvalues
        self.eigenvectors = eigenvectors
        self.shift = shift

    def __repr__(self) -> str:
        n, rank = self.eigenvectors.shape
        return f"<NystromPreconditioner {n}x{n} {self.dtype}, rank {rank}, shift={self.shift:g}>"


class _Krylov:
    """Products with an orthonormal basis of a block Krylov space, and its Ritz values.

    The space is span(V, AV, ..., A^(passes-1) V) for random V.

    Attributes:
        basis: Orthonormal columns, float64 of shape (n, m).
        products: A times the basis.
        values: Ritz values, of shape (m,), ascending.
        vectors: Their coordinates in the basis, of shape (m, m).
        noise: Error of an eigenvalue from rounding on the client.
        tolerance: Error of an eigenvalue from errors of products, which may be
            differences of gradients.
    """

    def __init__(
        self, A: "LinearOperator", dtype: np.dtype[Any], *, rank: int, seed: int, oversampling: int, passes: int
    ) -> None:
        n = A.shape[0]
        rank = integer(rank, "rank", 1, n)
        width = min(rank + integer(oversampling, "oversampling", 0), n)
        passes = integer(passes, "passes", 1)
        random = np.random.default_rng(integer(seed, "seed", 0))
        basis, _ = np.linalg.qr(random.standard_normal((n, width)))
        products = _multiply(A, basis, dtype)
        last = products
        for _ in range(passes - 1):
            # Householder's Q completes the basis orthogonally, even if the new vectors
            # add nothing.
            more = np.linalg.qr(np.hstack([basis, last]))[0][:, basis.shape[1] :]
            if not more.size:
                break
            last = _multiply(A, more, dtype)
            basis, products = np.hstack([basis, more]), np.hstack([products, last])
        self.basis, self.products = basis, products
        core = basis.T @ products
        self.values, self.vectors = np.linalg.eigh((core + core.T) / 2)
        eps, norm = np.finfo(dtype).eps, float(np.linalg.norm(products, 2))
        self.noise = max(np.sqrt(n) * eps * norm, np.finfo(dtype).tiny)
        self.tolerance = max(10 * self.noise, eps ** (2 / 3) * norm)

    def residuals(self, which: codec.Array) -> codec.Array:
        """Return |A u - value u| of some Ritz pairs, without further products."""
        chosen = self.vectors[:, which]
        found: codec.Array = np.linalg.norm(self.products @ chosen - (self.basis @ chosen) * self.values[which], axis=0)
        return found


def _multiply(A: "LinearOperator", columns: codec.Array, dtype: np.dtype[Any]) -> codec.Array:
    product = blocks.products(lambda rows: np.asarray(A @ rows.T).T, columns.T.astype(dtype))
    return product.T.astype(np.float64)


def low_rank(A: CurvatureOperator, rank: int, *, seed: int, oversampling: int, passes: int) -> LowRankOperator:
    """Return the largest eigenpairs; see `CurvatureOperator.low_rank`."""
    krylov = _Krylov(A.shifted(-A.shift), A.dtype, rank=rank, seed=seed, oversampling=oversampling, passes=passes)
    largest = np.argsort(-abs(krylov.values), kind="stable")[:rank]
    return LowRankOperator(
        krylov.values[largest],
        (krylov.basis @ krylov.vectors[:, largest]).astype(A.dtype),
        krylov.residuals(largest),
        A.shift,
    )


def nystrom(
    A: Any, rank: int, shift: float = 0.0, *, seed: int = 0, oversampling: int = 10, passes: int = 2
) -> NystromPreconditioner:
    """Return the Nyström preconditioner of A + shift I, for `M=` of SciPy's `cg`.

    A + shift I must be positive definite. The preconditioner flattens the spectrum down
    to the eigenvalue of the given rank. It is worth its cost if few eigenvalues are
    much larger than the rest and than the shift. It takes `passes` round trips of
    min(rank + oversampling, n) vectors.

    Source: Frangella, Tropp, Udell 2023 (https://doi.org/10.1137/21M1466244), algorithm
        2.1 and section 5. The sketch is that of `CurvatureOperator.low_rank`, which
        equals theirs for passes=1. If A is indefinite and A + shift I is not, the Ritz
        pairs of `low_rank` replace Nyström's.

    Args:
        A: A `CurvatureOperator`, or any real symmetric operator or matrix that SciPy
            takes. The shift of a CurvatureOperator counts: `nystrom(H, r, mu)` equals
            `nystrom(H.shifted(mu), r)`. Pass other operators without their shift.
        rank: Eigenpairs to keep, 1 to n.
        shift: Shift of the system to solve; 0 for A itself.
        seed: Seed of the random vectors.
        oversampling: Vectors beyond the rank.
        passes: Number of blocks of products.

    Raises:
        InvalidArgumentError: A + shift I is not positive definite; the message has its
            smallest Ritz value. Few products cannot find every negative eigenvalue: one
            that is small beside the largest may go unnoticed. Or A is a matrix that
            is not symmetric.

    Example:
        >>> M = hvpd.nystrom(H, rank=20, shift=1e-3)
        >>> step, info = scipy.sparse.linalg.cg(H.shifted(1e-3), b, M=M)
    """
    matrix = A if scipy.sparse.issparse(A) or isinstance(A, np.ndarray) else None
    if isinstance(A, CurvatureOperator):
        total = A.shifted(shift).shift
        A = A.shifted(-A.shift)
    else:
        A, total = aslinearoperator(A), float(shift)
    if A.shape[0] != A.shape[1] or np.dtype(A.dtype).kind not in "fiub" or not np.isfinite(total):
        raise InvalidArgumentError(
            f"a Nyström preconditioner needs a square real operator and a finite shift, got {A.shape} {A.dtype}, {_text.described(shift)}",
            reason="NOT_SYMMETRIC",
        )
    dtype = np.dtype(A.dtype if A.dtype in (np.float32, np.float64) else np.float64)
    if matrix is not None:
        check_symmetric(matrix, "A", dtype, 1e3 * float(np.finfo(dtype).eps))
    krylov = _Krylov(A, dtype, rank=rank, seed=seed, oversampling=oversampling, passes=passes)
    smallest = float(krylov.values[0])
    if smallest + total < -krylov.tolerance:
        off = float(krylov.residuals(np.array([0]))[0])
        raise InvalidArgumentError(
            f"the operator is indefinite: with the shift {total:g} its smallest Ritz value is {smallest + total:.6g} (residual "
            f"{off:.2g}), and its smallest eigenvalue is not above that. CG and its preconditioner need a positive definite one: "
            f"add a shift of more than {-(smallest + total):.6g}, such as {-1.1 * (smallest + total) + off:.2g}, or use MINRES "
            "without a preconditioner",
            reason="NOT_POSITIVE_DEFINITE",
        )
    if smallest < -krylov.tolerance:
        # A alone is indefinite, and A + shift I is not. Nyström's inverse of Q^T A Q
        # would amplify the part of the negative eigenvectors outside Q, so the Ritz
        # pairs replace it.
        values, U = krylov.values[::-1][:rank], krylov.basis @ krylov.vectors[:, ::-1][:, :rank]
    else:
        values, U = _nystrom_pairs(krylov, rank)
    kept = values + total > krylov.noise
    if not kept.any():
        raise InvalidArgumentError(
            f"the operator is zero to rounding (products of norm {np.linalg.norm(krylov.products, 2):.2g}) and the shift is "
            f"{total:g}: there is nothing to precondition; give a shift",
            reason="NOT_POSITIVE_DEFINITE",
        )
    return NystromPreconditioner(values[kept], U[:, kept].astype(dtype), total)


def _nystrom_pairs(krylov: _Krylov, rank: int) -> tuple[codec.Array, codec.Array]:
    """Return eigenpairs of A Q (Q^T A Q)^-1 Q^T A = B B^T.

    The matrix is lifted by the size of rounding, as in algorithm 2.1, so that it is
    definite.
    """
    lift = krylov.noise + max(0.0, -float(krylov.values[0]))
    B = (krylov.products + lift * krylov.basis) @ (krylov.vectors / np.sqrt(krylov.values + lift))
    U, roots, _ = np.linalg.svd(B, full_matrices=False)
    return np.maximum(roots[:rank] ** 2 - lift, 0.0), U[:, :rank]
