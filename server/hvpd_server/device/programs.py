"""The compiled programs of an objective. Knows neither jax nor gRPC.

A program is compiled once for each block width, a power of two ("bucket").
`executables` has it compiled by another process, and keeps the executable across
restarts.
"""

import concurrent.futures
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from hvpd.v1 import objective_pb2
from hvpd_server.derivation.compiling import Compiled
from hvpd_server.device.device import Device, device_errors
from hvpd_server.device.executables import Build, Built
from hvpd_server.errors import Code, ServiceError

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 60.0
"""Seconds after which a compile that failed is repeated on request: a compile may take
minutes of a GPU.
"""


_REPEATED = (Code.RESOURCE_EXHAUSTED, Code.DATA_LOSS, Code.CANCELLED)
"""Codes of failed compiles that are repeated on the next request."""

MEMORY_FACTOR = 20
"""Bytes of memory that a loaded executable takes for each byte of its serialized form:
12 to 22 on a CPU, for programs of 7 to 110 KB, with its share of a server's other
growth.
"""


class Programs:
    """The programs of one objective.

    Args:
        described: The description that the vetting process derived from the bundle.
        device: The device that runs the programs.
        build: Compiles a program.
        compiler: Runs the compiles.
        on_compile: Called with the seconds of each compile, and "compiled", "cached" or
            "failed".
        on_load: Called with the bytes of memory of each loaded program, estimated.
    """

    def __init__(
        self,
        described: objective_pb2.Derivation,
        device: Device,
        build: Build,
        compiler: concurrent.futures.Executor,
        on_compile: Callable[[float, str], None] = lambda seconds, outcome: None,
        on_load: Callable[[int], None] = lambda size_bytes: None,
    ) -> None:
        self.described = described
        self._device = device
        self._build = build
        self._compiler = compiler
        self._on_compile = on_compile
        self._on_load = on_load
        self._created = time.monotonic()
        self._lock = threading.Lock()
        # Programs are compiled for each number of rows, and forgotten with the last
        # point that uses them.
        self._kernels: weakref.WeakValueDictionary[int, Kernels] = weakref.WeakValueDictionary()

    @property
    def memory_bytes(self) -> int:
        """The bytes of memory of all executables, estimated."""
        return MEMORY_FACTOR * sum(kernels.size_bytes for kernels in self._every())

    @property
    def used(self) -> float:
        """The time of the last call, on time.monotonic's clock; of the creation if
        there was none.
        """
        return max([self._created, *(kernels.used for kernels in self._every())])

    def _every(self) -> "list[Kernels]":
        with self._lock:
            return list(self._kernels.values())

    def for_rows(self, rows: int) -> "Kernels":
        """Return the programs for data of so many rows, if the number of rows is
        symbolic; 0 if it is not.
        """
        with self._lock:
            found = self._kernels.get(rows)
            if found is None:
                found = self._kernels[rows] = Kernels(
                    rows, self._device, self._build, self._compiler, self._on_compile, self._on_load
                )
            return found


class Kernels:
    """The programs of one objective for data of one size, compiled for the block widths
    that were requested.
    """

    def __init__(
        self,
        rows: int,
        device: Device,
        build: Build,
        compiler: concurrent.futures.Executor,
        on_compile: Callable[[float, str], None],
        on_load: Callable[[int], None],
    ) -> None:
        self.rows = rows
        self._device = device
        self._build = build
        self._compiler = compiler
        self._on_compile = on_compile
        self._on_load = on_load
        self._lock = threading.Lock()
        self._compiles: dict[tuple[str, int], _Compile] = {}
        self._ready: dict[tuple[str, int], Compiled] = {}
        self._widths: dict[str, list[int]] = {}
        self.size_bytes = 0
        """Bytes of the serialized executables."""
        self.used = time.monotonic()
        """Time of the last call."""

    def request(self, name: str, width: int = 0) -> "concurrent.futures.Future[Compiled]":
        """Start the compile of a program for a block width, unless it is compiled, or
        runs, or failed a short while ago.
        """
        with self._lock:
            found = self._compiles.get((name, width))
            if found is None or found.future.cancelled() or found.may_be_repeated(time.perf_counter()):
                found = _Compile()
                found.future = self._compiler.submit(self._run, found, name, width)
                self._compiles[name, width] = found
            elif found.future.done() and (error := found.future.exception()) is not None:
                # Every caller raises this error. Its traceback would keep all their
                # frames, and so their vectors.
                error.__traceback__ = None
            return found.future

    def ready(self, name: str, width: int = 0) -> bool:
        """Return whether a program is compiled for a block width."""
        return (name, width) in self._ready

    def widths(self, name: str) -> list[int]:
        """Return the block widths that a program is compiled for, ascending."""
        return self._widths.get(name, [])

    def compiles(self) -> list[objective_pb2.Compile]:
        """Return the state of every compile, in the order of the requests."""
        with self._lock:
            return [compile_.message(name, width) for (name, width), compile_ in self._compiles.items()]

    def call(self, name: str, width: int, *args: Any) -> Any:
        """Run a program, after its compile if it is not ready. The results are on the
        device, and may not be computed yet.
        """
        compiled = self._ready.get((name, width)) or self.request(name, width).result()
        self.used = time.monotonic()
        return self._device.run(compiled, args)

    def _run(self, compile_: "_Compile", name: str, width: int) -> Compiled:
        started = compile_.started = time.perf_counter()
        outcome = "failed"
        try:
            built = self._compile(name, width)
            outcome = built.outcome
        finally:
            compile_.seconds = time.perf_counter() - started
            self._on_compile(compile_.seconds, outcome)
        with self._lock:
            self.size_bytes += built.size_bytes
            self._ready[name, width] = built.compiled
            self._widths[name] = sorted(width for program, width in self._ready if program == name)
        self._on_load(MEMORY_FACTOR * built.size_bytes)
        how = "found in the cache: " if outcome == "cached" else "compiled "
        _log.info("%s%s, width %d, in %.2f s", how, name, width, compile_.seconds)
        return built.compiled

    def _compile(self, name: str, width: int) -> Built:
        with device_errors():
            return self._build(self.rows, name, width)


class _Compile:
    """One compile, from its request on."""

    future: "concurrent.futures.Future[Compiled]"
    started: float | None = None
    seconds: float | None = None

    def may_be_repeated(self, now: float) -> bool:
        """Return whether the compile failed and may succeed now: memory or a lost blob
        may be back, its callers gave up, or enough time has passed.
        """
        if not self.future.done() or (error := self.future.exception()) is None:
            return False
        if isinstance(error, ServiceError) and error.code in _REPEATED:
            return True
        return now - (self.started or 0.0) - (self.seconds or 0.0) > _RETRY_SECONDS

    def message(self, name: str, width: int) -> objective_pb2.Compile:
        """Return the state as a message."""
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
