"""Matrix products, Cholesky factors and triangular systems of StableHLO.

LAPACK's routines are in `factorizations`.
"""

from collections.abc import Sequence
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax import lax

from hvpd_server.importer.table import Call, Value, dtype_of, operation

_PRECISIONS: Final = {"HIGH": lax.Precision.HIGH, "HIGHEST": lax.Precision.HIGHEST}
_DEFAULTS: Final = {"default": lax.Precision.DEFAULT, "high": lax.Precision.HIGH, "highest": lax.Precision.HIGHEST}
_TRANSPOSES: Final = {"NO_TRANSPOSE": (False, False), "TRANSPOSE": (True, False), "ADJOINT": (True, True)}


def precision(call: Call) -> tuple[lax.Precision, lax.Precision] | None:
    """Return the precision of each operand of a product; the registration's precision
    replaces DEFAULT.

    Raises:
        Refused: A precision is unknown, or the operation has another number of them
            than two.
    """
    stated: Sequence[str] = call.attributes.get("precision_config") or ("DEFAULT", "DEFAULT")
    if len(stated) != 2 or not all(each in ("DEFAULT", *_PRECISIONS) for each in stated):
        raise call.refuse(f"with the precision_config {list(stated)}: expected two of DEFAULT, HIGH and HIGHEST")
    if call.precision not in _DEFAULTS:
        raise ValueError(f"precision is {call.precision!r}: expected one of {', '.join(_DEFAULTS)}")
    if not jnp.issubdtype(call.operands[0].dtype, jnp.inexact):
        return None
    first, second = (_PRECISIONS.get(each, _DEFAULTS[call.precision]) for each in stated)
    return first, second


def _product(call: Call, contracting: Any, batching: Any) -> Value:
    lhs, rhs = call.operands
    return lax.dot_general(
        lhs,
        rhs,
        (contracting, batching),
        precision=precision(call),
        preferred_element_type=dtype_of(call.types[0]),
    )


@operation("stablehlo.dot_general", attributes=["dot_dimension_numbers", "precision_config", "algorithm"])
def _dot_general(call: Call) -> Value:
    if "algorithm" in call.attributes:
        raise call.refuse("with an algorithm: expected a precision_config of DEFAULT, HIGH or HIGHEST instead")
    numbers = call.attributes["dot_dimension_numbers"]
    names = ("contracting_dimensions", "batching_dimensions")
    contracting, batching = (
        tuple(tuple(numbers.get(f"{side}_{name}", ())) for side in ("lhs", "rhs")) for name in names
    )
    return _product(call, contracting, batching)


@operation("stablehlo.dot", attributes=["precision_config"])
def _dot(call: Call) -> Value:
    """Multiply matrices or vectors: an older form of dot_general."""
    lhs, rhs = call.operands
    if lhs.ndim not in (1, 2) or rhs.ndim not in (1, 2):
        raise call.refuse(f"of arrays with {lhs.ndim} and {rhs.ndim} axes: expected one or two axes")
    return _product(call, ((lhs.ndim - 1,), (0,)), ((), ()))


def cholesky(a: Value, *, lower: bool) -> Value:
    """Return the Cholesky factor of matrices of which one triangle is read.

    Args:
        a: Shape [..., n, n].
        lower: Read the lower triangle and return L of a = L L^H; otherwise read the
            upper and return U of a = U^H U.
    """
    if lower:
        return lax.linalg.cholesky(a, symmetrize_input=False)
    return adjoint(lax.linalg.cholesky(adjoint(a), symmetrize_input=False))


def adjoint(a: Value) -> Value:
    """Return the conjugate transpose of matrices."""
    return jnp.conj(jnp.swapaxes(a, -1, -2))


@operation("stablehlo.cholesky", attributes=["lower"])
def _cholesky(call: Call) -> Value:
    (a,) = call.operands
    return cholesky(jnp.asarray(a), lower=bool(call.attributes.get("lower", False)))


@operation("stablehlo.triangular_solve", attributes=["left_side", "lower", "unit_diagonal", "transpose_a"])
def _triangular_solve(call: Call) -> Value:
    a, b = (jnp.asarray(each) for each in call.operands)
    transpose = call.attributes.get("transpose_a", "NO_TRANSPOSE")
    if transpose not in _TRANSPOSES:
        raise call.refuse(f"with transpose_a {transpose}: expected one of {', '.join(_TRANSPOSES)}")
    if np.shape(a)[:-2] != np.shape(b)[:-2]:
        raise call.refuse(f"of arrays of shapes {list(a.shape)} and {list(b.shape)}: expected the same leading axes")
    transpose_a, conjugate_a = _TRANSPOSES[transpose]
    return lax.linalg.triangular_solve(
        a,
        b,
        left_side=bool(call.attributes.get("left_side", False)),
        lower=bool(call.attributes.get("lower", False)),
        unit_diagonal=bool(call.attributes.get("unit_diagonal", False)),
        transpose_a=transpose_a,
        conjugate_a=conjugate_a,
    )
