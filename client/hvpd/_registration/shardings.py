"""Drops the shardings that a function states, while the function is traced.

A sharding says where an array is, and changes no value. The server decides where its
arrays are, and may not have the caller's devices. Inside of `dropped` this thread binds
the primitives that place arrays as identities. Needs jax.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from hvpd._registration.jaxprs import equations
from hvpd._registration.marked_primitives import registered


class _Active(threading.local):
    now = False
    """Whether this thread drops shardings."""
    found = False
    """Whether this thread dropped one."""


_active = _Active()

_IDENTITIES: Final = ("sharding_constraint", "reshard")
"""Primitives of one array that do nothing else than place it."""


@contextlib.contextmanager
def dropped() -> Iterator[None]:
    """Decorate tracing and lowering: this thread then drops shardings."""
    _install()
    before = _active.now
    _active.now, _active.found = True, False
    try:
        yield
    finally:
        _active.now = before


def found() -> bool:
    """Return whether the last `dropped` of this thread dropped a sharding.

    Then jax's caches hold functions without their shardings.
    """
    return _active.found


def has_shardings(closed: Any) -> bool:
    """Return whether a jaxpr, which jax traced before, still states shardings."""
    return any(_places(each.primitive.name, each.params) for each in equations(closed))


def _places(name: str, params: Any) -> bool:
    """Return whether an operation says where an array is."""
    if name == "device_put":
        return any(each is not None for each in params["devices"])
    if name in ("jit", "pjit"):
        stated = (*params["in_shardings"], *params["out_shardings"])
        return any(isinstance(each, jax.sharding.Sharding) for each in stated)
    return name in _IDENTITIES


@functools.cache
def _install() -> None:
    """Divert the binding of these primitives once.

    Outside of `dropped` the binding stays jax's.
    """
    known = registered()
    for name in ("jit", "device_put", *_IDENTITIES):
        known[name].bind = functools.partial(_bind, name, known[name].bind)  # type: ignore[method-assign]


def _bind(primitive: str, bind: Callable[..., Any], /, *args: Any, **params: Any) -> Any:
    """Bind a primitive without its shardings, inside of `dropped`."""
    if not _active.now or not _places(primitive, params):
        return bind(*args, **params)
    _active.found = True
    if primitive == "jit":
        return jaxpr_as_fun(params["jaxpr"])(*args)
    if primitive == "device_put":
        nowhere = (None,) * len(args)
        return bind(*args, **params | {"devices": nowhere, "srcs": nowhere})
    (x,) = args
    return x if isinstance(x, jax.Array) else jnp.asarray(x)
