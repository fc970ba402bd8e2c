"""Compiled programs and the device that they run on. Knows no gRPC.

A program of an objective is compiled once for each block width (a bucket: 1, 2, 4, ...). `_executables` has that done in another
process, and keeps what was compiled across restarts.
"""

import concurrent.futures
import contextlib
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jaxlib.mlir.dialects import stablehlo

from hvpd import _codec
from hvpd.v1 import objective_pb2
from hvpd_server._board import LOST
from hvpd_server._errors import Code, ServiceError
from hvpd_server._executables import Build
from hvpd_server.derivation.compiling import Compiled, Target

_log = logging.getLogger(__name__)

DeviceArray = jax.Array

_RETRY_SECONDS = 60.0
"""After which a compile that failed is tried again: each try may take minutes, and a GPU's time."""

_DESCRIPTORS_SECONDS = 0.5
"""After which somebody may have closed a file."""


def devices(cache: Path) -> "list[Device]":
    """The accelerators of this host, each by itself; or the CPU.

    Args:
        cache: Directory of jax's persistent compilation cache.

    Raises:
        ServiceError: jax finds none of those that it was told to use.
    """
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # With caches of XLA's own, its keys have the cache's path in them: a store that is moved, or restored, would begin anew.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # A product is computed in the thread that asks for it: on the CPU one hand-off less.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        found = [Device([device]) for device in jax.local_devices()]
    except (RuntimeError, AssertionError) as error:  # The second of jax 0.10, without a word, where there is no GPU.
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            "NO_DEVICE",
            f"jax finds none of the devices that it may use, JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r} {error}".rstrip(),
        ) from error
    # Executables of another process call LAPACK through pointers that jax looks up when it first lowers such a call.
    jax.jit(jax.lax.linalg.cholesky).trace(jax.ShapeDtypeStruct((1, 1), np.float32)).lower(lowering_platforms=("cpu",))
    return found


class Device:
    """One accelerator, or the CPU, or several that work as one: placing arrays, and facts."""

    def __init__(self, parts: Sequence[jax.Device]) -> None:
        self.parts = parts
        first = parts[0]
        self.target = Target(parts)
        self.platform = self.target.platform
        self.kind = first.device_kind
        self.jax_version = jax.__version__
        self.stablehlo_version: str = stablehlo.get_current_version()
        # Programs that talk between devices must not overtake each other on some of them.
        self._turn = threading.Lock() if len(parts) > 1 else None
        self.overlaps = self._turn is None and self.platform != "cpu"
        """Whether it computes one launch while another's results are copied out."""

    @classmethod
    def together(cls, devices: "Sequence[Device]") -> "Device":
        """All as one: data is split over them by rows, all else is on each."""
        return cls([part for device in devices for part in device.parts])

    def memory_bytes(self) -> int | None:
        """The memory of each part as its driver tells; None for the CPU."""
        return (self.parts[0].memory_stats() or {}).get("bytes_limit")

    def memory_use(self) -> tuple[int, int] | None:
        """Bytes in use and bytes that there are, of the first part, as its driver tells; None where it tells nothing."""
        try:
            found = self.parts[0].memory_stats() or {}
        except jax.errors.JaxRuntimeError:  # A device that has failed is told of by who uses it.
            return None
        in_use, limit = found.get("bytes_in_use"), found.get("bytes_limit")
        return None if in_use is None or limit is None else (in_use, limit)

    def copies(self, shape: Sequence[Any], *, data: bool = False) -> int:
        """How many times an array of this shape is on the parts together."""
        return 1 if data and self.target.splits(shape) else len(self.parts)

    def put(self, array: _codec.Array, *, data: bool = False, owned: bool = False) -> DeviceArray:
        """Copies an array to the device; data by rows, where it is several. One that is owned is nobody else's, and may stay in use."""
        sharding = self.target.split if data and self.target.splits(array.shape) else self.target.whole
        with _device_errors():
            if self.platform == "cpu" and not owned:  # It would be used where it lies.
                array = np.array(array, copy=True)
            placed: DeviceArray = jax.block_until_ready(jax.device_put(array, sharding))
            return placed

    def run(self, compiled: Compiled, args: Sequence[Any]) -> Any:
        """Runs a program. On several devices one at a time, to its end."""
        if self._turn is None:
            return compiled(*args)
        with self._turn:
            return jax.block_until_ready(compiled(*args))


