"""Compile a derived program for its devices: in a session of the vetting process, or in
the server.
"""

import contextlib
import io
import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax
import numpy as np
from jax._src import compiler
from jax.experimental import serialize_executable

from hvpd_server.derivation.programs import ITERATIONS, Sized
from hvpd_server.derivation.spread import ROWS, Spread

_log = logging.getLogger(__name__)

Compiled = Callable[..., Any]

_DETERMINISTIC: Final[Mapping[str, str | bool]] = {
    "xla_gpu_deterministic_ops": True,
    "xla_gpu_exclude_nondeterministic_ops": True,
}
"""XLA options that make a GPU add in the same order every time; XLA refuses a program
for which this is impossible. https://openxla.org/xla/determinism
"""


class Target:
    """The devices that a program is compiled for: one, or several that work as one."""

    def __init__(self, parts: Sequence[jax.Device]) -> None:
        self.parts = parts
        self.platform = {"gpu": "cuda"}.get(parts[0].platform, parts[0].platform)
        self.mesh = mesh = jax.sharding.Mesh(np.array(parts), (ROWS,))
        """The devices along one axis."""
        alone = jax.sharding.SingleDeviceSharding(parts[0])
        self.whole = alone if len(parts) == 1 else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        """Sharding of an array that is on each part."""
        self.split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(ROWS))
        """Sharding of an array whose rows are spread over the parts."""

    def splits(self, shape: Sequence[Any]) -> bool:
        """Return whether data of this shape is split by rows."""
        rows = shape[0] if shape else 0
        return len(self.parts) > 1 and rows >= len(self.parts) and rows % len(self.parts) == 0

    def axis(self, shape: Sequence[int]) -> int | None:
        """Return the axis along which a leaf of x is split; None if it is not."""
        divided = [axis for axis, size in enumerate(shape) if size and size % len(self.parts) == 0]
        return max(divided, key=lambda axis: shape[axis]) if len(self.parts) > 1 and divided else None

    def by_leaf(self, shape: Sequence[int], front: int = 0) -> jax.sharding.Sharding:
        """Return the sharding of a leaf of x, or of vectors in its shape: split along
        the longest axis that can be divided; whole if there is none.

        Args:
            shape: Shape of the leaf.
            front: Axes before those of the leaf.
        """
        axis = self.axis(shape)
        if axis is None:
            return self.whole
        return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(*[None] * (front + axis), ROWS))

    def spec(self, shape: Sequence[int], dtype: Any, *, data: bool) -> jax.ShapeDtypeStruct:
        """Return the spec of an argument, with its sharding."""
        sharding = self.split if data and self.splits(shape) else self.whole
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def compile(
        self, function: Callable[..., Any], specs: Sequence[Any], *, results: Any = None, deterministic: bool = False
    ) -> jax.stages.Compiled:
        """Compile a function for arguments of such specs.

        Args:
            function: The function.
            specs: Specs of the arguments, with their shardings.
            results: Shardings of the results; None: they are whole on each part.
            deterministic: Whether the program must give the same bits each time.
        """
        options = dict(_DETERMINISTIC) if deterministic and self.platform == "cuda" else None
        jitted = jax.jit(function, keep_unused=True, out_shardings=self.whole if results is None else results)
        return jitted.lower(*specs).compile(compiler_options=options)


def compile_program(
    sized: Sized, name: str, width: int, target: Target, data: int, *, deterministic: bool
) -> jax.stages.Compiled:
    """Compile a program of an objective for a block width.

    Args:
        sized: The programs of the objective.
        name: One of `Derivation.programs`, or a variant of it; see `derivation.names`.
        width: Vectors in the block; 0 if the program takes none.
        target: Where the program runs.
        data: Number of last arguments that are captured arrays and data, which may be
            split by rows.
        deterministic: Whether the program must give the same bits each time.
    """
    split = sized.by_leaf and len(target.parts) > 1
    iterates = split and name.startswith(ITERATIONS)
    with sized.tracing(name), jax.set_mesh(target.mesh) if iterates else contextlib.nullcontext():
        spread = Spread([leaf.shape for leaf in sized.traced.layout.leaves], target) if iterates else None
        program = sized.program(name, width, spread)
        first = len(program.specs) - (data if name != "apply" else 0)  # The residuals of `apply` are whole.
        specs: list[Any] = [
            target.spec(spec.shape, spec.dtype, data=position >= first) if spec.sharding is None else spec
            for position, spec in enumerate(program.specs)
        ]
        ways, results = program.ways, None
        if iterates:
            specs[:1], _ = _by_leaf(sized, 0, target)
            results = jax.tree.map(
                lambda found: found or target.whole, program.results, is_leaf=lambda found: not found
            )
        elif split:
            specs[:first], results = _by_leaf(sized, width, target)
        if split:
            ways = [_with_whole_data(way, first, target) for way in ways]
        for way in ways[:-1]:
            try:
                return target.compile(way, specs, results=results, deterministic=deterministic)
            except (TypeError, ValueError, NotImplementedError) as error:
                _log.info("%s cannot be vectorized, so its vectors are multiplied one by one: %s", name, error)
        return target.compile(ways[-1], specs, results=results, deterministic=deterministic)


