"""From a Python function to a bundle: trace, differentiate, lower to StableHLO. With `_derivatives` and `_lift` the
only part of the client that imports jax.

Differentiation happens here because jax can do it only before export: an `Exported` has no jvp and no batching rule
(jax issue 28327). The programs take and return flat arrays, so a server needs none of the user's classes.
"""

import contextlib
import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.extend
import jax.interpreters.mlir
import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import stablehlo

from hvpd import _codec, _pytree
from hvpd._composite import REDUCTIONS, Composite
from hvpd._dense import Factors
from hvpd._derivatives import Stages, array_spec, curvatures_of, hvp_of, linearized, pairs_of
from hvpd._errors import InvalidArgumentError
from hvpd._layout import Layout, View
from hvpd._lift import forgetting, lift, trace
from hvpd._pytree import Spec
from hvpd.v1 import objective_pb2, tensor_pb2

FORMAT = 1
"""Bundle.format that this file writes."""

LIFT_BYTES = 16 << 10
"""Closed-over arrays larger than this become tensors; smaller ones stay constants of the program."""

PAIRS_BYTES = 64 << 10
"""Largest x of which products at many points go in one launch: of larger ones a launch has enough to do."""

PRECISIONS = ("highest", "high", "default")

EXPORTED = "exported"
"""Precision of a function that somebody else exported: whatever they had."""

MODES = (
    "forward_over_reverse",
    "reverse_over_forward",
    "reverse_over_reverse",
    "linearized",
    "finite_difference",
    "auto",
)

_MAX_BUCKET = 1024
"""Widest fixed bucket."""

_Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Export:
    """A bundle with everything that it refers to."""

    bundle: objective_pb2.Bundle
    """What is registered."""
    blobs: Mapping[str, _codec.Buffer]
    """Programs, tensors and the serialized bundle itself, by digest."""
    digest: str
    """Digest of the serialized bundle: the objective's."""
    x_treedef: Any
    """jax's treedef of x."""

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The leaves of x in the user's own containers."""
        return jax.tree.unflatten(self.x_treedef, leaves)


@dataclasses.dataclass(frozen=True)
class Target:
    """What programs are written for."""

    platforms: tuple[str, ...]
    stablehlo_version: str
    scope: jax.export.SymbolicScope
    """Of the symbolic sizes: k, the width of a block; m, the rows of data."""


