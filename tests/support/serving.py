"""Processes of tests: a server on a free port, and a command that runs to its end."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from hvpd_server.admission import spawn
from tests.support.zygote import Fork, UnsuitedError, Zygote

_WAIT = 120.0

_FAULTS = {"PYTHONFAULTHANDLER": "1"}
"""Variables of all servers: a crash logs the stacks."""


class Zygotes:
    """The zygotes of commands, servers and vetters. Each starts when it is needed."""

    def __init__(self) -> None:
        self._started: dict[str, Zygote] = {}

    def address(self, module: str, environment: Mapping[str, str]) -> str:
        """Return the address of a module's zygote. The environment is that of the first
        call.
        """
        if module not in self._started:
            self._started[module] = Zygote(module, environment)
        return self._started[module].address

    def vetters(self) -> str:
        """Return the address of the zygote of vetters."""
        return self.address("hvpd_server.admission.vetting_process", spawn.environment())

    def commands(self) -> str:
        """Return the address of the zygote of `hvpd`."""
        return self.address("hvpd._cli", os.environ | _FAULTS)

    def close(self) -> None:
        """End the zygotes."""
        for zygote in self._started.values():
            zygote.close()


def run(
    zygotes: Zygotes | None, arguments: Sequence[str], environment: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run `hvpd` with arguments to its end, and return its output.

    Args:
        zygotes: Fork the command. None: start a Python process.
        arguments: Arguments of the command.
        environment: Variables beside those of this process.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = _command(zygotes, arguments, environment, (0, out.fileno(), err.fileno()))
        try:
            code = process.wait(_WAIT)
        except BaseException:
            process.kill()
            process.wait()
            raise
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(["hvpd", *arguments], code, out.read(), err.read())


def _command(
    zygotes: Zygotes | None, arguments: Sequence[str], environment: Mapping[str, str], streams: tuple[int, int, int]
) -> "Fork | subprocess.Popen[bytes]":
    if zygotes is not None:
        forked = os.environ | _FAULTS | environment
        with contextlib.suppress(UnsuitedError):
            return Fork(zygotes.commands(), streams, arguments, forked, vetters=zygotes.vetters())
    stdin, stdout, stderr = streams
    command = [sys.executable, "-m", "hvpd._cli", *arguments]
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, env=os.environ | environment)


class Serving:
    """A server process that can be killed and started again on the same port and store.

    Args:
        store: The server's store.
        flags: Flags of `hvpd serve`.
        host: The address to listen on.
        environment: Variables beside those of this process.
        supervised: Whether to start `hvpd serve`, with its supervisor.
        zygotes: Fork the server, or its supervisor, which forks the server from itself.
            None: start Python processes with the true command lines.
    """

    def __init__(
        self,
        store: Path,
        *flags: str,
        host: str = "127.0.0.1",
        environment: dict[str, str] | None = None,
        supervised: bool = False,
        zygotes: Zygotes | None = None,
    ) -> None:
        self._module, self._command = ("hvpd._cli", ["serve"]) if supervised else ("hvpd_server", [])
        self.store = store
        self._flags = flags
        self._environment = os.environ | _FAULTS | (environment or {})
        self._zygotes = zygotes
        self._host = host
        self.port = 0
        self.lines: list[str] = []
        self.start()

    @property
    def address(self) -> str:
        return f"{self._host}:{self.port}"

    def start(self) -> None:
        """Start the server and wait for its ready line."""
        self.process, stderr = self._process()
        ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(stderr, ready), daemon=True)
        self._reader.start()
        assert ready.wait(_WAIT), self.lines
        assert self.process.poll() is None, self.lines

    def _process(self) -> "tuple[Fork | subprocess.Popen[bytes], IO[str]]":
        """Start a process, and return it with its stderr."""
        flags = ["--host", self._host, "--port", str(self.port), "--store", str(self.store), "--metrics-port", "0"]
        arguments = [*self._command, *flags, *self._flags]
        read, write = os.pipe()
        # gRPC logs the bytes that strangers sent.
        stderr = os.fdopen(read, encoding="utf-8", errors="backslashreplace")
        with os.fdopen(write, "wb"):
            if self._zygotes is not None:
                found = self._zygotes
                address = found.commands() if self._command else found.address(self._module, os.environ | _FAULTS)
                with contextlib.suppress(UnsuitedError):
                    streams, vetters = (0, 1, write), found.vetters()
                    return Fork(address, streams, arguments, self._environment, vetters=vetters), stderr
            command = [sys.executable, "-m", self._module, *arguments]
            return subprocess.Popen(command, stderr=write, env=self._environment), stderr

    def _read(self, stderr: IO[str], ready: threading.Event) -> None:
        with stderr:
            for line in stderr:
                self.lines.append(line.rstrip())
                if found := re.search(r"hvpd: serving on [^\s\"]*:(\d+)", line):
                    self.port = int(found[1])
                    ready.set()
        ready.set()

    def metric(self, name: str) -> float:
        """Return the sum of a metric's samples over its labels."""
        said = next(line for line in reversed(self.lines) if "hvpd: metrics on " in line)
        with urllib.request.urlopen(said.split(" on ")[1], timeout=30) as response:
            text = response.read().decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}[ {{}}]", line))

    def kill(self) -> None:
        """End the server with SIGKILL."""
        self.process.kill()
        self.process.wait(_WAIT)
        self._reader.join(_WAIT)

    def terminate(self) -> int:
        """Send SIGTERM; return the exit code. A server that does not end logs its
        stacks.
        """
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_WAIT)
        if hangs := self.process.poll() is None:
            self.process.send_signal(signal.SIGABRT)
            self.process.wait(_WAIT)
        self._reader.join(_WAIT)
        assert not hangs, "\n".join(self.lines)
        return self.process.returncode
