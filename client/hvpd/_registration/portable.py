"""Converts MLIR in any form to a StableHLO portable artifact. Needs jax."""

import contextlib
import json
import re
import sys
from collections.abc import Sequence

import jax
import jax.export
import jax.extend.mlir
import jax.interpreters.mlir
from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import stablehlo

from hvpd import _text
from hvpd._errors import HvpdError, IncompatibleError, InvalidArgumentError

_BYTECODE = b"ML\xefR"
"""The first bytes of MLIR bytecode."""

_VERSION = re.compile(r"[0-9]{1,5}(\.[0-9]{1,5}){2}")


def oldest_reader(newest: str) -> str:
    """Return the StableHLO version to write.

    Servers up to four weeks older than this client can read it. If the server's own
    version is older still, it is that version.

    Args:
        newest: Newest version that the server reads; empty if it is not known.
    """
    weeks: str = stablehlo.get_version_from_compatibility_requirement(
        stablehlo.StablehloCompatibilityRequirement.WEEK_4
    )
    least: str = stablehlo.get_minimum_version()
    if newest and (not _VERSION.fullmatch(newest) or _parts(newest) < _parts(least)):
        raise IncompatibleError(
            f"the server reads StableHLO {_text.quoted(newest, 40)}, and jax {jax.__version__} here writes versions from {least} on"
        )
    return min(weeks, newest or weeks, key=_parts)


def _parts(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def portable(module: bytes | str, version: str) -> bytes:
    """Return the portable artifact of MLIR bytecode or text.

    Text that states no locations keeps the numbers of its lines, for messages. Anything
    else loses its locations, so that no path leaves this machine.
    """
    has_places = isinstance(module, bytes) or "loc(" in module
    with jax.interpreters.mlir.make_ir_context() as context:
        return _written(ir.Module.parse(module, context), version, strips=has_places)


def portable_of(exported: jax.export.Exported, version: str) -> bytes:
    """Return the portable artifact of an exported function, without locations."""
    with jax.interpreters.mlir.make_ir_context() as context:
        module = jax.extend.mlir.deserialize_portable_artifact(exported.mlir_module_serialized)
        parsed = ir.Module.parse(module, context) if isinstance(module, str | bytes) else module
        return _written(parsed, version)


def _written(module: ir.Module, version: str, *, strips: bool = True) -> bytes:
    if strips:
        passmanager.PassManager.parse("builtin.module(strip-debuginfo)").run(module.operation)
    artifact: bytes = jax.extend.mlir.serialize_portable_artifact(module, version)
    return artifact


def main() -> None:
    """Convert the module on stdin for `stablehlo`, in a process that may crash.

    The second argument of the process limits its seconds of computing, because damaged
    locations can unfold without end.
    """
    with contextlib.suppress(ImportError, ValueError):  # Windows has no such limit; a lower one stays.
        import resource

        seconds = int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    try:
        written, platforms = artifact(sys.stdin.buffer.read(), sys.argv[1])
        head: dict[str, object] = {"platforms": list(platforms)}
    except HvpdError as error:
        written, head = b"", {"error": type(error).__name__, "message": str(error), "reason": error.reason}
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + written)


def artifact(content: bytes, newest: str) -> tuple[bytes, Sequence[str]]:
    """Return the portable artifact of a module, and the platforms of its branches.

    Args:
        content: Bytecode, text, or the bytes of a `jax.export.Exported`.
        newest: Newest StableHLO version that the server reads.

    Raises:
        InvalidArgumentError: The content is none of these, or an exported function that
            lost arguments or is partitioned.
    """
    version = oldest_reader(newest)
    if content.startswith(_BYTECODE):
        return _converted(content, version), ()
    try:
        exported = jax.export.deserialize(bytearray(content))
        module = portable_of(exported, version)
    except Exception:  # noqa: BLE001 - jax raises many errors for other bytes
        return _converted(content.decode(errors="replace"), version), ()
    if list(exported.module_kept_var_idx) != list(range(len(exported.in_avals))):
        raise InvalidArgumentError(
            f"{exported.fun_name} was exported without its unused arguments: jax.export.export(jax.jit(f, keep_unused=True))",
            reason="EXPORT_UNSUITABLE",
        )
    if exported.nr_devices != 1 or exported.ordered_effects or exported.unordered_effects:
        raise InvalidArgumentError(
            f"{exported.fun_name} is partitioned or has side effects: export a pure function of one device",
            reason="EXPORT_UNSUITABLE",
        )
    platforms = tuple(exported.platforms)
    return module, platforms if len(platforms) > 1 else ()


def _converted(module: bytes | str, version: str) -> bytes:
    try:
        return portable(module, version)
    except Exception as error:
        raise InvalidArgumentError(
            f"the module is no StableHLO that jax {jax.__version__} here can read (up to {stablehlo.get_current_version()}): "
            f"{type(error).__name__}: {_text.cut(str(error), 500)}",
            reason="PROGRAM_UNREADABLE",
        ) from error
