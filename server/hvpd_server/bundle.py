"""Checks of a bundle before anything of it is used: its messages are complete and
consistent.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from google.protobuf.message import DecodeError, Message

from hvpd import _text
from hvpd._wire import codec, pytree
from hvpd._wire.protocol import (
    DISTRIBUTIONS,
    MAX_FIXED_BUCKET,
    MODES,
    PLATFORMS,
    PRECISIONS,
    REDUCTIONS,
    RESIDUAL_MODES,
)
from hvpd.v1 import objective_pb2, tensor_pb2
from hvpd_server.errors import Code, ServiceError, invalid

FORMAT: Final = 2
"""Value of Bundle.format that this server understands."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


STAGES: Final = (frozenset(["objective"]), frozenset(["model", "loss"]))
"""Names of the programs of a bundle: of one function, and of a composite."""

MAX_SAMPLES: Final = 1 << 16
"""Most draws for a row of the Monte-Carlo Fisher matrix."""

MAX_LEAVES: Final = 1 << 16
"""Most leaves of x, of data, and of captured arrays."""

LEAF_DTYPES: Final = ("float16", "bfloat16", "float32", "float64")
"""Dtypes of leaves of x."""

MAX_BUNDLE_BYTES: Final = 4 << 20
"""Most bytes of a serialized bundle, because a reply contains it."""

MAX_TEXT: Final = 80
"""Most characters of a text in a bundle, unless `_MAX_TEXTS` has another limit."""

_MAX_TEXTS: Final = {"TreeSpec.type_name": 1000, "TreeSpec.Key.text": 1000}
"""Most characters of the texts that the user chooses, by field."""

MAX_BLOCKS: Final = 256
"""Most principal blocks of one objective that have programs of their own, since each is
compiled.
"""

_MAX_RANK: Final = 64
"""Most axes of an array, as in NumPy."""

_MAX_ENTRIES: Final = {
    "Bundle.blocks": MAX_BLOCKS,
    "Tensor.shape": _MAX_RANK,
    "ArraySpec.shape": _MAX_RANK,
    "TreeSpec.Sparse.shape": _MAX_RANK,
    "TreeSpec.Sparse.facts": 8,
}
"""Most entries of a list or map in a bundle, by field; `MAX_LEAVES` for all others."""

_MAX_MESSAGES: Final = 4 * MAX_LEAVES
"""Most nodes, keys and arrays in a bundle."""

_Spec = tuple[tuple[int, ...], str]


def check_name(name: str) -> None:
    """Raise ServiceError if `name` cannot name an objective."""
    if not _NAME.fullmatch(name) or len(name) > 200 or codec.is_digest(name):
        raise invalid(
            "INVALID_NAME",
            f"a name must have at most 200 letters, digits, '.', '_' and '-', in parts joined by '/', and be no digest; "
            f"got {_text.quoted(name, 80)}",
        )


def parse(serialized: bytes) -> objective_pb2.Bundle:
    """Parse a bundle, and check it as far as possible without its programs."""
    check_size(len(serialized))
    try:
        bundle = objective_pb2.Bundle.FromString(serialized)
    except DecodeError as error:
        raise invalid("BUNDLE_INVALID", f"the blob is no bundle: {error}") from None
    if bundle.format != FORMAT:
        older = bundle.format < FORMAT
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            "BUNDLE_INCOMPATIBLE",
            f"the bundle has format {bundle.format}"
            + (", of derivative programs that the client made" if older else "")
            + f"; this server reads format {FORMAT}: "
            + ("register the objective again with a newer client" if older else "upgrade the server"),
        )
    bundle.DiscardUnknownFields()  # Replies would contain them, in any size.
    _check_bounds(bundle, itertools.count(1))
    _check_arrays(bundle)
    _check_programs(bundle)
    _check_parts(bundle)
    _check_rows(bundle)
    return bundle


def check_size(size_bytes: int) -> None:
    """Raise ServiceError if a serialized bundle is too large, before anything reads it
    into memory.
    """
    if size_bytes > MAX_BUNDLE_BYTES:
        raise invalid("BUNDLE_INVALID", f"the bundle has {size_bytes} bytes, {MAX_BUNDLE_BYTES} are allowed")


def _check_bounds(message: Message, messages: Iterator[int]) -> None:
    """Raise ServiceError unless each text, list and map of a bundle is bounded, also in
    fields that are new.

    Args:
        message: The bundle, or a message in it.
        messages: Counts the messages so far.
    """
    if next(messages) > _MAX_MESSAGES:
        raise invalid("BUNDLE_INVALID", f"the bundle has more than {_MAX_MESSAGES} nodes, keys and arrays")
    for field, value in message.ListFields():
        name = field.full_name.removeprefix("hvpd.v1.")
        for entry in _entries(name, value):
            if isinstance(entry, Message):
                _check_bounds(entry, messages)
            elif isinstance(entry, (str, bytes)) and len(entry) > (most := _MAX_TEXTS.get(name, MAX_TEXT)):
                raise invalid("BUNDLE_INVALID", f"{name} has {len(entry)} characters, {most} are allowed")


