"""The Hessian at a point as SciPy's LinearOperator."""

from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator

from hvpd import _codec
from hvpd._errors import InvalidArgumentError
from hvpd._objective import Point


class HessianOperator(LinearOperator):
    """H + shift I at a point, symmetric, shape (n, n), in the objective's dtype. Made by `Point.hessian`.

    `H @ v` and `H @ V` are one round trip each: a block is multiplied as a block. Vectors of another real dtype are converted.

    Attributes:
        point: Where the Hessian is taken.
        shift: Added to the diagonal, on the client.
    """

    def __init__(self, point: Point, shift: float = 0.0) -> None:
        super().__init__(point.dtype, (point.n, point.n))  # type: ignore[call-arg]  # the stubs know only __new__
        self.point = point
        self.shift = float(shift)

    def _matvec(self, x: Any) -> _codec.Array:
        return self._multiply(np.asarray(x).reshape(1, -1)).reshape(-1)

    def _matmat(self, X: Any) -> _codec.Array:
        return self._multiply(np.asarray(X).T).T

    def _rmatvec(self, x: Any) -> _codec.Array:
        return self._matvec(x)

    def _rmatmat(self, X: Any) -> _codec.Array:
        return self._matmat(X)

    def _adjoint(self) -> "HessianOperator":
        return self

    def _transpose(self) -> "HessianOperator":
        return self

    def _multiply(self, rows: _codec.Array) -> _codec.Array:
        """V[k,n] -> (H + shift I) V[k,n]."""
        if not (np.issubdtype(rows.dtype, np.floating) or rows.dtype.kind in "iub"):
            raise InvalidArgumentError(
                f"a Hessian multiplies real vectors, got dtype {rows.dtype}"
                + (": multiply the real and the imaginary part" if rows.dtype.kind == "c" else "")
            )
        block = np.ascontiguousarray(rows, dtype=self.dtype)
        product = self.point.multiply(block)
        if self.shift:
            product += self.dtype.type(self.shift) * block
        return product

    def __repr__(self) -> str:
        shift = f", shift={self.shift:g}" if self.shift else ""
        return f"<HessianOperator {self.shape[0]}x{self.shape[1]} {self.dtype} of {self.point.objective.label}{shift}>"
