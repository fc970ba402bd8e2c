"""Where a store keeps its content: files by key, on a disk that servers may share.

A key is a path such as `names/abcd`. `Directory` keeps each under a directory. Several
servers can use one store at once:

- A file appears whole, or not at all.
- `locked` excludes the changes of all other servers.
- `bump` counts a change, and `version` tells whether anything has changed since.

Objects decide nothing: `index`, `store` and `tenant_content` know what the keys mean.
"""

import builtins
import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from hvpd_server.files import atomic_file
from hvpd_server.store.exclusion import Exclusion, busy

CHANGES: Final = "changed"
"""The key whose version changes with each change of objectives, names, owners and the
quarantine.
"""

_POLL_SECONDS = 0.005
"""Seconds between two tries to lock."""

_PIECE = 1 << 20
"""Bytes to read at a time from a file that may be large."""


class CorruptError(Exception):
    """A blob has other bytes than its name says."""


class Entry(NamedTuple):
    """A file of a store."""

    key: str
    """Its key."""
    size: int
    """Its bytes."""
    modified: float
    """Time of its last change, in seconds since 1970."""
    tag: str
    """A text that differs for each version of the file."""

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]


class Objects(Protocol):
    """The files of a store. Safe for many threads, and for several servers.

    Methods raise OSError if the disk or the network fails.
    """

    @property
    def name(self) -> str:
        """The directory, or the URL, for messages."""

    @property
    def local(self) -> Path:
        """Directory of this machine for arriving files and compiled programs."""

    @property
    def quick(self) -> bool:
        """Whether `version` and `stat` take microseconds. If not, only requests for a
        name or a list look at them.
        """

    def get(self, key: str) -> bytes | None:
        """Return the content of a file; None if there is none."""

    def put(self, key: str, content: bytes) -> None:
        """Write a file, in place of an older one."""

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Return the content and the tag of a file; None if there is none."""

    def replace(self, key: str, content: bytes, tag: str | None) -> str | None:
        """Write a file only if its version is still the one of `tag`; None: only if
        there is no file. Return the new tag; None if nothing was written.
        """

    def delete(self, key: str) -> None:
        """Remove a file, if it is there."""

    def stat(self, key: str) -> Entry | None:
        """Return a file without its content; None if there is none."""

    def exists(self, key: str) -> bool:
        """Return whether there is a file."""

    def list(self, folder: str) -> Iterator[Entry]:
        """Yield the files of a folder. A missing folder is empty."""

    def folders(self, folder: str) -> builtins.list[str]:
        """Return the names of the folders in a folder, sorted."""

    def walk(self, folder: str) -> Iterator[Entry]:
        """Yield the files of the folders in a folder."""

    def move(self, key: str, to: str) -> None:
        """Give a file another key, if it is there."""

    def pieces(self, key: str) -> Iterator[bytes]:
        """Yield the content of a blob piece by piece, from the store itself and never
        from a copy.

        Raises:
            FileNotFoundError: There is no such blob.
        """

    def fetch(self, key: str) -> Path:
        """Return a file of this machine with the content of a blob.

        Raises:
            FileNotFoundError: There is no such blob.
            CorruptError: It has other bytes.
        """

    def refetch(self, key: str) -> bool:
        """Drop this machine's copy of a blob. Return whether `fetch` gets another."""

    def placed(self, key: str) -> None:
        """Store a blob that is complete at its path below `local`."""

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Exclude changes by other servers, and by other threads.

        Raises:
            ServiceError: UNAVAILABLE: another server holds the lock for too long.
        """

    def version(self, key: str) -> str:
        """Return a text that differs after each `bump` of the key."""

    def bump(self, key: str, known: str) -> tuple[str, bool]:
        """Count a change. Return the new version, and whether `known` was the last one
        before, so that no other server has changed anything meanwhile.
        """

    def open(self) -> None:
        """Take part in the store. Remove what servers left behind that have ended.

        Raises:
            ServiceError: The store cannot be used.
        """

    def close(self) -> None:
        """Take part in the store no more."""


class Directory:
    """The files of a directory, which servers on several machines may share.

    Args:
        root: The directory, created by `open` if it is missing.
    """

    quick = True

    def __init__(self, root: Path) -> None:
        self.local = root
        self.name = str(root)
        self._exclusion = Exclusion(self.name, self._lock, self._unlock)
        self._lock_file = -1
        self._open_file = -1

    def open(self) -> None:
        """Take part in the store; see `Objects.open`."""
        (self.local / "incoming").mkdir(parents=True, exist_ok=True)
        self._open_file = self._opened("open")
        with contextlib.suppress(BlockingIOError):  # Otherwise files of another server are arriving.
            fcntl.flock(self._open_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in (self.local / "incoming").iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
        fcntl.flock(self._open_file, fcntl.LOCK_SH)

    def close(self) -> None:
        """Take part in the store no more."""
        for descriptor in (self._open_file, self._lock_file):
            if descriptor >= 0:
                os.close(descriptor)
        self._open_file = self._lock_file = -1

    def get(self, key: str) -> bytes | None:
        """Return the content of a file; None if there is none."""
        try:
            return (self.local / key).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, key: str, content: bytes) -> None:
        """Write a file, flushed to the disk."""
        path = self.local / key
        try:
            self._put(path, content)
        except FileNotFoundError:  # A folder is missing.
            for folder in (path.parent, self.local / "incoming"):
                folder.mkdir(parents=True, exist_ok=True)
            self._put(path, content)

    def _put(self, path: Path, content: bytes) -> None:
        with atomic_file(self.local / "incoming") as (file, commit):
            file.write(content)
            commit(path)

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Return the content and the tag of a file; None if there is none."""
        try:
            with (self.local / key).open("rb") as file:
                return file.read(), _entry(key, os.fstat(file.fileno())).tag
        except FileNotFoundError:
            return None

    def replace(self, key: str, content: bytes, tag: str | None) -> str | None:
        """Write a file only if its version is that of `tag`; see `Objects.replace`."""
        with self.locked():
            found = self.stat(key)
            if (found.tag if found else None) != tag:
                return None
            self.put(key, content)
            written = self.stat(key)
            return written.tag if written else None

    def delete(self, key: str) -> None:
        """Remove a file, if it is there."""
        (self.local / key).unlink(missing_ok=True)

    def stat(self, key: str) -> Entry | None:
        """Return a file without its content; None if there is none."""
        try:
            return _entry(key, (self.local / key).stat())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def exists(self, key: str) -> bool:
        """Return whether there is a file."""
        return os.path.exists(f"{self.name}/{key}")  # noqa: PTH110 - a third of the time

    def list(self, folder: str) -> Iterator[Entry]:
        """Yield the files of a folder, sorted."""
        try:
            paths = sorted((self.local / folder).iterdir())
        except FileNotFoundError:
            return
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                yield _entry(f"{folder}/{path.name}", path.stat())

    def folders(self, folder: str) -> builtins.list[str]:
        """Return the names of the folders in a folder, sorted."""
        try:
            return sorted(path.name for path in (self.local / folder).iterdir() if path.is_dir())
        except FileNotFoundError:
            return []

    def walk(self, folder: str) -> Iterator[Entry]:
        """Yield the files of the folders in a folder."""
        for part in self.folders(folder):
            yield from self.list(f"{folder}/{part}")

    def move(self, key: str, to: str) -> None:
        """Give a file another key, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            (self.local / key).rename(self.local / to)

    def pieces(self, key: str) -> Iterator[bytes]:
        """Yield the content of a blob piece by piece."""
        with (self.local / key).open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece

    def fetch(self, key: str) -> Path:
        """Return the file of a blob."""
        path = self.local / key
        if not path.exists():
            raise FileNotFoundError(key)
        return path

    def refetch(self, key: str) -> bool:
        """Return False: the file is the only copy."""
        return False

    def placed(self, key: str) -> None:
        """Do nothing: the file is in its place."""

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Exclude changes by other servers; see `Objects.locked`. A thread can lock
        several times.
        """
        return self._exclusion.held()

    def _lock(self, ends: float) -> None:
        if self._lock_file < 0:
            self._lock_file = self._opened("lock")
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if time.monotonic() > ends:
                raise busy(self.name)
            time.sleep(_POLL_SECONDS)

    def _unlock(self) -> None:
        fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def _opened(self, name: str) -> int:
        try:
            return os.open(self.local / name, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            self.local.mkdir(parents=True, exist_ok=True)
            return os.open(self.local / name, os.O_RDWR | os.O_CREAT, 0o666)

    def version(self, key: str) -> str:
        """Return the length of a file that grows by a byte for each change.

        The file is opened, because a network file system tells the true length then.
        """
        try:
            descriptor = os.open(self.local / key, os.O_RDONLY)
        except FileNotFoundError:
            return "0"
        try:
            return str(os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)

    def bump(self, key: str, known: str) -> tuple[str, bool]:
        """Count a change; see `Objects.bump`."""
        try:
            descriptor = os.open(self.local / key, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except FileNotFoundError:
            (self.local / key).parent.mkdir(parents=True, exist_ok=True)
            return self.bump(key, known)
        try:
            os.write(descriptor, b".")
            length = os.lseek(descriptor, 0, os.SEEK_CUR)
        finally:
            os.close(descriptor)
        return str(length), str(length - 1) == known


def _entry(key: str, status: os.stat_result) -> Entry:
    tag = f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
    return Entry(key, status.st_size, status.st_mtime_ns / 1e9, tag)
