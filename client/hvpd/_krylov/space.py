"""The space in which a Lanczos iteration runs: its basis, and products.

`Space` is the interface between the iteration and the machine that holds the vectors.
The iteration needs the small matrices alpha and beta only, so a run of any number of
steps moves few numbers. `LocalSpace` keeps the basis here, and asks for one product of
a block in each step.

The basis has the rows q_0, ..., q_(rows-1). The last block of it waits for its product.
One step multiplies this block, W = A Q_last, and makes W orthogonal to the last rows,
then to all rows, in one pass of block products. If a pass leaves less than 0.7 of a
norm, another pass follows. The step factors the rest into beta^T times a new
orthonormal block, and appends the new block:

    A Q_last^T = Q_last^T alpha + (earlier rows) + Q_new^T beta

The new block has fewer rows than the last one if W has lost rank. It has none if the
rows span an invariant space. Both are data, not errors.

Source: Golub and Van Loan, Matrix Computations, 10.1 and 10.3; Daniel, Gragg, Kaufman,
Stewart 1976 (https://doi.org/10.1090/S0025-5718-1976-0431641-8) for
the further passes.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import scipy.linalg

from hvpd._errors import InvalidArgumentError
from hvpd._krylov import vectors

Multiply = Callable[[vectors.Array], vectors.Array]
"""Multiplies V[k, n] -> A V[k, n] in the operator's dtype. Vectors are rows."""


class Step(NamedTuple):
    """The numbers of one step of block Lanczos."""

    alpha: vectors.Array
    """Q_last A Q_last^T, symmetric, float64 of shape (b, b)."""
    beta: vectors.Array
    """Coupling to the new block, float64 of shape (r, b), with 0 <= r <= b."""


class NotFiniteError(ArithmeticError):
    """A product or a start vector holds NaN or infinity. The space is as before."""


class Space(Protocol):
    """A basis of orthonormal rows, and the operator that extends it.

    Attributes:
        n: Number of elements of a vector.
        dtype: float32 or float64.
        rows: Number of rows of the basis, with those that wait for their product.
        products: Number of vectors that were multiplied.
        reorthogonalize: "full", or "none" if only the last two blocks are kept.
    """

    n: int
    dtype: np.dtype[Any]
    rows: int
    products: int
    reorthogonalize: str

    def append(self, V: vectors.Array) -> vectors.Array:
        """Orthonormalise the rows V[k, n] against the basis, and append them.

        They become the block that waits for its product.

        Returns:
            Their factor beta, float64 of shape (r, k). r < k rows are appended if the
            rows depend on each other or on the basis.

        Raises:
            NotFiniteError: V holds NaN or infinity.
        """
        ...

    def extend(self, steps: int) -> Iterator[Step]:
        """Take at most `steps` steps, and yield the numbers of each.

        The iteration ends early after a step whose beta has no rows. A caller may stop
        early; steps that were not yielded then have not happened.

        Raises:
            NotFiniteError: A product holds NaN or infinity. All steps before it count.
        """
        ...

    def combine(self, Y: vectors.Array) -> vectors.Array:
        """Return Y^T Q, of shape (k, n), for Y[m, k] and the first m rows."""
        ...

    def restart(self, Y: vectors.Array, *, waiting: bool = True) -> None:
        """Replace the first m rows by Y^T Q, for Y[m, k].

        These are all rows but those of the waiting block, which stays behind them.

        Args:
            Y: Float64 array of orthonormal columns.
            waiting: Whether the waiting block stays; otherwise it is dropped, and
                `append` gives the next one.
        """
        ...

    def close(self) -> None:
        """Free the basis."""
        ...


@runtime_checkable
class Resident(Protocol):
    """A space that a server holds.

    Attributes:
        id: Id of the run on the server; empty before its first step.
    """

    @property
    def id(self) -> str:
        """Return the id."""
        ...

    def pin(self, seconds: int) -> None:
        """Keep the space until it has not been used for `seconds`."""
        ...


LEAST_LEFT = 0.7
"""Part of a norm that a pass of an orthogonalization must leave. If a pass leaves less,
another pass follows, because the rounding of the first one has grown relative to what
is left.

Source: Daniel, Gragg, Kaufman and Stewart, Reorthogonalization and stable algorithms
for updating the Gram-Schmidt QR factorization, Mathematics of Computation 30 (1976).
"""


