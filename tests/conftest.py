"""Fixtures of all tests: real servers as child processes on free ports, which always
end with the test.
"""

import collections
import contextlib
import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import hvpd
from tests.support.serving import Serving, Zygotes, run

if not Path("/dev/nvidiactl").exists():
    # XLA compiles for a CPU in a tenth of the time if it does not optimize.
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
        "--xla_cpu_parallel_codegen_split_count=1",
    )

# A test fails because of its result, and never because the machine has other work.
hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")

pytest_plugins = ["tests.lock_order.plugin"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--target", metavar="HOST:PORT", help="run the end-to-end tests that allow it against this server")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import files whose tests are all slow, if slow tests are left out."""
    if config.option.markexpr == "not slow" and collection_path.suffix == ".py":
        return "\npytestmark = pytest.mark.slow" in collection_path.read_text("utf-8") or None
    return None


@pytest.fixture(scope="module", autouse=True)
def _garbage() -> None:
    """Let the garbage collector look at what a module's tests made, and at nothing
    older. Otherwise it spends a seventh of the time on what was imported.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _x64_mode() -> Iterator[None]:
    """Reset jax's x64 mode, which some libraries set when they are imported."""
    before = "jax" in sys.modules and sys.modules["jax"].config.jax_enable_x64
    yield
    if "jax" in sys.modules and sys.modules["jax"].config.jax_enable_x64 != before:
        sys.modules["jax"].config.update("jax_enable_x64", before)


@pytest.fixture(scope="session")
def zygotes() -> Iterator[Zygotes | None]:
    """Fork the servers of tests, which is faster than starting Python for each."""
    if sys.platform != "linux":
        yield None
        return
    with contextlib.closing(Zygotes()) as opened:
        yield opened


@pytest.fixture(scope="session")
def command(zygotes: Zygotes | None) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run the command `hvpd` to its end: command(*arguments, **environment)."""

    def command(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return run(zygotes, arguments, environment)

    return command


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of compiled programs of all servers whose store is new. A test
    about compiling gives its server another one: serve(cache=tmp_path).
    """
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def serve(
    tmp_path_factory: pytest.TempPathFactory, zygotes: Zygotes | None, compiled_programs: Path
) -> Iterator[Callable[..., Serving]]:
    """Start servers, which end with the test: serve(*flags, store=..., cache=...,
    environment=..., supervised=..., forked=...). With forked=False, the server and its
    vetter are started by their true command lines.
    """
    yield from _starting(tmp_path_factory, zygotes, compiled_programs)


@pytest.fixture(scope="module")
def serve_module(
    tmp_path_factory: pytest.TempPathFactory, zygotes: Zygotes | None, compiled_programs: Path
) -> Iterator[Callable[..., Serving]]:
    """Start servers as `serve` does. They end with the module."""
    yield from _starting(tmp_path_factory, zygotes, compiled_programs)


def _starting(
    tmp_path_factory: pytest.TempPathFactory, zygotes: Zygotes | None, compiled_programs: Path
) -> Iterator[Callable[..., Serving]]:
    started: list[Serving] = []

    def start(
        *flags: str,
        store: Path | None = None,
        cache: Path = compiled_programs,
        forked: bool = True,
        **settings: Any,
    ) -> Serving:
        if store is None:
            store = tmp_path_factory.mktemp("store")
            (store / "cache").symlink_to(cache)
        started.append(Serving(store, *flags, zygotes=zygotes if forked else None, **settings))
        return started[-1]

    yield start
    for serving in started:
        if serving.process.poll() is None:
            serving.kill()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, compiled_programs: Path) -> Iterator[Serving]:
    """Yield one server for all tests that leave it unchanged, started by its true
    command line.
    """
    store = tmp_path_factory.mktemp("store")
    (store / "cache").symlink_to(compiled_programs)
    serving = Serving(store)
    yield serving
    serving.kill()


@pytest.fixture(scope="session")
def client(request: pytest.FixtureRequest) -> Iterator[hvpd.Client]:
    """Yield a client of that server, or of --target."""
    target = request.config.getoption("--target")
    connected = hvpd.connect(target or request.getfixturevalue("server").address)
    yield connected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hvpd.CurvatureWarning)  # Tests register wrong objectives, too.
        connected.close()


# Counts of tried inputs, by kind

_tried: collections.Counter[str] = collections.Counter()


@pytest.fixture(scope="session")
def tried() -> Callable[..., None]:
    """Count inputs: tried("messages"). If $HVPD_FUZZ_COUNTS names a file, add a line
    with the count there.
    """
    file = os.environ.get("HVPD_FUZZ_COUNTS")

    def add(what: str, count: int = 1) -> None:
        _tried[what] += count
        if file:
            with Path(file).open("a", encoding="utf-8") as lines:
                lines.write(f"{count} {what}\n")

    return add


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send this process's counts to the main process of pytest-xdist."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["tried"] = dict(_tried)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Add the counts of a process of pytest-xdist that has ended."""
    _tried.update(getattr(node, "workeroutput", {}).get("tried", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _tried:
        terminalreporter.section("inputs tried")
        for what, count in sorted(_tried.items()):
            terminalreporter.write_line(f"{count:>10,}  {what}")
