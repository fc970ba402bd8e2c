"""The check that a matrix is symmetric."""

from typing import Any, cast

import numpy as np
import scipy.sparse

from hvpd._errors import InvalidArgumentError


def check_symmetric(A: Any, name: str, dtype: np.dtype[Any], tolerance: float) -> None:
    """Check that a square array or sparse matrix is symmetric.

    Args:
        A: The matrix.
        name: Name of the argument, for the message.
        dtype: dtype of the comparison.
        tolerance: Largest difference, relative to the largest element.

    Raises:
        InvalidArgumentError: A differs from its transpose (reason `NOT_SYMMETRIC`).
    """
    most, row, column = 0.0, 0, 0
    if scipy.sparse.issparse(A):
        A = cast("Any", A).tocsr()
        size = abs(A.data).max(initial=0)
        differences = abs(A - A.T).tocoo()
        if differences.nnz:
            at = int(differences.data.argmax())
            most, row, column = float(differences.data[at]), int(differences.row[at]), int(differences.col[at])
    else:
        size = abs(A).max(initial=0)
        for start in range(0, len(A), _ROWS):  # Only few rows are copied at once.
            part = abs(np.subtract(A[start : start + _ROWS], A[:, start : start + _ROWS].T, dtype=dtype))
            at = int(part.argmax())
            if part.flat[at] > most:
                most, row, column = float(part.flat[at]), start + at // len(A), at % len(A)
    if most > tolerance * float(size):
        raise InvalidArgumentError(
            f"{name} must be symmetric, and {name}[{row}, {column}] is {A[row, column]:.6g}, {name}[{column}, {row}] is "
            f"{A[column, row]:.6g}: pass a symmetric matrix, such as ({name} + {name}.T) / 2",
            reason="NOT_SYMMETRIC",
        )


_ROWS = 64
"""Rows that are compared at once."""
