"""What all operators here have in common as SciPy's LinearOperator: they are symmetric, and multiply blocks as blocks."""

from typing import Any, Self

import numpy as np
from scipy.sparse.linalg import LinearOperator

from hvpd import _codec


class SymmetricOperator(LinearOperator):
    """A real symmetric matrix of shape (n, n). Subclasses define `_matmat`, of a block whose vectors are columns."""

    def __init__(self, dtype: "np.dtype[Any]", n: int) -> None:
        super().__init__(dtype, (n, n))  # type: ignore[call-arg]  # the stubs know only __new__

    def _matmat(self, X: Any) -> _codec.Array:
        raise NotImplementedError

    def _matvec(self, x: Any) -> _codec.Array:
        return self._matmat(np.asarray(x).reshape(-1, 1)).reshape(-1)

    def _rmatvec(self, x: Any) -> _codec.Array:
        return self._matvec(x)

    def _rmatmat(self, X: Any) -> _codec.Array:
        return self._matmat(X)

    def _adjoint(self) -> Self:
        return self

    def _transpose(self) -> Self:
        return self