@forgetting()
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
    sharded: bool = False,
    stablehlo_version: str = "",
    lift_bytes: int = LIFT_BYTES,
) -> Export:
    """Differentiates `fun(x, *data)` and exports value_and_grad, hvp, prepare and apply, and what else there is to be had.

    Args:
        fun: Returns a floating scalar.
        x: Any pytree of floating arrays.
        data: One pytree of arrays for each trailing argument.
        platforms: Of "cpu", "cuda", "rocm", "tpu".
        mode: Of `MODES`: how products are made.
        precision: Of `PRECISIONS`, or `EXPORTED`, for matrix products in `fun` that do not say their own.
        any_rows: Whether the first axis of data is symbolic, in all leaves that have as many rows as the first leaf.
        row_reduction: Of `REDUCTIONS`: how `fun` goes over those rows, so that they can be gone through in chunks.
        blocks: Names of leaves, or groups of names: principal blocks that get programs of their own.
        fixed_bucket: The only block width of launches.
        sharded: Whether the server splits data by rows over all of its devices.
        stablehlo_version: Newest that the server reads; empty: what servers up to four weeks older read.
        lift_bytes: Largest closed-over array that stays a constant of the program.

    Raises:
        InvalidArgumentError: `fun`, `x` or `data` cannot be registered; the message says why.
    """
    _check_options(platforms, precision, mode)
    _check_rows(fun, row_reduction)
    _check_bucket(fixed_bucket)
    any_rows = any_rows or row_reduction is not None
    if mode in ("linearized", "auto") and (any_rows or sharded):
        raise InvalidArgumentError(
            f"mode {mode!r} keeps residuals, whose size must be known: it does not go with any_rows, nor with sharded"
        )
    x_leaves, x_treedef = jax.tree.flatten(x)
    x_arrays = [_floating(leaf, path) for leaf, path in zip(x_leaves, _paths(x), strict=True)]
    n = sum(array.size for array in x_arrays)
    if n == 0:
        raise InvalidArgumentError("x has no elements: there is nothing to differentiate by")
    flat_dtype = np.result_type(np.float32, *(np.float64 for array in x_arrays if array.dtype == np.float64))
    own = bool(jax.dtypes.canonicalize_dtype(np.float64) == np.float64)
    x64 = own or flat_dtype == np.float64
    data_leaves, data_treedef = jax.tree.flatten(tuple(data))
    data_arrays = [
        data_array(leaf, f"data{path}", x_dtype=flat_dtype, x64=x64)
        for leaf, path in zip(data_leaves, _paths(tuple(data)), strict=True)
    ]

    def tree_of(leaves: Sequence[jax.Array]) -> Any:
        return jax.tree.unflatten(x_treedef, leaves)

    def arguments_of(leaves: Sequence[jax.Array]) -> Any:
        return jax.tree.unflatten(data_treedef, leaves)

    x_structure = tree_spec(x)
    x_spec = jax.ShapeDtypeStruct((n,), flat_dtype)
    with jax.enable_x64(x64), jax.default_matmul_precision("highest" if precision == EXPORTED else precision):
        layout = Layout([jax.ShapeDtypeStruct(array.shape, array.dtype) for array in x_arrays])
        groups = _groups(x_structure, blocks)
        target = Target(tuple(platforms), _artifact_version(stablehlo_version), jax.export.SymbolicScope())
        row_leaves = _row_leaves(data_arrays) if any_rows else []
        (m,) = jax.export.symbolic_shape("m", scope=target.scope)
        data_specs = [
            jax.ShapeDtypeStruct((m, *array.shape[1:]) if index in row_leaves else array.shape, array.dtype)
            for index, array in enumerate(data_arrays)
        ]
        leaf_specs = [*layout.leaves, *data_specs]
        if isinstance(fun, Composite):
            captured, stages = _stages(
                fun, tree_of, arguments_of, leaf_specs, len(x_arrays), lift_bytes, widened=x64 and not own
            )
            objective = stages.whole
        else:
            captured, objective = _trace(
                lambda *leaves: fun(tree_of(leaves[: len(x_arrays)]), *arguments_of(leaves[len(x_arrays) :])),
                fun,
                leaf_specs,
                lift_bytes,
                widened=x64 and not own,
            )
            stages = None
        specs = [x_spec, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in captured), *data_specs]
        with _traced(fun):
            exported = _programs(_Subject(fun, objective, stages, layout, specs), groups, mode, target)
            if sharded:
                exported = exported.without_residuals()

    blobs: dict[str, _codec.Buffer] = {}

    def blob(content: _codec.Buffer) -> str:
        digest = _codec.digest(content)
        blobs[digest] = content
        return digest

    def tensor(array: _codec.Array) -> tensor_pb2.Tensor:
        return tensor_pb2.Tensor(dtype=array.dtype.name, shape=array.shape, digest=blob(_codec.payload(array)))

    serialized = {name: bytes(program.serialize()) for name, program in exported.programs.items()}
    bundle = objective_pb2.Bundle(
        format=FORMAT,
        n=n,
        dtype=flat_dtype.name,
        x_tree=x_structure,
        x_leaves=[array_spec(array) for array in x_arrays],
        data_tree=tree_spec(tuple(data)),
        data=[tensor(array) for array in data_arrays],
        captured=[tensor(array) for array in captured],
        mode=exported.mode,
        row_leaves=row_leaves,
        row_reduction=row_reduction or "",
        fixed_bucket=fixed_bucket or 0,
        sharded=sharded,
        residuals=exported.residuals,
        blocks=[objective_pb2.Block(leaves=positions) for positions in groups],
        dense_layers=exported.dense_layers,
        platforms=list(platforms),
        precision=precision,
        x64=x64,
        jax_version=jax.__version__,
        calling_convention_version=exported.programs["hvp"].calling_convention_version,
        programs={
            name: objective_pb2.Program(digest=blob(content), size_bytes=len(content))
            for name, content in serialized.items()
        },
    )
    digest = blob(bundle.SerializeToString(deterministic=True))
    return Export(bundle, blobs, digest, x_treedef)


