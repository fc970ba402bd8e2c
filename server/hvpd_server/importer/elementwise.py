"""Elementwise operations: arithmetic, logic, comparison, conversion.

Known integers are computed with NumPy.

NumPy and StableHLO differ in the division of integers, in shifts by many bits, and in
comparisons of a total order. The functions of this file follow StableHLO: division
truncates towards zero, and integers wrap around.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hvpd_server.importer.table import Call, Rule, Value, dtype_of, known, operation

Array = np.ndarray[Any, Any]

Fold = Callable[..., Any]
"""Computes a result from known integers with NumPy."""


def elementwise(build: Callable[..., Value], fold: Fold | None = None) -> Rule:
    """Return the rule of an operation without attributes.

    Args:
        build: Function of jax arrays.
        fold: The same function of NumPy arrays of integers or booleans; None if sizes
            never need the operation.
    """

    def rule(call: Call) -> Value:
        if fold is not None and known(*call.operands):
            return folded(fold, *call.operands)
        return build(*call.operands)

    return rule


def folded(fold: Fold, *values: Array) -> Array:
    """Compute a known result, which has the dtype of the last operand unless it is
    boolean.
    """
    with np.errstate(all="ignore"):
        result = np.asarray(fold(*values))
    return result if result.dtype == np.bool_ else result.astype(values[-1].dtype, copy=False)


def _add(x: Value, y: Value) -> Value:
    return lax.bitwise_or(x, y) if x.dtype == np.bool_ else lax.add(x, y)


def _multiply(x: Value, y: Value) -> Value:
    return lax.bitwise_and(x, y) if x.dtype == np.bool_ else lax.mul(x, y)


def _real(x: Value) -> Value:
    return lax.real(x) if jnp.issubdtype(x.dtype, jnp.complexfloating) else x


def _imag(x: Value) -> Value:
    return lax.imag(x) if jnp.issubdtype(x.dtype, jnp.complexfloating) else lax.full_like(x, 0)


def _power(x: Value, y: Value) -> Value:
    return _integer_power(x, y) if jnp.issubdtype(x.dtype, jnp.integer) else lax.pow(x, y)


def _integer_power(x: Value, y: Value) -> Value:
    """Raise integers to integers by repeated squaring; a negative exponent gives the
    truncated reciprocal.
    """
    one, zero = jnp.ones_like(x), jnp.zeros_like(x)
    exponent, factor, result = y, x, one
    for _ in range(np.dtype(y.dtype).itemsize * 8):
        result = jnp.where((exponent & 1).astype(bool), result * factor, result)
        factor = factor * factor
        exponent = lax.shift_right_logical(exponent, jnp.ones_like(exponent))
    if not jnp.issubdtype(x.dtype, jnp.signedinteger):
        return result
    is_odd = (y & 1).astype(bool)
    reciprocal = jnp.where(x == 1, one, jnp.where(x == -1, jnp.where(is_odd, -one, one), zero))
    return jnp.where(y < 0, reciprocal, result)


def quotient(x: Array, y: Array) -> Array:
    """Divide known integers towards zero; a division by zero gives a number with all
    bits set, as XLA does.
    """
    safe = np.where(y == 0, np.ones_like(y), y)
    towards_zero = (x - np.fmod(x, safe)) // safe
    return np.where(y == 0, ~np.zeros_like(x), towards_zero)


def remainder(x: Array, y: Array) -> Array:
    """Return the remainder of a division towards zero; a division by zero leaves the
    dividend, as in XLA.
    """
    return np.where(y == 0, x, np.fmod(x, np.where(y == 0, np.ones_like(y), y)))


def _bits(x: Array, kind: str) -> Array:
    """Return the same bits as integers of a kind: "u" is unsigned and "i" is signed."""
    return x.view(np.dtype(f"{kind}{x.dtype.itemsize}"))


def _shift(shift: Callable[[Array, Array], Array], kind: str, x: Array, y: Array) -> Array:
    """Shift known integers; an amount counts as unsigned, and no bit stays when it is
    at least the width.
    """
    width = x.dtype.itemsize * 8
    amount = _bits(y, "u")
    if kind == "i":
        # An arithmetic shift by more than all bits leaves copies of the sign bit.
        return _bits(shift(_bits(x, kind), _bits(np.minimum(amount, width - 1), kind)), x.dtype.kind)
    shifted = shift(_bits(x, kind), np.minimum(amount, width - 1))
    return _bits(np.where(amount < width, shifted, np.zeros_like(shifted)), x.dtype.kind)


def _leading_zeros(x: Array) -> Array:
    bits = _bits(x, "u")
    width = x.dtype.itemsize * 8
    used = sum((np.right_shift(bits, bits.dtype.type(each)) != 0).astype(np.int64) for each in range(width))
    return np.asarray(width - used)


_ARITHMETIC: Final[Mapping[str, tuple[Callable[..., Value], Fold | None]]] = {
    "abs": (lax.abs, np.abs),
    "add": (_add, np.add),
    "and": (lax.bitwise_and, np.bitwise_and),
    "atan2": (lax.atan2, None),
    "cbrt": (lax.cbrt, None),
    "ceil": (lax.ceil, None),
    "clamp": (lax.clamp, lambda low, x, high: np.minimum(np.maximum(x, low), high)),
    "complex": (lax.complex, None),
    "cosine": (lax.cos, None),
    "count_leading_zeros": (lax.clz, _leading_zeros),
    "divide": (lax.div, quotient),
    "exponential": (lax.exp, None),
    "exponential_minus_one": (lax.expm1, None),
    "floor": (lax.floor, None),
    "imag": (_imag, None),
    "is_finite": (lax.is_finite, None),
    "log": (lax.log, None),
    "log_plus_one": (lax.log1p, None),
    "logistic": (lax.logistic, None),
    "maximum": (lax.max, np.maximum),
    "minimum": (lax.min, np.minimum),
    "multiply": (_multiply, np.multiply),
    "negate": (lax.neg, np.negative),
    "not": (lax.bitwise_not, np.bitwise_not),
    "or": (lax.bitwise_or, np.bitwise_or),
    "popcnt": (lax.population_count, lambda x: np.bitwise_count(_bits(x, "u"))),
    "power": (_power, None),
    "real": (_real, None),
    "remainder": (lax.rem, remainder),
    "round_nearest_afz": (functools.partial(lax.round, rounding_method=lax.RoundingMethod.AWAY_FROM_ZERO), None),
    "round_nearest_even": (functools.partial(lax.round, rounding_method=lax.RoundingMethod.TO_NEAREST_EVEN), None),
    "rsqrt": (lax.rsqrt, None),
    "shift_left": (lax.shift_left, functools.partial(_shift, np.left_shift, "u")),
    "shift_right_arithmetic": (lax.shift_right_arithmetic, functools.partial(_shift, np.right_shift, "i")),
    "shift_right_logical": (lax.shift_right_logical, functools.partial(_shift, np.right_shift, "u")),
    "sign": (lax.sign, np.sign),
    "sine": (lax.sin, None),
    "sqrt": (lax.sqrt, None),
    "subtract": (lax.sub, np.subtract),
    "tan": (lax.tan, None),
    "tanh": (lax.tanh, None),
    "xor": (lax.bitwise_xor, np.bitwise_xor),
}
"""Operations whose meaning is one function of jax, which has the derivative rule of
native jax.
"""

for _name, (_build, _fold) in _ARITHMETIC.items():
    operation(f"stablehlo.{_name}")(elementwise(_build, _fold))


_COMPARISONS: Final[Mapping[str, tuple[Callable[[Value, Value], Value], Fold]]] = {
    "EQ": (lax.eq, np.equal),
    "NE": (lax.ne, np.not_equal),
    "GE": (lax.ge, np.greater_equal),
    "GT": (lax.gt, np.greater),
    "LE": (lax.le, np.less_equal),
    "LT": (lax.lt, np.less),
}
"""Comparisons by direction."""


def total_order(x: Value) -> Value:
    """Map floats to signed integers that compare in the total order: -NaN < -inf < -0 <
    +0 < inf < NaN.
    """
    width = np.dtype(x.dtype).itemsize * 8
    bits = lax.bitcast_convert_type(lax.stop_gradient(x), np.dtype(f"int{width}"))
    return jnp.where(bits < 0, bits ^ np.iinfo(bits.dtype).max, bits)


def _kinds(dtype: Any) -> tuple[str, ...]:
    """Return the comparison types that fit a dtype."""
    if jnp.issubdtype(dtype, jnp.floating):
        return ("FLOAT", "TOTALORDER")
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return ("FLOAT",)
    return ("SIGNED",) if jnp.issubdtype(dtype, jnp.signedinteger) else ("UNSIGNED",)


@operation("stablehlo.compare", attributes=["comparison_direction", "compare_type"])
def _compare(call: Call) -> Value:
    x, y = call.operands
    direction, kinds = call.attributes["comparison_direction"], _kinds(x.dtype)
    kind = call.attributes.get("compare_type", kinds[0])
    if direction not in _COMPARISONS:
        raise call.refuse(f"with the direction {direction}: expected one of {', '.join(_COMPARISONS)}")
    # NOTYPE is how older programs leave the type to the elements.
    if kind not in (*kinds, "NOTYPE"):
        raise call.refuse(f"of {x.dtype} with the type {kind}: expected {' or '.join(kinds)}")
    build, fold = _COMPARISONS[direction]
    if known(x, y):
        return folded(fold, x, y)
    if kind == "TOTALORDER":
        return build(total_order(x), total_order(y))
    return build(x, y)


@operation("stablehlo.select")
def _select(call: Call) -> Value:
    which, on_true, on_false = call.operands
    if known(which) and which.ndim == 0:
        # A known choice keeps sizes known, and keeps the other branch out of the
        # program.
        return on_true if which else on_false
    if known(which, on_true, on_false):
        return np.where(which, on_true, on_false)
    return lax.select(which, on_true, on_false)


def converted(x: Value, dtype: np.dtype[Any]) -> Value:
    """Convert elements: a complex number loses its imaginary part, then any number but
    zero becomes true.
    """
    if known(x):
        with np.errstate(all="ignore"):
            return x.astype(dtype)
    if jnp.issubdtype(x.dtype, jnp.complexfloating) and not jnp.issubdtype(dtype, jnp.complexfloating):
        x = lax.real(x)
    return lax.convert_element_type(x, dtype)


@operation("stablehlo.convert")
def _convert(call: Call) -> Value:
    (x,) = call.operands
    return converted(x, dtype_of(call.types[0]))


@operation("stablehlo.bitcast_convert")
def _bitcast_convert(call: Call) -> Value:
    (x,) = call.operands
    return lax.bitcast_convert_type(x, dtype_of(call.types[0]))


@operation("stablehlo.reduce_precision", attributes=["exponent_bits", "mantissa_bits"])
def _reduce_precision(call: Call) -> Value:
    (x,) = call.operands
    return lax.reduce_precision(x, call.attributes["exponent_bits"], call.attributes["mantissa_bits"])


@operation("stablehlo.map", attributes=["dimensions"], regions=1)
def _map(call: Call) -> Value:
    """Apply a region to each element: the region's operations go through the table,
    under vmap.
    """
    shape = np.shape(call.operands[0])
    dimensions = tuple(call.attributes.get("dimensions", range(len(shape))))
    if dimensions != tuple(range(len(shape))):
        raise call.refuse(f"over the dimensions {list(dimensions)}: expected all {len(shape)} in order")
    function: Callable[..., Any] = call.region()
    for _ in shape:
        function = jax.vmap(function)
    return function(*(jnp.asarray(each) for each in call.operands))