def _entries(name: str, value: Any) -> Sequence[Any]:
    """Return the entries of a field, or raise ServiceError if there are too many.

    A list of numbers has no entries to check.
    """
    if isinstance(value, (Message, str, bytes, int, float)):
        return (value,)
    most = _MAX_ENTRIES.get(name, MAX_LEAVES)
    if len(value) > most:
        raise invalid("BUNDLE_INVALID", f"{name} has {len(value)} entries, {most} are allowed")
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return () if isinstance(value[0], (int, float)) else value


def _check_programs(bundle: objective_pb2.Bundle) -> None:
    """Raise ServiceError unless programs, mode, precision and platforms are known."""
    if bundle.precision not in PRECISIONS:
        raise invalid(
            "BUNDLE_INVALID",
            f"precision must be one of {', '.join(PRECISIONS)}, got {_text.quoted(bundle.precision, 40)}",
        )
    if bundle.dtype == "float64" and not bundle.x64:
        raise invalid("BUNDLE_INVALID", "x is float64, and the bundle says that it was traced without 64-bit types")
    if bundle.programs.keys() not in STAGES:
        raise invalid(
            "BUNDLE_INVALID",
            "a bundle must have the program objective, or the programs model and loss; "
            f"got {_text.cut(', '.join(sorted(bundle.programs)), 200) or 'none'}",
        )
    _check_composite(bundle)
    if bundle.mode not in MODES:
        raise invalid(
            "BUNDLE_INVALID",
            f"the bundle's mode is {_text.quoted(bundle.mode, 40)}, this server knows {', '.join(MODES)}",
        )
    if bundle.mode in RESIDUAL_MODES and (bundle.row_leaves or bundle.sharded):
        raise invalid(
            "BUNDLE_INVALID",
            f"mode {bundle.mode} keeps residuals, whose size must be known: it excludes any number of rows, and data that is "
            "split over devices",
        )
    if bundle.sharded_parameters and (
        not bundle.sharded
        or bundle.mode != "forward_over_reverse"
        or bundle.row_leaves
        or bundle.blocks
        or bundle.HasField("composite")
    ):
        raise invalid(
            "BUNDLE_INVALID",
            "x that is split over devices needs sharded data and mode forward_over_reverse: it excludes any number of rows, blocks and "
            "composites",
        )
    if len(set(bundle.platforms)) != len(bundle.platforms) or not set(bundle.platforms) <= set(PLATFORMS):
        raise invalid("BUNDLE_INVALID", f"platforms must be of {', '.join(PLATFORMS)}, each once")


def _check_composite(bundle: objective_pb2.Bundle) -> None:
    """Raise ServiceError unless the programs of a composite fit its fields."""
    if bundle.HasField("composite") != ("model" in bundle.programs):
        raise invalid("BUNDLE_INVALID", "a composite has the programs model and loss, and only a composite has them")
    if not bundle.HasField("composite"):
        return
    stages = bundle.composite
    if stages.distribution not in ("", *DISTRIBUTIONS) or stages.reduction not in REDUCTIONS:
        raise invalid(
            "BUNDLE_INVALID",
            f"a composite's distribution must be one of {', '.join(DISTRIBUTIONS)} or empty, its reduction one of "
            f"{', '.join(REDUCTIONS)}; got {_text.quoted(stages.distribution, 40)} and {_text.quoted(stages.reduction, 40)}",
        )
    if not 1 <= stages.samples <= MAX_SAMPLES:
        raise invalid("BUNDLE_INVALID", f"a composite's samples are 1 to {MAX_SAMPLES}, got {stages.samples}")


def _check_arrays(bundle: objective_pb2.Bundle) -> None:
    """Raise ServiceError unless structures, shapes and dtypes fit each other."""
    if bundle.dtype not in codec.VECTOR_DTYPES or bundle.n < 1:
        raise invalid("BUNDLE_INVALID", f"x must be float32 or float64 with n > 0, got {bundle.dtype}[{bundle.n}]")
    for tree in (bundle.x_tree, bundle.data_tree):
        try:
            pytree.check(tree)
        except pytree.StructureError as error:
            raise invalid("BUNDLE_INVALID", str(error)) from None
    if pytree.count(bundle.x_tree) != len(bundle.x_leaves) or pytree.count(bundle.data_tree) != len(bundle.data):
        raise invalid("BUNDLE_INVALID", "the structures of x and data do not have as many leaves as are listed")
    _check_shapes(bundle.x_leaves)
    _check_shapes(bundle.data)
    _check_shapes(bundle.captured)
    _check_x(bundle)
    for dtype in {array.dtype for arrays in (bundle.data, bundle.captured) for array in arrays}:
        try:
            codec.dtype(dtype)
        except TypeError as error:
            raise invalid("BUNDLE_INVALID", str(error)) from None


def _check_shapes(arrays: Sequence[tensor_pb2.Tensor] | Sequence[tensor_pb2.ArraySpec]) -> None:
    """Raise ServiceError if an extent is negative."""
    for array in arrays:
        _size(array.shape)


