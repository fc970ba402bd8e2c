"""What a bundle must be before anything of it is used: complete, consistent, and of programs that fit its signature.

Looks at messages and signatures only: neither jax nor gRPC.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from google.protobuf.message import DecodeError

from hvpd import _codec, _pytree
from hvpd._composite import REDUCTIONS
from hvpd.v1 import objective_pb2, tensor_pb2
from hvpd_server._errors import Code, ServiceError

CURVATURES: Final = ("hvp", "ggn", "fisher", "empirical_fisher")
"""Programs that multiply from x and the data: (x, V[k,n], *args) -> [k,n]."""

MULTIPLYING: Final = ("sampled_fisher", *CURVATURES)
"""Programs that there may be for principal blocks, too, by the name followed by the block's position in brackets."""

PROGRAMS: Final = frozenset(["value_and_grad", "hvp_pairs", "prepare", "apply", "kfac", "sampled_kfac", *MULTIPLYING])
"""The programs that this server knows, by name; those of blocks aside."""

MODES: Final = {
    "forward_over_reverse": False,
    "reverse_over_forward": False,
    "reverse_over_reverse": False,
    "finite_difference": False,
    "linearized": True,
    "auto": True,
}
"""Modes that this server knows, and whether they need `apply`."""

FORMATS = (1,)
"""Values of Bundle.format that this server understands."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


PRECISIONS: Final = ("highest", "high", "default", "exported")
"""Matrix-multiplication precisions."""

MAX_FIXED_BUCKET: Final = 1024
"""Most vectors of a launch whose width an objective fixes."""

WIDTH: Final = "k"
"""The symbolic width of a block."""

ROWS: Final = "m"
"""The symbolic number of rows of data."""

_Spec = tuple[tuple[int | str, ...], str]


@dataclasses.dataclass(frozen=True)
class Signature:
    """Shapes and dtypes of a program's arguments and results; a symbolic extent is its expression, such as `WIDTH`."""

    arguments: tuple[_Spec, ...]
    results: tuple[_Spec, ...]


def check_name(name: str) -> None:
    """Raises ServiceError where `name` cannot name an objective."""
    if not _NAME.fullmatch(name) or len(name) > 200 or _codec.is_digest(name):
        raise _invalid(
            "INVALID_NAME",
            f"a name is made of letters, digits, '.', '_' and '-', its parts joined by '/', of 200 characters at most, and is "
            f"no digest; got {name[:80]!r}",
        )


def parse(serialized: bytes) -> objective_pb2.Bundle:
    """The bundle of its serialized bytes, checked as far as it can be without its programs."""
    try:
        bundle = objective_pb2.Bundle.FromString(serialized)
    except DecodeError as error:
        raise _invalid("BUNDLE_INVALID", f"the blob is no bundle: {error}") from None
    if bundle.format not in FORMATS:
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            "BUNDLE_INCOMPATIBLE",
            f"the bundle has format {bundle.format}, this server reads {FORMATS[0]} to {FORMATS[-1]}: upgrade the server",
        )
    _check_arrays(bundle)
    _check_programs(bundle)
    _check_parts(bundle)
    _check_rows(bundle)
    return bundle


def _check_programs(bundle: objective_pb2.Bundle) -> None:
    """The programs are known, complete, and of a mode and a precision that there is."""
    if bundle.precision not in PRECISIONS:
        raise _invalid(
            "BUNDLE_INVALID", f"precision must be one of {', '.join(PRECISIONS)}, got {bundle.precision[:40]!r}"
        )
    if bundle.dtype == "float64" and not bundle.x64:
        raise _invalid("BUNDLE_INVALID", "x is float64, and the bundle says that it was traced without 64-bit types")
    of_blocks = {f"{name}[{index}]" for index in range(len(bundle.blocks)) for name in MULTIPLYING}
    unknown = sorted(bundle.programs.keys() - PROGRAMS - of_blocks)
    if unknown:
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            "BUNDLE_INCOMPATIBLE",
            f"the bundle has programs that this server does not know: {', '.join(unknown)[:200]}; upgrade the server",
        )
    if not bundle.programs.keys() >= {"value_and_grad", "hvp"}:
        raise _invalid("BUNDLE_INVALID", "value_and_grad and hvp are required")
    if ("prepare" in bundle.programs) != ("apply" in bundle.programs):
        raise _invalid("BUNDLE_INVALID", "prepare and apply go together")
    if bundle.mode not in MODES:
        raise _invalid(
            "BUNDLE_INVALID", f"the bundle's mode is {bundle.mode[:40]!r}, this server knows {', '.join(MODES)}"
        )
    if MODES[bundle.mode] and "apply" not in bundle.programs:
        raise _invalid("BUNDLE_INVALID", f"mode {bundle.mode} needs prepare and apply")
    if bundle.residuals and "apply" not in bundle.programs:
        raise _invalid("BUNDLE_INVALID", "there are residuals, and no apply that takes them")


