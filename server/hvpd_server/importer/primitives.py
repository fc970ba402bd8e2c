"""Marks of single primitives of jax: the table of those that a program may ask for,
with a check of every parameter.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax
import jax.extend.core.primitives
import jax.numpy as jnp
import numpy as np
from jax import lax

from hvpd import _text
from hvpd_server.importer.mark import Mark, arrays
from hvpd_server.importer.table import Value, known

_Check = Callable[[Any, Mark, Sequence[Value]], Any]
"""Checks one parameter of a primitive: (JSON value, mark, operands) -> the value for
jax.
"""


@dataclasses.dataclass(frozen=True)
class _Primitive:
    """A primitive that a mark may bind."""

    operands: int | None
    """Number of operands; None for one or more."""
    parameters: Mapping[str, _Check] = dataclasses.field(default_factory=dict)
    """The check of each parameter; a mark has exactly these."""
    rebuild: Callable[..., Any] | None = None
    """(*operands, **parameters) -> results; None for the primitive of this name."""


def rebuilt(mark: Mark, name: str, args: Sequence[Value]) -> Sequence[Value]:
    found = PRIMITIVES.get(name)
    if found is None:
        raise mark.refuse("which is not known: use the version of hvpd that the server has")
    given = mark.mapping("parameters")
    mark.done()
    if len(args) != found.operands if found.operands is not None else not args:
        raise mark.refuse(f"with {len(args)} operands: expected {found.operands or 'one or more'}")
    if given.keys() != found.parameters.keys():
        raise mark.refuse(
            f"with the parameters {_text.cut(str(sorted(given)), 200)}: expected {sorted(found.parameters)}"
        )
    params = {key: check(given[key], mark, args) for key, check in found.parameters.items()}
    if name in _SIZES and known(*args):
        # Sizes stay known when the operations of the decomposition compute them.
        return mark.call.call(mark.call.attributes["decomposition"], *mark.call.operands)
    results = found.rebuild(*args, **params) if found.rebuild else bound(name)(*args, **params)
    return list(results) if isinstance(results, (list, tuple)) else [results]


_SIZES: Final = frozenset(["integer_pow", "square"])
"""Primitives that sizes are computed with."""


@functools.cache
def bound(name: str) -> Callable[..., Any]:
    """Return the primitive's bind."""
    for module in (lax, lax.linalg, jax.extend.core.primitives):
        primitive = getattr(module, f"{name}_p", None)
        if primitive is not None:
            return lambda *args, **params: primitive.bind(*arrays(args), **params)
    if name in _NEWER:
        newer = _NEWER[name]
        return lambda *args, **params: newer(*arrays(args))
    raise NotImplementedError(f"this version of jax has no {name}")


def _geqrf(a: Value) -> list[Value]:
    """Return the reflectors and scales of a QR factorization.

    jax has no derivative of them.
    """
    reflectors, scales = jnp.linalg.qr(a, mode="raw")
    return [jnp.swapaxes(reflectors, -1, -2), scales]


@jax.custom_jvp
def _log2(x: Value) -> Value:
    found = lax.log(x)
    factor = found.real.dtype.type(1 / math.log(2))
    if np.issubdtype(found.dtype, np.complexfloating):
        return lax.complex(lax.real(found) * factor, lax.imag(found) * factor)
    return found * factor


@_log2.defjvp
def _log2_jvp(primals: Sequence[Value], tangents: Sequence[Value]) -> tuple[Value, Value]:
    (x,), (tangent,) = primals, tangents
    return _log2(x), tangent / (x * lax.log(x.dtype.type(2)))


@jax.custom_jvp
def _one_minus_square(x: Value) -> Value:
    return (x.dtype.type(1) + x) * (x.dtype.type(1) - x)


@_one_minus_square.defjvp
def _one_minus_square_jvp(primals: Sequence[Value], tangents: Sequence[Value]) -> tuple[Value, Value]:
    (x,), (tangent,) = primals, tangents
    return _one_minus_square(x), tangent * (x.dtype.type(-2) * x)


