"""From a Python function to a bundle: trace, differentiate, lower to StableHLO. With `_derivatives` and `_lift` the
only part of the client that imports jax.

Differentiation happens here because jax can do it only before export: an `Exported` has no jvp and no batching rule
(jax issue 28327). The programs take and return flat arrays, so a server needs none of the user's classes.
"""

import contextlib
import dataclasses
import itertools
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

from hvpd import _codec
from hvpd._composite import Composite
from hvpd._derivatives import Stages, array_spec, curvatures_of, hvp_of, linearized
from hvpd._errors import InvalidArgumentError
from hvpd._lift import lift
from hvpd._pytree import Spec
from hvpd.v1 import objective_pb2, tensor_pb2

FORMAT = 1
"""Bundle.format that this file writes."""

LIFT_BYTES = 16 << 10
"""Closed-over arrays larger than this become tensors; smaller ones stay constants of the program."""

PRECISIONS = ("highest", "high", "default")

MODES = (
    "forward_over_reverse",
    "reverse_over_forward",
    "reverse_over_reverse",
    "linearized",
    "finite_difference",
    "auto",
)

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


def export(
    fun: _Function,
    x: Any,
    data: Sequence[Any],
    *,
    platforms: Sequence[str],
    precision: str,
    mode: str = "forward_over_reverse",
    any_rows: bool = False,
    stablehlo_version: str = "",
    lift_bytes: int = LIFT_BYTES,
) -> Export:
    """Differentiates `fun(x, *data)` and exports value_and_grad, hvp, prepare and apply.

    Args:
        fun: Returns a floating scalar.
        x: Any pytree of floating arrays.
        data: One pytree of arrays for each trailing argument.
        platforms: Of "cpu", "cuda", "rocm", "tpu".
        mode: Of `MODES`: how products are made.
        precision: Of `PRECISIONS`, for matrix products in `fun` that do not say their own.
        any_rows: Whether the first axis of data is symbolic, in all leaves that have as many rows as the first leaf.
        stablehlo_version: Newest that the server reads; empty: what servers up to four weeks older read.
        lift_bytes: Largest closed-over array that stays a constant of the program.

    Raises:
        InvalidArgumentError: `fun`, `x` or `data` cannot be registered; the message says why.
    """
    _check_options(platforms, precision, mode)
    if any_rows and mode in ("linearized", "auto"):
        raise InvalidArgumentError(
            f"mode {mode!r} keeps residuals, whose size must be known: it does not go with any_rows"
        )
    x_leaves, x_treedef = jax.tree.flatten(x)
    x_arrays = [_floating(leaf, path) for leaf, path in zip(x_leaves, _paths(x), strict=True)]
    n = sum(array.size for array in x_arrays)
    if n == 0:
        raise InvalidArgumentError("x has no elements: there is nothing to differentiate by")
    flat_dtype = np.result_type(np.float32, *(np.float64 for array in x_arrays if array.dtype == np.float64))
    x64 = bool(jax.dtypes.canonicalize_dtype(np.float64) == np.float64) or flat_dtype == np.float64
    data_leaves, data_treedef = jax.tree.flatten(tuple(data))
    data_arrays = [
        data_array(leaf, f"data{path}", x_dtype=flat_dtype, x64=x64)
        for leaf, path in zip(data_leaves, _paths(tuple(data)), strict=True)
    ]

    def tree_of(x: jax.Array) -> Any:
        ends = list(itertools.accumulate(array.size for array in x_arrays))
        parts = [
            x[end - array.size : end].reshape(array.shape).astype(array.dtype)
            for array, end in zip(x_arrays, ends, strict=True)
        ]
        return jax.tree.unflatten(x_treedef, parts)

    def arguments_of(leaves: Sequence[jax.Array]) -> Any:
        return jax.tree.unflatten(data_treedef, leaves)

    x_spec = jax.ShapeDtypeStruct((n,), flat_dtype)
    with jax.enable_x64(x64), jax.default_matmul_precision(precision):
        target = Target(tuple(platforms), _artifact_version(stablehlo_version), jax.export.SymbolicScope())
        row_leaves = _row_leaves(data_arrays) if any_rows else []
        (m,) = jax.export.symbolic_shape("m", scope=target.scope)
        data_specs = [
            jax.ShapeDtypeStruct((m, *array.shape[1:]) if index in row_leaves else array.shape, array.dtype)
            for index, array in enumerate(data_arrays)
        ]
        if isinstance(fun, Composite):
            captured, stages = _stages(fun, tree_of, arguments_of, [x_spec, *data_specs], lift_bytes)

            def objective(x: jax.Array, *args: jax.Array) -> Any:
                return stages.loss(stages.model(x, *args), *args)

            curvatures = curvatures_of(stages, fun)
        else:
            captured, objective = _trace(
                lambda x, *leaves: fun(tree_of(x), *arguments_of(leaves)), fun, [x_spec, *data_specs], lift_bytes
            )
            curvatures = {}
        specs = [x_spec, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in captured), *data_specs]
        with _traced(fun):
            programs, residuals, mode = _programs(objective, specs, mode, target)
            for name, product in curvatures.items():
                drawn = [jax.ShapeDtypeStruct((2,), np.uint32)] if name == "sampled_fisher" else []
                block = _block(x_spec, target)
                programs[name] = _export_batched(product, target, x_spec, block, *drawn, *specs[1:])

    blobs: dict[str, _codec.Buffer] = {}

    def blob(content: _codec.Buffer) -> str:
        digest = _codec.digest(content)
        blobs[digest] = content
        return digest

    def tensor(array: _codec.Array) -> tensor_pb2.Tensor:
        return tensor_pb2.Tensor(dtype=array.dtype.name, shape=array.shape, digest=blob(_codec.payload(array)))

    serialized = {name: bytes(exported.serialize()) for name, exported in programs.items()}
    bundle = objective_pb2.Bundle(
        format=FORMAT,
        n=n,
        dtype=flat_dtype.name,
        x_tree=tree_spec(x),
        x_leaves=[array_spec(array) for array in x_arrays],
        data_tree=tree_spec(tuple(data)),
        data=[tensor(array) for array in data_arrays],
        captured=[tensor(array) for array in captured],
        mode=mode,
        row_leaves=row_leaves,
        residuals=residuals,
        platforms=list(platforms),
        precision=precision,
        x64=x64,
        jax_version=jax.__version__,
        calling_convention_version=programs["hvp"].calling_convention_version,
        programs={
            name: objective_pb2.Program(digest=blob(content), size_bytes=len(content))
            for name, content in serialized.items()
        },
    )
    digest = blob(bundle.SerializeToString(deterministic=True))
    return Export(bundle, blobs, digest, x_treedef)


