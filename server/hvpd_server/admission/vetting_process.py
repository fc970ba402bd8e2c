"""The process that reads, differentiates and compiles: `python -m
hvpd_server.admission.vetting_process`.

`vetting` starts it. It imports jax once and forks a *session* for each bundle. The
session reads the bundle's programs and traces their derivatives. Then it compiles one
program after the other, as the server asks. Each of these steps has limits of its own.

A program that crashes the parser or the compiler, fills the memory, or never ends, ends
its own session only. This process tells the server about a bad end, and kills a session
when the server hangs up.
"""

import base64
import contextlib
import gc
import hashlib
import importlib
import json
import math
import os
import resource
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax

from hvpd import _text
from hvpd.v1 import objective_pb2, tensor_pb2
from hvpd_server.admission.forks import Forks
from hvpd_server.admission.spawn import BUNDLE, DERIVATION
from hvpd_server.derivation import compiling
from hvpd_server.derivation.programs import Derivation, Sized
from hvpd_server.importer import reader, refusals
from hvpd_server.importer.graph import Module
from hvpd_server.importer.refusals import Allowance, Limits
from hvpd_server.importer.table import Refused

_MOST = 1 << 23
"""Most bytes of a verdict, which lists an objective's residuals and dense layers."""

_LINE = 1 << 12
"""Bytes to read of a request at a time. Its programs come as a file."""

_SIZES = 4
"""Most numbers of rows whose traces a session keeps."""

_FORCED_DEVICES = "--xla_force_host_platform_device_count"
"""A flag that says how many devices the CPU has."""

_DRIVER_FILE = 2 << 30
"""Most bytes of a file that a compile for a GPU writes: its driver keeps a cache of
kernels, and assemblers write their results.
"""

_NICE = 10
"""Niceness of the forks, so that the server has the CPU first."""

_SMALL: Final = b"""
func.func public @main(%x: tensor<6xf32>) -> tensor<f32> {
  %zero = stablehlo.constant dense<0.0> : tensor<f32>
  %low = stablehlo.constant dense<0xFF800000> : tensor<f32>
  %w = stablehlo.reshape %x : (tensor<6xf32>) -> tensor<3x2xf32>
  %square = stablehlo.dot_general %w, %w, contracting_dims = [0] x [0]
      : (tensor<3x2xf32>, tensor<3x2xf32>) -> tensor<2x2xf32>
  %hidden = stablehlo.tanh %square : tensor<2x2xf32>
  %top = stablehlo.reduce(%hidden init: %low) applies stablehlo.maximum across dimensions = [1]
      : (tensor<2x2xf32>, tensor<f32>) -> tensor<2xf32>
  %powers = stablehlo.exponential %top : tensor<2xf32>
  %sum = stablehlo.reduce(%powers init: %zero) applies stablehlo.add across dimensions = [0]
      : (tensor<2xf32>, tensor<f32>) -> tensor<f32>
  return %sum : tensor<f32>
}
"""
"""A small objective."""


def serve(control: socket.socket) -> None:
    """Fork a session for each request, until the other end of the socket is closed."""
    _import_all()
    gc.collect()
    gc.freeze()
    forks = Forks()
    while True:
        forks.wait(control)
        line, descriptors = b"", []
        while not line.endswith(b"\n"):
            try:
                piece, more, *_ = socket.recv_fds(control, _LINE, 2)
            except ConnectionError:  # The server is gone.
                return
            if not piece:
                return
            line += piece
            descriptors += more
        programs, orders = descriptors
        _start(forks, json.loads(line), programs, socket.socket(fileno=orders), control)
        os.close(programs)


def _start(
    forks: Forks, request: Mapping[str, Any], programs: int, orders: socket.socket, control: socket.socket
) -> None:
    """Fork a session."""

    def work() -> None:
        _Session(request["platform"], _programs(programs), Limits(**request["limits"]), orders).run()

    forks.start(orders, work, closing=control)


def _import_all() -> None:
    """Derive the programs of a small objective, so that forks import nothing late."""
    # jaxlib imports it when it lowers the first call of LAPACK.
    importlib.import_module("scipy.linalg")
    x = tensor_pb2.ArraySpec(dtype="float32", shape=[6])
    bundle = objective_pb2.Bundle(n=6, dtype="float32", x_leaves=[x], mode="forward_over_reverse", precision="highest")
    bundle.x_tree.kind = tensor_pb2.TreeSpec.KIND_LEAF
    bundle.data_tree.kind = tensor_pb2.TreeSpec.KIND_TUPLE
    bundle.programs["objective"].size_bytes = len(_SMALL)
    parts = {BUNDLE: bundle.SerializeToString(), "objective": _SMALL}
    derivation_of(parts, "cpu", Limits()).for_rows(0).describe()


