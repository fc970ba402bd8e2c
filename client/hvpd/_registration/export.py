"""Turns a Python function into a bundle: trace, mark, lower. Needs jax.

Marks keep derivative rules that StableHLO would lose. The server differentiates.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from hvpd import _text
from hvpd._arguments import check_choice
from hvpd._composite import Composite
from hvpd._errors import InvalidArgumentError
from hvpd._registration import marked_primitives, marks, purity, shardings
from hvpd._registration.bundle import Arrays, Export, assemble, flat_dtype_of, floating_array
from hvpd._registration.closures import HiddenError, lowering
from hvpd._registration.hijax import kept_rules
from hvpd._registration.jaxprs import equations
from hvpd._registration.lift import forget, forgetting
from hvpd._registration.portable import oldest_reader, portable_of
from hvpd._registration.stages import Stage, Subject, worded
from hvpd._registration.trees import paths, tree_spec, with_jax_matrices
from hvpd._wire import codec, pytree
from hvpd._wire.protocol import (
    EXPORTED,
    MAX_FIXED_BUCKET,
    MODES,
    PLATFORMS,
    PRECISIONS,
    PRODUCT_PRECISIONS,
    REDUCTIONS,
    RESIDUAL_MODES,
)
from hvpd._wire.pytree import Spec
from hvpd.v1 import objective_pb2

LIFT_BYTES = 16 << 10
"""Bytes of the largest closed-over array that stays a constant of the program."""

_Function = Callable[..., Any]


@forgetting()
@kept_rules()
@shardings.dropped()
def export(
    fun: _Function,
    x: Any,
    data: Sequence[Any],
    *,
    platforms: Sequence[str],
    precision: str,
    mode: str = "forward_over_reverse",
    any_rows: bool = False,
    row_reduction: str | None = None,
    blocks: Sequence[str | Sequence[str]] = (),
    fixed_bucket: int | None = None,
    sharded: bool | Literal["parameters"] = False,
    stablehlo_version: str = "",
    lift_bytes: int = LIFT_BYTES,
    before_tracing: Callable[[Sequence[codec.Array]], None] = lambda data: None,
) -> Export:
    """Trace `fun(x, *data)`, mark derivative rules, and lower it to StableHLO.

    Args:
        fun: Returns a floating scalar.
        x: Any pytree of floating arrays.
        data: One pytree of arrays for each trailing argument.
        platforms: Platforms whose branches the program keeps, if `fun` has some
            (`jax.lax.platform_dependent`).
        mode: One of `MODES`: how products are made unless a product says otherwise.
        precision: One of `PRECISIONS`, for matrix products in `fun` that state none.
        any_rows: Whether the first axis of data is symbolic, in all leaves that have as
            many rows as the first leaf.
        row_reduction: One of `REDUCTIONS`: how `fun` reduces these rows, so that the
            server can process them in chunks.
        blocks: Names of leaves, or groups of names: principal blocks with programs of
            their own.
        fixed_bucket: The only block width of launches.
        sharded: Whether the server splits data by rows over all of its devices; with
            "parameters", also x and vectors by leaf.
        stablehlo_version: Newest version that the server reads. Empty for the version
            that servers up to four weeks older read.
        lift_bytes: Bytes of the largest closed-over array that stays a constant of the
            program.
        before_tracing: Called with the leaves of data. May raise.

    Raises:
        InvalidArgumentError: `fun`, `x` or `data` cannot be registered; the message
            says why.
    """
    _check_options(platforms, precision, mode)
    _check_rows(fun, row_reduction)
    _check_bucket(fixed_bucket)
    any_rows = any_rows or row_reduction is not None
    if mode in RESIDUAL_MODES and (any_rows or sharded):
        raise InvalidArgumentError(
            f"mode {mode!r} keeps residuals, whose size must be known: it does not go with any_rows, nor with sharded",
            reason="CONFLICTING_OPTIONS",
        )
    _check_sharded(sharded, fun, mode=mode, any_rows=any_rows, blocks=blocks)
    given = _given(x, data)
    before_tracing(given.data)
    # On the server, the bundle's precision applies to matrix products that state none.
    # A mesh of the caller (jax.set_mesh) would add shardings to the program.
    with (
        jax.enable_x64(given.x64),
        jax.default_matmul_precision(None),
        jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())),
    ):
        groups = _groups(given.x_tree, blocks)
        row_leaves = _row_leaves(given.data, given.data_tree) if any_rows else []
        subject = _subject(given, row_leaves, lift_bytes)
        version = oldest_reader(stablehlo_version)
        kept = None if precision != EXPORTED else tuple(platforms)
        try:
            with purity.noticed(fun), lowering(lift_bytes):
                captured, branches, programs = _programs(fun, subject, platforms, kept, version)
        except HiddenError:
            forget()
            captured, branches, programs = _programs(fun, subject, platforms, kept, version)
    return assemble(
        Arrays(given.x_tree, given.x, given.data_tree, given.data, captured),
        programs,
        objective_pb2.Bundle(
            mode=mode,
            row_leaves=row_leaves,
            row_reduction=row_reduction or "",
            fixed_bucket=fixed_bucket or 0,
            sharded=bool(sharded),
            sharded_parameters=sharded == "parameters",
            blocks=[objective_pb2.Block(leaves=positions) for positions in groups],
            composite=_composite_message(fun),
            platforms=branches,
            precision=precision,
            x64=given.x64,
            jax_version=jax.__version__,
            stablehlo_version=version,
        ),
        given.tree_of,
    )


# Options


def _check_options(platforms: Sequence[str], precision: str, mode: str) -> None:
    if precision not in PRECISIONS:
        check_choice(precision, "precision", PRODUCT_PRECISIONS)
    check_choice(mode, "mode", MODES)
    if isinstance(platforms, str) or "gpu" in platforms:
        names = platforms.replace(",", " ").split() if isinstance(platforms, str) else platforms
        meant = tuple("cuda" if name == "gpu" else name for name in names)
        raise InvalidArgumentError(
            f"platforms must be a tuple of cpu, cuda, rocm and tpu, such as platforms={meant}, got {platforms!r}",
            reason="INVALID_OPTION",
        )
    unknown = sorted(set(platforms) - set(PLATFORMS))
    if unknown or not platforms:
        raise InvalidArgumentError(
            f"platforms must be of cpu, cuda, rocm and tpu, got {list(platforms)!r}", reason="INVALID_OPTION"
        )


def _check_rows(fun: _Function, row_reduction: str | None) -> None:
    if row_reduction is None:
        return
    check_choice(row_reduction, "row_reduction", REDUCTIONS)
    if isinstance(fun, Composite) and fun.reduction != row_reduction:
        raise InvalidArgumentError(
            f"the composite's reduction is {fun.reduction!r}, row_reduction is {row_reduction!r}: both must be the same",
            reason="CONFLICTING_OPTIONS",
        )


def _check_sharded(
    sharded: bool | str, fun: Any, *, mode: str, any_rows: bool, blocks: Sequence[str | Sequence[str]]
) -> None:
    if not isinstance(sharded, bool) and sharded != "parameters":
        raise InvalidArgumentError(
            f'sharded must be False, True or "parameters", got {_text.described(sharded)}', reason="INVALID_OPTION"
        )
    if sharded == "parameters" and (mode != "forward_over_reverse" or any_rows or blocks or isinstance(fun, Composite)):
        raise InvalidArgumentError(
            'sharded="parameters" splits x by leaf: it goes with mode "forward_over_reverse" only, and not with any_rows, row_reduction, '
            "blocks or hvpd.composite",
            reason="CONFLICTING_OPTIONS",
        )


def _check_bucket(fixed_bucket: int | None) -> None:
    if fixed_bucket is not None and not (
        type(fixed_bucket) is int and 1 <= fixed_bucket <= MAX_FIXED_BUCKET and fixed_bucket & (fixed_bucket - 1) == 0
    ):
        raise InvalidArgumentError(
            f"fixed_bucket must be a power of two from 1 to {MAX_FIXED_BUCKET}, got {_text.described(fixed_bucket)}",
            reason="INVALID_OPTION",
        )


def _groups(structure: Spec, blocks: Sequence[str | Sequence[str]]) -> list[list[int]]:
    """Return the positions of the leaves of each block."""
    if isinstance(blocks, str) or not all(isinstance(block, str | Sequence) for block in blocks):
        raise InvalidArgumentError(
            f"blocks must be a list of names, and of groups of names, got {blocks!r}", reason="INVALID_OPTION"
        )
    known = pytree.leaf_names(structure)
    groups = [pytree.select(known, [block] if isinstance(block, str) else list(block)) for block in blocks]
    for index, group in enumerate(groups):
        if group in groups[:index]:
            raise InvalidArgumentError(
                f"blocks[{index}] has the same leaves as an earlier one: {blocks[index]!r}", reason="INVALID_OPTION"
            )
    return groups


def _composite_message(fun: _Function) -> objective_pb2.Composite | None:
    if not isinstance(fun, Composite):
        return None
    return objective_pb2.Composite(distribution=fun.distribution or "", reduction=fun.reduction, samples=fun.samples)


# Arguments


@dataclasses.dataclass(frozen=True)
class _Given:
    """x and data as arrays, with their structure."""

    x_tree: Spec
    x: Sequence[codec.Array]
    tree_of: _Function
    """Makes the pytree x from its leaves."""
    data_tree: Spec
    data: Sequence[codec.Array]
    arguments_of: _Function
    """Makes the trailing arguments from their leaves."""
    x64: bool
    """Whether the trace is in 64 bits."""
    widened: bool
    """Whether the trace is in 64 bits, while all other traces of jax are in 32."""


def _given(x: Any, data: Sequence[Any]) -> _Given:
    """Convert x and data to arrays.

    Raises:
        InvalidArgumentError: A leaf cannot be registered.
    """
    data = with_jax_matrices(tuple(data))
    x_leaves, x_treedef = jax.tree.flatten(x)
    x_arrays = [floating_array(leaf, f"x{path}") for leaf, path in zip(x_leaves, paths(x), strict=True)]
    if not any(array.size for array in x_arrays):
        raise InvalidArgumentError("x has no elements: there is nothing to differentiate by", reason="NO_PARAMETERS")
    dtype = flat_dtype_of(x_arrays)
    own = bool(jax.dtypes.canonicalize_dtype(np.float64) == np.float64)
    x64 = own or dtype == np.float64
    data_leaves, data_treedef = jax.tree.flatten(data)
    data_arrays = [
        _data_array(leaf, f"data{path}", x_dtype=dtype, x64=x64)
        for leaf, path in zip(data_leaves, paths(data), strict=True)
    ]
    return _Given(
        x_tree=tree_spec(x),
        x=x_arrays,
        tree_of=lambda leaves: jax.tree.unflatten(x_treedef, leaves),
        data_tree=tree_spec(data),
        data=data_arrays,
        arguments_of=lambda leaves: jax.tree.unflatten(data_treedef, leaves),
        x64=x64,
        widened=x64 and not own,
    )


def _data_array(leaf: Any, where: str, *, x_dtype: np.dtype[Any], x64: bool) -> codec.Array:
    """Convert a leaf of data as jax would; see `codec.data_array`.

    Raises:
        InvalidArgumentError: The leaf is no array of numbers, or holds integers that 32
            bits cannot hold.
    """
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended):
        raise InvalidArgumentError(
            f"{where} is of dtype {dtype}: pass jax.random.key_data(key), and wrap it in the function", reason="DTYPE"
        )
    return codec.data_array(leaf, where, x_dtype=x_dtype, x64=x64)


def _row_leaves(arrays: Sequence[codec.Array], structure: Spec) -> list[int]:
    """Return the leaves of data whose first axis is as long as that of the first
    leaf.
    """
    if not arrays or arrays[0].ndim == 0:
        raise InvalidArgumentError("any_rows needs data whose first leaf has rows", reason="NO_ROWS")
    sparse = {first + child for first, node in pytree.sparse_nodes(structure) for child in range(len(node.children))}
    if 0 in sparse:
        raise InvalidArgumentError(
            "any_rows and row_reduction need a first leaf of data that is a dense array: a sparse matrix has its number of rows "
            "in its structure, so it cannot have any other",
            reason="NO_ROWS",
        )
    rows = len(arrays[0])
    return [
        index for index, array in enumerate(arrays) if array.ndim > 0 and len(array) == rows and index not in sparse
    ]


# Programs


def _subject(given: _Given, row_leaves: Sequence[int], lift_bytes: int) -> Subject:
    """Describe the arguments to a trace, with a symbolic number of rows."""
    (m,) = jax.export.symbolic_shape("m")
    specs = [
        *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in given.x),
        *(
            jax.ShapeDtypeStruct((m, *array.shape[1:]) if index in row_leaves else array.shape, array.dtype)
            for index, array in enumerate(given.data)
        ),
    ]
    return Subject(given.tree_of, given.arguments_of, specs, len(given.x), lift_bytes, widened=given.widened)


def _programs(
    fun: _Function, subject: Subject, platforms: Sequence[str], kept: tuple[str, ...] | None, version: str
) -> tuple[list[codec.Array], tuple[str, ...], dict[str, bytes]]:
    """Return the lifted arrays, the platforms of branches, and the programs by name.

    Args:
        fun: The user's function.
        subject: Its arguments.
        platforms: Platforms whose branches are kept, if there are some.
        kept: Platforms that are kept in any case; None for none.
        version: Version of StableHLO.
    """
    captured, stages = subject.trace(fun)
    branches = kept or (tuple(platforms) if any(map(_has_branches, stages.values())) else ())
    with worded(fun):
        # Without branches the program is the same on every platform, because marks
        # replace what jax lowers differently. An exported function has the platforms
        # that it was exported for.
        programs = {name: _lower(stage, branches or ("cpu",), version) for name, stage in stages.items()}
    return captured, branches, programs


def _has_branches(stage: Stage) -> bool:
    """Return whether a function computes differently on different platforms."""
    return any(each.primitive.name == "platform_index" for each in equations(stage.closed))


def _lower(stage: Stage, platforms: Sequence[str], version: str) -> bytes:
    """Lower a stage to a portable artifact without source locations.

    The same function gives the same bytes from any checkout.
    """
    exported = jax.export.export(
        jax.jit(stage.fun, keep_unused=True),
        platforms=platforms,
        disabled_checks=marked_primitives.ALLOWED_CALLS,
        _override_lowering_rules=marks.rules(),
    )(*stage.specs)
    return portable_of(exported, version)
