"""What all operators here have in common as SciPy's LinearOperator: they are symmetric, and multiply blocks as blocks."""

from typing import Any, Self

import numpy as np
from scipy.sparse.linalg import LinearOperator

from hvpd import _codec
from hvpd._errors import InvalidArgumentError


class SymmetricOperator(LinearOperator):
    """A real symmetric matrix of shape (n, n). Subclasses define `_matmat`, of a block whose vectors are columns."""

    def __init__(self, dtype: "np.dtype[Any]", n: int) -> None:
        super().__init__(dtype, (n, n))  # type: ignore[call-arg]  # the stubs know only __new__

    def _matmat(self, X: Any) -> _codec.Array:
        raise NotImplementedError

    def _matvec(self, x: Any) -> _codec.Array:
        return self._matmat(np.asarray(x).reshape(-1, 1)).reshape(-1)

    def matvec(self, x: Any) -> Any:
        """This times a vector of shape (n,) or (n, 1); SciPy's, without what it asks of a plain vector."""
        if type(x) is np.ndarray and x.shape == self.shape[:1]:
            return self._matvec(x)
        self._check(x)
        return super().matvec(x)

    def matmat(self, X: Any) -> Any:
        """This times a block of shape (n, k)."""
        self._check(X)
        return super().matmat(X)

    def _check(self, operand: Any) -> None:
        shape, n = np.shape(operand), self.shape[0]
        if len(shape) not in (1, 2) or shape[0] != n:
            raise InvalidArgumentError(
                f"an operator of shape ({n}, {n}) multiplies vectors of shape ({n},) and blocks of shape ({n}, k), got {shape}"
            )

    def __matmul__(self, other: Any) -> Any:
        if type(other) is np.ndarray and other.shape == self.shape[:1]:
            return self._matvec(other)
        return super().__matmul__(other)

    def _rmatvec(self, x: Any) -> _codec.Array:
        return self._matvec(x)

    def _rmatmat(self, X: Any) -> _codec.Array:
        return self._matmat(X)

    def _adjoint(self) -> Self:
        return self

    def _transpose(self) -> Self:
        return self