class _Session:
    """One bundle in a fork: derive its programs, then compile them.

    Args:
        platform: Platform of the server's device.
        parts: The bundle and its programs by name, and `DERIVATION` if it is known
            already.
        limits: Limits on programs.
        orders: Socket for orders to compile. The derivation goes out there first,
            unless it is known.
    """

    def __init__(self, platform: str, parts: Mapping[str, bytes], limits: Limits, orders: socket.socket) -> None:
        self._platform = platform
        self._parts = parts
        self._limits = limits
        self._orders = orders
        self._derivation: Derivation | None = None
        self._sized: dict[int, Sized] = {}
        self._devices: dict[int, jax.Device] = {}

    def run(self) -> None:
        """Serve until the server hangs up."""
        _confine()
        if DERIVATION not in self._parts:
            _allow(self._limits.reading())
            verdict = _refusal_of(self._derived, self._limits.reading())
            _send(self._orders, json.dumps(verdict).encode() + b"\n")
            if DERIVATION not in verdict:
                return
        orders = self._orders.makefile("rb")
        while True:
            signal.setitimer(signal.ITIMER_REAL, 0)
            line = orders.readline()
            if not line:
                return
            _allow(self._limits.compiling(), 0 if self._platform == "cpu" else _DRIVER_FILE)
            self._compile(json.loads(line))

    def _derived(self) -> dict[str, str]:
        # Kept with its traces for the programs that are compiled next.
        self._derivation = derivation_of(self._parts, self._platform, self._limits)
        derived = derive(self._parts, self._platform, self._limits, self._derivation)
        answer = base64.b64encode(derived.SerializeToString(deterministic=True)).decode()
        if len(answer) > _MOST:
            raise Refused(refusals.VETTING_FAILED, f"gives a derivation of more than {_MOST >> 20} MiB")
        return {DERIVATION: answer}

    def _compile(self, order: Mapping[str, Any]) -> None:
        """Compile one program and send its executable.

        A line with its size and SHA-256 comes first, then its bytes.
        """
        blob = b""

        def found() -> dict[str, Any]:
            nonlocal blob
            sized = self._traced(order["rows"])
            if not self._devices:
                self._devices = _devices(self._platform, len(order["devices"]) if order.get("processes") else 0)
            target = compiling.Target([self._devices[identity] for identity in order["devices"]])
            deterministic, data = order["deterministic"], order["data"]
            compiled = compiling.compile_program(
                sized, order["name"], order["width"], target, data, deterministic=deterministic
            )
            try:
                blob = compiling.dump(compiled)
            except Exception as error:  # noqa: BLE001 - each backend raises another error
                return {"unsupported": _text.cut(f"{type(error).__name__}: {error}", 500)}
            return {"size": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}

        header = _refusal_of(found, self._limits.compiling())
        _send(self._orders, json.dumps(header).encode() + b"\n")
        _send(self._orders, blob)

    def _traced(self, rows: int) -> Sized:
        """Return the programs for data of so many rows, with one trace for all."""
        if self._derivation is None:
            described = objective_pb2.Derivation.FromString(self._parts[DERIVATION])
            self._derivation = derivation_of(self._parts, self._platform, self._limits)
            self._derivation.described = described
        if rows not in self._sized:
            while len(self._sized) >= _SIZES:
                del self._sized[next(iter(self._sized))]
            self._sized[rows] = self._derivation.for_rows(rows)
        return self._sized[rows]


def _devices(platform: str, pretended: int) -> dict[int, jax.Device]:
    """Open the device, and return its parts by their numbers.

    Args:
        platform: The device's platform.
        pretended: Number of CPUs of a whole group; 0 without a group.
    """
    jax.config.update("jax_platforms", platform if platform == "cpu" else f"{platform},cpu")
    if pretended:
        _pretend_devices(pretended)
    return {device.id: device for device in jax.local_devices()}


def _pretend_devices(count: int) -> None:
    """Have this process compile for the CPUs of a whole group: it needs as many
    devices, which run nothing.
    """
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_FORCED_DEVICES)]
    os.environ["XLA_FLAGS"] = " ".join(flags)  # jax forbids to say it twice.
    jax.config.update("jax_num_cpu_devices", count)


