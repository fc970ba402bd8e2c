"""Objectives that another framework wrote as StableHLO.

Portable artifacts need no jax, and are sent unread. A process of its own converts
everything else, because a damaged module can crash MLIR's parser. A module's entry
function takes the leaves of x, then the leaves of data, and returns one scalar.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Final

from hvpd import _text
from hvpd._arguments import check_choice
from hvpd._errors import IncompatibleError, InvalidArgumentError, MissingExtraError
from hvpd._registration.bundle import Arrays, Export, assemble, flat_dtype_of, floating_array
from hvpd._wire import codec, pytree
from hvpd._wire.protocol import MODES, PRECISIONS
from hvpd.v1 import objective_pb2

_PRODUCER: Final = re.compile(rb"ML\xefR.{1,9}?StableHLO_v(\d+\.\d+\.\d+)\0", re.DOTALL)
"""The beginning of a portable artifact, which is MLIR bytecode that StableHLO wrote."""

_SECONDS = 600
"""Most seconds of computing for a conversion."""

_CONVERT = "from hvpd._registration import portable; portable.main()"
"""Code of a conversion."""

_READ: Final = "read the file first, and pass its content: pathlib.Path(path).read_bytes()"

_REMEDIES: Final = {
    "Exported": "pass bytes(exported.serialize())",
    "Lowered": "pass lowered.as_text(), of jax.jit(f, keep_unused=True).lower(x, *data)",
}
"""Remedies for objects of jax that are no modules, by class."""

_ERRORS: Final = {each.__name__: each for each in (InvalidArgumentError, IncompatibleError)}
"""Errors of a conversion, by name."""


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
    content = _content(module)
    if not content.strip(b"\0 \t\r\n"):
        raise InvalidArgumentError("module is empty: expected StableHLO", reason="PROGRAM_UNREADABLE")
    return (content, ()) if _PRODUCER.match(content) else _converted(content, version)


def _content(module: Any) -> bytes:
    """Return the bytes or the text of a module.

    Raises:
        InvalidArgumentError: The object is no module, but perhaps has one.
    """
    if isinstance(module, (bytes, bytearray, memoryview)):
        return bytes(module)
    kind = type(module).__name__
    if kind in _REMEDIES:
        what, remedy = f"a jax {kind}", _REMEDIES[kind]
    elif isinstance(module, os.PathLike):
        what, remedy = f"the path {os.fspath(module)!r}", _READ
    elif isinstance(module, str):
        if not module.strip() or "{" in module:
            return module.encode()
        what, remedy = f"the text {_text.quoted(module, 80)}, which is no MLIR", f"if this is a path, {_READ}"
    elif callable(module):
        what, remedy = f"the function {getattr(module, '__name__', kind)}", "pass a function of jax to client.register"
    else:
        text = "" if module is None else str(module)
        if "{" in text and "func" in text:
            return text.encode()
        what, remedy = _text.described(module), "pass bytes, or MLIR as text"
    raise InvalidArgumentError(f"module is {what}: {remedy}", reason="PROGRAM_UNREADABLE")


def _converted(content: bytes, version: str) -> tuple[bytes, Sequence[str]]:
    """Return the portable artifact of a module, and the platforms of its branches."""
    try:
        found = importlib.util.find_spec("jax")
    except ImportError:
        found = None
    run = None if found is None else _run(content, version)
    last = _text.cut(run.stderr.decode(errors="replace").strip().rpartition("\n")[2], 500) if run is not None else ""
    if run is None or (run.returncode and last.startswith(("ImportError", "ModuleNotFoundError"))):
        raise MissingExtraError(
            "without jax only a StableHLO portable artifact can be registered, as bytes; jax turns MLIR text, MLIR bytecode and "
            f"the bytes of jax.export into one: pip install 'hvpd[jax]' ({last or 'there is no module jax'})"
        )
    if run.returncode:
        how = signal.Signals(-run.returncode).name if run.returncode < 0 else f"exit code {run.returncode}, {last}"
        if how == "SIGXCPU":
            how = f"it took more than {_SECONDS} s of computing"
        raise InvalidArgumentError(
            f"the module ended the process that converts it ({how}): its bytes are damaged. Write or copy the module again",
            reason="PROGRAM_UNREADABLE",
        )
    head, _, artifact = run.stdout.partition(b"\n")
    said = json.loads(head)
    if "error" in said:
        raise _ERRORS[said["error"]](said["message"], reason=said["reason"])
    return artifact, tuple(said["platforms"])


def _run(content: bytes, version: str) -> "subprocess.CompletedProcess[bytes]":
    """Run `portable.main`, which finds the modules that this process finds."""
    return subprocess.run(  # noqa: S603 - this interpreter, our own module
        [sys.executable, "-P", "-c", _CONVERT, version, str(_SECONDS)],
        input=content,
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    )
