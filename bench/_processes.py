"""Children that end with whoever started them, and how much memory a process takes (Linux)."""

import collections
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_PATIENCE_SECONDS = 600.0


class Child:
    """A running process that has said that it is ready."""

    def __init__(self, process: "subprocess.Popen[str]", ready: "re.Match[str]", seconds: float) -> None:
        self.process = process
        self.pid = process.pid
        self.ready = ready
        """The line in which it said so."""
        self.seconds = seconds
        """From exec until it said so."""


@contextlib.contextmanager
def child(argv: Sequence[str], ready: str, *, talks: bool = False) -> Iterator[Child]:
    """Starts a process, waits for the line on its stderr that matches `ready`, ends it in the end.

    Where it talks, its stdout is a pipe, to be read. Its standard input is a pipe, which ends with this process however that goes. Settings of hvpd in the environment are not
    for it: what is measured does not depend on who measures.
    """
    lines: collections.deque[str] = collections.deque(maxlen=30)
    found: list[tuple[re.Match[str], float]] = []
    said = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        with contextlib.suppress(ValueError):  # Closed in the end.
            for line in process.stderr:
                lines.append(line)
                if match := re.search(ready, line.rstrip()):
                    found.append((match, time.perf_counter() - started))
                    said.set()
        said.set()

    reader = threading.Thread(target=read, daemon=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HVPD_")}
    started = time.perf_counter()
    process = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if talks else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # Ctrl-C is for whoever started it, who then ends it.
    )
    try:
        reader.start()
        if not said.wait(_PATIENCE_SECONDS) or not found:
            raise RuntimeError(f"{' '.join(argv[1:4])} did not start:\n{''.join(lines)}")
        yield Child(process, *found[0])
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if reader.ident is not None:
            reader.join(5)
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


@contextlib.contextmanager
def serving(store: Path | None = None, *flags: str) -> Iterator[Child]:
    """A real server on a free port, without the supervisor of `hvpd serve`; its store is a temporary one where none is given."""
    with contextlib.ExitStack() as stack:
        if store is None:
            store = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="hvpd-bench-", ignore_cleanup_errors=True))
            )
        argv = [sys.executable, "-m", "hvpd_server", "--port", "0", "--store", str(store), *flags]
        yield stack.enter_context(child(argv, r"^hvpd: serving on (\S+)$"))


def address(server: Child) -> str:
    """Where a server is."""
    return server.ready[1]


def resident_bytes(pid: int) -> int:
    """Memory that a process has in use."""
    return _status(pid, "VmRSS")


def peak_bytes(pid: int) -> int:
    """The most that it had in use since `reset_peak`."""
    return _status(pid, "VmHWM")


def reset_peak(pid: int) -> None:
    """Begins to look for the most anew (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def available_bytes() -> int:
    """What the machine could still give."""
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable")


def _status(pid: int, field: str) -> int:
    return _kibibytes(Path(f"/proc/{pid}/status"), field)


def _kibibytes(path: Path, field: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10