_NEWER: Final[Mapping[str, Callable[..., Any]]] = {"log2": _log2, "one_minus_square": _one_minus_square}
"""Primitives of jax 0.11 that jax 0.10 lacks, with the values and the derivative rules
that jax 0.11 gives them.
"""


def _flag(value: Any, mark: Mark, args: Sequence[Value]) -> bool:
    if type(value) is not bool:
        raise mark.refuse(f"with the parameter {_text.cut(str(value), 40)}: expected true or false")
    return value


def _absent(value: Any, mark: Mark, args: Sequence[Value]) -> None:
    if value is not None:
        raise mark.refuse(f"with the parameter {_text.cut(str(value), 40)}: expected null")


def _is(expected: Any) -> _Check:
    def check(value: Any, mark: Mark, args: Sequence[Value]) -> Any:
        if value is not expected:
            raise mark.refuse(f"with the parameter {_text.cut(str(value), 40)}: expected {json.dumps(expected)}")
        return value

    return check


def _integer(low: int, high: int) -> _Check:
    return lambda value, mark, args: mark.checked_integer(value, "parameter", low, high)


def _number(low: float, high: float) -> _Check:
    def check(value: Any, mark: Mark, args: Sequence[Value]) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise mark.refuse(f"with the parameter {_text.cut(str(value), 40)}: expected a number from {low} to {high}")
        return float(value)

    return check


def _or_null(check: _Check) -> _Check:
    """Return a check that accepts null, and all that the given check accepts."""
    return lambda value, mark, args: None if value is None else check(value, mark, args)


def _axis(value: Any, mark: Mark, args: Sequence[Value]) -> int:
    return mark.checked_integer(value, "axis", 0, np.ndim(args[0]) - 1)


def _any_axis(value: Any, mark: Mark, args: Sequence[Value]) -> int:
    return mark.checked_integer(value, "axis", -np.ndim(args[0]), np.ndim(args[0]) - 1)


def _one_axis(value: Any, mark: Mark, args: Sequence[Value]) -> tuple[int]:
    if type(value) is not list or len(value) != 1:
        raise mark.refuse(f"with the axes {_text.cut(str(value), 40)}: expected one axis")
    return (_axis(value[0], mark, args),)


def _index_dtype(value: Any, mark: Mark, args: Sequence[Value]) -> Any:
    if value not in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):
        raise mark.refuse(f"with the parameter {_text.cut(str(value), 40)}: expected the name of an integer dtype")
    return np.dtype(value)


def _choice(**choices: Any) -> _Check:
    def check(value: Any, mark: Mark, args: Sequence[Value]) -> Any:
        if type(value) is not str or value not in choices:
            raise mark.refuse(f"with the parameter {_text.cut(str(value), 40)}: expected one of {', '.join(choices)}")
        return choices[value]

    return check


def _member(enum: Any) -> _Check:
    return _choice(**{each.name: each for each in enum})


def _keys(value: Any, mark: Mark, args: Sequence[Value]) -> int:
    return mark.checked_integer(value, "num_keys", 1, len(args))


def _leading(value: Any, mark: Mark, args: Sequence[Value]) -> int:
    return mark.checked_integer(value, "k", 0, max(np.shape(args[0]), default=0))


def _integers(count: int | None, low: int, high: int) -> _Check:
    """Return a check for a list of integers, one for each axis of the first operand
    when `count` is None.
    """

    def check(value: Any, mark: Mark, args: Sequence[Value]) -> tuple[int, ...]:
        expected = np.ndim(args[0]) if count is None else count
        if type(value) is not list or len(value) != expected:
            raise mark.refuse(f"with the parameter {_text.cut(str(value), 40)}: expected {expected} integers")
        return tuple(mark.checked_integer(each, "parameter", low, high) for each in value)

    return check