def _check_x(bundle: objective_pb2.Bundle) -> None:
    """Raise ServiceError unless the leaves of x make the flat x."""
    if sum(_size(leaf.shape) for leaf in bundle.x_leaves) != bundle.n:
        raise invalid("BUNDLE_INVALID", f"the leaves of x do not have n = {bundle.n} elements together")
    for leaf in bundle.x_leaves:
        # Derivatives by other dtypes are zero or not real, and a narrower x loses
        # digits.
        if leaf.dtype not in LEAF_DTYPES or (leaf.dtype == "float64" and bundle.dtype != "float64"):
            raise invalid(
                "BUNDLE_INVALID",
                f"x is {bundle.dtype}, and a leaf of x is {_text.cut(leaf.dtype, 40) or 'of no dtype'}: leaves must be of "
                f"{', '.join(LEAF_DTYPES)}, and x must be float64 if a leaf is",
            )


def _check_rows(bundle: objective_pb2.Bundle) -> None:
    """Raise ServiceError unless the leaves with rows and the fixed bucket are valid."""
    rows = list(bundle.row_leaves)
    if not all(0 <= index < len(bundle.data) and bundle.data[index].shape for index in rows):
        raise invalid("BUNDLE_INVALID", f"row_leaves {_text.cut(str(rows), 80)} are not all leaves of data with rows")
    if len(set(rows)) != len(rows):
        raise invalid("BUNDLE_INVALID", f"row_leaves has {len(rows)} entries, and only {len(set(rows))} leaves")
    if bundle.row_reduction and (bundle.row_reduction not in REDUCTIONS or not bundle.row_leaves):
        raise invalid(
            "BUNDLE_INVALID",
            f"row_reduction {_text.quoted(bundle.row_reduction, 40)} of {len(bundle.row_leaves)} leaves",
        )
    if not 0 <= bundle.fixed_bucket <= MAX_FIXED_BUCKET or bundle.fixed_bucket & (bundle.fixed_bucket - 1):
        raise invalid(
            "BUNDLE_INVALID", f"fixed_bucket must be a power of two up to {MAX_FIXED_BUCKET}, got {bundle.fixed_bucket}"
        )


def _check_parts(bundle: objective_pb2.Bundle) -> None:
    """Raise ServiceError unless blocks consist of leaves of x."""
    for index, block in enumerate(bundle.blocks):
        check_leaves(bundle, block.leaves, f"blocks[{index}]")


def check_leaves(bundle: objective_pb2.Bundle, leaves: Sequence[int], what: str) -> None:
    """Raise ServiceError unless leaves of x make a principal block."""
    known = range(len(bundle.x_leaves))
    if (
        not leaves
        or sorted(set(leaves)) != list(leaves)
        or not set(leaves) <= set(known)
        or not block_size(bundle, leaves)
    ):
        raise invalid(
            "UNKNOWN_BLOCK",
            f"{what} must be of ascending positions of leaves of x, 0 to {len(known) - 1}, that have elements; "
            f"got {_text.cut(str(list(leaves)), 80)}",
        )


def block_size(bundle: objective_pb2.Bundle, leaves: Sequence[int]) -> int:
    """Return the number of elements of some leaves of x."""
    return sum(_size(bundle.x_leaves[leaf].shape) for leaf in leaves)


def references(bundle: objective_pb2.Bundle) -> Iterator[str]:
    """Yield the digests of all blobs that a bundle needs."""
    for program in bundle.programs.values():
        yield program.digest
    for tensor in [*bundle.captured, *bundle.data]:
        yield tensor.digest


def check_data(bundle: objective_pb2.Bundle, data: Sequence[tensor_pb2.Tensor]) -> None:
    """Raise ServiceError if tensors cannot be bound as the objective's data."""
    if len(data) != len(bundle.data):
        raise invalid("DATA_MISMATCH", f"data has {len(data)} leaves, the objective takes {len(bundle.data)}")
    rows = rows_of(bundle, data)
    for index, path in enumerate(pytree.leaf_paths(bundle.data_tree)):
        given, expected = _spec(data[index]), _spec(bundle.data[index])
        if index in bundle.row_leaves:
            expected = ((rows, *expected[0][1:]), expected[1])
        if given != expected:
            raise invalid(
                "DATA_MISMATCH",
                f"data{path} is {given[1]}{list(given[0])}, the objective takes {expected[1]}{list(expected[0])}",
            )


def rows_of(bundle: objective_pb2.Bundle, data: Sequence[tensor_pb2.Tensor]) -> int:
    """Return the number of rows of data if it is symbolic, else 0."""
    if not bundle.row_leaves:
        return 0
    shape = data[bundle.row_leaves[0]].shape
    if not shape or shape[0] < 1:
        raise invalid(
            "DATA_MISMATCH", f"data needs at least one row, its first leaf of rows has the shape {list(shape)}"
        )
    return shape[0]


def _spec(array: tensor_pb2.Tensor | tensor_pb2.ArraySpec) -> _Spec:
    return tuple(array.shape), array.dtype


def _size(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        if extent < 0:
            raise invalid("BUNDLE_INVALID", f"a shape has a negative extent: {list(shape)}")
        size *= extent
    return size
