"""Keeps a server running: a child that dies, or whose device answers nothing for too long, is replaced.

Clients ride through it: they repeat what was under way, and find the same objectives at the same address. Imports no jax.
"""

import contextlib
import ctypes
import dataclasses
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from hvpd_server import _config, _logs
from hvpd_server._board import LOST, Board
from hvpd_server._quarantine import Quarantine

_SIGNALS: Final = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}
_LOOK: Final = 0.5
"""Seconds from one look at the child to the next."""

_SILENCE: Final = 60.0
"""Seconds without a beat after which a child is taken for dead."""

_START: Final = 0.1
_MOST: Final = 30.0
"""Seconds before another child is started: at first, and at most."""

_LONG: Final = 60.0
"""Seconds after which a child that ended counts as one that ran well."""

_CRASHES: Final = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
"""What a program can do to a process. SIGKILL is somebody else's doing."""

_BOARD = "HVPD_BOARD"
_PARENT = "HVPD_SUPERVISOR"


def run(config: _config.Config) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code.

    Args:
        config: The server's settings.
    """
    _logs.configure(config.log_level, config.log_format)
    # They wait until they are asked for, also while there is no child.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    descriptor = Board.share()
    board = Board(descriptor)
    pause, served = _START, False
    while True:
        board.clear()
        began = time.monotonic()
        with _child(config, descriptor) as process:
            stopped, ended = _watch(process, board, config)
        _, port, metrics_port = board.beaten()
        served |= port > 0
        code = process.returncode
        if stopped or code == 0:
            return 0
        if code > 0 and not served:  # It cannot start, and has said why.
            return code
        _blame(config, board, code, ended)
        pause = _START if time.monotonic() - began > _LONG else pause
        _warn(f"the server {ended.reason if ended else _how(code)}; another one starts in {pause:g} s")
        if signal.sigtimedwait(_SIGNALS - {signal.SIGCHLD}, pause) is not None:
            return 0
        pause = min(2 * pause, _MOST)
        # It comes back where clients look for it.
        config = dataclasses.replace(config, port=port or config.port, metrics_port=metrics_port or config.metrics_port)


@contextlib.contextmanager
def _child(config: _config.Config, descriptor: int) -> "Iterator[subprocess.Popen[bytes]]":
    """A server of its own, that does not outlive this process, and is gone in the end."""
    process = subprocess.Popen(  # noqa: S603 - this interpreter, our own module
        [sys.executable, "-m", "hvpd_server", *_config.arguments(config)],
        stdin=subprocess.PIPE,  # Its end of file tells the child that nobody supervises it any more.
        pass_fds=[descriptor],
        # gRPC's own INFO has a line for each handshake that fails, whoever tried.
        env={"GRPC_VERBOSITY": "ERROR"}
        | os.environ
        | {_BOARD: str(descriptor), _PARENT: str(os.getpid()), "HVPD_OWNED": "1"},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _watch(process: "subprocess.Popen[bytes]", board: Board, config: _config.Config) -> "tuple[bool, _Ended | None]":
    """Waits until the child ends, or must. Returns whether it was told to stop, and why it was ended where it was."""
    deadline = float("inf")
    while process.poll() is None:
        found = signal.sigtimedwait(_SIGNALS, _LOOK)
        now = time.monotonic()
        if found is not None and found.si_signo != signal.SIGCHLD and deadline == float("inf"):
            process.send_signal(signal.SIGTERM)
            deadline = now + config.drain + 15.0
        if now > deadline:
            _warn("the server did not stop in time, and is ended")
            process.kill()
            break
        if ended := _stuck(board, config, now):
            process.kill()
            process.wait()
            return deadline < float("inf"), ended
    process.wait()
    return deadline < float("inf"), None


class _Ended(NamedTuple):
    """Why a child was ended."""

    reason: str
    """What it did, for the log."""
    digest: str
    """The objective whose doing that was; empty where it was none's."""
    blame: str
    """What it did."""


def _stuck(board: Board, config: _config.Config, now: float) -> _Ended | None:
    """Why the child must be ended; None where it need not."""
    work = board.work()
    for each in work:
        if each.compiling and 0 < config.compile_timeout < now - each.since:
            what = f"a compile of it did not end within {config.compile_timeout:g} s"
            return _Ended(f"was at one compile for {config.compile_timeout:g} s", each.digest, what)
        if not each.compiling and 0 < config.launch_timeout < now - each.since:
            what = f"a launch of it did not end within {config.launch_timeout:g} s"
            return _Ended(f"had no answer of its device for {config.launch_timeout:g} s", each.digest, what)
    beat, _, _ = board.beaten()
    if beat and now - beat > max(_SILENCE, config.launch_timeout):
        oldest = work[0].digest if work else ""
        return _Ended(f"was silent for {now - beat:.0f} s", oldest, "it was at work when the server fell silent")
    return None


def _blame(config: _config.Config, board: Board, code: int, ended: _Ended | None) -> None:
    """Counts it against the objectives that can have done it."""
    if ended:
        digests, how = [ended.digest] if ended.digest else [], ended.blame
    elif -code in _CRASHES or code == LOST:
        digests = [each.digest for each in board.work()]
        how = f"it was being computed or compiled when the server {_how(code)}"
    else:
        return
    quarantine = Quarantine(config.store, config.quarantine_after)
    for digest in dict.fromkeys(digests):
        with contextlib.suppress(OSError, ValueError):
            record = quarantine.strike(digest, how)
            _warn(f"objective {digest[:12]}: {how} ({record.strikes} of {config.quarantine_after})", objective=digest)


def _how(code: int) -> str:
    if code == LOST:
        return "lost its device"
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _warn(line: str, **fields: object) -> None:
    _logs.say(line, logging.WARNING, **fields)


# In the child


def board_of(environment: Mapping[str, str] = os.environ) -> Board | None:
    """The board of the supervisor that started this process, which ends with it from now on; None where there is none."""
    descriptor, parent = environment.get(_BOARD), environment.get(_PARENT)
    if descriptor is None or parent is None:
        return None
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    with contextlib.suppress(OSError, AttributeError):  # Another system: the pipe's end of file does it a moment later.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG. prctl(2)
    if os.getppid() != int(parent):
        os._exit(0)
    return Board(int(descriptor))
