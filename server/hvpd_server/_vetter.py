"""The process that reads and differentiates programs before the server does: `python -m hvpd_server._vetter`.

`_vetting` starts it. It imports jax once, and forks for each bundle. The fork takes limits on itself, reads the programs,
differentiates the objective without compiling, tells what it found, and ends. A program that crashes the parser, fills the
memory, or takes for ever, ends the fork only. Knows neither gRPC nor the store.
"""

import base64
import contextlib
import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
import warnings
from typing import Final, NoReturn

import jax

from hvpd.v1 import objective_pb2
from hvpd_server import _rules
from hvpd_server._rules import Limits
from hvpd_server.derivation.programs import Derivation
from hvpd_server.importer import reader
from hvpd_server.importer.graph import Module
from hvpd_server.importer.table import Refused

_MOST = 1 << 23
"""Most bytes of a verdict, which lists the residuals and dense layers of an objective."""

BUNDLE: Final = "bundle"
"""Name of the bundle among the programs that are sent."""

_LINE = 1 << 12
"""Bytes of a request, whose programs come as a file."""

_PR_SET_PDEATHSIG: Final = 1


def serve(control: socket.socket) -> None:
    """Vets what comes, one bundle after the other, until the other end of the socket is closed."""
    _import_all()
    gc.collect()
    gc.freeze()
    while True:
        request, descriptors = b"", []
        while not request.endswith(b"\n"):
            piece, more, *_ = socket.recv_fds(control, _LINE, 1)
            if not piece:
                return
            request += piece
            descriptors += more
        (programs,) = descriptors
        asked = json.loads(request)
        platform, limits = asked["platform"], Limits(**asked["limits"])
        try:
            verdict = _ask_a_fork(control, programs, platform, limits)
        finally:
            os.close(programs)
        try:
            control.sendall(json.dumps(verdict).encode() + b"\n")
        except OSError:  # The server is gone.
            return


def _import_all() -> None:
    """Trace a small derivative, so that the forks need not import what jax imports late."""
    gradient = jax.grad(lambda x: jax.numpy.sum(x**3))
    jax.eval_shape(lambda x: jax.jvp(gradient, (x,), (x,)), jax.ShapeDtypeStruct((2,), "float32"))


def _ask_a_fork(control: socket.socket, programs: int, platform: str, limits: Limits) -> dict[str, str]:
    """Forks, and waits for the verdict, or the fork's end, or that of its time, or that of the server."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.close(ours)
            control.close()
            _confine(limits)
            _tell(theirs, programs, platform, limits)
        os._exit(1)
    os.close(theirs)
    said, late = b"", False
    ends = time.monotonic() + limits.seconds
    with os.fdopen(ours, "rb", buffering=0) as pipe:
        while len(said) <= _MOST:
            ready, _, _ = select.select([ours, control.fileno()], [], [], max(ends - time.monotonic(), 0.0))
            late = not ready
            if late or control.fileno() in ready:  # The server sends nothing while it waits: this is its end.
                ends = 0.0
                break
            piece = pipe.read(_MOST)
            if not piece:
                break
            said += piece
    ended = 0
    while not ended:  # At once, as a rule; but one that was taken over may have closed its pipe, and live on.
        if time.monotonic() > ends or len(said) > _MOST:
            late |= len(said) <= _MOST
            os.kill(child, signal.SIGKILL)
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            time.sleep(0.001)
    return _verdict(said, os.waitstatus_to_exitcode(status), late=late, limits=limits)


def _verdict(said: bytes, code: int, *, late: bool, limits: Limits) -> dict[str, str]:
    if late or code == -signal.SIGXCPU:
        took = f"{limits.seconds:g} s" if late else f"{limits.cpu_seconds} s of computing"
        return {"reason": _rules.VETTING_TIMEOUT, "message": f"reading the programs took more than {took}"}
    if code != 0:
        names = {each.value: each.name for each in signal.Signals}
        how = f"signal {names.get(-code, -code)}" if code < 0 else f"code {code}"
        return {
            "reason": _rules.VETTING_FAILED,
            "message": f"the process that read the programs ended with {how}: they are damaged, or made to crash whoever reads "
            f"them, or take more than {limits.memory_bytes >> 20} MiB to read",
        }
    try:
        verdict = json.loads(said)
    except (ValueError, RecursionError):
        verdict = None
    if not isinstance(verdict, dict) or not all(isinstance(value, str) for value in verdict.values()):
        return {"reason": _rules.VETTING_FAILED, "message": "the process that read the programs said nothing"}
    return verdict


def _confine(limits: Limits) -> None:
    """Takes the limits on this process, for ever: no more memory, time, files, core dumps; no life after its parent's."""
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(silent, stream)
    if sys.platform == "linux":
        parent = os.getppid()
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:  # noqa: PTH123 - as below
            score.write("1000")  # Where the machine runs out of memory, this process goes first, and not the server.
        with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123 - no pathlib in what is confined
            used = int(statm.read().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, used + limits.memory_bytes)
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds + 1))
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)


def _limit(which: int, most: int) -> None:
    _, hard = resource.getrlimit(which)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(which, (most, most))


def _tell(pipe: int, programs: int, platform: str, limits: Limits) -> NoReturn:
    """Derive, write the verdict, and end the process without cleaning up."""
    verdict = {}
    try:
        found = derive(_programs(programs), platform, limits)
        verdict = {"derivation": base64.b64encode(found.SerializeToString(deterministic=True)).decode()}
    except Refused as refused:
        verdict = {"reason": refused.reason, "message": str(refused)[:2000]}
    except MemoryError:
        verdict = {
            "reason": _rules.VETTING_FAILED,
            "message": f"reading the programs takes more than {limits.memory_bytes >> 20} MiB of memory",
        }
    except Exception as error:  # noqa: BLE001 - a program that reading fails of is refused, whatever it was
        verdict = {
            "reason": _rules.VETTING_FAILED,
            "message": f"a program cannot be read or differentiated: {type(error).__name__}: {error}"[:2000],
        }
    answer = memoryview(json.dumps(verdict).encode())
    while answer:
        answer = answer[os.write(pipe, answer) :]
    os._exit(0)


def derive(parts: dict[str, bytes], platform: str, limits: Limits) -> objective_pb2.Derivation:
    """Read the programs of a bundle and differentiate the objective, without compiling.

    Args:
        parts: The bundle, as `BUNDLE`, and its programs, by name.
        platform: Platform of the server's device.
        limits: How large programs may be.

    Raises:
        Refused: A program is not served; the message begins with its name.
    """
    bundle = objective_pb2.Bundle.FromString(parts[BUNDLE])

    def read(name: str) -> Module:
        try:
            return reader.read(parts[name], limits)
        except Refused as refused:
            raise Refused(refused.reason, f"{name} {refused}") from None

    rows = bundle.data[bundle.row_leaves[0]].shape[0] if bundle.row_leaves else 0
    return Derivation(bundle, read, platform).for_rows(rows).describe()


def _programs(descriptor: int) -> dict[str, bytes]:
    """The programs of a file: a line that lists [name, size] of each, then their bytes."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return {name: file.read(size) for name, size in json.loads(file.readline())}


def main() -> None:
    """Serves on the socket that is this process's standard input."""
    warnings.simplefilter("ignore")  # Of forks: this process has one thread.
    jax.config.update("jax_enable_x64", True)
    serve(socket.socket(fileno=os.dup(0)))


if __name__ == "__main__":
    main()
