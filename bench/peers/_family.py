"""A process with all its descendants (Linux): their memory, and their end."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_GRACE_SECONDS = 10.0


class Member(NamedTuple):
    """A process. Its start tells it from a later process with the same number."""

    pid: int
    started: str


def members(pid: int) -> list[Member]:
    """Return a process and its descendants, as they are now."""
    found: list[Member] = []
    waiting = [pid]
    while waiting:
        each = waiting.pop()
        if (started := _started(each)) is None:
            continue
        found.append(Member(each, started))
        for task in _listed(Path(f"/proc/{each}/task")):
            with contextlib.suppress(OSError):
                waiting += map(int, (task / "children").read_text().split())
    return found


def used_bytes(pid: int) -> int:
    """Return the memory of a process and its descendants. Pages that several of them
    share count once (proc(5), Pss).
    """
    total = 0
    for member in members(pid):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def end(family: Iterable[Member]) -> None:
    """End those processes that still run, and wait until they are gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [member for member in family if _started(member.pid) == member.started]
        for member in left:
            with contextlib.suppress(OSError):
                os.kill(member.pid, number)
        ends = time.monotonic() + _GRACE_SECONDS
        while any(_started(member.pid) == member.started for member in left) and time.monotonic() < ends:
            time.sleep(0.02)


def _started(pid: int) -> str | None:
    """Return when a process started. None if it is gone or has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