def _check_options(platforms: Sequence[str], precision: str, mode: str) -> None:
    if precision not in PRECISIONS:
        raise InvalidArgumentError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if mode not in MODES:
        raise InvalidArgumentError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    unknown = sorted(set(platforms) - {"cpu", "cuda", "rocm", "tpu"})
    if unknown or not platforms:
        raise InvalidArgumentError(f"platforms must be of cpu, cuda, rocm and tpu, got {list(platforms)!r}")


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
        exported.mlir_module()
    except Exception as error:
        raise InvalidArgumentError(
            f"these are not the bytes of a jax.export.Exported that jax {jax.__version__} here can read (calling conventions "
            f"{oldest} to {newest}): {type(error).__name__}: {error}"
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
    flat: _Function, fun: _Function, specs: Sequence[Any], lift_bytes: int
) -> tuple[list[_codec.Array], _Function]:
    """The large arrays that a scalar function closes over, and the function as fun(x, *arrays, *data)."""
    with _traced(fun):
        closed, out = jax.make_jaxpr(flat, return_shape=True)(*specs)
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
    lift_bytes: int,
) -> tuple[list[_codec.Array], Stages]:
    """The large arrays that both stages close over, and the stages, traced apart."""
    takes = len(jax.eval_shape(lambda *leaves: arguments_of(leaves), *specs[1:]))
    if composite.inputs > takes:
        raise InvalidArgumentError(
            f"the model takes {composite.inputs} data arguments (inputs={composite.inputs}), {takes} were given"
        )
    with _traced(composite.model):
        closed, z = jax.make_jaxpr(
            lambda x, *leaves: composite.model(tree_of(x), *arguments_of(leaves)[: composite.inputs]), return_shape=True
        )(*specs)
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
            [*leaves, *specs[1:]],
            lift_bytes,
        )
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"the loss cannot take what the model returns, {shapes}: {error}") from error
    first, both = len(models), len(models) + len(losses)

    def model(x: jax.Array, *args: jax.Array) -> Any:
        return jax.tree.unflatten(treedef, lifted(args[:first], [x, *args[both:]]))

    def loss_of(z: Any, *args: jax.Array) -> Any:
        return loss(z, *args[first:])

    return [*models, *losses], Stages(model, loss_of, both + len(specs) - 1, rows)


def _row_leaves(arrays: Sequence[_codec.Array]) -> list[int]:
    """Which leaves of data have a first axis of rows: those that are as long as the first one."""
    if not arrays or arrays[0].ndim == 0:
        raise InvalidArgumentError("any_rows needs data whose first leaf has rows")
    rows = len(arrays[0])
    return [index for index, array in enumerate(arrays) if array.ndim > 0 and len(array) == rows]


def _block(x_spec: jax.ShapeDtypeStruct, target: Target) -> jax.ShapeDtypeStruct:
    """V[k,n], its width symbolic."""
    (k,) = jax.export.symbolic_shape("k", scope=target.scope)
    return jax.ShapeDtypeStruct((k, *x_spec.shape), x_spec.dtype)


def _programs(
    fun: _Function, specs: Sequence[jax.ShapeDtypeStruct], mode: str, target: Target
) -> tuple[dict[str, jax.export.Exported], list[objective_pb2.Residual], str]:
    """Exports the derivative programs of fun(x, *args); `specs` are those of x and args.

    Returns:
        The programs, the residuals of `apply`, and the mode: reverse over reverse where jax forbids the jvp that was asked for.
    """
    block = _block(specs[0], target)

    def value_and_grad(x: jax.Array, *args: jax.Array) -> Any:
        return jax.value_and_grad(fun)(x, *args)

    programs = {"value_and_grad": _export(value_and_grad, target, *specs)}
    try:
        hvp = hvp_of(fun, mode)
        programs["hvp"] = _export_batched(hvp, target, specs[0], block, *specs[1:])
        symbolic = any(not isinstance(size, int) for spec in specs for size in spec.shape)
        if symbolic or mode not in ("forward_over_reverse", "linearized", "auto"):
            return programs, [], mode
        prepare, apply_of, residuals = linearized(fun, specs)
    except TypeError as error:
        if "custom_vjp" not in str(error) or mode == "reverse_over_reverse":
            raise
        warnings.warn(
            f"jax forbids mode {mode!r} for this function, which has a custom_vjp inside: it is registered with mode "
            "'reverse_over_reverse'",
            stacklevel=4,
        )
        return _programs(fun, specs, "reverse_over_reverse", target)
    residual_specs = [jax.ShapeDtypeStruct(tuple(residual.spec.shape), residual.spec.dtype) for residual in residuals]
    programs["prepare"] = _export(prepare, target, *specs)
    programs["apply"] = _export_batched(apply_of, target, block, *residual_specs)
    return programs, residuals, mode


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