def _padding(value: Any, mark: Mark, args: Sequence[Value]) -> tuple[tuple[int, ...], ...]:
    if type(value) is not list or len(value) != np.ndim(args[0]):
        raise mark.refuse(f"with the padding {_text.cut(str(value), 40)}: expected a pair for each axis")
    return tuple(_integers(2, -_LARGE, _LARGE)(each, mark, args) for each in value)


def _gather_dimensions(value: Any, mark: Mark, args: Sequence[Value]) -> lax.GatherDimensionNumbers:
    names = (
        "offset_dims",
        "collapsed_slice_dims",
        "start_index_map",
        "operand_batching_dims",
        "start_indices_batching_dims",
    )
    if type(value) is not dict or value.keys() != set(names):
        raise mark.refuse(f"with the dimension numbers {_text.cut(str(value), 80)}: expected {', '.join(names)}")
    for each in value.values():
        if type(each) is not list or any(type(axis) is not int or not 0 <= axis < _RANK for axis in each):
            raise mark.refuse(f"with the dimension numbers {_text.cut(str(each), 80)}: expected lists of axes")
    return lax.GatherDimensionNumbers(**{name: tuple(value[name]) for name in names})


def _slice_sizes(value: Any, mark: Mark, args: Sequence[Value]) -> tuple[int, ...]:
    extents = np.shape(args[0])
    if type(value) is not list or len(value) != len(extents):
        raise mark.refuse(
            f"with the slice sizes {_text.cut(str(value), 40)}: expected one for each of {len(extents)} axes"
        )
    return tuple(
        extent if size is None else mark.checked_integer(size, "slice size", 0, extent)
        for size, extent in zip(value, extents, strict=True)
    )


def _fill_value(value: Any, mark: Mark, args: Sequence[Value]) -> Any:
    if value is not None and type(value) not in (bool, int, float):
        raise mark.refuse(f"with the fill value {_text.cut(str(value), 40)}: expected a number or null")
    return value


def _permutation_size(value: Any, mark: Mark, args: Sequence[Value]) -> int:
    return mark.checked_integer(value, "permutation_size", max(np.shape(args[0])[-1:], default=0), _LARGE)


def _top_k(x: Value, *, k: int, axis: int) -> Any:
    # The primitive of jax 0.11 has one more parameter, which the function sets.
    return lax.top_k(x, k, axis=axis)


def _random_gamma(key: Value, shape: Value, *, impl: str, log_space: bool) -> Any:
    wrapped = jax.random.wrap_key_data(key, impl=impl)
    # Not by `bound`, because a random key is no plain array.
    return jax.extend.core.primitives.random_gamma_p.bind(wrapped, shape, log_space=log_space)


_LARGE: Final = (1 << 31) - 1
_RANK: Final = 64

_CUMULATIVE: Final = _Primitive(1, {"axis": _axis, "reverse": _flag})
_ARG: Final = _Primitive(1, {"axes": _one_axis, "index_dtype": _index_dtype})
_SUBSET: Final = _or_null(_integers(2, 0, _LARGE))

