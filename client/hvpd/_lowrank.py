"""Randomized eigendecompositions of symmetric operators, and the Nyström preconditioner."""

from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from hvpd import _blocks, _codec
from hvpd._errors import InvalidArgumentError
from hvpd._operator import CurvatureOperator
from hvpd._symmetric import SymmetricOperator


class _LowRank(SymmetricOperator):
    """U diag(weights) U^T + shift I, multiplied here."""

    def __init__(self, U: _codec.Array, weights: _codec.Array, shift: float) -> None:
        super().__init__(U.dtype, len(U))
        self._U, self._weights, self._shift = U, weights[:, None].astype(U.dtype), U.dtype.type(shift)

    def _matmat(self, X: Any) -> _codec.Array:
        X = np.asarray(X)
        product: _codec.Array = self._U @ (self._weights * (self._U.T @ X)) + self._shift * X
        return product


class LowRankOperator(_LowRank):
    """U diag(eigenvalues) U^T + shift I, symmetric, multiplied without round trips. Made by `CurvatureOperator.low_rank`.

    Attributes:
        eigenvalues: Ritz values of the operator without its shift, float64 of shape (rank,), largest magnitude first.
        eigenvectors: U, of shape (n, rank), orthonormal columns.
        residuals: |A u - eigenvalue u| of each, of shape (rank,): A has an eigenvalue within that distance.
        shift: The operator's own.
    """

    def __init__(
        self, eigenvalues: _codec.Array, eigenvectors: _codec.Array, residuals: _codec.Array, shift: float
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
    """An approximate inverse, up to a factor, for `M=` of SciPy's solvers; positive definite. Made by `hvpd.nystrom`.

    (d_r) U D^-1 U^T + (I - U U^T), where D holds the shifted eigenvalues d_1 >= ... >= d_r.

    Attributes:
        eigenvalues: Nyström's, of the operator without its shift, float64 of shape (rank,), largest first.
        eigenvectors: U, of shape (n, rank), orthonormal columns.
        shift: Of the system that it is for, the operator's own included.
    """

    def __init__(self, eigenvalues: _codec.Array, eigenvectors: _codec.Array, shift: float) -> None:
        shifted = eigenvalues + shift
        super().__init__(eigenvectors, shifted[-1] / shifted - 1.0, 1.0)
        self.eigenvalues = eigenvalues
        self.eigenvectors = eigenvectors
        self.shift = shift

    def __repr__(self) -> str:
        n, rank = self.eigenvectors.shape
        return f"<NystromPreconditioner {n}x{n} {self.dtype}, rank {rank}, shift={self.shift:g}>"


class _Krylov:
    """Products with an orthonormal basis of span(V, AV, ..., A^(passes-1) V) for random V, and its Ritz values.

    Attributes:
        basis: Shape (n, m), float64.
        products: A times the basis.
        values: Ritz values, of shape (m,), ascending.
        vectors: Their coordinates in the basis, of shape (m, m).
        noise: What rounding here may put into an eigenvalue.
        tolerance: What errors of the products may, differences of gradients included.
    """

    def __init__(
        self, A: "LinearOperator", dtype: np.dtype[Any], *, rank: int, seed: int, oversampling: int, passes: int
    ) -> None:
        n = A.shape[0]
        rank = _blocks.integer(rank, "rank", 1, n)
        width = min(rank + _blocks.integer(oversampling, "oversampling", 0), n)
        passes = _blocks.integer(passes, "passes", 1)
        random = np.random.default_rng(_blocks.integer(seed, "seed", 0))
        basis, _ = np.linalg.qr(random.standard_normal((n, width)))
        products = _multiply(A, basis, dtype)
        last = products
        for _ in range(passes - 1):
            # Householder's Q completes the basis orthogonally, also where the new vectors add nothing.
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

    def residuals(self, which: _codec.Array) -> _codec.Array:
        """|A u - value u| of some Ritz pairs, without further products."""
        chosen = self.vectors[:, which]
        found: _codec.Array = np.linalg.norm(
            self.products @ chosen - (self.basis @ chosen) * self.values[which], axis=0
        )
        return found


def _multiply(A: "LinearOperator", columns: _codec.Array, dtype: np.dtype[Any]) -> _codec.Array:
    product = _blocks.products(lambda rows: np.asarray(A @ rows.T).T, columns.T.astype(dtype))
    return product.T.astype(np.float64)


def low_rank(A: CurvatureOperator, rank: int, *, seed: int, oversampling: int, passes: int) -> LowRankOperator:
    """See `CurvatureOperator.low_rank`."""
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
    """The Nyström preconditioner of A + shift I, which must be positive definite: `M=` of `scipy.sparse.linalg.cg`.

    It takes `passes` round trips of min(rank + oversampling, n) vectors, and flattens the spectrum down to the eigenvalue of that
    rank: worth it where few eigenvalues are much larger than the rest and than the shift. Source: Frangella, Tropp, Udell 2023
    (https://doi.org/10.1137/21M1466244), algorithm 2.1 and section 5; the sketch is that of `CurvatureOperator.low_rank`, and is
    theirs with passes=1. Where A is indefinite and A + shift I is not, the Ritz pairs of `low_rank` take the place of Nyström's.

    Args:
        A: A `CurvatureOperator`, or any real symmetric operator or matrix that SciPy takes. The shift of a CurvatureOperator is
            known and counts: `nystrom(H, r, mu)` and `nystrom(H.shifted(mu), r)` are the same. Another operator is better given
            without its shift.
        rank: Eigenpairs to keep, 1 to n.
        shift: Of the system that is to be solved; at 0, A itself.
        seed: Of the random vectors.
        oversampling: Vectors beyond the rank.
        passes: Blocks of products.

    Raises:
        InvalidArgumentError: A + shift I is found not to be positive definite, with its smallest Ritz value. Few products cannot
            find every negative eigenvalue: one that is small beside the largest may go unnoticed.
    """
    if isinstance(A, CurvatureOperator):
        total = A.shifted(shift).shift
        A = A.shifted(-A.shift)
    else:
        A, total = aslinearoperator(A), float(shift)
    if A.shape[0] != A.shape[1] or np.dtype(A.dtype).kind not in "fiub" or not np.isfinite(total):
        raise InvalidArgumentError(
            f"a Nyström preconditioner needs a square real operator and a finite shift, got {A.shape} {A.dtype}, {shift!r}"
        )
    dtype = np.dtype(A.dtype if A.dtype in (np.float32, np.float64) else np.float64)
    krylov = _Krylov(A, dtype, rank=rank, seed=seed, oversampling=oversampling, passes=passes)
    smallest = float(krylov.values[0])
    if smallest + total < -krylov.tolerance:
        off = float(krylov.residuals(np.array([0]))[0])
        raise InvalidArgumentError(
            f"the operator is indefinite: with the shift {total:g} its smallest Ritz value is {smallest + total:.6g} (residual "
            f"{off:.2g}), and its smallest eigenvalue is not above that. CG and its preconditioner need a positive definite one: "
            f"add a shift of more than {-(smallest + total):.6g}, such as {-1.1 * (smallest + total) + off:.2g}, or use MINRES "
            "without a preconditioner"
        )
    if smallest < -krylov.tolerance:
        # A alone is indefinite, and the shift mends it. Nyström's inverse of Q^T A Q would blow up what Q misses of the negative
        # eigenvectors: the Ritz pairs serve instead.
        values, U = krylov.values[::-1][:rank], krylov.basis @ krylov.vectors[:, ::-1][:, :rank]
    else:
        values, U = _nystrom_pairs(krylov, rank)
    kept = values + total > krylov.noise
    if not kept.any():
        raise InvalidArgumentError(
            f"the operator is zero to rounding (products of norm {np.linalg.norm(krylov.products, 2):.2g}) and the shift is "
            f"{total:g}: there is nothing to precondition; give a shift"
        )
    return NystromPreconditioner(values[kept], U[:, kept].astype(dtype), total)


def _nystrom_pairs(krylov: _Krylov, rank: int) -> tuple[_codec.Array, _codec.Array]:
    """Eigenpairs of A Q (Q^T A Q)^-1 Q^T A = B B^T, lifted by rounding's size as in algorithm 2.1, so that it is definite."""
    lift = krylov.noise + max(0.0, -float(krylov.values[0]))
    B = (krylov.products + lift * krylov.basis) @ (krylov.vectors / np.sqrt(krylov.values + lift))
    U, roots, _ = np.linalg.svd(B, full_matrices=False)
    return np.maximum(roots[:rank] ** 2 - lift, 0.0), U[:, :rank]
