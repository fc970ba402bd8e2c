"""Verification of a store or a backup: reads everything, changes nothing.

It needs no lock: a reference is read before the files that it names, and is written
after them. Objectives that are deleted meanwhile are no problem.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from hvpd._wire import codec
from hvpd.v1 import objective_pb2
from hvpd_server.bundle import references
from hvpd_server.store.index import name_key
from hvpd_server.store.objects import CHANGES, Directory, Entry, Objects
from hvpd_server.store.store import blob_key


@dataclasses.dataclass(frozen=True)
class Found:
    """The content of a store."""

    objectives: int
    """Number of registered objectives."""
    names: int
    """Number of names."""
    blobs: int
    """Number of blobs."""
    blob_bytes: int
    """Size of the blobs."""
    problems: Sequence[str]
    """Damaged and missing files, one a line; empty if the store is whole."""
    unreferenced: Sequence[str]
    """Digests of blobs that no objective needs, which is no fault: data of other
    points, and uploads without a registration.
    """
    unreferenced_bytes: int
    """Size of these blobs."""


def verify(where: Path | Objects) -> Found:
    """Read a whole store.

    Args:
        where: Directory of a backup, or of a store in use; or the files.

    Raises:
        ValueError: There is no store.
        ServiceError: The object store cannot be read.
        OSError: A directory of the store cannot be read.
    """
    store = Directory(where) if isinstance(where, Path) else where
    # A directory has the folder from the beginning. An object store has no folders.
    if not (store.exists("objectives") or store.exists(CHANGES) or any(store.list("objectives"))):
        raise ValueError(f"{store.name} is no store of hvpd: it has no objectives")
    problems: list[str] = []
    names = _names(store, problems)
    objectives = _objectives(store, problems)
    problems += [
        f"name {name!r} points at {digest}, which is not registered"
        for name, digest in names.items()
        if digest not in objectives and store.exists(name_key(name))
    ]
    _owners(store, problems)
    for part in ("checks", "derived", "quarantine"):
        for entry in _whole(store.list(part)):
            _record(store, entry.key, problems)
    sizes, damaged = _blobs(store, problems)
    needed: set[str] = set()
    for digest in objectives:
        parts = _parts(store, digest, problems) if digest in sizes.keys() - damaged else {digest}
        if not store.exists(f"objectives/{digest}"):
            continue
        lost = [f"{each} is missing" for each in sorted(parts - sizes.keys())]
        lost += [f"{each} is damaged" for each in sorted(parts & damaged)]
        called = " ".join([digest, *(repr(name) for name, to in names.items() if to == digest)])
        problems += [f"objective {called}: its blob {what}" for what in lost]
        needed |= parts
    unreferenced = sorted(sizes.keys() - needed)
    return Found(
        len(objectives),
        len(names),
        len(sizes),
        sum(sizes.values()),
        problems,
        unreferenced,
        sum(sizes[digest] for digest in unreferenced),
    )


def _names(store: Objects, problems: list[str]) -> Mapping[str, str]:
    found = {}
    for entry in _whole(store.list("names")):
        record = _record(store, entry.key, problems)
        if record is None:
            continue
        name, digest = record.get("name"), record.get("digest")
        if isinstance(name, str) and isinstance(digest, str) and entry.key == name_key(name):
            found[name] = digest
        else:
            problems.append(f"{entry.key} is damaged: it is not that of its name")
    return found


def _objectives(store: Objects, problems: list[str]) -> Sequence[str]:
    found = []
    for entry in _whole(store.list("objectives")):
        record = _record(store, entry.key, problems)
        if record is None:
            continue
        if codec.is_digest(entry.name) and isinstance(record.get("create_time_ns"), int):
            found.append(entry.name)
        else:
            problems.append(f"{entry.key} is damaged: it does not name an objective and the time of its registration")
    return found


def _owners(store: Objects, problems: list[str]) -> None:
    for tenant in store.folders("owners"):
        for entry in _whole(store.list(f"owners/{tenant}/objectives")):
            record = _record(store, entry.key, problems)
            if record is not None and codec.digest(str(record.get("tenant")).encode()) != tenant:
                problems.append(f"{entry.key} is damaged: it is not that of its tenant")
        for entry in _whole(store.list(f"owners/{tenant}/checks")):
            _record(store, entry.key, problems)


def _blobs(store: Objects, problems: list[str]) -> tuple[Mapping[str, int], set[str]]:
    """Return the size of each blob, and the damaged blobs."""
    sizes, damaged = {}, set()
    for entry in _whole(store.walk("blobs")):
        state, size = hashlib.sha256(), 0
        try:
            for piece in store.pieces(entry.key):
                state.update(piece)
                size += len(piece)
        except FileNotFoundError:  # A server has set it aside meanwhile.
            continue
        except OSError as error:
            sizes[entry.name] = 0
            problems.append(f"{entry.key} cannot be read: {error.strerror}")
            damaged.add(entry.name)
            continue
        sizes[entry.name] = size
        if (found := state.hexdigest()) != entry.name or entry.key != blob_key(entry.name):
            problems.append(f"{entry.key} is damaged: its bytes have the digest {found}")
            damaged.add(entry.name)
    return sizes, damaged


def _parts(store: Objects, digest: str, problems: list[str]) -> set[str]:
    """Return the digests of an objective's blobs, its bundle included."""
    try:
        bundle = objective_pb2.Bundle.FromString(store.get(blob_key(digest)) or b"")
    except (DecodeError, OSError) as error:
        problems.append(f"objective {digest}: its blob {digest} is no bundle ({error})")
        return {digest}
    return {digest, *references(bundle)}


def _whole(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield the files that are no longer being written: until then, their names begin
    with a dot.
    """
    return (entry for entry in entries if not entry.name.startswith("."))


def _record(store: Objects, key: str, problems: list[str]) -> Mapping[str, Any] | None:
    """Return the JSON object of a file; None if it is damaged or gone."""
    try:
        content = store.get(key)
        if content is None:
            return None
        record = json.loads(content)
        if isinstance(record, dict):
            return record
        why = "it is no JSON object"
    except (OSError, ValueError, RecursionError) as error:
        why = str(error)
    problems.append(f"{key} is damaged: {why}")
    return None
