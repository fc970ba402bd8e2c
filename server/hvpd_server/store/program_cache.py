"""The files of compiled programs, STORE/cache, within a number of bytes.

A file's name begins with the digest of its objective, so it counts for the tenants of
that objective. Objectives of a tenant that differ only in the content of their data
share a file by links, and each link counts. jax keeps small programs of the server
itself there, which count for no tenant.
"""

import collections
import contextlib
import stat
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from hvpd_server.tenancy.fair_share import Holding, surplus

_KEPT = 15 / 16
"""Share of the most bytes that stays in a full cache, otherwise every new file would be
a reason to list all files.
"""


class ProgramCache:
    """Counts the files of compiled programs, and removes some when there are too many.

    Args:
        directory: Directory of the files.
        most_bytes: Most bytes of all files.
        tenants_of: Returns the tenants of an objective.
        limit_of: Returns the most bytes of a tenant's files; None for no limit.
    """

    def __init__(
        self,
        directory: Path,
        most_bytes: int,
        tenants_of: Callable[[str], Collection[str]] = lambda digest: (),
        limit_of: Callable[[str], int | None] = lambda tenant: None,
    ) -> None:
        self.directory = directory
        self.most_bytes = most_bytes
        self._tenants_of = tenants_of
        self._limit_of = limit_of
        self._lock = threading.Lock()
        self._bytes: collections.Counter[str] = collections.Counter()  # By digest of the objective; empty for others.
        self._count()

    def path(self, digest: str, key: str) -> Path:
        """Return the path of a program of an objective."""
        return self.directory / f"{digest}-{key}"

    def borrow(self, digest: str, key: str, tenants: Collection[str]) -> None:
        """Give an objective a program that another objective of one of its tenants has,
        if there is one. The file counts for both.

        Without tenants, the other objective must have none. Another tenant's program is
        left out, because its tenant would show in the time of a registration.
        """
        path = self.path(digest, key)
        for other in self.directory.glob(f"*-{key}"):
            theirs = self._tenants_of(_objective_of(other))
            if not (set(tenants) & set(theirs) or not (tenants or theirs)):
                continue
            with contextlib.suppress(OSError):  # It is gone, or the disk has no links.
                path.hardlink_to(other)
                self.written(digest, path.stat().st_size)
                return

    def bytes_of(self, tenant: str) -> int:
        """Return the bytes of a tenant's files; of all if empty."""
        with self._lock:
            found = list(self._bytes.items())
        return sum(size for digest, size in found if not tenant or tenant in self._tenants_of(digest))

    def written(self, digest: str, size_bytes: int) -> int:
        """Count a new file of an objective. Return the number of files that were
        removed for it.
        """
        with self._lock:
            self._bytes[digest] += size_bytes
            full = self._bytes.total() > self.most_bytes
        limits = {tenant: self._limit_of(tenant) for tenant in self._tenants_of(digest)}
        over = any(limit is not None and self.bytes_of(tenant) > limit for tenant, limit in limits.items())
        return self.trim() if full or over else 0

    def trim(self) -> int:
        """Remove files of tenants over their limits, and, if the cache is full, of the
        tenants that have most. Return the number of removed files.
        """
        dropped = surplus(self._count(), self.most_bytes, self._limit_of, kept=_KEPT)
        for each in dropped:
            self._remove(each.entry, each.size_bytes)
        return len(dropped)

    def forget(self, digest: str) -> None:
        """Remove the files of an objective."""
        for path in self.directory.glob(f"{digest}-*") if self._bytes[digest] else ():
            self._remove(path, 0)
        with self._lock:
            del self._bytes[digest]

    def _remove(self, path: Path, size_bytes: int) -> None:
        with contextlib.suppress(OSError):  # Gone already, or not for this process to remove.
            path.unlink()
            with self._lock:
                self._bytes[_objective_of(path)] -= size_bytes

    def _count(self) -> list[Holding[Path]]:
        """Count all files anew, and return them."""
        holdings = []
        for path in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    tenants = self._tenants_of(_objective_of(path))
                    used = max(status.st_atime, status.st_mtime)
                    holdings.append(Holding(path, tenants, status.st_size, used))
        found: collections.Counter[str] = collections.Counter()
        for each in holdings:
            found[_objective_of(each.entry)] += each.size_bytes
        with self._lock:
            self._bytes = found
        return holdings


def _objective_of(path: Path) -> str:
    """Return the digest of a file's objective; empty if it is of none."""
    digest, dash, _ = path.name.partition("-")
    return digest if dash and len(digest) == 64 else ""