def _check_options(platforms: Sequence[str], precision: str, mode: str) -> None:
    if precision not in (*PRECISIONS, EXPORTED):
        raise InvalidArgumentError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if mode not in MODES:
        raise InvalidArgumentError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    unknown = sorted(set(platforms) - {"cpu", "cuda", "rocm", "tpu"})
    if unknown or not platforms:
        raise InvalidArgumentError(f"platforms must be of cpu, cuda, rocm and tpu, got {list(platforms)!r}")


def _check_rows(fun: _Function, row_reduction: str | None) -> None:
    if row_reduction not in (None, *REDUCTIONS):
        raise InvalidArgumentError(f"row_reduction must be one of {', '.join(REDUCTIONS)}, got {row_reduction!r}")
    if row_reduction is not None and isinstance(fun, Composite) and fun.reduction != row_reduction:
        raise InvalidArgumentError(
            f"the composite's reduction is {fun.reduction!r}, row_reduction is {row_reduction!r}: they say the same thing"
        )


def _check_bucket(fixed_bucket: int | None) -> None:
    if fixed_bucket is not None and not (
        type(fixed_bucket) is int and 1 <= fixed_bucket <= _MAX_BUCKET and fixed_bucket & (fixed_bucket - 1) == 0
    ):
        raise InvalidArgumentError(f"fixed_bucket must be a power of two from 1 to {_MAX_BUCKET}, got {fixed_bucket!r}")


@dataclasses.dataclass(frozen=True)
class Foreign:
    """An objective that somebody else exported, as a function to register."""

    fun: _Function
    """fun(x, *data), differentiable by reverse mode twice."""
    x: Any
    """Zeros of the structure, shapes and dtypes of its first argument."""
    platforms: tuple[str, ...]
    """What it was lowered for."""


def foreign(blob: bytes | bytearray) -> Foreign:
    """Reads a function that `jax.export.export(jax.jit(f))(...).serialize(vjp_order=2)` made.

    Raises:
        InvalidArgumentError: It is none, or it cannot be differentiated twice, or its arguments are not x and data.
    """
    oldest = jax.export.minimum_supported_calling_convention_version
    newest = jax.export.maximum_supported_calling_convention_version
    try:
        exported = jax.export.deserialize(bytearray(blob))
        version = exported.calling_convention_version
        if not oldest <= version <= newest:
            raise ValueError(f"it has calling convention {version}")  # noqa: TRY301 - told below
        exported.mlir_module()
    except Exception as error:
        raise InvalidArgumentError(
            f"these are not the bytes of a jax.export.Exported that jax {jax.__version__} here can read (calling conventions "
            f"{oldest} to {newest}, StableHLO up to {stablehlo.get_current_version()}{_producer(blob)}): {type(error).__name__}: {error}; "
            "export it with a version of jax that is nearer to this one"
        ) from error
    order, derivative = 0, exported
    while order < 2 and derivative.has_vjp():
        order, derivative = order + 1, derivative.vjp()
    if order < 2:
        raise InvalidArgumentError(
            f"{exported.fun_name} was serialized with vjp_order={order}; a Hessian needs both derivatives: "
            "exported.serialize(vjp_order=2)"
        )
    args, kwargs = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    if kwargs or not args:
        raise InvalidArgumentError(f"{exported.fun_name} must take x and data by position, it takes {exported.in_tree}")
    if any(not isinstance(size, int) for aval in exported.in_avals for size in aval.shape):
        raise InvalidArgumentError(
            f"{exported.fun_name} has symbolic shapes ({exported.in_avals}): export it for fixed ones"
        )
    zeros = jax.tree.map(lambda aval: np.zeros(aval.shape, aval.dtype), args[0])
    return Foreign(exported.call, zeros, tuple(exported.platforms))


def _producer(blob: bytes | bytearray) -> str:
    """Which StableHLO wrote it, as its bytes say."""
    found = re.search(rb"StableHLO_v([0-9.]+)", blob)
    return f"; this was written by {found[1].decode()}" if found else ""