def _by_leaf(sized: Sized, width: int, target: Target) -> tuple[list[Any], Any]:
    """Return the specs of x by leaf and of vectors by leaf, if there are some; and the
    shardings of the results.
    """
    leaves, dtype = sized.traced.layout.leaves, sized.traced.x.dtype
    x = [jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=target.by_leaf(leaf.shape)) for leaf in leaves]
    if not width:
        return [x], (target.whole, [leaf.sharding for leaf in x])
    V = [
        jax.ShapeDtypeStruct((width, *leaf.shape), dtype, sharding=target.by_leaf(leaf.shape, front=1))
        for leaf in leaves
    ]
    return [x, V], [leaf.sharding for leaf in V]


def _with_whole_data(way: Callable[..., Any], first: int, target: Target) -> Callable[..., Any]:
    """Return a program that gathers its data first. Otherwise XLA gathers the vectors,
    which are larger.
    """

    def gathered(*args: Any) -> Any:
        data = [jax.lax.with_sharding_constraint(array, target.whole) for array in args[first:]]
        return way(*args[:first], *data)

    return gathered


def dump(compiled: jax.stages.Compiled) -> bytes:
    """Return an executable as bytes for `load`, on the same kind of device and of the
    same jax.

    Raises:
        Exception: The backend cannot serialize executables.
    """
    return pickle.dumps(serialize_executable.serialize(compiled))


def load(blob: bytes, parts: Sequence[jax.Device]) -> jax.stages.Compiled:
    """Return the executable of bytes that `dump` returned, without tracing or lowering.

    Executables are machine code: bytes from an untrusted place can do anything, with or
    without pickle.
    """
    payload, in_tree, out_tree = pickle.loads(blob)  # noqa: S301 - see above
    found: jax.stages.Compiled = serialize_executable.deserialize_and_load(
        payload, in_tree, out_tree, execution_devices=list(parts)
    )
    return found


def load_on_all(blob: bytes, parts: Sequence[jax.Device]) -> jax.stages.Compiled:
    """Return the executable of bytes that `dump` returned, on the devices of several
    processes. Each process loads it.

    The process that compiled it had as many devices, all of its own. So the number of a
    device there is its position among the parts.
    """
    payload, in_tree, out_tree = pickle.loads(blob)  # noqa: S301 - see `load`
    unloaded, args_info, no_kwargs = _Unpickler(payload, parts).load()
    return jax.stages.Compiled(unloaded.load(), [], in_tree.unflatten(args_info), out_tree, no_kwargs=no_kwargs)


class _Unpickler(serialize_executable._JaxPjrtUnpickler):  # noqa: SLF001 - jax puts executables on the devices that they were compiled for
    def __init__(self, payload: bytes, parts: Sequence[jax.Device]) -> None:
        super().__init__(io.BytesIO(payload), parts[0].client, parts)  # type: ignore[no-untyped-call]
        self._parts = parts

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "device":
            return self._parts[pid[1]]
        if pid[0] != "exec":
            return super().persistent_load(pid)  # type: ignore[no-untyped-call]
        options = compiler.get_compile_options(
            num_replicas=1,
            num_partitions=len(self._parts),
            device_assignment=np.array([[part.id for part in self._parts]]),
            backend=self.backend,
        )
        return self.backend.deserialize_executable(pid[1], self.execution_devices, options)
