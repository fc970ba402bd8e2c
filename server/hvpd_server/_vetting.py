"""Admits bundles: a process of its own reads and differentiates their programs before the server uses them.

The process is `_vetter`; `importer.table` lists the operations that it allows. The store keeps what it derived, until the importer,
the derivation, or jax change. No jax, no gRPC's wire.
"""

import base64
import contextlib
import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import hvpd
from hvpd.v1 import objective_pb2
from hvpd_server import _rules
from hvpd_server._errors import Code, ServiceError
from hvpd_server._store import Store

_log = logging.getLogger(__name__)

_COMMAND = ["-m", "hvpd_server._vetter"]

_PATIENCE = 120.0
"""Seconds that the process has to start, and to say that a limit was reached."""

_END = 10.0
"""Seconds that it has to end."""

_MOST = 1 << 24
"""Bytes of its answer."""

_PIECE = 1 << 16
"""Bytes to take from the socket at a time."""

_KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")
"""The environment that it gets. What else is there is none of its business, credentials for instance."""


class Vetter:
    """The process that reads programs: started when it is first needed, started again when it has died, one bundle at a time.

    Args:
        limits: What programs may be, and may take to be read.
    """

    def __init__(self, limits: _rules.Limits | None = None) -> None:
        self.limits = limits or _rules.Limits()
        self._asking = threading.Lock()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False

    def start(self) -> socket.socket:
        """Starts the process unless it runs, without waiting for it; returns the socket to it.

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
                    self._process = subprocess.Popen(  # noqa: S603 - this interpreter, our own module
                        [sys.executable, "-P", *_COMMAND],
                        # Its end of file tells the process that the server is gone, however that went.
                        stdin=theirs.fileno(),
                        stdout=subprocess.DEVNULL,
                        env=_environment(),
                        start_new_session=True,  # Ctrl-C is for the server, which may still want an answer.
                    )
                self._control = ours
            return self._control

    def vet(self, programs: Mapping[str, bytes], platform: str = "cpu") -> objective_pb2.Derivation:
        """Return what a bundle's programs give when they are differentiated.

        Args:
            programs: The serialized bundle, as "bundle", and its programs, by name.
            platform: Platform of the server's device.

        Raises:
            ServiceError: INVALID_ARGUMENT with a reason of `_rules.REASONS`, and a message that names program and operation;
                UNAVAILABLE if the process cannot be had.
        """
        size = sum(map(len, programs.values()))
        if size > self.limits.bundle_bytes:
            raise too_large(size, self.limits)
        with self._asking, _file(programs) as file:
            try:
                verdict = self._ask(file, platform)
            except OSError:  # Somebody has ended it since.
                self._end()
                try:
                    verdict = self._ask(file, platform)
                except OSError as error:
                    self._end()
                    raise ServiceError(
                        Code.UNAVAILABLE,
                        "VETTING_UNAVAILABLE",
                        f"the process that reads programs before they are used does not run on the server: {error}",
                        retry_after=1.0,
                    ) from error
        if "derivation" not in verdict:
            reason = verdict.get("reason")
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                reason if reason in _rules.REASONS else _rules.VETTING_FAILED,
                f"the bundle is refused: {_printable(verdict.get('message', ''))[:2000]}",
            )
        return objective_pb2.Derivation.FromString(base64.b64decode(verdict["derivation"]))

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._closed = True
        self._end()

    def _ask(self, file: IO[bytes], platform: str) -> Mapping[str, str]:
        control = self.start()
        control.settimeout(self.limits.seconds + _PATIENCE)
        line = json.dumps({"platform": platform, "limits": dataclasses.asdict(self.limits)}).encode() + b"\n"
        socket.send_fds(control, [line], [file.fileno()])
        answer = b""
        while not answer.endswith(b"\n"):
            piece = control.recv(_PIECE)
            if not piece or len(answer) > _MOST:
                raise ConnectionError("it is gone")
            answer += piece
        found: Mapping[str, str] = json.loads(answer)
        return found

    def _end(self) -> None:
        with self._lock:
            process, control = self._process, self._control
            self._process = self._control = None
        if process is None or control is None:
            return
        with contextlib.suppress(OSError):
            control.shutdown(socket.SHUT_RDWR)  # Who waits for an answer, in another thread, waits no more.
        control.close()
        try:
            process.wait(_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Vetting:
    """Admits the bundles of a store.

    Args:
        store: Keeps what was derived.
        vetter: Reads and differentiates programs.
        platform: Platform of the server's device.
    """

    def __init__(self, store: Store, vetter: Vetter, platform: str) -> None:
        self._store = store
        self._vetter = vetter
        self._platform = platform
        self._version = f"{_rules.version()} {platform}"

    def admit(
        self, digest: str, bundle: objective_pb2.Bundle, read: Callable[[str], bytes]
    ) -> objective_pb2.Derivation:
        """Return what the server derives from a bundle, whose programs may be used from then on.

        Args:
            digest: Of the bundle.
            bundle: Parsed.
            read: The bytes of a blob.

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
                    _rules.BUNDLE_INVALID,
                    f"{name} has {len(programs[name])} bytes, the bundle says {program.size_bytes}",
                )
        found = self._vetter.vet({"bundle": bundle.SerializeToString()} | programs, self._platform)
        self._store.add_derivation(digest, self._version, found)
        return found

    def known(self, digest: str) -> objective_pb2.Derivation | None:
        """Return what was derived from a bundle before; None if this version has not read the bundle yet."""
        return self._store.derivation(digest, self._version)


def too_large(size: int, limits: _rules.Limits) -> ServiceError:
    """The refusal of programs of so many bytes."""
    return ServiceError(
        Code.INVALID_ARGUMENT,
        _rules.PROGRAM_TOO_LARGE,
        f"the bundle is refused: its programs have {size >> 20} MiB, {limits.bundle_bytes >> 20} MiB are taken; "
        "pass large arrays as data",
    )


def _printable(text: str) -> str:
    """Return one line without control characters, because words of a program go into logs and on terminals."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))


@contextlib.contextmanager
def _file(programs: Mapping[str, bytes]) -> Iterator[IO[bytes]]:
    """A file without a name: a line that lists [name, size] of each program, then their bytes."""
    in_memory = hasattr(os, "memfd_create")
    with os.fdopen(os.memfd_create("hvpd-programs"), "wb") if in_memory else tempfile.TemporaryFile() as file:
        file.write(json.dumps([[name, len(blob)] for name, blob in programs.items()]).encode() + b"\n")
        for blob in programs.values():
            file.write(blob)
        file.flush()
        yield file


def _environment() -> dict[str, str]:
    found = {name: os.environ[name] for name in _KEPT if name in os.environ}
    roots = dict.fromkeys(str(Path(module).parents[1]) for module in (hvpd.__file__, __file__))
    paths = [*roots, *filter(None, [found.get("PYTHONPATH")])]
    # The device is not this process's, and it has nothing to compute.
    return found | {
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