def data_array(leaf: Any, where: str, *, x_dtype: np.dtype[Any], x64: bool) -> _codec.Array:
    """A leaf of data as jax would take it: Python numbers in x's dtype, 64 bits narrowed where x64 is off.

    Raises:
        InvalidArgumentError: Not an array of numbers, or integers that 32 bits cannot hold.
    """
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended):
        raise InvalidArgumentError(
            f"{where} is of dtype {dtype}: pass jax.random.key_data(key), and wrap it in the function"
        )
    return _codec.data_array(leaf, where, x_dtype=x_dtype, x64=x64)


def _floating(leaf: Any, path: str) -> _codec.Array:
    array = _codec.native(np.asarray(leaf))
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InvalidArgumentError(
            f"x{path} is of dtype {array.dtype}: derivatives are taken by real floating numbers; "
            "convert it, for instance with .astype(float), or pass it as data"
        )
    if array.dtype.itemsize not in (2, 4, 8):
        raise InvalidArgumentError(f"x{path} is of dtype {array.dtype}: use float64, float32, bfloat16 or float16")
    return array


def _paths(tree: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


@contextlib.contextmanager
def _traced(fun: _Function) -> Iterator[None]:
    """Turns what jax raises while it traces `fun` into an error that says what to do."""
    try:
        yield
    except InvalidArgumentError:
        raise
    except Exception as error:
        name = getattr(fun, "__name__", repr(fun))
        raise InvalidArgumentError(
            f"jax cannot trace, differentiate or export {name}: {type(error).__name__}: {error}"
        ) from error


def _check_scalar(fun: _Function, out: Any) -> None:
    name = getattr(fun, "__name__", repr(fun))
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1 or leaves[0] is not out:
        shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", out)
        raise InvalidArgumentError(f"{name} must return one scalar and nothing else, it returns {shapes}")
    if out.shape != ():
        raise InvalidArgumentError(
            f"{name} must return a scalar, it returns an array of shape {out.shape}: reduce it, for instance with jnp.mean"
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise InvalidArgumentError(f"{name} must return a real floating scalar, it returns {out.dtype}")


def _trace(
    flat: _Function, fun: _Function, specs: Sequence[Any], lift_bytes: int, *, widened: bool
) -> tuple[list[_codec.Array], _Function]:
    """The large arrays that a scalar function closes over, and the function as fun(x, *arrays, *data)."""
    with _traced(fun):
        closed, out = trace(flat, specs, widened=widened)
    _check_scalar(fun, out)
    _check_pure(fun, closed)
    captured, lifted = lift(closed, lift_bytes)
    count = len(captured)

    def traced(x: Any, *args: jax.Array) -> Any:
        return lifted(args[:count], [*jax.tree.leaves(x), *args[count:]])[0]

    return captured, traced


def _check_pure(fun: _Function, closed: Any) -> None:
    if closed.effects:
        name = getattr(fun, "__name__", repr(fun))
        raise InvalidArgumentError(
            f"{name} has side effects ({', '.join(sorted(map(str, closed.effects)))}): printing and callbacks cannot be served"
        )


def _stages(
    composite: Composite,
    tree_of: _Function,
    arguments_of: _Function,
    specs: Sequence[Any],
    count: int,
    lift_bytes: int,
    *,
    widened: bool,
) -> tuple[list[_codec.Array], Stages]:
    """The large arrays that both stages close over, and the stages, traced apart; the first `count` specs are x's leaves."""
    takes = len(jax.eval_shape(lambda *leaves: arguments_of(leaves), *specs[count:]))
    if composite.inputs > takes:
        raise InvalidArgumentError(
            f"the model takes {composite.inputs} data arguments (inputs={composite.inputs}), {takes} were given"
        )
    with _traced(composite.model):
        closed, z = trace(
            lambda *leaves: composite.model(tree_of(leaves[:count]), *arguments_of(leaves[count:])[: composite.inputs]),
            specs,
            widened=widened,
        )
    _check_pure(composite.model, closed)
    leaves, treedef = jax.tree.flatten(z)
    shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", z)
    if not leaves or not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        raise InvalidArgumentError(f"the model must return real floating arrays, it returns {shapes}")
    rows = leaves[0].shape[0] if leaves[0] is z and leaves[0].ndim > 0 else None
    least = 2 if composite.distribution == "categorical" else 1
    if composite.distribution is not None and (rows is None or leaves[0].ndim < least):
        raise InvalidArgumentError(
            f"a model of distribution {composite.distribution!r} must return one array [rows, ...], it returns {shapes}"
        )
    models, lifted = lift(closed, lift_bytes)
    try:
        losses, loss = _trace(
            lambda *z_and_leaves: composite.loss(
                jax.tree.unflatten(treedef, z_and_leaves[: len(leaves)]),
                *arguments_of(z_and_leaves[len(leaves) :])[composite.inputs :],
            ),
            composite.loss,
            [*leaves, *specs[count:]],
            lift_bytes,
            widened=widened,
        )
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"the loss cannot take what the model returns, {shapes}: {error}") from error
    first, both = len(models), len(models) + len(losses)

    def model(x: Sequence[jax.Array], *args: jax.Array) -> Any:
        return jax.tree.unflatten(treedef, lifted(args[:first], [*x, *args[both:]]))

    def loss_of(z: Any, *args: jax.Array) -> Any:
        return loss(z, *args[first:])

    return [*models, *losses], Stages(model, loss_of, both + len(specs) - count, rows)


def _row_leaves(arrays: Sequence[_codec.Array]) -> list[int]:
    """Which leaves of data have a first axis of rows: those that are as long as the first one."""
    if not arrays or arrays[0].ndim == 0:
        raise InvalidArgumentError("any_rows needs data whose first leaf has rows")
    rows = len(arrays[0])
    return [index for index, array in enumerate(arrays) if array.ndim > 0 and len(array) == rows]


def _groups(structure: Spec, blocks: Sequence[str | Sequence[str]]) -> list[list[int]]:
    """Positions of the leaves of each block."""
    if isinstance(blocks, str) or not all(isinstance(block, str | Sequence) for block in blocks):
        raise InvalidArgumentError(f"blocks must be a list of names, and of groups of names, got {blocks!r}")
    known = _pytree.leaf_names(structure)
    groups = [_pytree.select(known, [block] if isinstance(block, str) else list(block)) for block in blocks]
    for index, group in enumerate(groups):
        if group in groups[:index]:
            raise InvalidArgumentError(f"blocks[{index}] has the same leaves as an earlier one: {blocks[index]!r}")
    return groups


@dataclasses.dataclass(frozen=True)
class _Subject:
    """What is differentiated."""

    fun: _Function
    """The user's, for messages, or their composite."""
    objective: _Function
    """objective(leaves of x, *args) -> scalar; args are the captured arrays and the leaves of data."""
    stages: Stages | None
    """Of a composite, likewise in the leaves of x."""
    layout: Layout
    """Of the leaves in the flat x."""
    specs: Sequence[jax.ShapeDtypeStruct]
    """Of the flat x and of args."""

    def hvp(self, view: View, mode: str) -> Callable[[_Function], _Function]:
        """The Hessian's product in a view of x, given how to batch."""
        return hvp_of(lambda y, *args: self.objective(*view(y, *args)), mode)

    def curvatures(self, view: View, extra: int = 0) -> dict[str, Callable[[_Function], _Function]]:
        """The products of a composite's other operators, likewise."""
        if self.stages is None or not isinstance(self.fun, Composite):
            return {}
        return curvatures_of(self.stages.through(view, extra), self.fun)


@dataclasses.dataclass(frozen=True)
class _Programs:
    """What was exported, and what the bundle says of it."""

    programs: dict[str, jax.export.Exported]
    mode: str
    residuals: Sequence[objective_pb2.Residual] = ()
    dense_layers: Sequence[objective_pb2.DenseLayer] = ()

    def without_residuals(self) -> "_Programs":
        """The same for products that recompute what depends on x."""
        kept = {name: program for name, program in self.programs.items() if name not in ("prepare", "apply")}
        return dataclasses.replace(self, programs=kept, residuals=())


def _programs(subject: _Subject, groups: Sequence[Sequence[int]], mode: str, target: Target) -> _Programs:
    """Exports all programs of a bundle; `groups` are the positions of each block's leaves."""
    hessians = _hessians(subject, mode, target)
    try:
        curvatures = _curvatures(subject, groups, hessians.mode, target)
    except (TypeError, NotImplementedError) as error:
        if subject.stages is None or not _forbidden(error):
            raise
        # What jax does not do in a model, or a loss, with a custom_vjp inside, it does by reverse mode.
        reverse = dataclasses.replace(subject, stages=dataclasses.replace(subject.stages, reverse=True))
        curvatures = _curvatures(reverse, groups, hessians.mode, target)
    return dataclasses.replace(
        hessians, programs=hessians.programs | curvatures.programs, dense_layers=curvatures.dense_layers
    )


def _curvatures(subject: _Subject, groups: Sequence[Sequence[int]], mode: str, target: Target) -> _Programs:
    """Exports the products of a composite's operators, of principal blocks, and Kronecker factors."""
    layout, x, args = subject.layout, subject.specs[0], subject.specs[1:]
    programs: dict[str, jax.export.Exported] = {}
    for name, product in subject.curvatures(layout.whole).items():
        programs[name] = _export_batched(product, target, x, _block(layout.size(), x, target), *_drawn(name), *args)
    for index, group in enumerate(groups):
        block, view = _block(layout.size(group), x, target), layout.block(group)
        for name, product in [("hvp", subject.hvp(view, mode)), *subject.curvatures(view, extra=1).items()]:
            drawn = _drawn(name)
            restricted = _restricted(product, functools.partial(layout.take, positions=group), len(drawn))
            programs[f"{name}[{index}]"] = _export_batched(restricted, target, x, block, *drawn, *args)
    if not isinstance(subject.fun, Composite) or subject.stages is None or subject.stages.rows is None:
        return _Programs(programs, mode)
    factors = Factors.of(subject.stages, layout, args, subject.fun)
    for name, function in factors.programs().items():
        programs[name] = _export(function, target, x, *_drawn(name), *args)
    return _Programs(programs, mode, dense_layers=[layer.message for layer in factors.layers])


def _forbidden(error: Exception) -> bool:
    """Whether jax says that there is no forward mode, because of a custom_vjp."""
    return "custom_vjp" in str(error) or "custom_lin" in str(error)


def _block(size: int, x: jax.ShapeDtypeStruct, target: Target) -> jax.ShapeDtypeStruct:
    """V[k,size], its width symbolic."""
    (k,) = jax.export.symbolic_shape("k", scope=target.scope)
    return jax.ShapeDtypeStruct((k, size), x.dtype)


def _drawn(name: str) -> list[jax.ShapeDtypeStruct]:
    """The random key that programs take which draw."""
    return [jax.ShapeDtypeStruct((2,), np.uint32)] if name.startswith("sampled_") else []


def _restricted(
    product: Callable[[_Function], _Function], take: _Function, drawn: int
) -> Callable[[_Function], _Function]:
    """(x, V, *drawn, *args) from a product of a block, (y, V, *drawn, x, *args)."""

    def batched(batch: _Function) -> _Function:
        multiply = product(batch)
        return lambda x, V, *args: multiply(take(x), V, *args[:drawn], x, *args[drawn:])

    return batched


def _hessians(subject: _Subject, mode: str, target: Target) -> _Programs:
    """Exports the value, the gradient and the Hessian's products, by reverse over reverse where jax forbids the jvp of `mode`."""
    x, args = subject.specs[0], subject.specs[1:]
    block = _block(subject.layout.size(), x, target)

    def fun(x: jax.Array, *args: jax.Array) -> Any:
        return subject.objective(*subject.layout.whole(x, *args))

    def value_and_grad(x: jax.Array, *args: jax.Array) -> Any:
        return jax.value_and_grad(fun)(x, *args)

    programs = {"value_and_grad": _export(value_and_grad, target, x, *args)}
    try:
        programs["hvp"] = _export_batched(subject.hvp(subject.layout.whole, mode), target, x, block, *args)
        if mode != "linearized" and x.size * x.dtype.itemsize <= PAIRS_BYTES:
            programs["hvp_pairs"] = _export_batched(pairs_of(fun, mode), target, block, block, *args)
        symbolic = any(not isinstance(size, int) for spec in args for size in spec.shape)
        if symbolic or mode not in ("forward_over_reverse", "linearized", "auto"):
            return _Programs(programs, mode)
        prepare, apply_of, residuals = linearized(fun, [x, *args])
    except (TypeError, NotImplementedError) as error:
        if not _forbidden(error) or mode == "reverse_over_reverse":
            raise
        warnings.warn(
            f"jax forbids mode {mode!r} for this function, which has a custom_vjp inside: it is registered with mode "
            "'reverse_over_reverse'",
            stacklevel=5,
        )
        return _hessians(subject, "reverse_over_reverse", target)
    residual_specs = [jax.ShapeDtypeStruct(tuple(residual.spec.shape), residual.spec.dtype) for residual in residuals]
    programs["prepare"] = _export(prepare, target, x, *args)
    programs["apply"] = _export_batched(apply_of, target, block, *residual_specs)
    return _Programs(programs, mode, residuals)


def _export_batched(function_of: Callable[[_Function], _Function], target: Target, *specs: Any) -> jax.export.Exported:
    """Exports with a symbolic block width: vectorized, or one vector after the other where an operation cannot be."""
    try:
        return _export(function_of(jax.vmap), target, *specs)
    except Exception:  # noqa: BLE001 - whatever the batching rule or the shape analysis raised: the loop needs neither
        return _export(function_of(lambda f: lambda V: jax.lax.map(f, V)), target, *specs)


def _export(fun: _Function, target: Target, *specs: Any) -> jax.export.Exported:
    """Exports without source locations: the same function gives the same bytes from any checkout, and no path travels."""
    exported = jax.export.export(jax.jit(fun, keep_unused=True), platforms=target.platforms)(*specs)
    with jax.interpreters.mlir.make_ir_context() as context:
        module = jax.extend.mlir.deserialize_portable_artifact(exported.mlir_module_serialized)
        parsed = ir.Module.parse(module, context) if isinstance(module, str | bytes) else module
        passmanager.PassManager.parse("builtin.module(strip-debuginfo)").run(parsed.operation)
        artifact = jax.extend.mlir.serialize_portable_artifact(parsed, target.stablehlo_version)
    return dataclasses.replace(exported, mlir_module_serialized=artifact)


def _artifact_version(newest: str) -> str:
    """The StableHLO version to write: what servers up to four weeks older read, as jax.export chooses; or older, for this one."""
    weeks: str = stablehlo.get_version_from_compatibility_requirement(
        stablehlo.StablehloCompatibilityRequirement.WEEK_4
    )
    return min(weeks, newest or weeks, key=lambda version: [int(part) for part in version.split(".")])


def tree_spec(tree: Any) -> Spec:
    """The structure of a pytree, with the names of its children."""
    children, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    if tree is None:
        return Spec(kind=Spec.KIND_NONE)
    if len(children) == 1 and children[0][1] is tree:
        return Spec(kind=Spec.KIND_LEAF)
    kind = _kind(tree, [path[-1] for path, _ in children])
    named = kind not in (Spec.KIND_LIST, Spec.KIND_TUPLE)
    return Spec(
        kind=kind,
        children=[tree_spec(child) for _, child in children],
        keys=[_key(path[-1]) for path, _ in children] if named else (),
        type_name=type(tree).__name__ if kind in (Spec.KIND_NAMED_TUPLE, Spec.KIND_CUSTOM) else "",
    )


def _kind(tree: Any, keys: Sequence[Any]) -> Spec.Kind.ValueType:
    if type(tree) is list:
        return Spec.KIND_LIST
    if type(tree) is tuple:
        return Spec.KIND_TUPLE
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return Spec.KIND_NAMED_TUPLE
    plain = type(tree) is dict and all(type(getattr(key, "key", None)) in (str, int) for key in keys)
    return Spec.KIND_DICT if plain else Spec.KIND_CUSTOM


def _key(key: Any) -> Spec.Key:
    name = next((getattr(key, field) for field in ("key", "name", "idx") if hasattr(key, field)), str(key))
    if type(name) is int:
        return Spec.Key(number=name)
    return Spec.Key(text=name if isinstance(name, str) else repr(name))


def flatten(tree: Any) -> tuple[Spec, list[Any]]:
    """Structure and leaves of any pytree that jax knows."""
    return tree_spec(tree), jax.tree.leaves(tree)
