"""One device: places arrays, runs executables, and translates errors. Knows no
gRPC.
"""

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jaxlib.mlir.dialects import stablehlo

from hvpd._wire import codec
from hvpd_server.derivation import compiling
from hvpd_server.derivation.compiling import Compiled, Target
from hvpd_server.derivation.spread import Spread, cut
from hvpd_server.device.leaves import Leaves
from hvpd_server.errors import Code, ServiceError
from hvpd_server.liveness import LOST

_log = logging.getLogger(__name__)

_DESCRIPTORS_SECONDS = 0.5
"""Seconds until a retry, when the process has no file descriptor free."""


def devices(cache: Path) -> "list[Device]":
    """Return the accelerators of this host, each by itself; if there are none, the CPU.

    Args:
        cache: Directory of jax's persistent compilation cache.

    Raises:
        ServiceError: jax finds none of the devices that it was told to use.
    """
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # With XLA's own caches the keys would contain the cache's path, and a store that is
    # moved would compile anew.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # On the CPU, a product is computed in the thread that asks for it. This saves one
    # change of threads.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        found = [Device([device]) for device in jax.local_devices()]
    # jax 0.10 raises an AssertionError without a text if there is no GPU.
    except (RuntimeError, AssertionError) as error:
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            "NO_DEVICE",
            f"jax finds none of the devices that it may use, JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r} {error}".rstrip(),
        ) from error
    # Executables of another process call LAPACK through pointers that jax looks up when
    # it first lowers such a call.
    jax.jit(jax.lax.linalg.cholesky).trace(jax.ShapeDtypeStruct((1, 1), np.float32)).lower(lowering_platforms=("cpu",))
    return found


class Device:
    """One accelerator, or the CPU, or several devices that work as one.

    Args:
        parts: The devices.
    """

    def __init__(self, parts: Sequence[jax.Device]) -> None:
        self.parts = parts
        first = parts[0]
        self.target = Target(parts)
        self.platform = self.target.platform
        self.kind = first.device_kind
        self.jax_version = jax.__version__
        self.stablehlo_version: str = stablehlo.get_current_version()
        # Programs that communicate between devices must start in the same order on all
        # of them.
        self._turn = threading.Lock() if len(parts) > 1 else None
        self.spans_processes = False
        """Whether some parts belong to other processes."""
        self.overlaps = self._turn is None and self.platform != "cpu"
        """Whether the device computes one launch while the results of another are
        copied out.
        """

    @classmethod
    def together(cls, devices: "Sequence[Device]") -> "Device":
        """Return all devices as one: data is split over them by rows, everything else
        is copied to each.
        """
        return cls([part for device in devices for part in device.parts])

    def memory_bytes(self) -> int | None:
        """Return each part's memory as its driver reports it; None for the CPU."""
        return (self.parts[0].memory_stats() or {}).get("bytes_limit")

    def memory_use(self) -> tuple[int, int] | None:
        """Return bytes in use and bytes in all of the first part, as its driver reports
        them; None if it reports nothing.
        """
        try:
            found = self.parts[0].memory_stats() or {}
        except jax.errors.JaxRuntimeError:  # The next product reports a device that has failed.
            return None
        in_use, limit = found.get("bytes_in_use"), found.get("bytes_limit")
        return None if in_use is None or limit is None else (in_use, limit)

    def copies(self, shape: Sequence[Any], *, data: bool = False) -> int:
        """Return how many copies of an array of this shape the parts hold together."""
        return 1 if data and self.target.splits(shape) else len(self.parts)

    def put(self, array: codec.Array, *, data: bool = False, owned: bool = False) -> jax.Array:
        """Copy an array to the device.

        Args:
            array: The array.
            data: Whether to split it by rows, if there are several parts.
            owned: Whether nothing else uses the array, so that a CPU may use it without
                a copy.
        """
        sharding = self.target.split if data and self.target.splits(array.shape) else self.target.whole
        with device_errors():
            if self.platform == "cpu" and not owned:
                array = np.array(array, copy=True)
            placed: jax.Array = jax.block_until_ready(jax.device_put(array, sharding))
            return placed

    def put_by_leaf(self, x: codec.Array, shapes: Sequence[Sequence[int]]) -> Leaves:
        """Copy x to the parts, split by leaf.

        Args:
            x: The flat x.
            shapes: Shapes of its leaves.
        """
        with device_errors():
            placed = [
                jax.device_put(np.array(leaf, copy=True), self.target.by_leaf(shape))
                for leaf, shape in zip(cut(x, shapes), shapes, strict=True)
            ]
            return Leaves(jax.block_until_ready(placed), 0)

    def spread(self, shapes: Sequence[Sequence[int]]) -> Spread | None:
        """Return the layout of flat vectors for x in leaves of such shapes; None if x
        is not split.
        """
        return Spread(shapes, self.target) if shapes else None

    def put_spread(self, array: codec.Array, spread: Spread, axis: int = -1) -> jax.Array:
        """Copy vectors, which are along an axis of an array, to the parts that split
        x.
        """
        with device_errors():
            return spread.put(array, axis)

    def leaf_copies(self, shape: Sequence[int]) -> int:
        """Return how many copies of a leaf of x the parts hold together, if x is split
        by leaf.
        """
        return len(self.parts) if self.target.by_leaf(shape) is self.target.whole else 1

    def place_rows(self, part: Any, rows: slice) -> jax.Array:
        """Copy some rows of a tensor to the device, split if there are several parts.

        Args:
            part: Reads rows, as `store.rows.Rows` does.
            rows: The rows.
        """
        return self.put(part[rows], data=True, owned=True)

    def load(self, blob: bytes) -> Compiled:
        """Load a compiled program, from the bytes of `compiling.dump`."""
        return compiling.load(blob, self.parts)

    def run(self, compiled: Compiled, args: Sequence[Any]) -> Any:
        """Run a program. Several parts run one program at a time, to its end; else the
        results may not be computed yet.

        Raises:
            ServiceError: The device is out of memory, or the process has no file
                descriptor free.
        """
        try:
            if self._turn is None:
                return compiled(*args)
            with self._turn:
                return jax.block_until_ready(compiled(*args))
        except jax.errors.JaxRuntimeError as error:
            _raise_as_service_error(error)
        except ValueError as error:
            # XLA opens a file, by std::random_device, in each thread that computes for
            # the first time.
            if "random_device" not in str(error):
                raise
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                "DESCRIPTORS",
                f"the server has no file descriptor free ({error}): try again, or raise its limit (ulimit -n)",
                retry_after=_DESCRIPTORS_SECONDS,
            ) from error