def _refusal_of(work: Callable[[], dict[str, Any]], allowance: Allowance) -> dict[str, Any]:
    """Return the result of `work`, or the reason and message of its failure."""
    reason = allowance.failed
    try:
        return work()
    except Refused as refused:
        return {"reason": refused.reason, "message": _text.cut(str(refused), 2000)}
    except MemoryError:
        return {
            "reason": reason,
            "message": f"the programs cannot be {allowance.did} in {allowance.memory_bytes >> 20} MiB of memory",
        }
    except Exception as error:  # noqa: BLE001 - any error refuses the program
        if reason == refusals.COMPILE_FAILED and "RESOURCE_EXHAUSTED" in str(error):
            reason = refusals.DEVICE_MEMORY
        what = "compiled" if reason in (refusals.COMPILE_FAILED, refusals.DEVICE_MEMORY) else "read or differentiated"
        return {
            "reason": reason,
            "message": _text.cut(f"a program cannot be {what}: {type(error).__name__}: {error}", 2000),
        }


def _send(answer: socket.socket, content: bytes) -> None:
    """Send all bytes, unless the server hangs up."""
    with contextlib.suppress(OSError):
        answer.sendall(content)


def _confine() -> None:
    """Take from this process what it needs for no program: streams, priority, core
    dumps.
    """
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(silent, stream)
    os.nice(_NICE)
    if sys.platform == "linux":
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:  # noqa: PTH123 - no pathlib in a confined process
            score.write("1000")  # If the machine runs out of memory, the kernel ends this process and not the server.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _allow(allowance: Allowance, file_bytes: int = 0) -> None:
    """Limit the memory, time and files that this process takes from now on.

    Args:
        allowance: Memory and time.
        file_bytes: Most bytes of a file that the process writes.
    """
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123 - no pathlib in a confined process
            used = int(statm.read().split()[5]) * resource.getpagesize()
        # Not RLIMIT_AS: the driver of a GPU reserves far more addresses than it uses.
        # The kernel counts no reservation and no shared mapping here.
        _limit(resource.RLIMIT_DATA, used + allowance.memory_bytes)
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + allowance.cpu_seconds)
    _limit(resource.RLIMIT_FSIZE, file_bytes)
    signal.setitimer(signal.ITIMER_REAL, allowance.seconds)


def _limit(which: int, soft: int) -> None:
    _, hard = resource.getrlimit(which)
    resource.setrlimit(which, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


# Programs


def derivation_of(parts: Mapping[str, bytes], platform: str, limits: Limits) -> Derivation:
    """Return the programs of a bundle, to be read when they are traced.

    Args:
        parts: The bundle, as `BUNDLE`, and its programs, by name.
        platform: Platform of the server's device.
        limits: Limits on programs.
    """
    bundle = objective_pb2.Bundle.FromString(parts[BUNDLE])

    def read(name: str) -> Module:
        try:
            return reader.read(parts[name], limits)
        except Refused as refused:
            raise Refused(refused.reason, f"{name} {refused}") from None

    return Derivation(bundle, read, platform)


def derive(
    parts: Mapping[str, bytes], platform: str, limits: Limits, derivation: Derivation | None = None
) -> objective_pb2.Derivation:
    """Read the programs of a bundle and differentiate the objective, without compiling.

    Raises:
        Refused: A program is not served; the message begins with its name.
    """
    derivation = derivation or derivation_of(parts, platform, limits)
    bundle = derivation.bundle
    rows = bundle.data[bundle.row_leaves[0]].shape[0] if bundle.row_leaves else 0
    return derivation.for_rows(rows).describe()


def _programs(descriptor: int) -> dict[str, bytes]:
    """Return the programs of a file: a line that lists [name, size] of each, then their
    bytes.
    """
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        found = {name: file.read(size) for name, size in json.loads(file.readline())}
    os.close(descriptor)
    return found


def main() -> None:
    """Serve on the socket at standard input."""
    warnings.simplefilter("ignore")  # About forks; this process has one thread.
    jax.config.update("jax_enable_x64", True)
    control = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as silent:  # noqa: PTH123 - no pathlib in a confined process
        os.dup2(silent.fileno(), 0)  # Otherwise forks inherit the socket there, and keep it open.
    serve(control)


if __name__ == "__main__":
    main()
