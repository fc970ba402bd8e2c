"""Admission of bundles, and compilation of their programs, by a separate process.

The process is `vetting_process`. `importer.table` lists the operations that it allows.
The store keeps a derivation until the importer, the derivation code, or jax change.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, TypeVar

from hvpd.v1 import objective_pb2
from hvpd_server.admission import spawn
from hvpd_server.admission.session import Session
from hvpd_server.errors import Code, ServiceError
from hvpd_server.importer import refusals
from hvpd_server.store.store import Store

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_END = 10.0
"""Seconds to wait for the process to end."""

_DYING = 1.0
"""Most seconds from the end of the process's sockets to its own end."""

_IDLE = 10.0
"""Seconds after which a session that compiles nothing is ended."""

_MOST_IDLE = 2
"""Most sessions that stay open without compiling."""

_WAIT = 1.0
"""Seconds to wait for a session that compiles another program of the same bundle. After
that, a second session reads the bundle again.
"""


class Vetter:
    """The process that reads and compiles programs.

    It is started when it is first needed, and again after it died.

    Args:
        limits: Limits on programs.
    """

    def __init__(self, limits: refusals.Limits | None = None) -> None:
        self.limits = limits or refusals.Limits()
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False
        self._sessions: list[Session] = []  # In the order of their last use.

    def start(self) -> socket.socket:
        """Start the process unless it runs, and return the socket to it, without
        waiting.

        Raises:
            ServiceError: The server is closing.
            OSError: It cannot be started.
        """
        with self._lock:
            if self._closed:
                raise ServiceError(Code.UNAVAILABLE, "SHUTTING_DOWN", "the server is stopping: nothing is registered")
            if self._control is None:
                if sys.platform != "linux":
                    _log.warning("programs are read without a limit on memory: %s has none", sys.platform)
                ours, theirs = socket.socketpair()
                with theirs:
                    self._process = spawn.start(theirs.fileno(), spawn.environment())
                self._control = ours
            return self._control

    def vet(self, programs: Mapping[str, bytes], platform: str = "cpu") -> objective_pb2.Derivation:
        """Return the derivation of a bundle. Its session stays open for compiles.

        Args:
            programs: The bundle, as `spawn.BUNDLE`, and its programs, by name.
            platform: Platform of the server's device.

        Raises:
            ServiceError: INVALID_ARGUMENT with a reason of `refusals.REASONS`, and a
                message that names program and operation; UNAVAILABLE if the process
                does not run.
        """
        size = sum(map(len, programs.values()))
        if size > self.limits.bundle_bytes:
            raise too_large(size, self.limits)

        def attempt() -> objective_pb2.Derivation:
            with self._session(key_of(programs[spawn.BUNDLE]), lambda: programs, platform, new=True) as session:
                return session.derivation()

        return self._twice(attempt)

    def compile(
        self,
        key: str,
        read: Callable[[], Mapping[str, bytes]],
        derivation: objective_pb2.Derivation,
        platform: str,
        order: Mapping[str, object],
        check_wanted: Callable[[], None] = lambda: None,
    ) -> bytes:
        """Return the executable of a program, as `Session.compile` does.

        Args:
            key: SHA-256 of the serialized bundle.
            read: Returns the programs, as `vet` takes them.
            derivation: Derivation of the bundle, from `vet`.
            platform: Platform of the server's device.
            order: The program; see `Session.compile`.
            check_wanted: Raises ServiceError if the program is not wanted any more.
        """

        def programs() -> Mapping[str, bytes]:
            try:
                return {**read(), spawn.DERIVATION: derivation.SerializeToString()}
            except ServiceError:
                check_wanted()  # The programs of a deleted objective are gone.
                raise

        def attempt() -> bytes:
            with self._session(key, programs, platform) as session:
                check_wanted()  # An earlier `abandon` did not find this session.
                return session.compile(order)

        return self._twice(attempt)

    def abandon(self, key: str) -> None:
        """End the reading and the compiles of a bundle.

        Args:
            key: SHA-256 of the serialized bundle.
        """
        with self._lock:
            abandoned = [session for session in self._sessions if session.key == key]
        for session in abandoned:
            session.abandon()
        self._end_idle(lambda session: session.abandoned)

    def sweep(self, idle: float = _IDLE) -> None:
        """End the sessions that have compiled nothing for `idle` seconds."""
        now = time.monotonic()
        self._end_idle(lambda session: now - session.used > idle)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._closed = True
        self._end()

    @contextlib.contextmanager
    def _session(
        self, key: str, programs: Callable[[], Mapping[str, bytes]], platform: str, *, new: bool = False
    ) -> Iterator[Session]:
        """Yield an idle session of a bundle, or a new one. Keep the session afterwards,
        unless it failed.
        """

        def of_key() -> list[Session]:
            return [session for session in self._sessions if session.key == key]

        theirs = None
        with self._freed:
            if not new:
                self._freed.wait_for(lambda: not of_key() or not all(each.busy for each in of_key()), _WAIT)
            session = next((each for each in of_key() if not (each.busy or new)), None)
            if session is None:
                ours, theirs = socket.socketpair()
                session = Session(key, ours, self.limits)
                self._sessions.append(session)
            session.busy = True
        try:
            if theirs is not None:
                with theirs:
                    self._open(theirs, programs(), platform)
            yield session
        except BaseException as error:  # The session may have failed.
            with self._freed:
                self._sessions.remove(session)
                self._freed.notify_all()
            session.end()
            if session.abandoned and isinstance(error, OSError):
                raise _abandoned() from None
            raise
        with self._freed:
            session.busy, session.used = False, time.monotonic()
            self._sessions.remove(session)
            self._sessions.append(session)
            self._freed.notify_all()
        self._end_idle()

    def _open(self, theirs: socket.socket, programs: Mapping[str, bytes], platform: str) -> None:
        control = self.start()
        line = json.dumps({"platform": platform, "limits": dataclasses.asdict(self.limits)}).encode() + b"\n"
        with _file(programs) as file, self._lock:
            socket.send_fds(control, [line], [file.fileno(), theirs.fileno()])

    def _end_idle(self, which: Callable[[Session], bool] = lambda session: False) -> None:
        """End the idle sessions that are surplus, abandoned, or chosen by `which`."""
        with self._lock:
            idle = [each for each in self._sessions if not each.busy]
            ended = [each for each in idle if each in idle[:-_MOST_IDLE] or each.abandoned or which(each)]
            self._sessions = [each for each in self._sessions if each not in ended]
        for session in ended:
            session.end()

    def _twice(self, attempt: "Callable[[], _T]") -> "_T":
        """Return the result of an attempt. If the process is gone, try once more with a
        new one.
        """
        try:
            return attempt()
        except OSError:
            self._bury()
            try:
                return attempt()
            except OSError as error:
                self._bury()
                raise ServiceError(
                    Code.UNAVAILABLE,
                    "VETTING_UNAVAILABLE",
                    "the process that reads programs does not run on the server "
                    f"({error.strerror or type(error).__name__}): try again in a moment",
                    retry_after=1.0,
                ) from error

    def _bury(self) -> None:
        """Clean up after a dead process, so that `start` starts another one.

        A process that lives is left alone: only a session is gone, and other sessions
        use the process.
        """
        with self._lock:
            process = self._process
        if process is None:
            return
        try:
            process.wait(_DYING)
        except subprocess.TimeoutExpired:
            return
        self._end(process)

    def _end(self, dead: "subprocess.Popen[bytes] | None" = None) -> None:
        """End the process; with `dead`, only if another thread has not done so."""
        with self._lock:
            process, control = self._process, self._control
            if dead is not None and process is not dead:
                return
            self._process = self._control = None
            sessions = list(self._sessions)
        for session in sessions:
            session.hang_up()  # Wakes the threads that wait for an answer.
        self._end_idle(lambda session: True)
        if process is None or control is None:
            return
        with contextlib.suppress(OSError):
            control.shutdown(socket.SHUT_RDWR)  # Wakes the threads that wait for an answer.
        control.close()
        try:
            process.wait(_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Vetting:
    """Admits the bundles of a store.

    Args:
        store: Keeps derivations.
        vetter: Reads and differentiates programs.
        platform: Platform of the server's device.
    """

    def __init__(self, store: Store, vetter: Vetter, platform: str) -> None:
        self._store = store
        self._vetter = vetter
        self._platform = platform
        self._version = f"{refusals.version()} {platform}"

    def admit(
        self, digest: str, bundle: objective_pb2.Bundle, read: Callable[[str], bytes]
    ) -> objective_pb2.Derivation:
        """Return the derivation of a bundle. Afterwards its programs may be used.

        Args:
            digest: Digest of the bundle.
            bundle: The parsed bundle.
            read: Returns the bytes of a blob.

        Raises:
            ServiceError: As for `Vetter.vet`.
        """
        known = self.known(digest)
        if known is not None:
            return known
        size = sum(self._store.size(program.digest) for program in bundle.programs.values())
        if size > self._vetter.limits.bundle_bytes:
            raise too_large(size, self._vetter.limits)
        programs = {name: read(program.digest) for name, program in sorted(bundle.programs.items())}
        for name, program in bundle.programs.items():
            if program.size_bytes != len(programs[name]):
                raise ServiceError(
                    Code.INVALID_ARGUMENT,
                    refusals.BUNDLE_INVALID,
                    f"{name} has {len(programs[name])} bytes, the bundle says {program.size_bytes}",
                )
        found = self._vetter.vet({spawn.BUNDLE: bundle.SerializeToString()} | programs, self._platform)
        self._store.add_derivation(digest, self._version, found)
        return found

    def known(self, digest: str) -> objective_pb2.Derivation | None:
        """Return the derivation of a bundle; None if this version has not read the
        bundle yet.
        """
        return self._store.derivation(digest, self._version)


def key_of(bundle: bytes) -> str:
    """Return the key of the sessions of a bundle, from the serialized bundle."""
    return hashlib.sha256(bundle).hexdigest()


def _abandoned() -> ServiceError:
    return ServiceError(
        Code.CANCELLED, "CANCELLED", "all callers gave up the registration, or the objective was deleted meanwhile"
    )


def too_large(size: int, limits: refusals.Limits) -> ServiceError:
    """Return the error for programs of too many bytes."""
    return ServiceError(
        Code.INVALID_ARGUMENT,
        refusals.PROGRAM_TOO_LARGE,
        f"the registration is refused: its programs have {size >> 20} MiB, at most {limits.bundle_bytes >> 20} MiB are allowed; "
        "pass large arrays as data",
    )


@contextlib.contextmanager
def _file(programs: Mapping[str, bytes]) -> Iterator[IO[bytes]]:
    """Yield a file without a name.

    It begins with a line that lists [name, size] of each program. The bytes follow.
    """
    in_memory = hasattr(os, "memfd_create")
    with os.fdopen(os.memfd_create("hvpd-programs"), "wb") if in_memory else tempfile.TemporaryFile() as file:
        file.write(json.dumps([[name, len(blob)] for name, blob in programs.items()]).encode() + b"\n")
        for blob in programs.values():
            file.write(blob)
        file.flush()
        yield file