class LocalSpace:
    """A `Space` in NumPy, on this machine.

    Args:
        multiply: Multiplies a block.
        n: Number of elements of a vector.
        dtype: float32 or float64.
        reorthogonalize: "full" keeps the basis, and makes each new block orthogonal to
            all of it. "none" keeps two blocks; the basis then loses its orthogonality,
            and `combine` and `restart` are refused.
    """

    def __init__(self, multiply: Multiply, n: int, dtype: np.dtype[Any], *, reorthogonalize: str = "full") -> None:
        self.n = n
        self.dtype = dtype
        self.rows = 0
        self.products = 0
        self.reorthogonalize = reorthogonalize
        self._multiply = multiply
        self._stored = np.empty((0, n), dtype)
        """The rows of the basis, with room for more; if "none", the last two blocks."""
        self._kept = 0
        """Number of rows in `_stored` that count."""
        self._waiting = 0
        """Number of rows of the block that waits for its product."""
        self._beta = np.zeros((0, 0))
        """beta of the waiting block; for "none"."""
        self._scale = 0.0
        """Largest norm of a product so far: what rounding is relative to."""

    @property
    def _basis(self) -> vectors.Array:
        return self._stored[: self._kept]

    def append(self, V: vectors.Array) -> vectors.Array:
        """See `Space.append`."""
        if not np.isfinite(V).all():
            raise NotFiniteError
        W = np.array(V, self.dtype)
        size = float(vectors.norms(W).max(initial=0.0))
        _, W = self._orthogonal(W)
        new, beta = self._factored(W, size)
        self._push(new, beta)
        return beta

    def extend(self, steps: int) -> Iterator[Step]:
        """See `Space.extend`."""
        for _ in range(steps):
            if not self._waiting:
                return
            last = self._basis[self._kept - self._waiting :]
            W = np.array(self._multiply(last), self.dtype)
            if not np.isfinite(W).all():
                raise NotFiniteError
            self.products += len(last)
            self._scale = max(self._scale, float(vectors.norms(W).max()))
            if self.reorthogonalize == "none" and self._kept > self._waiting:
                before = self._basis[: self._kept - self._waiting]
                vectors.subtract(W, self._beta.T, before)
                C = vectors.gram(last, W)
                vectors.subtract(W, C, last)
                alpha = C
            else:
                C, W = self._orthogonal(W)
                alpha = C[self._kept - self._waiting :]
            new, beta = self._factored(W, self._scale)
            self._push(new, beta)
            yield Step((alpha + alpha.T) / 2, beta)

    def combine(self, Y: vectors.Array) -> vectors.Array:
        """See `Space.combine`."""
        self._check_kept()
        return vectors.combination(Y, self._basis[: len(Y)])

    def restart(self, Y: vectors.Array, *, waiting: bool = True) -> None:
        """See `Space.restart`."""
        self._check_kept()
        rows = vectors.combination(Y, self._basis[: len(Y)])
        self._waiting *= waiting
        last = self._basis[self._kept - self._waiting :].copy()
        self._kept = len(rows) + len(last)
        self._stored[: len(rows)], self._stored[len(rows) : self._kept] = rows, last
        self.rows = self._kept

    def close(self) -> None:
        """See `Space.close`."""
        self._stored, self._kept, self._waiting, self.rows = np.empty((0, self.n), self.dtype), 0, 0, 0

    def _check_kept(self) -> None:
        if self.reorthogonalize == "none":
            raise InvalidArgumentError(
                "this run keeps no basis, because it was started with reorthogonalize='none': start it with 'full'",
                reason="NO_BASIS",
            )

    def _orthogonal(self, W: vectors.Array) -> tuple[vectors.Array, vectors.Array]:
        """Return the coefficients of W in the basis, and W without them.

        The last rows come first, because a product has little in the others. So one
        pass over all rows is enough for most products.
        """
        Q, total = self._basis, np.zeros((self._kept, len(W)))
        if not len(Q):
            return total, W
        latest = min(2 * len(W), len(Q))
        total[-latest:] = vectors.gram(Q[-latest:], W)
        vectors.subtract(W, total[-latest:], Q[-latest:])
        size = vectors.norms(W)
        for _ in range(4):
            C = vectors.gram(Q, W)
            vectors.subtract(W, C, Q)
            total += C
            before, size = size, vectors.norms(W)
            if (size >= LEAST_LEFT * before).all():
                break
        return total, W

    def _factored(self, W: vectors.Array, scale: float) -> tuple[vectors.Array, vectors.Array]:
        """Return orthonormal rows and beta, so that W = beta^T rows.

        Rows that are rounding, relative to the scale, are dropped.
        """
        # Without reorthogonalization, a basis of copies may have more than n rows.
        room = self.n - self.rows if self.reorthogonalize == "full" else len(W)
        least = 10 * float(np.finfo(self.dtype).eps) * scale
        if len(W) == 1:
            size = float(vectors.norms(W)[0])
            if size <= least or room < 1:
                return W[:0], np.zeros((0, 1))
            W /= self.dtype.type(size)
            return W, np.array([[size]])
        rows, beta = _pivoted(W, least, room)
        if len(rows):
            # A row that was small before it was scaled has lost its orthogonality.
            rows = self._orthogonal(rows.astype(self.dtype))[1] if self.reorthogonalize == "full" else rows
            rows, again = _pivoted(rows, 0.1, room)
            beta = again @ beta
        return rows.astype(self.dtype), beta

    def _push(self, new: vectors.Array, beta: vectors.Array) -> None:
        if self.reorthogonalize == "none":
            last = self._basis[self._kept - self._waiting :]
            self._stored = np.vstack([last, new])
            self._kept = len(self._stored)
        else:
            if self._kept + len(new) > len(self._stored):
                room = min(max(2 * self._kept, self._kept + len(new), 16), max(self.n, self._kept + len(new)))
                grown = np.empty((room, self.n), self.dtype)
                grown[: self._kept] = self._basis
                self._stored = grown
            self._stored[self._kept : self._kept + len(new)] = new
            self._kept += len(new)
        self.rows += len(new)
        self._waiting = len(new)
        self._beta = beta


def _pivoted(W: vectors.Array, least: float, room: int) -> tuple[vectors.Array, vectors.Array]:
    """Return orthonormal rows and beta, so that W = beta^T rows, by QR with pivots."""
    Q, R, order = scipy.linalg.qr(W.T.astype(np.float64), mode="economic", pivoting=True)
    rank = min(int((abs(np.diag(R)) > least).sum()), room)
    beta = np.empty((rank, len(W)))
    beta[:, order] = R[:rank]
    return Q[:, :rank].T, beta
