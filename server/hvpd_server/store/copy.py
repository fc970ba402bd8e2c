"""Copies a store to another place: to another directory, or to or from an object store.

What a record refers to comes before the record, so a copy that is broken off serves
nothing that it lacks. The same command again goes on where it ended.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

from hvpd_server.errors import Code, ServiceError
from hvpd_server.files import atomic_file
from hvpd_server.store.objects import CHANGES, CorruptError, Objects

_PIECE = 1 << 20
"""Bytes to copy at a time."""

_RECORDS = ("derived", "checks", "quarantine")
_OWNED = ("blobs", "objectives", "checks")


@dataclasses.dataclass(frozen=True)
class Copied:
    """The outcome of a copy."""

    blobs: int
    """Number of blobs that were copied."""
    blob_bytes: int
    """Their bytes."""
    present: int
    """Number of blobs that were there already."""
    records: int
    """Number of records that were written."""


def copy(source: Objects, target: Objects) -> Copied:
    """Copy a store. Records of the target with the same key are replaced.

    Args:
        source: The store to copy. Servers may use it meanwhile.
        target: Where to copy it.

    Raises:
        ServiceError: A blob is damaged, or one of the stores cannot be used.
        OSError: A disk failed.
    """
    if not any(True for _ in source.list("objectives")):
        raise ServiceError(
            Code.FAILED_PRECONDITION, "STORE_UNAVAILABLE", f"{source.name} is no store of hvpd, or has no objectives"
        )
    # Objectives and names are read first, because what they need was written before.
    last = {entry.key: source.get(entry.key) for folder in ("objectives", "names") for entry in source.list(folder)}
    target.open()
    try:
        count = size = present = records = 0
        for entry in source.walk("blobs"):
            if target.exists(entry.key):
                present += 1
                continue
            size += _copy_blob(source, target, entry.key)
            count += 1
        with target.locked():
            for key in _records(source):
                if (content := source.get(key)) is not None:
                    target.put(key, content)
                    records += 1
            for key, content in last.items():
                if content is not None:
                    target.put(key, content)
                    records += 1
            target.bump(CHANGES, "")
    finally:
        target.close()
    return Copied(count, size, present, records)


def _records(source: Objects) -> Iterator[str]:
    for folder in _RECORDS:
        yield from (entry.key for entry in source.list(folder))
    for tenant in source.folders("owners"):
        for part in _OWNED:
            yield from (entry.key for entry in source.list(f"owners/{tenant}/{part}"))


def _copy_blob(source: Objects, target: Objects, key: str) -> int:
    """Copy a blob, and verify it against its name; return its size."""
    digest, state = key.rpartition("/")[2], hashlib.sha256()
    try:
        path = source.fetch(key)
    except CorruptError:
        raise _damaged(source, digest) from None
    with path.open("rb") as file, atomic_file(target.local / "incoming") as (copied, commit):
        while piece := file.read(_PIECE):
            state.update(piece)
            copied.write(piece)
        if state.hexdigest() != digest:
            raise _damaged(source, digest)
        size = copied.tell()
        (target.local / key).parent.mkdir(parents=True, exist_ok=True)
        commit(target.local / key)
    target.placed(key)
    return size


def _damaged(source: Objects, digest: str) -> ServiceError:
    return ServiceError(
        Code.DATA_LOSS,
        "BLOB_CORRUPT",
        f"blob {digest} of {source.name} is damaged, and was not copied: `hvpd store verify` lists what needs it",
    )
