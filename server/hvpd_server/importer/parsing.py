"""Bytes to MLIR: portable artifacts, bytecode, text, and exports of jax.

Knows the formats, and nothing of what is in a program.
"""

import re
from typing import Final

import jax
import jax.export
import jax.extend.mlir
from jaxlib.mlir import ir

from hvpd_server.importer import refusals
from hvpd_server.importer.attributes import short
from hvpd_server.importer.table import Refused

_BYTECODE: Final = b"ML\xefR"
"""First bytes of MLIR's bytecode, portable or not."""

_QUANTIZED: Final = re.compile(r'!"?quant\b|uniform_(de)?quantize')
"""Traces of quantized types in a message of MLIR's."""

EXPORT_PLAIN: Final = "export a function of one device, without donated arguments, aliases, shardings or other memories"
"""The remedy for a program that states devices or memories."""


def parse(blob: bytes | str) -> ir.Module:
    """Return the module of a program, in the current context.

    Raises:
        Refused: This jax cannot read it.
    """
    try:
        if isinstance(blob, str):
            return ir.Module.parse(blob)
        if not blob.startswith(_BYTECODE) and b"\0" in blob[:64]:
            blob = _exported(blob)
        if not blob.startswith(_BYTECODE):
            return ir.Module.parse(blob.decode())
        return _bytecode(blob)
    except (MemoryError, Refused):
        raise
    except RecursionError:
        raise Refused(refusals.PROGRAM_TOO_LARGE, "is nested too deeply to be read") from None
    except Exception as error:  # noqa: BLE001 - the parsers raise many kinds
        words = short(str(error).replace("\n", " "))
        if _QUANTIZED.search(words):
            raise Refused(
                refusals.OPERATION_REFUSED,
                f"has quantized types, which are not served: {words}. Expected floating-point numbers in their place",
            ) from None
        raise Refused(
            refusals.BUNDLE_INCOMPATIBLE,
            f"cannot be read by this server (jax {jax.__version__}): {type(error).__name__}: {words}. Expected StableHLO "
            "as a portable artifact, bytecode or text, or a serialized jax.export.Exported",
        ) from None


def _exported(blob: bytes) -> bytes:
    """Return the module of a serialized `jax.export.Exported`."""
    exported = jax.export.deserialize(bytearray(blob))
    if exported.nr_devices != 1 or any(
        sharding is not None for sharding in (*exported.in_shardings_hlo, *exported.out_shardings_hlo)
    ):
        raise Refused(
            refusals.OPERATION_REFUSED, f"is for {exported.nr_devices} devices or says where arrays are: {EXPORT_PLAIN}"
        )
    return exported.mlir_module_serialized


def _bytecode(blob: bytes) -> ir.Module:
    """Return a portable artifact, or StableHLO bytecode that is not portable."""
    try:
        module: ir.Module = jax.extend.mlir.deserialize_portable_artifact(blob)
    except Exception:  # noqa: BLE001 - the parser raises many kinds
        # Gives the reason, which the error above does not; a handler of diagnostics
        # there crashes jaxlib 0.11.
        module = ir.Module.parse(blob)
        for view in module.body.operations:
            if view.operation.name.startswith("vhlo."):
                raise ValueError("the portable artifact has operations of a later version of StableHLO") from None
    return module
