"""An embedded server: a child process that never outlives its owner."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any

from hvpd._client import Client
from hvpd._connect import client_of
from hvpd._errors import HvpdError, InvalidArgumentError, MissingExtraError
from hvpd._progress import reporter
from hvpd._transport.transport import Transport
from hvpd_server import config

_READY = "hvpd: serving on "

_WRONG_USAGE, _USAGE = 2, ": error: "
"""Exit code of argparse, and the words before its message."""

_NOT_OURS = ("tls_cert", "tls_key", "tls_client_ca", "tokens", "log_format", "group", "leader", "rank", "size")
"""Settings that an embedded server does not have.

It listens on loopback for its owner, which has no token and reads its log lines. It is
one process."""


def missing_packages() -> list[str]:
    """Return the packages that a server needs and that are not installed."""
    needed = ("jax", "flatbuffers", "grpc_health", "prometheus_client")
    return [name for name in needed if not importlib.util.find_spec(name)]


class LocalServer:
    """The child process.

    Args:
        settings: Settings of `hvpd serve`, such as `memory_budget="4G"`. Without
            `store`, a temporary directory is the store.

    Raises:
        MissingExtraError: The server's packages are not installed.
        HvpdError: The server did not start; the message has its last lines.
    """

    def __init__(self, **settings: Any) -> None:
        if missing := missing_packages():
            raise MissingExtraError(f"an embedded server needs {', '.join(missing)}: pip install 'hvpd[server]'")
        known = {field.name for field in dataclasses.fields(config.Config)} - set(_NOT_OURS)
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise InvalidArgumentError(
                f"hvpd serve has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}",
                reason="UNKNOWN_SETTING",
            )
        ephemeral = "store" not in settings
        if ephemeral:
            settings["store"] = tempfile.mkdtemp(prefix="hvpd-")
        arguments = []
        for name, value in {"host": "127.0.0.1", "port": 0, "log_level": "WARNING", **settings}.items():
            arguments += [f"--{name.replace('_', '-')}"] + (
                [] if value is True else [os.fspath(value) if isinstance(value, Path) else str(value)]
            )
        self.process = subprocess.Popen(  # noqa: S603 - this interpreter, our own module
            [sys.executable, "-m", "hvpd_server", *arguments],
            stdin=subprocess.PIPE,  # Its end of file tells the child that its owner has ended.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ
            | {f"HVPD_{name.upper()}": "" for name in (*_NOT_OURS, "config")}
            | {"HVPD_OWNED": "ephemeral" if ephemeral else "1"},
            start_new_session=True,  # So that Ctrl-C interrupts the solver, and not the server.
        )
        self._lines: collections.deque[str] = collections.deque(maxlen=50)
        self._ready: concurrent.futures.Future[str] = concurrent.futures.Future()
        self._reader = threading.Thread(target=self._read, name="hvpd-local", daemon=True)
        self._reader.start()
        self.stop = weakref.finalize(self, _stop, self.process, os.getpid(), settings["store"] if ephemeral else None)
        self.address = self._ready.result()
        if not self.address:
            self.stop()
            last = self._lines[-1] if self._lines else ""
            if self.process.returncode == _WRONG_USAGE and _USAGE in last:  # The lines before it list all settings.
                raise InvalidArgumentError(f"hvpd serve: {last.partition(_USAGE)[2]}", reason="INVALID_OPTION")
            raise HvpdError(
                "the embedded server did not start:\n" + "\n".join(self._lines), reason="SERVER_NOT_STARTED"
            )

    def _read(self) -> None:
        """Keep the child's last lines, and never let its pipe fill up."""
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            for line in stderr:
                self._lines.append(line.rstrip())
                if line.startswith(_READY):
                    self._ready.set_result(line.removeprefix(_READY).strip())
        if not self._ready.done():
            self._ready.set_result("")

    def check(self) -> None:
        """Raise if the server has ended.

        Raises:
            HvpdError: It has ended; the message has its exit code or signal.
        """
        code = self.process.poll()
        if code is not None:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise HvpdError(f"the embedded server ended ({how}): call hvpd.local() again", reason="SERVER_ENDED")


def _stop(process: "subprocess.Popen[str]", owner: int, ephemeral_store: str | None) -> None:
    if os.getpid() != owner:  # A fork of the owner ends, which does not own the server.
        return
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if ephemeral_store is not None:
        shutil.rmtree(ephemeral_store, ignore_errors=True)


def local(**settings: Any) -> Client:
    """Start an embedded server and connect to it.

    Both end with the client, or with this process.

    Args:
        settings: Settings of `hvpd serve`, and `retry_timeout`, `timeout` and
            `progress` of `connect`. Without `store` nothing is kept.

    Raises:
        MissingExtraError: The server's packages are not installed here.
        HvpdError: The server did not start; the message has its last lines.

    Example:
        >>> client = hvpd.local(memory_budget="4G")
    """
    connection: dict[str, Any] = {"retry_timeout": 60.0, "timeout": None, "progress": None}
    connection |= {name: settings.pop(name) for name in tuple(connection) if name in settings}
    connection["reporter"] = reporter(connection.pop("progress"))
    with connection["reporter"].stage("starting a server"):
        server = LocalServer(**settings)
    try:
        transport = Transport(server.address, token=None, connect_timeout=None, **connection)
    except BaseException:
        server.stop()
        raise
    transport.check_server = server.check
    return client_of(transport, on_close=server.stop)
