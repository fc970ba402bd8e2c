"""From a Python function to a bundle: trace, differentiate, lower to StableHLO. The only file of the client that imports jax.

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
import jax.extend.core as jex
import jax.interpreters.mlir
import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import stablehlo

from hvpd import _codec
from hvpd._errors import InvalidArgumentError
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
    """jax's treedef of x, to rebuild the user's own containers."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What programs are written for."""

    platforms: tuple[str, ...]
    stablehlo_version: str


def export(
    fun: _Function,
    x: Any,
    data: Sequence[Any],
    *,
    platforms: Sequence[str],
    precision: str,
    mode: str = "forward_over_reverse",
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
        stablehlo_version: Newest that the server reads; empty: what servers up to four weeks older read.
        lift_bytes: Largest closed-over array that stays a constant of the program.

    Raises:
        InvalidArgumentError: `fun`, `x` or `data` cannot be registered; the message says why.
    """
    if precision not in PRECISIONS:
        raise InvalidArgumentError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if mode not in MODES:
        raise InvalidArgumentError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    unknown = sorted(set(platforms) - {"cpu", "cuda", "rocm", "tpu"})
    if unknown or not platforms:
        raise InvalidArgumentError(f"platforms must be of cpu, cuda, rocm and tpu, got {list(platforms)!r}")
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

    def flat_fun(x: jax.Array, *leaves: jax.Array) -> Any:
        ends = list(itertools.accumulate(array.size for array in x_arrays))
        parts = [
            x[end - array.size : end].reshape(array.shape).astype(array.dtype)
            for array, end in zip(x_arrays, ends, strict=True)
        ]
        return fun(jax.tree.unflatten(x_treedef, parts), *jax.tree.unflatten(data_treedef, leaves))

    x_spec = jax.ShapeDtypeStruct((n,), flat_dtype)
    with jax.enable_x64(x64), jax.default_matmul_precision(precision):
        data_specs = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in data_arrays]
        with _traced(fun):
            closed, out = jax.make_jaxpr(flat_fun, return_shape=True)(x_spec, *data_specs)
        _check_scalar(fun, out)
        captured, lifted = _lift(closed, lift_bytes)
        specs = [x_spec, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in captured), *data_specs]
        with _traced(fun):
            target = Target(tuple(platforms), _artifact_version(stablehlo_version))
            programs, residuals, mode = _programs(lifted, specs, mode, target)

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
        x_leaves=[_array_spec(array) for array in x_arrays],
        data_tree=tree_spec(tuple(data)),
        data=[tensor(array) for array in data_arrays],
        captured=[tensor(array) for array in captured],
        mode=mode,
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
    array = np.asarray(leaf)
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


def _array_spec(array: Any) -> tensor_pb2.ArraySpec:
    return tensor_pb2.ArraySpec(dtype=np.dtype(array.dtype).name, shape=array.shape)


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


def _programs(
    fun: _Function, specs: Sequence[jax.ShapeDtypeStruct], mode: str, target: Target
) -> tuple[dict[str, jax.export.Exported], list[objective_pb2.Residual], str]:
    """Exports the derivative programs of fun(x, *args); `specs` are those of x and args.

    Returns:
        The programs, the residuals of `apply`, and the mode: reverse over reverse where jax forbids the jvp that was asked for.
    """
    (k,) = jax.export.symbolic_shape("k")
    block = jax.ShapeDtypeStruct((k, *specs[0].shape), specs[0].dtype)

    def value_and_grad(x: jax.Array, *args: jax.Array) -> Any:
        return jax.value_and_grad(fun)(x, *args)

    programs = {"value_and_grad": _export(value_and_grad, target, *specs)}
    try:
        hvp = _hvp_of(fun, mode)
        programs["hvp"] = _export_batched(hvp, target, specs[0], block, *specs[1:])
        if mode not in ("forward_over_reverse", "linearized", "auto"):
            return programs, [], mode
        prepare, apply_of, residuals = _linearized(fun, specs)
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


def _hvp_of(fun: _Function, mode: str) -> Callable[[_Function], _Function]:
    """hvp(x, V[k,n], *args) -> HV[k,n] in a mode, given how to batch one vector's product."""

    def forward_over_reverse(x: jax.Array, v: jax.Array, *args: jax.Array) -> Any:
        # Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6 (1994).
        return jax.jvp(jax.grad(lambda x: fun(x, *args)), (x,), (v,))[1]

    def reverse_over_forward(x: jax.Array, v: jax.Array, *args: jax.Array) -> Any:
        return jax.grad(lambda x: jax.jvp(lambda x: fun(x, *args), (x,), (v,))[1].astype(x.dtype))(x)

    def reverse_over_reverse(x: jax.Array, v: jax.Array, *args: jax.Array) -> Any:
        return jax.grad(lambda x: jnp.vdot(jax.grad(lambda x: fun(x, *args))(x), v))(x)

    def finite_difference(x: jax.Array, v: jax.Array, *args: jax.Array) -> Any:
        # Central, its step balancing rounding and truncation: Nocedal and Wright, Numerical Optimization (2006), section 8.1.
        # Rounding of x + step v decides how far the points really are apart; v = 0 needs some step, and gets H 0 = 0.
        gradient = jax.grad(lambda x: fun(x, *args))
        size = jnp.linalg.norm(v)
        scale = jnp.where(size > 0, size, 1.0)
        step = float(np.finfo(x.dtype).eps) ** (1 / 3) * (1 + jnp.linalg.norm(x)) / scale
        return (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)

    one = {
        "reverse_over_forward": reverse_over_forward,
        "reverse_over_reverse": reverse_over_reverse,
        "finite_difference": finite_difference,
    }.get(mode, forward_over_reverse)

    def batched(batch: _Function) -> _Function:
        def hvp(x: jax.Array, V: jax.Array, *args: jax.Array) -> Any:
            return batch(lambda v: one(x, v, *args))(V)

        return hvp

    return batched


def _linearized(
    fun: _Function, specs: Sequence[jax.ShapeDtypeStruct]
) -> tuple[_Function, Callable[[_Function], _Function], list[objective_pb2.Residual]]:
    """Splits the product into what depends on x only and what is linear in V, as jax.linearize does.

    Returns:
        prepare(x, *args) -> (value, gradient, *results); apply(V, *residuals), given how to batch; and where apply's
        residuals come from. One that is an argument (a data matrix, often) is taken from there: prepare need not copy it.
    """
    linear: list[Any] = []

    def prepare(x: jax.Array, *args: jax.Array) -> Any:
        def gradient_and_value(x: jax.Array) -> Any:
            value, gradient = jax.value_and_grad(fun)(x, *args)
            return gradient, value

        gradient, apply, value = jax.linearize(gradient_and_value, x, has_aux=True)
        residuals, treedef = jax.tree.flatten(apply)
        linear[:] = [treedef]
        return value, gradient, *residuals

    closed = jax.make_jaxpr(prepare)(*specs)
    inputs = {variable: position for position, variable in enumerate(closed.jaxpr.invars)}
    residuals = closed.jaxpr.outvars[2:]
    sources, kept = [], [0, 1]
    for output, variable in enumerate(residuals, start=2):
        position = None if isinstance(variable, jex.Literal) else inputs.get(variable)
        source = {"result": len(kept) - 2} if position is None else {"argument": position}
        sources.append(objective_pb2.Residual(spec=_array_spec(variable.aval), **source))
        if position is None:
            kept.append(output)

    def prepare_shortened(x: jax.Array, *args: jax.Array) -> Any:
        outputs = jex.jaxpr_as_fun(closed)(x, *args)
        return tuple(outputs[output] for output in kept)

    prepare_shortened.__name__ = prepare_shortened.__qualname__ = "prepare"

    def apply_of(batch: _Function) -> _Function:
        def apply(V: jax.Array, *residuals: jax.Array) -> Any:
            return batch(jax.tree.unflatten(linear[0], residuals))(V)

        return apply

    return prepare_shortened, apply_of, sources


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


def _lift(closed: Any, lift_bytes: int) -> tuple[list[_codec.Array], _Function]:
    """Turns closed-over arrays of more than `lift_bytes` into arguments.

    Returns:
        The arrays, and fun(x, *arrays, *data).
    """
    found = {id(constant): constant for constant in _constants(closed) if getattr(constant, "nbytes", 0) > lift_bytes}
    captured = [np.asarray(constant) for constant in found.values()]

    def lifted(x: jax.Array, *args: jax.Array) -> Any:
        replaced = dict(zip(found, args[: len(found)], strict=True))
        (value,) = _evaluate(closed, [x, *args[len(found) :]], replaced)
        return value

    return captured, lifted


def _calls(closed: Any) -> Iterator[tuple[Any, Any]]:
    """The equations that are calls of a nested jit, with its jaxpr. Loops and branches take what they close over as operands."""
    for equation in closed.jaxpr.eqns:
        if equation.primitive.name in ("jit", "pjit"):
            yield equation, equation.params["jaxpr"]


def _constants(closed: Any) -> Iterator[Any]:
    yield from closed.consts
    for _, inner in _calls(closed):
        yield from _constants(inner)


def _evaluate(closed: Any, args: Sequence[Any], replaced: Mapping[int, Any]) -> list[Any]:
    """Evaluates a jaxpr with some constants replaced; nested jits that hold one of them are inlined, all else stays."""
    inlined = {
        id(equation): inner
        for equation, inner in _calls(closed)
        if any(id(constant) in replaced for constant in _constants(inner))
    }
    constants = [replaced.get(id(constant), constant) for constant in closed.consts]
    values = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*constants, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in closed.jaxpr.eqns:
        inner = inlined.get(id(equation))
        if inner is not None:
            outputs = _evaluate(inner, [read(atom) for atom in equation.invars], replaced)
            values.update(zip(equation.outvars, outputs, strict=True))
        else:
            variables = list(dict.fromkeys(atom for atom in equation.invars if not isinstance(atom, jex.Literal)))
            kept = [variable for variable in equation.outvars if not isinstance(variable, jex.DropVar)]
            names = jex.DebugInfo("eval", "equation", ("",) * len(variables), ("",) * len(kept))
            single = jex.Jaxpr((), variables, kept, [equation], equation.effects, names)
            values.update(zip(kept, jex.jaxpr_as_fun(jex.ClosedJaxpr(single, ()))(*map(read, variables)), strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


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


def unflatten(treedef: Any, leaves: Sequence[Any]) -> Any:
    """The tree of a treedef, with the user's own containers."""
    return jax.tree.unflatten(treedef, leaves)