def _check_arrays(bundle: objective_pb2.Bundle) -> None:
    """Structures, shapes and dtypes fit each other."""
    if bundle.dtype not in _codec.VECTOR_DTYPES or bundle.n < 1:
        raise _invalid("BUNDLE_INVALID", f"x must be float32 or float64 with n > 0, got {bundle.dtype}[{bundle.n}]")
    for tree in (bundle.x_tree, bundle.data_tree):
        try:
            _pytree.check(tree)
        except _pytree.StructureError as error:
            raise _invalid("BUNDLE_INVALID", str(error)) from None
    if _pytree.count(bundle.x_tree) != len(bundle.x_leaves) or _pytree.count(bundle.data_tree) != len(bundle.data):
        raise _invalid("BUNDLE_INVALID", "the structures of x and data do not have as many leaves as are listed")
    if sum(_size(leaf.shape) for leaf in bundle.x_leaves) != bundle.n:
        raise _invalid("BUNDLE_INVALID", f"the leaves of x do not have n = {bundle.n} elements together")
    for dtype in {
        array.dtype
        for arrays in (bundle.x_leaves, bundle.data, bundle.captured, (r.spec for r in bundle.residuals))
        for array in arrays
    }:
        try:
            _codec.dtype(dtype)
        except TypeError as error:
            raise _invalid("BUNDLE_INVALID", str(error)) from None


def _check_rows(bundle: objective_pb2.Bundle) -> None:
    """Rows and launches are of sizes that there are."""
    if not all(0 <= index < len(bundle.data) and bundle.data[index].shape for index in bundle.row_leaves):
        raise _invalid("BUNDLE_INVALID", f"row_leaves {list(bundle.row_leaves)} are not all leaves of data with rows")
    if bundle.row_reduction and (bundle.row_reduction not in REDUCTIONS or not bundle.row_leaves):
        raise _invalid(
            "BUNDLE_INVALID", f"row_reduction {bundle.row_reduction[:40]!r} of {len(bundle.row_leaves)} leaves"
        )
    if bundle.sharded and bundle.residuals:
        raise _invalid("BUNDLE_INVALID", "data that is split over devices does not go with residuals")
    if bundle.row_leaves and bundle.residuals:
        raise _invalid(
            "BUNDLE_INVALID", "data of any number of rows does not go with residuals, whose size must be known"
        )
    if not 0 <= bundle.fixed_bucket <= MAX_FIXED_BUCKET or bundle.fixed_bucket & (bundle.fixed_bucket - 1):
        raise _invalid("BUNDLE_INVALID", f"fixed_bucket must be a power of two, got {bundle.fixed_bucket}")


def _check_parts(bundle: objective_pb2.Bundle) -> None:
    """Blocks and dense layers are made of leaves of x, and have their programs."""
    leaves = range(len(bundle.x_leaves))
    for index, block in enumerate(bundle.blocks):
        if sorted(set(block.leaves)) != list(block.leaves) or not set(block.leaves) <= set(leaves) or not block.leaves:
            raise _invalid("BUNDLE_INVALID", f"blocks[{index}] must be of ascending leaves of x, it is {block.leaves}")
        if f"hvp[{index}]" not in bundle.programs or not block_size(bundle, block):
            raise _invalid("BUNDLE_INVALID", f"blocks[{index}] has no program hvp[{index}], or no elements")
    factored = "kfac" in bundle.programs
    if bool(bundle.dense_layers) != factored or (not factored and "sampled_kfac" in bundle.programs):
        raise _invalid("BUNDLE_INVALID", "dense layers and kfac go together")
    taken: list[int] = []
    for layer in bundle.dense_layers:
        parts = [layer.kernel, *([layer.bias] if layer.HasField("bias") else [])]
        shapes = [tuple(bundle.x_leaves[leaf].shape) for leaf in parts if leaf in leaves]
        kernel = shapes[0] if len(shapes) == len(parts) else ()
        if len(kernel) != 2 or shapes[1:] not in ([], [(kernel[0 if layer.transposed else 1],)]):
            raise _invalid("BUNDLE_INVALID", f"a dense layer is of the leaves {parts} of x, whose shapes are {shapes}")
        taken += parts
    if len(set(taken)) != len(taken):
        raise _invalid("BUNDLE_INVALID", f"a leaf of x is in one dense layer only, they are of the leaves {taken}")


def block_size(bundle: objective_pb2.Bundle, block: objective_pb2.Block) -> int:
    """Number of elements of a principal block."""
    return sum(_size(bundle.x_leaves[leaf].shape) for leaf in block.leaves)


def factor_shapes(bundle: objective_pb2.Bundle) -> list[tuple[int, int]]:
    """The shapes of A_0, G_0, A_1, ... of the dense layers."""
    shapes = []
    for layer in bundle.dense_layers:
        kernel = tuple(bundle.x_leaves[layer.kernel].shape)
        inputs, outputs = reversed(kernel) if layer.transposed else kernel
        shapes += [(inputs + layer.HasField("bias"),) * 2, (outputs,) * 2]
    return shapes


