"""Turns large arrays that a function closes over into arguments of its jaxpr.

Such arrays are data, not constants of a program. `closures` brings those of nested
functions up to the jaxpr itself. Needs jax.
"""

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hvpd._errors import InvalidArgumentError
from hvpd._registration import closures, shardings
from hvpd._registration.hijax import is_high
from hvpd._registration.jaxprs import held, inside, is_sharded, open_jaxpr
from hvpd._wire import codec

Lifted = Callable[[Sequence[Any], Sequence[Any]], list[Any]]
"""Maps captured arrays and flat arguments to the outputs of a traced function."""

_NARROW = ("float32", "complex64", "int32", "uint32")
"""dtypes that jax may have made from a dtype of twice the bits."""


class _Seen(threading.local):
    widened = False
    """Whether this thread traced NumPy arrays in 64 instead of 32 bits."""


_seen = _Seen()


@contextlib.contextmanager
def forgetting() -> Iterator[None]:
    """Decorate a function that traces, so that later traces find nothing of it.

    See `trace`.
    """
    _seen.widened = False
    try:
        yield
    finally:
        if _seen.widened or shardings.found():
            forget()


def forget() -> None:
    """Forget all traces of jax."""
    jax.clear_caches()
    gc.collect()


def trace(fun: Callable[..., Any], specs: Sequence[Any], *, widened: bool, lift_bytes: int) -> tuple[Any, Any]:
    """Return the jaxpr of a function for these specs, and its output shapes.

    jax 0.10.2 converts a NumPy array that a function closes over once, and reuses the
    result as long as a jaxpr holds it. It reuses a conversion to 32 bits in a trace in
    64 bits, and the reverse. Then digits are lost without an error, or dtypes do not
    fit. So all traces of jax are forgotten: before this one, if it finds such an array
    in 32 bits, and after it (`forgetting`).

    Args:
        fun: A function of flat arrays.
        specs: Shapes and dtypes of its arguments.
        widened: Whether this trace is in 64 bits, while all other traces of jax are in
            32.
        lift_bytes: Bytes of the largest array that may stay inside the jaxpr. Larger
            ones become its constants.
    """
    found, arrays = _trace(fun, specs, lift_bytes)
    # A nested jit that jax traced before this export can have high-level primitives,
    # whose rules `kept_rules` did not see, shardings, or loops that hold arrays.
    if (
        (widened and any(dtype.name in _NARROW for dtype in arrays))
        or is_high(found[0])
        or shardings.has_shardings(found[0])
        or _hides(found[0], lift_bytes)
    ):
        del found
        forget()
        found, arrays = _trace(fun, specs, lift_bytes)
    _seen.widened |= widened and bool(arrays)
    return found


def _trace(fun: Callable[..., Any], specs: Sequence[Any], lift_bytes: int) -> tuple[tuple[Any, Any], list[Any]]:
    """Return the jaxpr and the output shapes, and the dtypes of all NumPy arrays that
    the function closes over.
    """
    with closures.opened(lift_bytes) as taken:
        found: tuple[Any, Any] = jax.make_jaxpr(fun, return_shape=True)(*specs)
    leaked = [each for each in found[0].consts if isinstance(each, jax.core.Tracer)]
    if leaked:  # jax itself fails later, without a cause.
        raise jax.errors.UnexpectedTracerError(f"the function closes over {leaked[0]!r}")
    return found, [each.dtype for each in (*held(found[0]), *taken) if isinstance(each, np.ndarray)]


def _hides(closed: Any, lift_bytes: int) -> bool:
    return any(_bytes(constant) > lift_bytes for each in inside(closed) for constant in getattr(each, "consts", ()))


def lift(closed: Any, lift_bytes: int) -> tuple[list[codec.Array], Lifted]:
    """Return the constants above `lift_bytes`, and the function that takes them."""
    places = [place for place, constant in enumerate(closed.consts) if _bytes(constant) > lift_bytes]
    large = [closed.consts[place] for place in places]
    small = [_whole(constant) for constant in closed.consts]
    evaluate = open_jaxpr(closed)

    def lifted(arrays: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        constants = list(small)
        for place, constant, array in zip(places, large, arrays, strict=True):
            constants[place] = jax.random.wrap_key_data(array, impl=_impl(constant)) if _is_key(constant) else array
        return evaluate(*constants, *arguments)

    return [_array(constant) for constant in large], lifted


def _whole(constant: Any) -> Any:
    """Return a constant without the mesh that its devices make."""
    return np.asarray(constant) if is_sharded(constant) else constant


def _array(constant: Any) -> codec.Array:
    """Return the array that is sent for a constant."""
    if _is_key(constant):
        return np.asarray(jax.random.key_data(constant))
    if constant.dtype.name in ("int2", "int4", "uint2", "uint4"):
        raise InvalidArgumentError(
            f"the function closes over an array {constant.dtype}{list(constant.shape)}, whose dtype cannot be sent: close over "
            "its .astype(jnp.int8), and compute with int8",
            reason="DTYPE",
        )
    # The jaxpr holds a NumPy constant as the user gave it, but uses it in the dtype
    # that jax's x64 mode allows. A view would keep a conversion alive, which must be
    # forgotten.
    converted = _seen.widened and type(constant) is not np.ndarray
    return np.array(constant, jax.dtypes.canonicalize_dtype(constant.dtype), copy=True if converted else None)


def _bytes(constant: Any) -> int:
    found: int = getattr(constant, "nbytes", 0)
    return found


def _is_key(constant: Any) -> bool:
    return bool(jnp.issubdtype(constant.dtype, jax.dtypes.prng_key))


def _impl(keys: Any) -> Any:
    return jax.random.key_impl(keys)