class Programs:
    """The programs of one objective.

    Args:
        described: What the vetting process derived from the bundle.
        device: Where the programs run.
        build: Gives the programs compiled.
        compiler: Where compiles run.
        on_compile: Told the seconds that each compile took, and whether it was "compiled", "cached" or "failed".
    """

    def __init__(
        self,
        described: objective_pb2.Derivation,
        device: Device,
        build: Build,
        compiler: concurrent.futures.Executor,
        on_compile: Callable[[float, str], None] = lambda seconds, outcome: None,
    ) -> None:
        self.described = described
        self._device = device
        self._build = build
        self._compiler = compiler
        self._on_compile = on_compile
        self._lock = threading.Lock()
        # Each number of rows is compiled for itself, and forgotten with the last point that has it.
        self._kernels: weakref.WeakValueDictionary[int, Kernels] = weakref.WeakValueDictionary()

    def for_rows(self, rows: int) -> "Kernels":
        """The programs to be compiled for data of this many rows, where that is symbolic; 0 where nothing is."""
        with self._lock:
            found = self._kernels.get(rows)
            if found is None:
                found = self._kernels[rows] = Kernels(rows, self._device, self._build, self._compiler, self._on_compile)
            return found


class Kernels:
    """The programs of one objective, compiled for data of one size, each for the block widths that were asked for."""

    def __init__(
        self,
        rows: int,
        device: Device,
        build: Build,
        compiler: concurrent.futures.Executor,
        on_compile: Callable[[float, str], None],
    ) -> None:
        self.rows = rows
        self._device = device
        self._build = build
        self._compiler = compiler
        self._on_compile = on_compile
        self._lock = threading.Lock()
        self._compiles: dict[tuple[str, int], _Compile] = {}
        self._ready: dict[tuple[str, int], Compiled] = {}
        self._widths: dict[str, list[int]] = {}

    def request(self, name: str, width: int = 0) -> "concurrent.futures.Future[Compiled]":
        """Has a program compiled for a block width, unless it is already, or under way, or failed a short while ago."""
        with self._lock:
            found = self._compiles.get((name, width))
            if found is None or found.may_be_repeated(time.perf_counter()):
                found = self._compiles[name, width] = _Compile()
                found.future = self._compiler.submit(self._run, found, name, width)
            elif found.future.done() and (error := found.future.exception()) is not None:
                # It is raised by everybody who asks, and would keep the frames of all of them, with their vectors.
                error.__traceback__ = None
            return found.future

    def ready(self, name: str, width: int = 0) -> bool:
        """Whether a program is compiled for a block width."""
        return (name, width) in self._ready

    def widths(self, name: str) -> list[int]:
        """The block widths that a program is compiled for, ascending."""
        return self._widths.get(name, [])

    def compiles(self) -> list[objective_pb2.Compile]:
        """What became of everything that was asked for, in that order."""
        with self._lock:
            return [compile_.message(name, width) for (name, width), compile_ in self._compiles.items()]

    def call(self, name: str, width: int, *args: Any) -> Any:
        """Runs a program, waiting for its compile where it is not ready; results are on the device, perhaps not computed yet."""
        compiled = self._ready.get((name, width)) or self.request(name, width).result()
        try:
            return self._device.run(compiled, args)
        except jax.errors.JaxRuntimeError as error:
            _tell(error)
        except (
            ValueError
        ) as error:  # XLA opens a file in a thread that computes for the first time (std::random_device).
            if "random_device" not in str(error):
                raise
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                "DESCRIPTORS",
                f"the server has no file descriptor free ({error}): try again, or raise its limit (ulimit -n)",
                retry_after=_DESCRIPTORS_SECONDS,
            ) from error

    def _run(self, compile_: "_Compile", name: str, width: int) -> Compiled:
        started = compile_.started = time.perf_counter()
        outcome = "failed"
        try:
            compiled, outcome = self._compile(name, width)
        finally:
            compile_.seconds = time.perf_counter() - started
            self._on_compile(compile_.seconds, outcome)
        with self._lock:
            self._ready[name, width] = compiled
            self._widths[name] = sorted(width for program, width in self._ready if program == name)
        how = "found in the cache: " if outcome == "cached" else "compiled "
        _log.info("%s%s, width %d, in %.2f s", how, name, width, compile_.seconds)
        return compiled

    def _compile(self, name: str, width: int) -> tuple[Compiled, str]:
        with _device_errors():
            return self._build(self.rows, name, width)


