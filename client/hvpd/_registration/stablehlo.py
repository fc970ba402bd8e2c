"""Objectives that another framework wrote as StableHLO.

Portable artifacts need no jax. A module's entry function takes the leaves of x, then
the leaves of data, and returns one scalar.
"""

import re
from collections.abc import Sequence
from typing import Any, Final

from hvpd._arguments import check_choice
from hvpd._errors import InvalidArgumentError, MissingExtraError
from hvpd._registration.bundle import Arrays, Export, assemble, flat_dtype_of, floating_array
from hvpd._wire import codec, pytree
from hvpd._wire.protocol import MODES, PRECISIONS
from hvpd.v1 import objective_pb2

_BYTECODE: Final = b"ML\xefR"
"""The first bytes of MLIR bytecode."""

_PRODUCER: Final = re.compile(rb"ML\xefR.{1,9}?StableHLO_v(\d+\.\d+\.\d+)\0", re.DOTALL)
"""The beginning of a portable artifact, which is MLIR bytecode that StableHLO wrote."""


def export(
    module: Any,
    x: Any,
    data: Sequence[Any],
    *,
    mode: str,
    precision: str,
    stablehlo_version: str,
) -> Export:
    """Make the bundle of a module.

    Args:
        module: A portable artifact or MLIR bytecode as bytes; MLIR as text; the bytes
            of a `jax.export.Exported` of any vjp_order; or an object whose text is
            MLIR, such as an `ir.Module`.
        x: A pytree of floating arrays: structure, shapes, dtypes, and the values at
            which the server checks.
        data: A pytree of arrays for each further argument.
        mode: How products are made unless a product says otherwise.
        precision: One of `PRECISIONS`.
        stablehlo_version: Newest version that the server reads.

    Raises:
        InvalidArgumentError: The module cannot be read, or x or data cannot be
            registered.
        MissingExtraError: The module is no portable artifact, and jax, which converts
            it, is not installed.
    """
    check_choice(mode, "mode", MODES)
    check_choice(precision, "precision", PRECISIONS)
    artifact, platforms = _artifact(module, stablehlo_version)
    x_tree, x_leaves = pytree.flatten(x)
    names = pytree.leaf_paths(x_tree)
    arrays = [floating_array(leaf, f"x{name}") for leaf, name in zip(x_leaves, names, strict=True)]
    if not sum(array.size for array in arrays):
        raise InvalidArgumentError("x has no elements: there is nothing to differentiate by", reason="NO_PARAMETERS")
    data_tree, data_leaves = pytree.flatten(tuple(data))
    flat_dtype = flat_dtype_of(arrays)
    data_arrays = [
        codec.data_array(leaf, f"data{path}", x_dtype=flat_dtype, x64=True)
        for leaf, path in zip(data_leaves, pytree.leaf_paths(data_tree), strict=True)
    ]
    version = _PRODUCER.match(artifact)
    return assemble(
        Arrays(x_tree, arrays, data_tree, data_arrays),
        {"objective": artifact},
        objective_pb2.Bundle(
            mode=mode,
            precision=precision,
            platforms=platforms,
            x64=True,
            stablehlo_version=version[1].decode() if version else "",
        ),
    )


def _artifact(module: Any, version: str) -> tuple[bytes, Sequence[str]]:
    """Return a portable artifact and the platforms that it has branches for."""
    if isinstance(module, (bytes, bytearray, memoryview)):
        content = bytes(module)
        if _PRODUCER.match(content):
            return content, ()
    else:
        content = str(module).encode()
    try:
        from hvpd._registration import portable
    except ImportError as error:
        raise MissingExtraError(
            "without jax only a StableHLO portable artifact can be registered, as bytes; jax turns MLIR text, MLIR bytecode and "
            f"the bytes of jax.export into one: pip install 'hvpd[jax]' ({error})"
        ) from error
    return portable.artifact(content, version, is_text=not content.startswith(_BYTECODE))
