"""The supervisor keeps a server running: it replaces a child that dies, or whose device
does not answer for too long.

Clients notice only a delay: they repeat their requests, and find the same objectives at
the same address. Imports no jax.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from hvpd_server import config as _config
from hvpd_server.errors import ServiceError
from hvpd_server.group import failure
from hvpd_server.liveness import LOST, Liveness
from hvpd_server.store.location import objects_of
from hvpd_server.store.quarantine import Quarantine
from hvpd_server.telemetry import logs

_SIGNALS: Final = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}
_POLL: Final = 0.5
"""Seconds between two checks of the child."""

_SILENCE: Final = 60.0
"""Seconds without a heartbeat after which a child counts as dead."""

_MIN_BACKOFF: Final = 0.1
_MAX_BACKOFF: Final = 30.0
"""Seconds before another child is started: at first, and at most."""

_STABLE: Final = 60.0
"""Seconds of life after which a child that ends resets the backoff."""

_PROBATION: Final = 600.0
"""Seconds of probation, in addition to the timeout of a launch."""

_CRASHES: Final = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
"""Signals that a program can cause. SIGKILL comes from outside, unless the kernel has
sent it for lack of memory; see `oom_kills`.
"""

_LIVENESS = "HVPD_LIVENESS"
_PARENT = "HVPD_SUPERVISOR"


def run(config: _config.Config) -> int:
    """Run servers until SIGTERM or SIGINT. Return the exit code.

    Args:
        config: The server's settings.
    """
    logs.configure(config.log_level, config.log_format)
    # Blocked signals wait for sigtimedwait, also while there is no child.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    descriptor = Liveness.share()
    liveness = Liveness(descriptor)
    backoff, served = _MIN_BACKOFF, False
    while True:
        liveness.clear()
        began = time.monotonic()
        with _child(config, descriptor) as process:
            stopped, ended = _watch(process, liveness, config)
        _, port, metrics_port = liveness.last_beat()
        served |= port > 0
        code = process.returncode
        if stopped or code == 0:
            return 0
        if code > 0 and code != failure.ENDED and not served:  # It cannot start, and has logged the reason.
            return code
        known = _blame(config, liveness, code, ended)
        # A known cause is quarantined in the end, so others need not wait ever longer.
        backoff = _MIN_BACKOFF if known or time.monotonic() - began > _STABLE else backoff
        _warn(f"the server {ended.reason if ended else _how(code)}; another one starts in {backoff:g} s")
        if signal.sigtimedwait(_SIGNALS - {signal.SIGCHLD}, backoff) is not None:
            return 0
        backoff = min(2 * backoff, _MAX_BACKOFF)
        # Clients look for the next server at the address of this one.
        config = dataclasses.replace(config, port=port or config.port, metrics_port=metrics_port or config.metrics_port)


@contextlib.contextmanager
def _child(config: _config.Config, descriptor: int) -> "Iterator[subprocess.Popen[bytes]]":
    """Start a server that does not outlive this process, and kill it at the end of the
    `with` statement.
    """
    environment = os.environ | {_LIVENESS: str(descriptor), _PARENT: str(os.getpid()), "HVPD_OWNED": "1"}
    process = _start(_config.arguments(config), environment, descriptor)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _start(arguments: Sequence[str], environment: Mapping[str, str], descriptor: int) -> "subprocess.Popen[bytes]":
    """Start a server, which inherits a file descriptor."""
    return subprocess.Popen(  # noqa: S603 - this interpreter, our own module
        [sys.executable, "-m", "hvpd_server", *arguments],
        stdin=subprocess.PIPE,  # Its end of file tells that the supervisor is gone.
        pass_fds=[descriptor],
        env=environment,
    )


def _watch(
    process: "subprocess.Popen[bytes]", liveness: Liveness, config: _config.Config
) -> "tuple[bool, _Ended | None]":
    """Wait until the child ends, or must be ended. Return whether it was told to stop,
    and why it was ended, if it was.
    """
    deadline, kills, latest = float("inf"), oom_kills(), oom_kills()
    while process.poll() is None:
        kills, latest = latest, oom_kills()  # Of the latest, the child may have been one already.
        found = signal.sigtimedwait(_SIGNALS, _POLL)
        now = time.monotonic()
        if found is not None and found.si_signo != signal.SIGCHLD and deadline == float("inf"):
            process.send_signal(signal.SIGTERM)
            deadline = now + config.drain + 15.0
        if now > deadline:
            _warn("the server did not stop in time, and is ended")
            process.kill()
            break
        if ended := _stuck(liveness, config, now):
            process.kill()
            process.wait()
            return deadline < float("inf"), ended
    process.wait()
    stopped = deadline < float("inf")
    return stopped, _out_of_memory(liveness) if process.returncode == -signal.SIGKILL and oom_kills() > kills else None


def oom_kills(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return how many processes of this control group the kernel has ended for lack of
    memory; 0 if it does not say. docs.kernel.org/admin-guide/cgroup-v2.html

    Args:
        groups: Where version 2 of cgroups is mounted.
        own: Names the control group of this process.
    """
    with contextlib.suppress(OSError, StopIteration, ValueError, KeyError):
        group = next(line for line in own.read_text().splitlines() if line.startswith("0::"))
        events = (groups / group.removeprefix("0::").lstrip("/") / "memory.events").read_text()
        return int(dict(line.split() for line in events.splitlines())["oom_kill"])
    return 0