def add(total: Any, weights: Sequence[float], part: Any) -> Any:
    """Add a weighted result to the total, in float64; return the new total. The weights
    repeat over the arrays of a result.
    """
    parts = jax.tree.leaves(part)
    with device_errors():
        weighted = [
            weight * leaf.astype(np.float64) for weight, leaf in zip(itertools.cycle(weights), parts, strict=False)
        ]
        return weighted if total is None else [before + more for before, more in zip(total, weighted, strict=True)]


def rounded(total: Any, like: Any) -> Any:
    """Return a total in the structure and dtypes of a result."""
    leaves, treedef = jax.tree.flatten(like)
    cast = [array.astype(leaf.dtype) for array, leaf in zip(total, leaves, strict=True)]
    return computed(jax.tree.unflatten(treedef, cast))


def computed(result: Any) -> Any:
    """Wait until a result is computed, and return it."""
    with device_errors():
        return jax.block_until_ready(result)


def host(result: Any, spread: Spread | None = None) -> codec.Array:
    """Wait until an array is computed, and return it in the host's memory; on the CPU
    without a copy.

    Args:
        result: The array.
        spread: The layout of the vectors along its last axis, if they are split.
    """
    try:
        return np.asarray(result) if spread is None else spread.host(result)
    except jax.errors.JaxRuntimeError as error:
        _raise_as_service_error(error)


@contextlib.contextmanager
def device_errors() -> Iterator[None]:
    """Turn errors of the runtime into errors for the client."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        _raise_as_service_error(error)


def _raise_as_service_error(error: Exception) -> NoReturn:
    if "RESOURCE_EXHAUSTED" in str(error):
        raise ServiceError(Code.RESOURCE_EXHAUSTED, "DEVICE_MEMORY", f"the device is out of memory: {error}") from error
    for part in jax.local_devices():
        if part.platform != "cpu":
            _check_alive(part, error)
    raise error


def _check_alive(device: Any, error: Exception) -> None:
    """End the process if a device has failed for good. Another process may be able to
    use the device again.

    After some errors, such as an illegal address, CUDA fails every later call of the
    process. https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html
    """
    try:
        np.asarray(jax.device_put(np.ones(1, np.float32), device))
    except jax.errors.JaxRuntimeError as why:
        _log.critical("device %s has failed for good, and the server ends: %s (%s)", device, error, why)
        os._exit(LOST)