def references(bundle: objective_pb2.Bundle) -> Iterator[str]:
    """The digests of all blobs that a bundle needs."""
    for program in bundle.programs.values():
        yield program.digest
    for tensor in [*bundle.captured, *bundle.data]:
        yield tensor.digest


def check_signatures(bundle: objective_pb2.Bundle, signatures: Mapping[str, Signature]) -> None:
    """Raises ServiceError where a program does not take or return what the bundle says."""
    x = ((bundle.n,), bundle.dtype)
    block = ((WIDTH, bundle.n), bundle.dtype)
    data: list[_Spec] = [
        ((ROWS, *tensor.shape[1:]), tensor.dtype) if index in bundle.row_leaves else _spec(tensor)
        for index, tensor in enumerate(bundle.data)
    ]
    args = (*map(_spec, bundle.captured), *data)
    value = signatures["value_and_grad"].results[:1]
    if len(value) != 1 or value[0][0] != ():
        raise _invalid("BUNDLE_INVALID", f"value_and_grad must return a scalar first, it returns {value}")
    kept = tuple(_spec(residual.spec) for residual in bundle.residuals if residual.WhichOneof("source") == "result")
    key: _Spec = ((2,), "uint32")
    factors = tuple((shape, bundle.dtype) for shape in factor_shapes(bundle))
    expected = {
        "value_and_grad": Signature((x, *args), (*value, x)),
        **dict.fromkeys(CURVATURES, Signature((x, block, *args), (block,))),
        "sampled_fisher": Signature((x, block, key, *args), (block,)),
        "hvp_pairs": Signature((block, block, *args), (block,)),
        "kfac": Signature((x, *args), factors),
        "sampled_kfac": Signature((x, key, *args), factors),
        "prepare": Signature((x, *args), (*value, x, *kept)),
        "apply": Signature((block, *(_spec(residual.spec) for residual in bundle.residuals)), (block,)),
    }
    for index, part in enumerate(bundle.blocks):
        small = ((WIDTH, block_size(bundle, part)), bundle.dtype)
        for name in CURVATURES:
            expected[f"{name}[{index}]"] = Signature((x, small, *args), (small,))
        expected[f"sampled_fisher[{index}]"] = Signature((x, small, key, *args), (small,))
    for name, signature in signatures.items():
        if signature != expected[name]:
            raise _invalid("BUNDLE_INVALID", f"{name} is {signature}, the bundle says {expected[name]}")
    results = [residual.result for residual in bundle.residuals if residual.WhichOneof("source") == "result"]
    arguments = [residual for residual in bundle.residuals if residual.WhichOneof("source") != "result"]
    if results != list(range(len(results))) or any(
        not 0 <= residual.argument <= len(args) or _spec(residual.spec) != (x, *args)[residual.argument]
        for residual in arguments
    ):
        raise _invalid("BUNDLE_INVALID", "the residuals do not refer to results of prepare, or to arguments, in order")


def check_data(bundle: objective_pb2.Bundle, data: Sequence[tensor_pb2.Tensor]) -> None:
    """Raises ServiceError where tensors cannot be bound as the objective's data."""
    if len(data) != len(bundle.data):
        raise _invalid("DATA_MISMATCH", f"data has {len(data)} leaves, the objective takes {len(bundle.data)}")
    rows = rows_of(bundle, data)
    for index, path in enumerate(_pytree.leaf_paths(bundle.data_tree)):
        given, expected = _spec(data[index]), _spec(bundle.data[index])
        if index in bundle.row_leaves:
            expected = ((rows, *expected[0][1:]), expected[1])
        if given != expected:
            raise _invalid(
                "DATA_MISMATCH",
                f"data{path} is {given[1]}{list(given[0])}, the objective takes {expected[1]}{list(expected[0])}",
            )


def rows_of(bundle: objective_pb2.Bundle, data: Sequence[tensor_pb2.Tensor]) -> int:
    """How many rows data has where that is symbolic, 0 where nothing is."""
    if not bundle.row_leaves:
        return 0
    shape = data[bundle.row_leaves[0]].shape
    if not shape or shape[0] < 1:
        raise _invalid(
            "DATA_MISMATCH", f"data needs at least one row, its first leaf of rows has the shape {list(shape)}"
        )
    return shape[0]


def _spec(array: tensor_pb2.Tensor | tensor_pb2.ArraySpec) -> _Spec:
    return tuple(array.shape), array.dtype


def _size(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        if extent < 0:
            raise _invalid("BUNDLE_INVALID", f"a shape has a negative extent: {list(shape)}")
        size *= extent
    return size


def _invalid(reason: str, message: str) -> ServiceError:
    return ServiceError(Code.INVALID_ARGUMENT, reason, message)
