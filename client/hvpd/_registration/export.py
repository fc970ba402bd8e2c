"""From a Python function to a bundle: trace, mark what StableHLO would lose, lower. Needs jax.

The server differentiates. The programs take and return flat arrays, so a server needs none of the user's classes.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.export
import jax.extend
import jax.interpreters.mlir
import jax.numpy as jnp
import numpy as np
from jaxlib.mlir.dialects import stablehlo

from hvpd import _codec, _pytree
from hvpd._composite import REDUCTIONS, Composite
from hvpd._errors import InvalidArgumentError
from hvpd._pytree import Spec
from hvpd._registration import marks
from hvpd._registration.bundle import Arrays, Export, assemble, flat_dtype_of
from hvpd._registration.hijax import is_high, kept_rules
from hvpd._registration.lift import forgetting, lift, trace
from hvpd._registration.portable import oldest_reader, portable_of
from hvpd.v1 import objective_pb2

LIFT_BYTES = 16 << 10
"""Closed-over arrays larger than this become tensors; smaller ones stay constants of the program."""

PRECISIONS = ("highest", "high", "default")

EXPORTED = "exported"
"""Precision of a function that came exported: its matrix products keep the precision that they have."""

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


@forgetting()
@kept_rules()
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
    """Trace `fun(x, *data)` and lower it to StableHLO, marked where jax has derivative rules that StableHLO would lose.

    Args:
        fun: Returns a floating scalar.
        x: Any pytree of floating arrays.
        data: One pytree of arrays for each trailing argument.
        platforms: Of "cpu", "cuda", "rocm", "tpu": whose branches the program keeps, if `fun` has some (`jax.lax.platform_dependent`).
        mode: Of `MODES`: how products are made unless a product says otherwise.
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
    flat_dtype = flat_dtype_of(x_arrays)
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
    # What states no precision gets the bundle's, on the server.
    with jax.enable_x64(x64), jax.default_matmul_precision(None):
        groups = _groups(x_structure, blocks)
        row_leaves = _row_leaves(data_arrays) if any_rows else []
        (m,) = jax.export.symbolic_shape("m")
        leaf_specs = [
            *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in x_arrays),
            *(
                jax.ShapeDtypeStruct((m, *array.shape[1:]) if index in row_leaves else array.shape, array.dtype)
                for index, array in enumerate(data_arrays)
            ),
        ]
        subject = _Subject(tree_of, arguments_of, leaf_specs, len(x_arrays), lift_bytes, widened=x64 and not own)
        captured, stages = subject.composite(fun) if isinstance(fun, Composite) else subject.single(fun)
        branches = tuple(platforms) if precision == EXPORTED or any(map(_has_branches, stages.values())) else ()
        version = oldest_reader(stablehlo_version)
        with _traced(fun):
            # Without branches the program is the same on every platform, since marks stand for what jax lowers differently.
            # A function that came exported has the platforms that it was exported for.
            artifacts = {name: _lower(stage, branches or ("cpu",), version) for name, stage in stages.items()}

    return assemble(
        Arrays(x_structure, x_arrays, tree_spec(tuple(data)), data_arrays, captured),
        artifacts,
        objective_pb2.Bundle(
            mode=mode,
            row_leaves=row_leaves,
            row_reduction=row_reduction or "",
            fixed_bucket=fixed_bucket or 0,
            sharded=sharded,
            blocks=[objective_pb2.Block(leaves=positions) for positions in groups],
            composite=_composite_message(fun),
            platforms=branches,
            precision=precision,
            x64=x64,
            jax_version=jax.__version__,
            stablehlo_version=version,
        ),
        lambda leaves: jax.tree.unflatten(x_treedef, leaves),
    )


def _composite_message(fun: _Function) -> objective_pb2.Composite | None:
    if not isinstance(fun, Composite):
        return None
    return objective_pb2.Composite(distribution=fun.distribution or "", reduction=fun.reduction, samples=fun.samples)


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
    """An exported objective, as a function to register."""

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


