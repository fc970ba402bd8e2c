"""Block conjugate gradients, for one or several right-hand sides.

All right-hand sides share one Krylov space, so that each profits from the products of
the others. The residuals are kept as R = C^T Q with orthonormal rows Q (orthonormal in
the inner product of the preconditioner M). This form stays stable when right-hand sides
depend on each other, or converge at different times: the block then gets narrower. With
one right-hand side it is the method of Hestenes and Stiefel.

Source: Dubrulle 2001, Retooling the method of block conjugate gradients (BCGrQ,
https://etna.ricam.oeaw.ac.at/vol.12.2001/pp216-233.dir/pp216-233.pdf); O'Leary 1980
(https://doi.org/10.1016/0024-3795(80)90247-5).
"""

from collections.abc import Iterator

import numpy as np
import scipy.linalg

from hvpd._errors import InvalidArgumentError
from hvpd._krylov import vectors
from hvpd._krylov.space import Multiply, NotFiniteError


class IndefiniteError(ArithmeticError):
    """A direction has no positive curvature.

    Attributes:
        direction: The direction, a unit vector of shape (n,).
        curvature: d' A d for it; at most 0, up to rounding.
    """

    def __init__(self, direction: vectors.Array, curvature: float) -> None:
        super().__init__(f"the curvature along a direction is {curvature:g}")
        size = float(vectors.norms(direction[None])[0])
        self.direction = direction / direction.dtype.type(size)
        self.curvature = curvature / size**2


class BlockCG:
    """The state of block conjugate gradients for A X = R, from X = 0.

    Args:
        multiply: Multiplies a block by A.
        precondition: Multiplies a block by M; None for the identity.
        R: The right-hand sides as rows, of shape (k, n). Their scales may differ.

    Attributes:
        X: The solutions so far, of shape (k, n).
        Q: Rows that span the residuals, of shape (r, n), r <= k.
        S: Directions, of shape (r, n), conjugate to all before.
        C: Coordinates of the residuals in Q, float64 of shape (r, k).
        norm: A lower bound of the norm of A. Rounding is relative to it.
        finished: Whether all residuals are zero to rounding.
    """

    def __init__(self, multiply: Multiply, precondition: Multiply | None, R: vectors.Array) -> None:
        self._multiply = multiply
        self._precondition = precondition
        self.X = np.zeros_like(R)
        self.norm = 0.0
        scales = vectors.norms(R)
        scales[scales == 0] = 1.0
        self.Q, self.S, self.C = self._factored(R / scales[:, None].astype(R.dtype))
        self.C = self.C * scales
        self.finished = len(self.Q) == 0

    def advance(self, targets: vectors.Array, most: int) -> Iterator[vectors.Array]:
        """Take at least one step. Yield the norms of the residuals after each step.

        Here it is one step. A server may take several steps at once.

        Args:
            targets: Norms of the residuals that end the steps, of shape (k,).
            most: Most steps.

        Raises:
            IndefiniteError: As `step` does, after the steps before it.
            NotFiniteError: As `step` does.
            InvalidArgumentError: As `step` does.
        """
        self.step()
        yield self.residual_norms()

    def solutions(self) -> vectors.Array:
        """Return the solutions so far, of shape (k, n)."""
        return self.X

    def step(self) -> None:
        """Take one step, with one product of a block.

        Raises:
            IndefiniteError: A direction has no positive curvature. X is as before.
            NotFiniteError: A product holds NaN or infinity. X is as before.
            InvalidArgumentError: M is not positive definite.
        """
        AS = self._multiply(self.S)
        if not np.isfinite(AS).all():
            raise NotFiniteError
        curvature = vectors.gram(self.S, AS)
        values, Y = np.linalg.eigh((curvature + curvature.T) / 2)
        self.norm = max(self.norm, float((vectors.norms(AS) / vectors.norms(self.S)).max()))
        if not np.isfinite(self.norm):
            raise NotFiniteError
        lowest = vectors.combination(Y[:, :1], self.S)
        if values[0] <= np.finfo(self.S.dtype).eps * self.norm * vectors.norms(lowest)[0] ** 2:
            raise IndefiniteError(lowest[0], float(values[0]))
        inverse = (Y / values) @ Y.T
        self.X += vectors.combination(inverse @ self.C, self.S)
        rest = self.Q - vectors.combination(inverse, AS)
        self.Q, Z, change = self._factored(rest)
        self.S = Z + vectors.combination(change.T, self.S)
        self.C = change @ self.C
        self.finished = len(self.Q) == 0

    def residual_norms(self) -> vectors.Array:
        """Return the norm of each residual, float64 of shape (k,)."""
        if self._precondition is None:
            found: vectors.Array = np.linalg.norm(self.C, axis=0)
            return found
        squares = np.einsum("ik,ij,jk->k", self.C, vectors.gram(self.Q, self.Q), self.C)
        tracked: vectors.Array = np.sqrt(np.maximum(squares, 0.0))
        return tracked

    def _factored(self, R: vectors.Array) -> tuple[vectors.Array, vectors.Array, vectors.Array]:
        """Return rows Q, M Q, and C, so that R = C^T Q and Q M Q^T = I."""
        Q, C = _orthonormal(R)
        if self._precondition is None or not len(Q):
            return Q, Q, C
        Z = self._precondition(Q)
        if not np.isfinite(Z).all():
            raise InvalidArgumentError("M is not finite: a product with it holds NaN or infinity", reason="NOT_FINITE")
        G = vectors.gram(Q, Z)
        values, V = np.linalg.eigh((G + G.T) / 2)
        if values[0] <= 0:
            raise InvalidArgumentError(
                f"M is not positive definite: v'Mv is {values[0]:.3g} for a unit vector v; pass a positive definite approximation "
                "of the inverse, or None",
                reason="NOT_POSITIVE_DEFINITE",
            )
        roots = np.sqrt(values)
        return (
            vectors.combination(V / roots, Q),
            vectors.combination(V / roots, Z),
            roots[:, None] * (V.T @ C),
        )


def _orthonormal(R: vectors.Array) -> tuple[vectors.Array, vectors.Array]:
    """Return orthonormal rows Q, without those of rounding, and C: R = C^T Q."""
    least = float(np.finfo(R.dtype).tiny)
    if len(R) == 1:
        size = float(vectors.norms(R)[0])
        return (R / R.dtype.type(size), np.array([[size]])) if size > least else (R[:0], np.zeros((0, 1)))
    Q, upper, order = scipy.linalg.qr(R.T.astype(np.float64), mode="economic", pivoting=True)
    sizes = abs(np.diag(upper))
    # The rest of a row that equals another is up to 6 eps in float64.
    relative = max(10 * np.finfo(np.float64).eps, np.finfo(R.dtype).eps)
    rank = int((sizes > max(least, relative * sizes.max(initial=0.0))).sum())
    C = np.empty((rank, len(R)))
    C[:, order] = upper[:rank]
    return Q[:, :rank].T.astype(R.dtype), C
