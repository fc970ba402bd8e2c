"""An embedded server: a child process with a store of its own, which never outlives its owner."""

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
from hvpd._errors import HvpdError, InvalidArgumentError, MissingExtraError
from hvpd._transport import Transport
from hvpd_server import _config

_READY = "hvpd: serving on "

_NOT_OURS = ("tls_cert", "tls_key", "tls_client_ca", "tokens", "log_format")
"""Settings of servers that others call: an embedded one is on loopback, for its owner, who has no token for it, and reads its lines."""


def missing_packages() -> list[str]:
    """What is not installed here of what a server needs."""
    needed = ("jax", "flatbuffers", "grpc_health", "prometheus_client")
    return [name for name in needed if not importlib.util.find_spec(name)]


class LocalServer:
    """The child process.

    Args:
        settings: Of `hvpd serve`, by their names: `memory_budget="4G"`. The store is a temporary directory, removed at the
            end, unless one is given.

    Raises:
        MissingExtraError: The server's packages are not installed.
        HvpdError: It did not start; the message has its last lines.
    """

    def __init__(self, **settings: Any) -> None:
        if missing := missing_packages():
            raise MissingExtraError(f"an embedded server needs {', '.join(missing)}: pip install 'hvpd[server]'")
        known = {field.name for field in dataclasses.fields(_config.Config)} - set(_NOT_OURS)
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise InvalidArgumentError(
                f"hvpd serve has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}"
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
            stdin=subprocess.PIPE,  # Its end of file tells the child that its owner is gone, however that went.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ
            | {f"HVPD_{name.upper()}": "" for name in _NOT_OURS}
            | {"HVPD_OWNED": "ephemeral" if ephemeral else "1"},
            start_new_session=True,  # Ctrl-C is for the solver, not for the server under it.
        )
        self._lines: collections.deque[str] = collections.deque(maxlen=50)
        self._ready: concurrent.futures.Future[str] = concurrent.futures.Future()
        self._reader = threading.Thread(target=self._read, name="hvpd-local", daemon=True)
        self._reader.start()
        self.stop = weakref.finalize(self, _stop, self.process, os.getpid(), settings["store"] if ephemeral else None)
        self.address = self._ready.result()
        if not self.address:
            self.stop()
            raise HvpdError("the embedded server did not start:\n" + "\n".join(self._lines))

    def _read(self) -> None:
        """Keeps the child's last lines, passes warnings on, and never lets its pipe fill up."""
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            for line in stderr:
                self._lines.append(line.rstrip())
                if line.startswith(_READY):
                    self._ready.set_result(line.removeprefix(_READY).strip())
        if not self._ready.done():
            self._ready.set_result("")


def _stop(process: "subprocess.Popen[str]", owner: int, ephemeral_store: str | None) -> None:
    if os.getpid() != owner:  # A fork of the owner ends; the server is not its own.
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
    """Starts an embedded server and connects to it; both end with the client, or with this process.

    Args:
        settings: Of `hvpd serve`, by their names: `hvpd.local(memory_budget="4G")`; also `connect`'s `retry_timeout` and
            `timeout`. Without `store` nothing is kept.

    Raises:
        MissingExtraError: The server's packages are not installed here.
        HvpdError: The server did not start; the message has its last lines.
    """
    connection: dict[str, Any] = {"retry_timeout": 60.0, "timeout": None}
    connection |= {name: settings.pop(name) for name in tuple(connection) if name in settings}
    server = LocalServer(**settings)
    try:
        transport = Transport(server.address, token=None, connect_timeout=10.0, **connection)
    except BaseException:
        server.stop()
        raise
    return Client(transport, on_close=server.stop)
