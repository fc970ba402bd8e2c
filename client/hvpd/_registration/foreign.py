"""Functions that `jax.export` serialized elsewhere. Needs jax."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import numpy as np
from jaxlib.mlir.dialects import stablehlo

from hvpd import _text
from hvpd._errors import InvalidArgumentError


@dataclasses.dataclass(frozen=True)
class Foreign:
    """An exported objective, as a function to register."""

    fun: Callable[..., Any]
    """fun(x, *data), which reverse mode can differentiate twice."""
    x: Any
    """Zeros of the structure, shapes and dtypes of the first argument."""
    platforms: tuple[str, ...]
    """Platforms that the function was lowered for."""


def foreign(blob: bytes | bytearray) -> Foreign:
    """Read `jax.export.export(jax.jit(f))(...).serialize(vjp_order=2)`.

    Raises:
        InvalidArgumentError: The bytes are no exported function, or its arguments are
            not x and data, or it cannot be differentiated twice.
    """
    given: Any = blob
    if not isinstance(given, (bytes, bytearray)):
        raise InvalidArgumentError(
            f"register_exported takes the bytes of Exported.serialize(vjp_order=2), got {_text.described(given)}",
            reason="PROGRAM_UNREADABLE",
        )
    exported = _read(blob)
    order, derivative = 0, exported
    while order < 2 and derivative.has_vjp():
        order, derivative = order + 1, derivative.vjp()
    if order < 2:
        raise InvalidArgumentError(
            f"{exported.fun_name} was serialized with vjp_order={order}; a Hessian needs both derivatives: "
            "exported.serialize(vjp_order=2)",
            reason="EXPORT_UNSUITABLE",
        )
    args, kwargs = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    if kwargs or not args:
        raise InvalidArgumentError(
            f"{exported.fun_name} must take x and data by position, it takes {exported.in_tree}",
            reason="EXPORT_UNSUITABLE",
        )
    if any(not isinstance(size, int) for aval in exported.in_avals for size in aval.shape):
        raise InvalidArgumentError(
            f"{exported.fun_name} has symbolic shapes ({exported.in_avals}): export it for fixed ones",
            reason="EXPORT_UNSUITABLE",
        )
    zeros = jax.tree.map(lambda aval: np.zeros(aval.shape, aval.dtype), args[0])
    return Foreign(exported.call, zeros, tuple(exported.platforms))


def _read(blob: bytes | bytearray) -> jax.export.Exported:
    oldest = jax.export.minimum_supported_calling_convention_version
    newest = jax.export.maximum_supported_calling_convention_version
    try:
        exported = jax.export.deserialize(bytearray(blob))
        version = exported.calling_convention_version
        if not oldest <= version <= newest:
            raise ValueError(f"it has calling convention {version}")  # noqa: TRY301 - worded below
        exported.mlir_module()
    except Exception as error:
        raise InvalidArgumentError(
            f"these are not the bytes of a jax.export.Exported that jax {jax.__version__} here can read (calling conventions "
            f"{oldest} to {newest}, StableHLO up to {stablehlo.get_current_version()}{_producer(blob)}): {type(error).__name__}: {error}; "
            "export it with a version of jax that is nearer to this one",
            reason="PROGRAM_UNREADABLE",
        ) from error
    return exported


def _producer(blob: bytes | bytearray) -> str:
    """Return the version of StableHLO that wrote the bytes, for the message."""
    found = re.search(rb"StableHLO_v([0-9.]+)", blob)
    return f"; this was written by {found[1].decode()}" if found else ""
