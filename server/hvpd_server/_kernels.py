"""Compiled programs and the device that they run on. The only file of the server that imports jax; it knows no gRPC.

A program of a bundle is compiled once for each block width (a bucket: 1, 2, 4, ...), on threads of its own, so that a compile
never stalls somebody else's product. What was compiled stays in jax's persistent cache across restarts.
"""

import concurrent.futures
import contextlib
import copy
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from jaxlib.mlir.dialects import stablehlo

from hvpd import _codec
from hvpd.v1 import objective_pb2
from hvpd_server._admission import ROWS, WIDTH, Signature
from hvpd_server._errors import Code, ServiceError

_log = logging.getLogger(__name__)

DeviceArray = jax.Array
Compiled = Callable[..., Any]


class Device:
    """One accelerator, or the CPU: placing arrays, and facts.

    Args:
        cache: Directory of jax's persistent compilation cache.
    """

    def __init__(self, cache: Path) -> None:
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        # A product is computed in the thread that asks for it: on the CPU one hand-off less.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        self._device = jax.devices()[0]
        self.platform = {"gpu": "cuda"}.get(self._device.platform, self._device.platform)
        self.kind = self._device.device_kind
        self.jax_version = jax.__version__
        self.stablehlo_version: str = stablehlo.get_current_version()
        self.calling_conventions = (
            jax.export.minimum_supported_calling_convention_version,
            jax.export.maximum_supported_calling_convention_version,
        )

    def memory_bytes(self) -> int | None:
        """The device's memory as its driver tells; None for the CPU."""
        return (self._device.memory_stats() or {}).get("bytes_limit")

    def put(self, array: _codec.Array) -> DeviceArray:
        """Copies an array to the device."""
        with _device_errors():
            placed: DeviceArray = jax.block_until_ready(jax.device_put(np.array(array, copy=True), self._device))
            return placed