class _Ended(NamedTuple):
    """The reason why a child was ended."""

    reason: str
    """The child's behaviour, for the log."""
    digests: Sequence[str]
    """The objectives that may have caused it."""
    blame: str
    """Their behaviour, for the quarantine."""


def _out_of_memory(liveness: Liveness) -> _Ended:
    digests = [each.digest for each in liveness.work()]
    reason = "was ended by the kernel for lack of memory"
    return _Ended(reason, digests, f"it was being computed or loaded when the server {reason}")


def _stuck(liveness: Liveness, config: _config.Config, now: float) -> _Ended | None:
    """Return why the child must be ended; None if it need not."""
    work = liveness.work()
    for each in work:
        timeout = config.compile_timeout if each.compiling else config.launch_timeout
        if not 0 < timeout < now - each.since:
            continue
        # Work that hangs on the device delays all later work. Work younger than half of
        # the timeout is not suspect.
        stuck = [other.digest for other in work if now - other.since > timeout / 2]
        if each.compiling:
            what = f"a compile of it did not end within {timeout:g} s"
            return _Ended(f"was at one compile for {timeout:g} s", stuck, what)
        what = f"a launch of it did not end within {timeout:g} s"
        return _Ended(f"had no answer of its device for {timeout:g} s", stuck, what)
    beat, _, _ = liveness.last_beat()
    silence = max(_SILENCE, config.launch_timeout)
    if _config.in_group(config):  # The other ranks wait for it, and end before.
        silence = failure.silence_seconds(config.launch_timeout)
    if beat and now - beat > silence:
        digests = [] if _config.in_group(config) else [each.digest for each in work]
        return _Ended(f"was silent for {now - beat:.0f} s", digests, "it was at work when the server fell silent")
    return None


def _blame(config: _config.Config, liveness: Liveness, code: int, ended: _Ended | None) -> bool:
    """Count a crash against the objective that ran; if several ran, put them on
    probation. Return whether one objective is to blame.
    """
    if ended:
        digests, how = ended.digests, ended.blame
    elif -code in _CRASHES or code == LOST:
        digests = [each.digest for each in liveness.work()]
        how = f"it was being computed or loaded when the server {_how(code)}"
    else:
        return False
    suspects = sorted(set(digests))
    with contextlib.suppress(OSError, ValueError, ServiceError):
        _judge(Quarantine(objects_of(config), config.quarantine_after), suspects, how, config)
    return len(suspects) == 1


def _judge(quarantine: Quarantine, digests: Sequence[str], how: str, config: _config.Config) -> None:
    seconds = _PROBATION + config.launch_timeout
    if len(digests) > 1:
        probation = quarantine.suspect(digests, seconds)
        names = ", ".join(digest[:12] for digest in digests)
        these = "all objectives" if probation.everyone else "these"
        _warn(
            f"objectives {names}: one of them may have done this: {these} run one at a time for at most {seconds:g} s"
        )
    for digest in digests if len(digests) == 1 else ():
        record = quarantine.strike(digest, how)
        _warn(f"objective {digest[:12]}: {how} ({record.strikes} of {config.quarantine_after})", objective=digest)
        if record.strikes >= config.quarantine_after:
            quarantine.end_probation()
        elif quarantine.probation() is not None:
            quarantine.suspect((), seconds)


def _how(code: int) -> str:
    if code == LOST:
        return "lost its device"
    if code == failure.ENDED:
        return "ended with its group"
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _warn(line: str, **fields: object) -> None:
    logs.say(line, logging.WARNING, **fields)


# In the child


def liveness_of(environment: Mapping[str, str] = os.environ) -> Liveness | None:
    """Return the liveness that the supervisor of this process reads; None if there is
    no supervisor.

    From now on, this process ends with its supervisor.
    """
    descriptor, parent = environment.get(_LIVENESS), environment.get(_PARENT)
    if descriptor is None or parent is None:
        return None
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    # On other systems, the pipe's end of file ends this process a moment later.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG. prctl(2)
    if os.getppid() != int(parent):
        os._exit(0)
    return Liveness(int(descriptor))
