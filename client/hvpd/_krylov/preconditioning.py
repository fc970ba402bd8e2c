"""Preconditioners: functions that multiply by them, and their arrays for a server."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import scipy.sparse
from scipy.sparse.linalg import aslinearoperator

from hvpd._errors import InvalidArgumentError
from hvpd._krylov.space import Multiply
from hvpd._krylov.symmetry import check_symmetric
from hvpd._krylov.vectors import Array


def preconditioner(M: Any, n: int, dtype: np.dtype[Any]) -> Multiply | None:
    """Return the function that multiplies a block of rows by M; None for no M.

    Args:
        M: An operator, matrix or sparse matrix of shape (n, n); or a vector of shape
            (n,), the diagonal of one; or None.
        n: Number of elements of a vector.
        dtype: dtype of the result.

    Raises:
        InvalidArgumentError: M has another shape, is a curvature with an inverse, or is
            a matrix that is not symmetric.
    """
    if M is None:
        return None
    if hasattr(M, "inverse"):
        raise InvalidArgumentError(
            "M must approximate the inverse of A, got the curvature itself: pass M.inverse()", reason="PRECONDITIONER"
        )
    if hasattr(M, "values") and hasattr(M, "standard_error"):
        raise InvalidArgumentError(
            "M must approximate the inverse of A, got its diagonal: pass 1 / M.values", reason="PRECONDITIONER"
        )
    if np.ndim(M) == 1 and not hasattr(M, "matvec"):
        diagonal = np.asarray(M)
        if diagonal.shape != (n,) or not (diagonal > 0).all() or not np.isfinite(diagonal).all():
            raise InvalidArgumentError(
                f"a vector M is the diagonal of an approximate inverse: it must have {n} positive elements, got shape "
                f"{diagonal.shape}, smallest {diagonal.min(initial=np.inf):.3g}",
                reason="PRECONDITIONER",
            )
        return multiply(Described("diagonal", {"M": diagonal.astype(dtype)}))
    try:
        operator: Any = aslinearoperator(M)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"M must be an operator, a matrix or a vector, got {type(M).__name__}", reason="PRECONDITIONER"
        ) from error
    if operator.shape != (n, n):
        raise InvalidArgumentError(
            f"M must have the shape ({n}, {n}) of A, got {operator.shape}", reason="PRECONDITIONER"
        )
    if scipy.sparse.issparse(M) or isinstance(M, np.ndarray):
        # A computed inverse is symmetric only up to rounding times its condition.
        check_symmetric(M, "M", dtype, float(np.finfo(dtype).eps) ** 0.5)
    return lambda rows: np.asarray(operator.matmat(rows.T), dtype).T


KINDS: Final = ("diagonal", "low_rank", "kronecker")
"""Kinds of a described preconditioner."""

PARTS: Final = ("elements", "a", "g", "weights")
"""Names of the arrays of a layer, of the kind "kronecker"."""


class Described(NamedTuple):
    """A preconditioner M that arrays describe.

    - "diagonal": M is the diagonal matrix of "M", of shape (n,).
    - "low_rank": M is U diag(weights) U^T + shift I, with "M_U" of shape (n, r) and
      "M_weights" of shape (r,).
    - "kronecker": M is shift I outside of the layers. In layer i, the elements X[p, q]
      of a vector at "M_elements_i" become a (weights * (a^T X g)) g^T, with "M_a_i" of
      shape (p, p), "M_g_i" of shape (q, q) and "M_weights_i" of shape (p, q).
    """

    kind: str
    """One of `KINDS`; empty for the identity."""
    arrays: Mapping[str, Array]
    shift: float = 0.0


def described(M: Any, dtype: np.dtype[Any]) -> Described | None:
    """Return the description of a preconditioner; None if it has none.

    Args:
        M: A vector, which is a diagonal; an operator with a method `_described`; or
            None for the identity.
        dtype: dtype of the arrays.
    """
    if M is None:
        return Described("", {})
    describe = getattr(M, "_described", None)
    if describe is not None:
        found: Described = describe()
        arrays = {
            name: array if array.dtype.kind == "i" else array.astype(dtype) for name, array in found.arrays.items()
        }
        return found._replace(arrays=arrays)
    if np.ndim(M) == 1 and not hasattr(M, "matvec"):
        return Described("diagonal", {"M": np.ascontiguousarray(M, dtype)})
    return None


Put = Callable[[Any, Any, Any], Any]
"""Returns a block of rows with other values at some elements: (rows, elements, values)
-> rows.
"""


def _put(rows: Array, elements: Array, values: Array) -> Array:
    rows[:, elements] = values
    return rows


@dataclasses.dataclass(frozen=True)
class Applied:
    """Multiplies a block of rows by a described preconditioner: (k, n) -> (k, n).

    The arrays are NumPy's, or those of another library with another `put`.
    """

    described: Described
    put: Put = _put

    def __call__(self, rows: Any) -> Any:
        """Return V M for rows V."""
        kind, arrays, shift = self.described
        if kind == "diagonal":
            return rows * arrays["M"]
        if kind == "low_rank":
            U = arrays["M_U"]
            return ((rows @ U) * arrays["M_weights"]) @ U.T + shift * rows
        product = rows * shift
        for number in range(layer_count(arrays)):
            elements, a, g, weights = (arrays[f"M_{part}_{number}"] for part in PARTS)
            inner = (a.T @ (rows[:, elements] @ g)) * weights
            product = self.put(product, elements, a @ (inner @ g.T))
        return product


def multiply(described: Described) -> Applied | None:
    """Return the function that multiplies a block of rows; None for the identity."""
    # A float of NumPy would make float64 vectors of float32 vectors.
    return Applied(described._replace(shift=float(described.shift))) if described.kind else None


def layer_count(arrays: Mapping[str, Array]) -> int:
    """Return the number of layers that arrays describe."""
    return sum(re.fullmatch(r"M_elements_\d+", name) is not None for name in arrays)


def fault(described: Described, n: int) -> str:
    """Return the fault of a description that came from elsewhere; empty if there is
    none.
    """
    arrays = described.arrays
    shapes = {name: array.shape for name, array in arrays.items()}
    finite = all(array.dtype.kind == "i" or np.isfinite(array).all() for array in arrays.values())
    if not (np.isfinite(described.shift) and finite):
        return "it holds NaN or infinity"
    if described.kind == "diagonal" and shapes.get("M") != (n,):
        return f"M must have the shape ({n},)"
    if described.kind == "low_rank" and shapes.get("M_U") != (n, *shapes.get("M_weights", ())):
        return "M_U must have the shape (n, r), and M_weights the shape (r,)"
    return _layers_fault(arrays, n) if described.kind == "kronecker" else ""


def _layers_fault(arrays: Mapping[str, Array], n: int) -> str:
    taken = np.zeros(n, bool)
    for number in range(layer_count(arrays)):
        found = [arrays.get(f"M_{part}_{number}") for part in PARTS]
        elements = found[0]
        if elements is None or elements.ndim != 2 or elements.dtype.kind != "i":
            return f"M_elements_{number} must be integers of shape (p, q)"
        p, q = elements.shape
        if [None if part is None else part.shape for part in found[1:]] != [(p, p), (q, q), (p, q)]:
            return f"layer {number} of {p} x {q} elements needs a ({p}, {p}), g ({q}, {q}) and weights ({p}, {q})"
        inside = elements.min(initial=0) >= 0 and elements.max(initial=0) < n
        if not inside or taken[elements].any() or len(np.unique(elements)) < elements.size:
            return f"M_elements_{number} must be different positions below {n}, each in one layer"
        taken[elements] = True
    return ""
