"""Child processes that end with their parent, their metrics, and the memory of a
process (Linux).
"""

import collections
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

_PATIENCE_SECONDS = 600.0


class Child:
    """A running process that has printed its ready line."""

    def __init__(
        self,
        process: "subprocess.Popen[str]",
        ready: "re.Match[str]",
        seconds: float,
        lines: Sequence[str],
        latest: Sequence[str],
    ) -> None:
        self.process = process
        self.pid = process.pid
        self.lines = lines
        """The lines on its stderr before it was ready."""
        self.latest = latest
        """The latest 30 lines on its stderr."""
        self.ready = ready
        """The match of the ready line."""
        self.seconds = seconds
        """Seconds from exec until the ready line."""


@contextlib.contextmanager
def child(
    argv: Sequence[str], ready: str, *, talks: bool = False, patience: float = _PATIENCE_SECONDS
) -> Iterator[Child]:
    """Start a process, wait for the line on its stderr that matches `ready`, and end it
    at the end of the context.

    If `talks`, its stdout is a pipe. Its standard input is a pipe, which ends
    whenever this process ends. The child gets no settings of hvpd from the environment,
    so that figures do not depend on them. It may take `patience` seconds to be ready.
    """
    lines: collections.deque[str] = collections.deque(maxlen=30)
    before: list[str] = []
    found: list[tuple[re.Match[str], float]] = []
    said = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        with contextlib.suppress(ValueError):  # The pipe is closed at the end.
            for line in process.stderr:
                lines.append(line)
                if not found:
                    before.append(line)
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
        start_new_session=True,  # Ctrl-C is for the parent, which then ends this child.
    )
    try:
        reader.start()
        if not said.wait(patience) or not found:
            raise RuntimeError(f"{' '.join(argv[1:4])} did not start:\n{''.join(lines)}")
        yield Child(process, *found[0], before, lines)
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
    """Run a real server on a free port, without the supervisor of `hvpd serve`. By
    default its store is temporary.
    """
    with contextlib.ExitStack() as stack:
        if store is None:
            store = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="hvpd-bench-", ignore_cleanup_errors=True))
            )
        argv = [sys.executable, "-m", "hvpd_server", "--port", "0", "--store", str(store), *flags]
        yield stack.enter_context(child(argv, r"^hvpd: serving on (\S+)$"))


def address(server: Child) -> str:
    """Return a server's address."""
    return server.ready[1]


def metric(server: Child, name: str) -> float:
    """Return the sum of a metric's samples. The server serves metrics, on any port.

    Args:
        server: The server.
        name: A regular expression for the name and the labels.
    """
    (address,) = (line.split(" on ")[1] for line in server.lines if line.startswith("hvpd: metrics on "))
    with urllib.request.urlopen(address.strip(), timeout=30) as response:
        text = response.read().decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name} ", line))


def resident_bytes(pid: int) -> int:
    """Return the bytes that a process uses."""
    return _status(pid, "VmRSS")


def peak_bytes(pid: int) -> int:
    """Return the most bytes that it used since `reset_peak`."""
    return _status(pid, "VmHWM")


def reset_peak(pid: int) -> None:
    """Reset the peak of memory (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def available_bytes() -> int:
    """Return the bytes that the machine has available."""
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable")


def _status(pid: int, field: str) -> int:
    return _kibibytes(Path(f"/proc/{pid}/status"), field)


def _kibibytes(path: Path, field: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10