def _check_pure(fun: _Function, closed: Any) -> None:
    if closed.effects:
        name = getattr(fun, "__name__", repr(fun))
        raise InvalidArgumentError(
            f"{name} has side effects ({', '.join(sorted(map(str, closed.effects)))}): printing and callbacks cannot be served"
        )
    if is_high(closed):
        name = getattr(fun, "__name__", repr(fun))
        raise InvalidArgumentError(
            f"{name} uses values or primitives of jax.experimental.hijax whose derivative rules hvpd cannot send to the server: "
            "write this part of the function with arrays and other jax operations"
        )


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A traced function to lower: of the leaves of its first argument, then captured arrays and leaves of data."""

    fun: _Function
    specs: Sequence[Any]
    closed: Any
    """The jaxpr that `fun` evaluates."""


@dataclasses.dataclass(frozen=True)
class _Subject:
    """What a user's function takes, and how to trace it."""

    tree_of: _Function
    """The pytree x of its leaves."""
    arguments_of: _Function
    """The trailing arguments of their leaves."""
    specs: Sequence[Any]
    """Specs of the leaves of x, then of data."""
    count: int
    """Leaves of x."""
    lift_bytes: int
    """Largest closed-over array that stays a constant."""
    _: dataclasses.KW_ONLY
    widened: bool
    """Whether this trace is in 64 bits and everything else that jax traces in 32."""

    def single(self, fun: _Function) -> tuple[list[_codec.Array], dict[str, _Stage]]:
        """Trace an objective of one function; return the large arrays that it closes over, and its program."""

        def flat(*leaves: Any) -> Any:
            return fun(self.tree_of(leaves[: self.count]), *self.arguments_of(leaves[self.count :]))

        captured, lifted, closed = self._scalar(flat, fun, self.specs)
        return captured, {"objective": self._stage(lifted, closed, self.specs, self.count, captured, 0, len(captured))}

    def composite(self, composite: Composite) -> tuple[list[_codec.Array], dict[str, _Stage]]:
        """Trace both stages of a composite, apart; return the large arrays that they close over, and their programs."""
        takes = len(jax.eval_shape(lambda *leaves: self.arguments_of(leaves), *self.specs[self.count :]))
        if composite.inputs > takes:
            raise InvalidArgumentError(
                f"the model takes {composite.inputs} data arguments (inputs={composite.inputs}), {takes} were given"
            )
        with _traced(composite.model):
            closed, z = trace(
                lambda *leaves: composite.model(
                    self.tree_of(leaves[: self.count]), *self.arguments_of(leaves[self.count :])[: composite.inputs]
                ),
                self.specs,
                widened=self.widened,
            )
        _check_pure(composite.model, closed)
        leaves, treedef = jax.tree.flatten(z)
        _check_output(composite, z, leaves)
        models, model = lift(closed, self.lift_bytes)

        def loss_of(*z_and_leaves: Any) -> Any:
            return composite.loss(
                jax.tree.unflatten(treedef, z_and_leaves[: len(leaves)]),
                *self.arguments_of(z_and_leaves[len(leaves) :])[composite.inputs :],
            )

        outputs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        loss_specs = [*outputs, *self.specs[self.count :]]
        try:
            losses, loss, loss_closed = self._scalar(loss_of, composite.loss, loss_specs)
        except InvalidArgumentError as error:
            shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", z)
            raise InvalidArgumentError(f"the loss cannot take what the model returns, {shapes}: {error}") from error
        captured = [*models, *losses]
        return captured, {
            "model": self._stage(model, closed, self.specs, self.count, captured, 0, len(models)),
            "loss": self._stage(loss, loss_closed, loss_specs, len(leaves), captured, len(models), len(captured)),
        }

    def _scalar(self, flat: _Function, fun: _Function, specs: Sequence[Any]) -> tuple[list[_codec.Array], Any, Any]:
        """Trace a function that returns one scalar; return its large arrays, and the function that takes them."""
        with _traced(fun):
            closed, out = trace(flat, specs, widened=self.widened)
        _check_scalar(fun, out)
        _check_pure(fun, closed)
        return *lift(closed, self.lift_bytes), closed

    @staticmethod
    def _stage(
        lifted: Any,
        closed: Any,
        specs: Sequence[Any],
        count: int,
        captured: Sequence[_codec.Array],
        first: int,
        last: int,
    ) -> _Stage:
        """The function of (leaves, *captured, *data), of which it uses captured[first:last]."""
        arrays = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in captured]

        def stage(*args: Any) -> Any:
            own = args[count : count + len(captured)][first:last]
            return lifted(own, [*args[:count], *args[count + len(captured) :]])

        return _Stage(stage, [*specs[:count], *arrays, *specs[count:]], closed)


def _check_output(composite: Composite, z: Any, leaves: Sequence[Any]) -> None:
    shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", z)
    if not leaves or not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        raise InvalidArgumentError(f"the model must return real floating arrays, it returns {shapes}")
    rows = leaves[0].shape[0] if leaves[0] is z and leaves[0].ndim > 0 else None
    least = 2 if composite.distribution == "categorical" else 1
    if composite.distribution is not None and (rows is None or leaves[0].ndim < least):
        raise InvalidArgumentError(
            f"a model of distribution {composite.distribution!r} must return one array [rows, ...], it returns {shapes}"
        )


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


def _has_branches(stage: _Stage) -> bool:
    """Whether a function does different things on different platforms."""
    pending = [stage.closed.jaxpr]
    while pending:
        for equation in pending.pop().eqns:
            if equation.primitive.name == "platform_index":
                return True
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    pending.append(inner)
    return False


def _lower(stage: _Stage, platforms: Sequence[str], version: str) -> bytes:
    """Lower to a portable artifact without source locations: the same function gives the same bytes from any checkout."""
    exported = jax.export.export(
        jax.jit(stage.fun, keep_unused=True),
        platforms=platforms,
        _override_lowering_rules=marks.rules(),
    )(*stage.specs)
    return portable_of(exported, version)


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
