"""Factorizations of matrices by LAPACK, cuSOLVER and hipSOLVER, as jax calls them,
rebuilt through `jax.lax.linalg`.

Each routine also returns whether it failed, as the integer `info`. The rules return
success: jax's own function puts NaN where a factorization fails, so that the program's
selection of NaN by `info` has nothing left to do.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hvpd_server.importer.graph import Operation
from hvpd_server.importer.linear_algebra import adjoint, cholesky
from hvpd_server.importer.table import Value
from hvpd_server.importer.targets import CustomCall, check_layouts, gpu, lapack, target

_YES_OR_NO: Final = {ord("V"): True, ord("N"): False}

WITHOUT_DERIVATIVE: Final[Mapping[str, str]] = {
    name: f"jax has no derivative of {what}"
    for names, what in (
        (("gees",), "a Schur decomposition"),
        (("gehrd",), "a Hessenberg form"),
        (("sytrd", "hetrd"), "a tridiagonal form"),
    )
    for name in names
}
"""Reasons to refuse a routine, by its name without its library and dtype."""

_ROUTINE: Final = re.compile(r"(?:lapack_[sdcz]|(?:cu|hip)solver_)(\w+)_ffi")


def why_not(name: str) -> str:
    """Return the reason for which a target is not in the table."""
    routine = _ROUTINE.fullmatch(name)
    return WITHOUT_DERIVATIVE.get(routine[1] if routine else "", "the importer does not know this routine")


def _success(a: Value) -> Value:
    """Return the `info` of a routine that found nothing wrong, for each matrix."""
    return np.zeros(np.shape(a)[:-2], np.int32)


def _matrix(custom: CustomCall, index: int = 0) -> Value:
    a = jnp.asarray(custom.operands[index])
    if a.ndim < 2:
        raise custom.refuse(f"of an array of {a.ndim} axes: expected matrices")
    return a


def _is_lower(custom: CustomCall) -> bool:
    """Return whether a routine reads the lower triangle: LAPACK has a letter, a GPU's
    routine a flag.
    """
    if "uplo" in custom.options:
        return bool(custom.option("uplo", {ord("L"): True, ord("U"): False}))
    return bool(custom.options["lower"])


def _potrf(custom: CustomCall) -> Sequence[Value]:
    a = _matrix(custom)
    return [cholesky(a, lower=_is_lower(custom)), _success(a)]


_CHOLESKY: Final = "Cholesky factorization"
target(*lapack("potrf"), what=_CHOLESKY, operands=1, options=["uplo"], column_major=True)(_potrf)
target(*gpu("potrf"), what=_CHOLESKY, operands=1, options=["lower"], column_major=True)(_potrf)


@target(*lapack("getrf"), *gpu("getrf"), what="LU factorization", operands=1, options=[], column_major=True)
def _getrf(custom: CustomCall) -> Sequence[Value]:
    a = _matrix(custom)
    factors, pivots, _ = lax.linalg.lu(a)
    # The routine counts rows from 1.
    return [factors, pivots + np.int32(1), _success(a)]


@target("cu_lu_pivots_to_permutation", "hip_lu_pivots_to_permutation", operands=1, options=[], column_major=False)
def _lu_pivots_to_permutation(custom: CustomCall) -> Sequence[Value]:
    size = custom.call.types[0].shape[-1]
    if size is None:
        raise custom.refuse("whose result has a size that is not stated")
    return [lax.linalg.lu_pivots_to_permutation(jnp.asarray(custom.operands[0]), size)]


def _syevd(custom: CustomCall) -> Sequence[Value]:
    a = _matrix(custom)
    if "mode" in custom.options:
        custom.option("mode", {ord("V"): True})
    else:
        custom.option("algorithm", {0: "default", 1: "QR", 2: "Jacobi"})
    vectors, values = lax.linalg.eigh(a, lower=_is_lower(custom), symmetrize_input=False)
    return [vectors, values, _success(a)]


_EIGH: Final = "eigenvalues of symmetric matrices"
target(*lapack("syevd", "heevd"), what=_EIGH, operands=1, options=["mode", "uplo"], column_major=True)(_syevd)
target(*gpu("syevd"), what=_EIGH, operands=1, options=["algorithm", "lower"], column_major=True)(_syevd)


@target(*lapack("geev"), what="eigenvalues", operands=1, options=["compute_left", "compute_right"], column_major=True)
def _geev(custom: CustomCall) -> Sequence[Value]:
    a = _matrix(custom)
    left, right = (custom.option(f"compute_{side}", _YES_OR_NO) for side in ("left", "right"))
    values, *vectors = lax.linalg.eig(a, compute_left_eigenvectors=left, compute_right_eigenvectors=right)
    missing = jnp.zeros(a.shape, values.dtype)
    parts = [values] if jnp.issubdtype(a.dtype, jnp.complexfloating) else [lax.real(values), lax.imag(values)]
    return [
        *parts,
        vectors[0] if left else missing,
        vectors[-1] if right else missing,
        _success(a),
    ]


# Singular values.

_SVD: Final = "singular values"


@target(*lapack("gesdd"), *lapack("gesvd"), what=_SVD, operands=1, options=["mode"], column_major=True)
def _gesdd(custom: CustomCall) -> Sequence[Value]:
    a = _matrix(custom)
    vectors, full = custom.option("mode", {ord("A"): (True, True), ord("S"): (True, False), ord("N"): (False, True)})
    if not vectors:
        # Nothing reads the singular vectors, which have space in one of two sizes.
        sizes = [custom.call.types[index].shape[-2:] for index in (2, 3)]
        nothing = [jnp.zeros((*a.shape[:-2], *_stated(custom, each)), a.dtype) for each in sizes]
        return [a, lax.linalg.svd(a, compute_uv=False), *nothing, _success(a)]
    left, values, right = lax.linalg.svd(a, full_matrices=full)
    return [a, values, left, right, _success(a)]


def _stated(custom: CustomCall, shape: Sequence[int | None]) -> tuple[int, ...]:
    if any(extent is None for extent in shape):
        raise custom.refuse("whose singular vectors have a size that is not stated")
    return tuple(extent for extent in shape if extent is not None)


@target(
    *gpu("gesvdj"), *gpu("gesvdp"), what=_SVD, operands=1, options=["compute_uv", "full_matrices"], column_major=True
)
def _gesvdj(custom: CustomCall) -> Sequence[Value]:
    """Factorize; these routines return V instead of its adjoint, and have space for
    vectors that are not asked for.
    """
    a = _matrix(custom)
    *batch, rows, columns = a.shape
    full = custom.options["full_matrices"]
    if not custom.options["compute_uv"]:
        widths = (rows, columns) if full else (min(rows, columns),) * 2
        shapes = [(*batch, size, width) for size, width in zip((rows, columns), widths, strict=True)]
        return [a, lax.linalg.svd(a, compute_uv=False), *(jnp.zeros(each, a.dtype) for each in shapes), _success(a)]
    left, values, right = _vectors(a, full=full)
    return [a, values, left, adjoint(right), _success(a)]


@target(
    *gpu("gesvd"), "hipsolver_gesdd_ffi", what=_SVD, operands=1, options=["compute_uv", "full_matrices", "transposed"]
)
def _gesvd(custom: CustomCall) -> Sequence[Value]:
    a = _matrix(custom)
    transposed = custom.options["transposed"]
    # The routine only factorizes tall matrices, so jax hands it the memory of a wide
    # one as its transpose.
    if transposed and a.shape[-2] >= a.shape[-1]:
        raise custom.refuse("with the option transposed for a matrix that is not wide")
    check_layouts(custom, column_major=not transposed)
    if not custom.options["compute_uv"]:
        nothing = jnp.zeros((), a.dtype)
        return [a, lax.linalg.svd(a, compute_uv=False), nothing, nothing, _success(a)]
    left, values, right = _vectors(a, full=custom.options["full_matrices"])
    return [a, values, *((right, left) if transposed else (left, right)), _success(a)]


def _vectors(a: Value, *, full: bool) -> tuple[Value, Value, Value]:
    """Return U, the singular values and the adjoint of V.

    A program for GPUs may ask for all singular vectors and then take the first. jax has
    no derivative of all of them. The others are therefore completed from the first,
    with a derivative of their own.
    """
    left, values, right = lax.linalg.svd(a, full_matrices=False)
    if not full:
        return left, values, right
    return _completed(left), values, adjoint(_completed(adjoint(right)))


def _completed(vectors: Value) -> Value:
    """Append orthonormal columns until a matrix is square."""
    rows, columns = vectors.shape[-2:]
    return vectors if rows == columns else jnp.concatenate([vectors, _complement(vectors)], -1)


@jax.custom_jvp
def _complement(vectors: Value) -> Value:
    """Return orthonormal columns that are orthogonal to given ones."""
    columns = vectors.shape[-1]
    return lax.linalg.qr(vectors, full_matrices=True)[0][..., columns:]


@_complement.defjvp
def _complement_jvp(primals: tuple[Value], tangents: tuple[Value]) -> tuple[Value, Value]:
    """Move the complement as little as possible: a function of the spanned space alone
    has this derivative.
    """
    (vectors,), (moved,) = primals, tangents
    rest = _complement(vectors)
    return rest, -jnp.matmul(vectors, jnp.matmul(adjoint(moved), rest, precision="highest"), precision="highest")


# QR.

_GEQRF: Final = (*lapack("geqrf"), *gpu("geqrf"))
_QR: Final = "QR factorization"


@target(*_GEQRF, what=_QR, operands=1, options=[], column_major=True)
def _geqrf(custom: CustomCall) -> Sequence[Value]:
    """Return R, with NaN in place of the reflectors: jax has no derivative of them, and
    `_orgqr` does not need them.
    """
    a = _matrix(custom)
    rows, columns = a.shape[-2:]
    _, upper = lax.linalg.qr(a, full_matrices=False)
    padded = jnp.concatenate([upper, jnp.zeros((*a.shape[:-2], rows - upper.shape[-2], columns), a.dtype)], -2)
    triangle = np.tri(rows, columns, -1, dtype=bool)
    reflectors = jnp.where(triangle, jnp.asarray(np.nan, a.dtype), padded)
    return [reflectors, jnp.full((*a.shape[:-2], min(rows, columns)), np.nan, a.dtype)]


@target(*lapack("orgqr", "ungqr"), *gpu("orgqr"), what=_QR, operands=2, options=[], column_major=True)
def _orgqr(custom: CustomCall) -> Sequence[Value]:
    """Return Q of the matrix whose reflectors are expanded."""
    call = custom.call
    factored = call.definition(call.operation.operands[1])
    if factored is None or not _is_geqrf(factored) or call.operation.operands[1] != factored.results[1]:
        raise custom.refuse("whose second operand is not that of a QR factorization (geqrf) in the same function")
    if not _is_corner(custom, call.operation.operands[0], factored.results[0]):
        raise custom.refuse("whose first operand is not the result of the same geqrf, from its first row and column on")
    a = jnp.asarray(call.values[factored.operands[0]])
    rows, columns = a.shape[-2:]
    wanted = np.shape(custom.operands[0])[-1]
    if wanted not in (rows, min(rows, columns)):
        raise custom.refuse(f"for {wanted} columns: expected {min(rows, columns)} or {rows}")
    return [lax.linalg.qr(a, full_matrices=wanted == rows)[0]]


def _is_geqrf(maker: Operation) -> bool:
    return maker.name == "stablehlo.custom_call" and maker.attributes.get("call_target_name") in _GEQRF


def _is_corner(custom: CustomCall, value: int, whole: int) -> bool:
    """Return whether a value is an array, padded at its end, or its first rows and
    columns.
    """
    if value == whole:
        return True
    maker = custom.call.definition(value)
    if maker is None or not maker.operands or maker.operands[0] != whole:
        return False
    attributes, known = maker.attributes, [custom.call.values[each] for each in maker.operands[1:]]
    match maker.name:
        case "stablehlo.pad":
            offsets = [attributes["edge_padding_low"], attributes["interior_padding"]]
        case "stablehlo.slice":
            offsets = [attributes["start_indices"], np.asarray(attributes["strides"]) - 1]
        case "stablehlo.dynamic_pad":
            offsets = [known[1], known[3]]
        case "stablehlo.real_dynamic_slice":
            offsets = [known[0], known[2] - 1]
        case "stablehlo.gather" | "stablehlo.dynamic_gather":
            # With symbolic sizes, jax writes a slice as the gather of one window.
            axes = attributes["dimension_numbers"].get("offset_dims", ())
            offsets = [known[0], len(axes) - len(maker.types[0].shape)]
        case _:
            return False
    return not any(isinstance(each, jax.Array) or np.any(np.asarray(each)) for each in offsets)


# Systems of equations.


@target(
    *lapack("trsm"),
    what="triangular system",
    operands=2,
    options=["diag", "side", "trans_x", "uplo"],
    column_major=True,
)
def _trsm(custom: CustomCall) -> Sequence[Value]:
    transpose, conjugate = custom.option(
        "trans_x", {ord("N"): (False, False), ord("T"): (True, False), ord("C"): (True, True)}
    )
    return [
        lax.linalg.triangular_solve(
            _matrix(custom),
            _matrix(custom, 1),
            left_side=custom.option("side", {ord("L"): True, ord("R"): False}),
            lower=_is_lower(custom),
            transpose_a=transpose,
            conjugate_a=conjugate,
            unit_diagonal=custom.option("diag", {ord("U"): True, ord("N"): False}),
        )
    ]


_TRIDIAGONAL: Final = "tridiagonal system"


@target(*lapack("gtsv"), what=_TRIDIAGONAL, operands=4, options=[], column_major=True)
def _gtsv(custom: CustomCall) -> Sequence[Value]:
    """Solve a system; the routine overwrites the diagonals with factors that nothing
    reads.
    """
    (solution,) = _gtsv2(custom)
    overwritten = [jnp.full(np.shape(each), np.nan, each.dtype) for each in custom.operands[:3]]
    return [*overwritten, solution, _success(solution)]


@target("cusparse_gtsv2_ffi", "hipsparse_gtsv2_ffi", what=_TRIDIAGONAL, operands=4, options=[], column_major=True)
def _gtsv2(custom: CustomCall) -> Sequence[Value]:
    return [lax.linalg.tridiagonal_solve(*(jnp.asarray(each) for each in custom.operands))]