class _Compile:
    """One compile, from the moment that somebody asked for it."""

    future: "concurrent.futures.Future[Compiled]"
    started: float | None = None
    seconds: float | None = None

    def may_be_repeated(self, now: float) -> bool:
        """Whether it failed, and can go better now: memory may be free, a lost part may be back, all else takes some time."""
        if not self.future.done() or (error := self.future.exception()) is None:
            return False
        if isinstance(error, ServiceError) and error.code in (Code.RESOURCE_EXHAUSTED, Code.DATA_LOSS):
            return True
        return now - (self.started or 0.0) - (self.seconds or 0.0) > _RETRY_SECONDS

    def message(self, name: str, width: int) -> objective_pb2.Compile:
        """For who asks how far it is."""
        found = objective_pb2.Compile(program=name, width=width, state=objective_pb2.Compile.STATE_QUEUED)
        if self.started is not None:
            found.state = objective_pb2.Compile.STATE_COMPILING
            found.seconds = time.perf_counter() - self.started if self.seconds is None else self.seconds
        if self.future.done():
            error = None if self.future.cancelled() else self.future.exception()
            failed = self.future.cancelled() or error is not None
            found.state = objective_pb2.Compile.STATE_FAILED if failed else objective_pb2.Compile.STATE_READY
            found.error = str(error or "")
        return found


def add(total: Any, weights: Sequence[float], part: Any) -> Any:
    """The total plus the weighted part, in float64, for each of the arrays of a result; weights are repeated over them."""
    parts = jax.tree.leaves(part)
    with _device_errors():
        weighted = [
            weight * leaf.astype(np.float64) for weight, leaf in zip(itertools.cycle(weights), parts, strict=False)
        ]
        return weighted if total is None else [before + more for before, more in zip(total, weighted, strict=True)]


def rounded(total: Any, like: Any) -> Any:
    """Such a total as a result like another, in its dtypes."""
    leaves, treedef = jax.tree.flatten(like)
    cast = [array.astype(leaf.dtype) for array, leaf in zip(total, leaves, strict=True)]
    return computed(jax.tree.unflatten(treedef, cast))


def computed(result: Any) -> Any:
    """The same, as soon as it is computed."""
    with _device_errors():
        return jax.block_until_ready(result)


def host(result: Any) -> _codec.Array:
    """The array in the host's memory, as soon as it is computed; on the CPU without a copy."""
    try:
        return np.asarray(result)
    except jax.errors.JaxRuntimeError as error:
        _tell(error)


@contextlib.contextmanager
def _device_errors() -> Iterator[None]:
    """Turns what the runtime raises into something that the client is told."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        _tell(error)


def _tell(error: Exception) -> NoReturn:
    if "RESOURCE_EXHAUSTED" in str(error):
        raise ServiceError(Code.RESOURCE_EXHAUSTED, "DEVICE_MEMORY", f"the device is out of memory: {error}") from error
    for part in jax.local_devices():
        if part.platform != "cpu":
            _check_alive(part, error)
    raise error


def _check_alive(device: Any, error: Exception) -> None:
    """Ends the process where a device does nothing any more: no call that follows in this process would succeed, and another may.

    CUDA fails all that comes after some errors, such as an illegal address.
    https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html
    """
    try:
        np.asarray(jax.device_put(np.ones(1, np.float32), device))
    except jax.errors.JaxRuntimeError as why:
        _log.critical("device %s does nothing any more, and the server ends: %s (%s)", device, error, why)
        os._exit(LOST)
