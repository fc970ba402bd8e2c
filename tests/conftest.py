"""What all tests share: real servers as child processes, on free ports, stopped whatever happens."""

import collections
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hvpd

_WAIT = 120.0


class Serving:
    """A server process that can be killed and started again on the same port and store: what `hvpd serve` supervises, or that."""

    def __init__(
        self,
        store: Path,
        *flags: str,
        host: str = "127.0.0.1",
        environment: dict[str, str] | None = None,
        supervised: bool = False,
    ) -> None:
        self._command = ["hvpd._cli", "serve"] if supervised else ["hvpd_server"]
        self.store = store
        self._flags = flags
        self._environment = os.environ | {"PYTHONFAULTHANDLER": "1"} | (environment or {})
        self._host = host
        self.port = 0
        self.lines: list[str] = []
        self.start()

    @property
    def address(self) -> str:
        return f"{self._host}:{self.port}"

    def start(self) -> None:
        """Starts it and waits until it says that it serves."""
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", *self._command, "--host", self._host, "--port", str(self.port)),
                *("--store", str(self.store), "--metrics-port", "0", *self._flags),
            ],
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",  # gRPC logs what strangers sent, as it came.
            env=self._environment,
        )
        ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(self.process, ready), daemon=True)
        self._reader.start()
        assert ready.wait(_WAIT), self.lines
        assert self.process.poll() is None, self.lines

    def _read(self, process: "subprocess.Popen[str]", ready: threading.Event) -> None:
        assert process.stderr is not None
        with process.stderr as stderr:
            for line in stderr:
                self.lines.append(line.rstrip())
                if found := re.search(r"hvpd: serving on [^\s\"]*:(\d+)", line):
                    self.port = int(found[1])
                    ready.set()
        ready.set()

    def metric(self, name: str) -> float:
        """The sum of a metric's samples over its labels."""
        said = next(line for line in reversed(self.lines) if "hvpd: metrics on " in line)
        with urllib.request.urlopen(said.split(" on ")[1], timeout=30) as response:
            text = response.read().decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}[ {{}}]", line))

    def kill(self) -> None:
        """`kill -9`."""
        self.process.kill()
        self.process.wait(_WAIT)
        self._reader.join(_WAIT)

    def terminate(self) -> int:
        """SIGTERM; returns the exit code. Who does not end says where it is."""
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_WAIT)
        if hangs := self.process.poll() is None:
            self.process.send_signal(signal.SIGABRT)
            self.process.wait(_WAIT)
        self._reader.join(_WAIT)
        assert not hangs, "\n".join(self.lines)
        return self.process.returncode


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--target", metavar="HOST:PORT", help="run the end-to-end tests that allow it against this server")


@pytest.fixture
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Serving]]:
    """Starts servers, which end with the test: serve(*flags, store=..., environment=..., supervised=...)."""
    yield from _starting(tmp_path_factory)


@pytest.fixture(scope="module")
def serve_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Serving]]:
    """Starts servers, as `serve` does, which end with the module."""
    yield from _starting(tmp_path_factory)


def _starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Serving]]:
    started: list[Serving] = []

    def start(*flags: str, store: Path | None = None, **settings: Any) -> Serving:
        started.append(Serving(store or tmp_path_factory.mktemp("store"), *flags, **settings))
        return started[-1]

    yield start
    for serving in started:
        if serving.process.poll() is None:
            serving.kill()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One server for all tests that leave it as it was."""
    serving = Serving(tmp_path_factory.mktemp("store"))
    yield serving
    serving.kill()


@pytest.fixture(scope="session")
def client(request: pytest.FixtureRequest) -> Iterator[hvpd.Client]:
    """A client of that server, or of --target."""
    target = request.config.getoption("--target")
    with contextlib.closing(hvpd.connect(target or request.getfixturevalue("server").address)) as connected:
        yield connected


# How many inputs were tried, of which kind

_tried: collections.Counter[str] = collections.Counter()


@pytest.fixture(scope="session")
def tried() -> Callable[..., None]:
    """Counts inputs: tried("messages")."""
    return lambda what, count=1: _tried.update({what: count})


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a process of pytest-xdist, tells the one that sums up."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["tried"] = dict(_tried)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A process of pytest-xdist is done."""
    _tried.update(getattr(node, "workeroutput", {}).get("tried", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _tried:
        terminalreporter.section("inputs tried")
        for what, count in sorted(_tried.items()):
            terminalreporter.write_line(f"{count:>10,}  {what}")