class Kernels:
    """The programs of one objective.

    Args:
        bundle: What was registered.
        read: The bytes of a blob by digest.
        compiler: Where compiles run.
        on_compile: Told the seconds that each compile took.

    Raises:
        ServiceError: A program is not what the bundle says, or not for this server's platform or version of jax.
    """

    def __init__(
        self,
        bundle: objective_pb2.Bundle,
        device: Device,
        read: Callable[[str], bytes],
        compiler: concurrent.futures.Executor,
        on_compile: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._rows = 0
        self._others: dict[int, Kernels] = {}
        self._compiler = compiler
        self._on_compile = on_compile
        self._lock = threading.Lock()
        self._compiled: dict[tuple[str, int], concurrent.futures.Future[Compiled]] = {}
        self._exported = {
            name: _deserialize(name, read(program.digest), device, bundle) for name, program in bundle.programs.items()
        }

    def signatures(self) -> Mapping[str, Signature]:
        """What each program takes and returns."""
        return {name: Signature(_specs(e.in_avals), _specs(e.out_avals)) for name, e in self._exported.items()}

    def for_rows(self, rows: int) -> "Kernels":
        """The same programs, compiled for data of this many rows, where that is symbolic; 0 where nothing is."""
        if rows == self._rows:
            return self
        with self._lock:
            found = self._others.get(rows)
            if found is None:
                found = self._others[rows] = copy.copy(self)
                found._rows, found._lock, found._compiled, found._others = rows, threading.Lock(), {}, self._others  # noqa: SLF001
            return found

    def request(self, name: str, width: int = 0) -> "concurrent.futures.Future[Compiled]":
        """Has a program compiled for a block width, unless it is already, or under way."""
        with self._lock:
            future = self._compiled.get((name, width))
            if future is None or (future.done() and future.exception() is not None):
                future = self._compiled[name, width] = self._compiler.submit(self._compile, name, width)
            return future

    def ready(self, name: str, width: int = 0) -> bool:
        """Whether a program is compiled for a block width."""
        future = self._compiled.get((name, width))
        return future is not None and future.done() and future.exception() is None

    def widths(self, name: str) -> list[int]:
        """The block widths that a program is compiled for, ascending."""
        with self._lock:
            return sorted(width for program, width in self._compiled if program == name and self.ready(name, width))

    def call(self, name: str, width: int, *args: Any) -> Any:
        """Runs a program, waiting for its compile where it is not ready; results are on the device, computed."""
        compiled = self.request(name, width).result()
        with _device_errors():
            return jax.block_until_ready(compiled(*args))

    def _compile(self, name: str, width: int) -> Compiled:
        started = time.perf_counter()
        exported = self._exported[name]
        sizes = {WIDTH: width, ROWS: self._rows}
        specs = [
            jax.ShapeDtypeStruct(
                [size if isinstance(size, int) else sizes[str(size)] for size in aval.shape], aval.dtype
            )
            for aval in exported.in_avals
        ]
        try:
            with _device_errors():
                compiled = jax.jit(exported.call, keep_unused=True).lower(*specs).compile()
        except ServiceError:
            raise
        except Exception as error:
            _log.exception("compiling %s for width %d failed", name, width)
            raise ServiceError(
                Code.INVALID_ARGUMENT, "COMPILE_FAILED", f"the server cannot compile {name} (width {width}): {error}"
            ) from error
        seconds = time.perf_counter() - started
        self._on_compile(seconds)
        _log.info("compiled %s, width %d, in %.2f s", name, width, seconds)
        return compiled


def host(result: Any) -> _codec.Array:
    """The array in the host's memory; on the CPU without a copy."""
    return np.asarray(result)


def _deserialize(name: str, blob: bytes, device: Device, bundle: objective_pb2.Bundle) -> jax.export.Exported:
    oldest, newest = device.calling_conventions
    if not oldest <= bundle.calling_convention_version <= newest:
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            "BUNDLE_INCOMPATIBLE",
            f"the bundle was exported by jax {bundle.jax_version} with calling convention {bundle.calling_convention_version}; "
            f"this server runs jax {device.jax_version}, which reads {oldest} to {newest}: "
            "use a version of jax on the client that is nearer to the server's",
        )
    try:
        exported = jax.export.deserialize(bytearray(blob))
        version = exported.calling_convention_version
        exported.mlir_module()  # StableHLO of a version that this one does not know is found here, not at the first product.
    except Exception as error:
        raise ServiceError(
            Code.INVALID_ARGUMENT,
            "BUNDLE_INCOMPATIBLE",
            f"{name} is no program that this server (jax {device.jax_version}) can read; the bundle says that jax "
            f"{bundle.jax_version} exported it: {type(error).__name__}: {error}",
        ) from error
    if device.platform not in exported.platforms or not oldest <= version <= newest:
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            "BUNDLE_INCOMPATIBLE",
            f"{name} was lowered for {', '.join(exported.platforms)} (calling convention {version}), and this server's device "
            f"is {device.platform}: register with platforms=({device.platform!r},)",
        )
    if tuple(bundle.platforms) != tuple(exported.platforms):
        raise ServiceError(
            Code.INVALID_ARGUMENT,
            "BUNDLE_INVALID",
            f"{name} was lowered for {', '.join(exported.platforms)}, the bundle says {', '.join(bundle.platforms)}",
        )
    if exported.ordered_effects or exported.unordered_effects or exported.nr_devices != 1:
        raise ServiceError(
            Code.INVALID_ARGUMENT,
            "BUNDLE_INVALID",
            f"{name} has side effects or is partitioned: only pure programs are served",
        )
    return exported


def _specs(avals: Sequence[Any]) -> tuple[tuple[tuple[int | str, ...], str], ...]:
    return tuple(
        (tuple(size if isinstance(size, int) else str(size) for size in aval.shape), np.dtype(aval.dtype).name)
        for aval in avals
    )


@contextlib.contextmanager
def _device_errors() -> Iterator[None]:
    """Turns what the runtime raises into something that the client is told."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED, "DEVICE_MEMORY", f"the device is out of memory: {error}"
            ) from error
        raise