PRIMITIVES: Final[Mapping[str, _Primitive]] = {
    **{
        name: _Primitive(1)
        for name in (
            *("acos", "acosh", "asin", "asinh", "atan", "atanh", "cosh", "sinh", "square", "one_minus_square"),
            *("erf", "erfc", "erf_inv", "lgamma", "digamma", "bessel_i0e", "bessel_i1e"),
            *("cholesky", "lu", "hessenberg"),
        )
    },
    **{
        name: _Primitive(2)
        for name in (
            *("nextafter", "polygamma", "zeta", "igamma", "igammac", "igamma_grad_a", "pow"),
            *("max", "min"),
            "householder_product",
        )
    },
    "regularized_incomplete_beta": _Primitive(3),
    "threefry2x32": _Primitive(4),
    **{
        name: _Primitive(1, {"accuracy": _absent})
        for name in ("exp2", "log2", "logistic", "cos", "exp", "log", "log1p", "sin", "sqrt")
    },
    "integer_pow": _Primitive(1, {"y": _integer(-_LARGE, _LARGE)}),
    "random_gamma": _Primitive(
        2,
        {"log_space": _flag, "impl": _choice(threefry2x32="threefry2x32", rbg="rbg", unsafe_rbg="unsafe_rbg")},
        _random_gamma,
    ),
    "argmax": _ARG,
    "argmin": _ARG,
    "cumsum": _CUMULATIVE,
    "cumprod": _CUMULATIVE,
    "cummax": _CUMULATIVE,
    "cummin": _CUMULATIVE,
    "cumlogsumexp": _CUMULATIVE,
    "sort": _Primitive(None, {"dimension": _axis, "is_stable": _flag, "num_keys": _keys}),
    "top_k": _Primitive(1, {"k": _leading, "axis": _axis}, _top_k),
    "approx_top_k": _Primitive(
        1,
        {
            "k": _leading,
            "reduction_dimension": _any_axis,
            "recall_target": _number(0.0, 1.0),
            "is_max_k": _flag,
            "reduction_input_size_override": _integer(-1, _LARGE),
            "aggregate_to_topk": _flag,
        },
    ),
    "gather": _Primitive(
        2,
        {
            "dimension_numbers": _gather_dimensions,
            "slice_sizes": _slice_sizes,
            "unique_indices": _flag,
            "indices_are_sorted": _flag,
            "mode": _member(lax.GatherScatterMode),
            "fill_value": _fill_value,
        },
    ),
    "select_and_gather_add": _Primitive(
        2,
        {
            "select_prim": _choice(ge=lax.ge_p, le=lax.le_p),
            "window_dimensions": _integers(None, 1, _LARGE),
            "window_strides": _integers(None, 1, _LARGE),
            "padding": _padding,
            "base_dilation": _integers(None, 1, _LARGE),
            "window_dilation": _integers(None, 1, _LARGE),
        },
    ),
    "eigh": _Primitive(
        1,
        {
            "lower": _flag,
            "sort_eigenvalues": _flag,
            "subset_by_index": _SUBSET,
            "algorithm": _or_null(_member(lax.linalg.EighImplementation)),
        },
    ),
    "eig": _Primitive(
        1,
        {
            "compute_left_eigenvectors": _flag,
            "compute_right_eigenvectors": _flag,
            "enable_eigvec_derivs": _flag,
            "implementation": _or_null(_member(lax.linalg.EigImplementation)),
        },
    ),
    "svd": _Primitive(
        1,
        {
            "full_matrices": _flag,
            "compute_uv": _flag,
            "subset_by_index": _SUBSET,
            "algorithm": _or_null(_member(lax.linalg.SvdAlgorithm)),
        },
    ),
    "qr": _Primitive(1, {"pivoting": _flag, "full_matrices": _flag, "use_magma": _or_null(_flag)}),
    "lu_pivots_to_permutation": _Primitive(1, {"permutation_size": _permutation_size}),
    "geqrf": _Primitive(1, {}, _geqrf),
    "ormqr": _Primitive(3, {"left": _flag, "transpose": _flag}),
    "triangular_solve": _Primitive(
        2,
        dict.fromkeys(("left_side", "lower", "transpose_a", "conjugate_a", "unit_diagonal"), _flag),
    ),
    "tridiagonal": _Primitive(1, {"lower": _flag}),
    "tridiagonal_solve": _Primitive(4, {"perturb_singular": _flag}),
    "schur": _Primitive(1, {"compute_schur_vectors": _flag, "sort_eig_vals": _is(False), "select_callable": _absent}),
    "symmetric_product": _Primitive(2, {"alpha": _number(-math.inf, math.inf), "beta": _number(-math.inf, math.inf)}),
}
"""Every primitive that a mark may bind, with every parameter's check."""
