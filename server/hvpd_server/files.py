"""Files that are replaced as a whole, and the versions by which a change is seen."""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

Version = tuple[int, int, int]
"""Inode, size and time of the last change of a file."""


def version(file: Path | int) -> Version | None:
    """Return the version of a file (a path or descriptor); None if there is none."""
    try:
        found = os.stat(file)  # noqa: PTH116 - unlike Path.stat, it takes descriptors
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def atomic_file(
    directory: Path, *, mode: int = 0o600, durable: bool = True
) -> Iterator[tuple[BinaryIO, Callable[[Path], None]]]:
    """Yield a new file, and the function that gives the file its final path.

    A crash leaves the old file of that path, or the new one. Without a call of the
    function, the new file is removed.

    Args:
        directory: Holds the file until then, on the file system of the final path.
        mode: Permissions of the file, before the process's umask.
        durable: Whether the file must be on the disk when the function returns.
    """
    aside = directory / f".{secrets.token_hex(8)}"
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:

            def commit(path: Path) -> None:
                file.flush()
                if durable:
                    os.fsync(file.fileno())
                path.parent.mkdir(exist_ok=True)  # Now, so that a full disk leaves no directory.
                aside.replace(path)
                if durable:
                    _flush_directory(path.parent)

            yield file, commit
    finally:
        aside.unlink(missing_ok=True)


def _flush_directory(path: Path) -> None:
    """Write a directory's entries to the disk, otherwise a power failure can undo a
    rename.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
