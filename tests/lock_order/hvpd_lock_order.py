"""Checks the order in which the server's threads take locks, while tests run.

`install` replaces threading.Lock and threading.RLock, which threading.Condition uses,
too. Locks that the server's code makes get a name, such as `Batcher._lock`, and a level
from the tables of docs/architecture/concurrency.md. A thread that waits for a lock
while it holds another one of the same or a later level breaks the order. This is
reported even if no deadlock follows in this run. If every thread keeps the order, no
cycle is possible.

A lock that is only tried (`acquire(blocking=False)`) cannot deadlock, so it may be
taken in any order.
"""

import linecache
import os
import re
import sys
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "server" / "hvpd_server"
TABLES = ROOT / "docs" / "architecture" / "concurrency.md"
REPORT = "LOCK_ORDER_REPORT"
"""Environment variable with the path of the file that gets each fault. Its name does
not begin with HVPD_, because clients warn of such names.
"""

END = "\0"
"""Ends each fault in the report."""

NESTS_IN_ITSELF = {"device/residency.py Residency._loading"}
"""Locks of which a thread may hold several: the load of a point loads its data."""

_ROW = re.compile(r"^\| `([\w/]+\.py)` `(\w+\.\w+)`")
_MADE = re.compile(r"threading\.(?:R?Lock|Condition)\(")
_MEMBER = re.compile(r"self\.(\w+)")


def levels(page: str) -> dict[str, int]:
    """Return the level of each lock in the page's tables. All leaves have one level.
    Each other lock has a level of its own.
    """
    found: dict[str, int] = {}
    level, among_leaves = 0, False
    for line in page.splitlines():
        if line.startswith("| leaf "):
            level, among_leaves = level + 1, True
        elif not line.startswith("|"):
            among_leaves = False
        if row := _ROW.match(line):
            level += not among_leaves
            found[f"{row[1]} {row[2]}"] = level
    return found


def name_of(file: str, line: str, function: str) -> str:
    """Return the name of a lock that is made in a line of source, in a method."""
    member = _MEMBER.search(line)
    return f"{Path(file).relative_to(SERVER).as_posix()} {function.split('.', maxsplit=1)[0]}.{member[1] if member else '?'}"


class _Held(threading.local):
    def __init__(self) -> None:
        self.locks: list[_Lock] = []


_held = _Held()
_told: set[tuple[str, str]] = set()
_Real, _RealRecursive = threading.Lock, threading.RLock


class _Lock:
    """A lock that knows its place in the order."""

    def __init__(self, real, name, level):
        self._real = real
        self.name = name
        self.level = level
        self._lists = []  # Of the threads that hold it: another thread may release it.

    def acquire(self, blocking=True, timeout=-1):
        held = _held.locks
        if held and blocking and self not in held:
            for other in held:
                if other.level >= self.level and not (other.name == self.name and self.name in NESTS_IN_ITSELF):
                    report(other.name, self.name)
        if taken := self._real.acquire(blocking, timeout):
            held.append(self)
            self._lists.append(held)
        return taken

    def release(self):
        if self._lists:
            self._lists.pop().remove(self)
        self._real.release()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *error):
        self.release()

    def locked(self):
        return self._real.locked()


class _RecursiveLock(_Lock):
    """The same for threading.RLock, with the methods that threading.Condition uses."""

    def _is_owned(self):
        return self._real._is_owned()

    def _release_save(self):
        lists, self._lists = self._lists, []
        for each in lists:
            each.remove(self)
        return self._real._release_save(), lists

    def _acquire_restore(self, saved):
        state, lists = saved
        self._real._acquire_restore(state)
        for each in lists:
            each.append(self)
        self._lists = lists


def report(held: str, taken: str) -> None:
    """Write a fault and its stack to the report and to stderr."""
    if (held, taken) in _told:
        return
    _told.add((held, taken))
    fault = f"a thread takes {taken} while it holds {held}: docs/architecture/concurrency.md has another order"
    stack = "".join(traceback.format_stack(limit=12)[:-2])
    sys.stderr.write(f"lock order: {fault}\n{stack}")
    if path := os.environ.get(REPORT):
        with Path(path).open("a") as file:
            file.write(f"{fault}\n{stack}{END}")


def install() -> None:
    """Watch the locks that the server's code makes from now on."""
    order = levels(TABLES.read_text())
    server = str(SERVER)

    def watched(kind, real):
        frame = sys._getframe(2)
        if frame.f_code.co_qualname == "Condition.__init__":
            frame = frame.f_back
        file = frame.f_code.co_filename
        line = linecache.getline(file, frame.f_lineno)
        if not (file.startswith(server) and _MADE.search(line)):  # Or compiled code makes it, such as numpy's.
            return real
        name = name_of(file, line, frame.f_code.co_qualname)
        return kind(real, name, order.get(name, -1))

    class Factory:
        """Makes locks. Unlike a function, it can be an attribute of a class, as in
        werkzeug.
        """

        def __init__(self, kind, real):
            self._kind, self._real = kind, real

        def __call__(self):
            return watched(self._kind, self._real())

    threading.Lock = Factory(_Lock, _Real)
    threading.RLock = Factory(_RecursiveLock, _RealRecursive)
