"""The server's end of a session, the fork that reads and compiles one bundle."""

import base64
import contextlib
import hashlib
import json
import signal
import socket
from collections.abc import Mapping
from typing import Any

from hvpd import _text
from hvpd.v1 import objective_pb2
from hvpd_server.admission.spawn import DERIVATION
from hvpd_server.errors import Code, ServiceError
from hvpd_server.importer import refusals

_PATIENCE = 120.0
"""Seconds to wait for the process to start, or to report a limit."""

_MOST = 1 << 24
"""Most bytes of an answer."""

_MESSAGE = 2100
"""Most characters of a refusal. The process sends at most 2000, and a note of the
full length.
"""

_MOST_EXECUTABLE = 2 << 30
"""Most bytes of an executable."""

_PIECE = 1 << 16
"""Bytes to read at a time."""


class UnsupportedError(Exception):
    """The device's backend cannot move executables between processes."""


class Session:
    """A fork that has read one bundle and compiles its programs, one after the other.

    Args:
        key: SHA-256 of the serialized bundle.
        control: Socket to the fork.
        limits: Limits on programs.
    """

    def __init__(self, key: str, control: socket.socket, limits: refusals.Limits) -> None:
        self.key = key
        self.abandoned = False
        """Whether the session was ended because no caller waits for it."""
        self.busy = True
        """Whether the session reads or compiles."""
        self.used = 0.0
        """Time of the last compile's end."""
        self._control = control
        self._limits = limits

    def derivation(self) -> objective_pb2.Derivation:
        """Return the derivation of the bundle.

        Raises:
            ServiceError: The programs are refused.
            OSError: The process is gone.
        """
        verdict = self._answer(self._limits.reading())
        if DERIVATION not in verdict:
            raise _refused(verdict, "the registration is refused")
        return objective_pb2.Derivation.FromString(base64.b64decode(verdict[DERIVATION]))

    def compile(self, order: Mapping[str, object]) -> bytes:
        """Return the executable of a program, as `derivation.compiling.load` takes it.

        Args:
            order: rows, name, width, devices, data, deterministic, and processes in a
                group; see `vetting_process`.

        Raises:
            ServiceError: The program cannot be compiled.
            UnsupportedError: The backend cannot serialize it.
            OSError: The session is gone.
        """
        what = f"the server cannot compile {order['name']} (width {order['width']})"
        self._control.settimeout(None)
        self._control.sendall(json.dumps(order).encode() + b"\n")
        header = self._answer(self._limits.compiling())
        if "unsupported" in header:
            raise UnsupportedError(header["unsupported"])
        if "size" not in header:
            raise _refused(header, what)
        try:
            blob = _read(self._control, min(int(header["size"]), _MOST_EXECUTABLE))
        except TimeoutError:
            blob = b""
        if hashlib.sha256(blob).hexdigest() != header["sha256"]:
            if self.abandoned:
                raise ConnectionError("the session was ended")
            verdict = {
                "reason": refusals.COMPILE_FAILED,
                "message": "the process that compiled it ended before it had sent the whole executable",
            }
            raise _refused(verdict, what)
        return blob

    def _answer(self, allowance: refusals.Allowance) -> Mapping[str, Any]:
        """Return the first line of the fork's answer, or the verdict on its end.

        Raises:
            OSError: The process is gone.
        """
        self._control.settimeout(allowance.seconds + _PATIENCE if allowance.seconds else None)
        try:
            found = _read_line(self._control)
        except TimeoutError:
            found = {"ended": -signal.SIGALRM}
        return _verdict_on(found["ended"], allowance) if "ended" in found else found

    def end(self) -> None:
        """End the fork."""
        self.hang_up()
        self._control.close()

    def abandon(self) -> None:
        """End the fork, and its compiles. Their callers get an error with the code
        CANCELLED.
        """
        self.abandoned = True
        self.hang_up()  # The vetting process kills the fork.

    def hang_up(self) -> None:
        """Have the vetting process kill the fork, and wake the thread that waits."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)


def _read_line(control: socket.socket) -> Mapping[str, Any]:
    """Return a line of JSON from a process.

    Raises:
        ConnectionError: The process is gone.
        TimeoutError: The process does not answer.
    """
    answer = bytearray()
    while not answer.endswith(b"\n"):
        # Other bytes follow the line, so nothing is read beyond its end.
        waiting = control.recv(_PIECE, socket.MSG_PEEK)
        end = waiting.find(b"\n") + 1
        piece = control.recv(end or len(waiting))
        if not piece or len(answer) > _MOST:
            raise ConnectionError("the process is gone")
        answer += piece
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return {"reason": refusals.VETTING_FAILED, "message": "the process that read the programs said nothing"}
    return found


def _read(control: socket.socket, size: int) -> bytes:
    """Return `size` bytes from a process, or fewer if it ends before."""
    found = bytearray()
    while len(found) < size and (piece := control.recv(min(size - len(found), _PIECE))):
        found += piece
    return bytes(found)


def _verdict_on(code: int, allowance: refusals.Allowance) -> Mapping[str, str]:
    """Return the reason and the message for a fork that ended without an answer."""
    if code == 0:
        return {"reason": allowance.failed, "message": f"the process that {allowance.did} the programs said nothing"}
    if code in (-signal.SIGXCPU, -signal.SIGALRM):
        took = f"{allowance.seconds:g} s" if code == -signal.SIGALRM else f"{allowance.cpu_seconds} s of computing"
        return {"reason": allowance.late, "message": f"it took more than {took}"}
    names = {each.value: each.name for each in signal.Signals}
    how = f"signal {names.get(-code, -code)}" if code < 0 else f"code {code}"
    return {
        "reason": allowance.failed,
        "message": f"the process that {allowance.did} the programs ended with {how}: the programs are damaged, or made to "
        f"crash their reader, or take more than {allowance.memory_bytes >> 20} MiB",
    }


def _refused(verdict: Mapping[str, str], what: str) -> ServiceError:
    reason = verdict.get("reason")
    reason = reason if reason in refusals.REASONS else refusals.VETTING_FAILED
    return ServiceError(
        Code.RESOURCE_EXHAUSTED if reason == refusals.DEVICE_MEMORY else Code.INVALID_ARGUMENT,
        reason,
        f"{what}: {_text.cut(_printable(str(verdict.get('message', ''))), _MESSAGE)}",
    )


def _printable(text: str) -> str:
    """Return one line without control characters, because a program's words go into
    logs.
    """
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
