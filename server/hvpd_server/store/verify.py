"""Verification of a store or a backup: reads everything, changes nothing.

It needs no lock: a reference is read before the files that it names, and is written
after them. Objectives that are deleted meanwhile are no problem.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from hvpd._wire import codec
from hvpd.v1 import objective_pb2
from hvpd_server.bundle import references


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


def verify(root: Path) -> Found:
    """Read a whole store.


    Args:
        root: Directory of a backup, or of a store in use.

    Raises:
        ValueError: There is no store.
        OSError: A directory of the store cannot be read.
    """
    if not ((root / "blobs").is_dir() and (root / "objectives").is_dir()):
        raise ValueError(f"{root} is no store of hvpd: it has no directories blobs and objectives")
    problems: list[str] = []
    names = _names(root, problems)
    objectives = _objectives(root, problems)
    problems += [
        f"name {name!r} points at {digest}, which is not registered"
        for name, digest in names.items()
        if digest not in objectives and (root / "names" / codec.digest(name.encode())).exists()
    ]
    _owners(root, problems)
    for part in ("checks", "derived", "quarantine"):
        for path in _files(root / part):
            _record(root, path, problems)
    sizes, damaged = _blobs(root, problems)
    needed: set[str] = set()
    for digest in objectives:
        parts = _parts(root, digest, problems) if digest in sizes.keys() - damaged else {digest}
        if not (root / "objectives" / digest).exists():
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


def _names(root: Path, problems: list[str]) -> Mapping[str, str]:
    found = {}
    for path in _files(root / "names"):
        record = _record(root, path, problems)
        if record is None:
            continue
        name, digest = record.get("name"), record.get("digest")
        if isinstance(name, str) and isinstance(digest, str) and path.name == codec.digest(name.encode()):
            found[name] = digest
        else:
            problems.append(f"{path.relative_to(root)} is damaged: it is not that of its name")
    return found


def _objectives(root: Path, problems: list[str]) -> Sequence[str]:
    found = []
    for path in _files(root / "objectives"):
        record = _record(root, path, problems)
        if record is None:
            continue
        if codec.is_digest(path.name) and isinstance(record.get("create_time_ns"), int):
            found.append(path.name)
        else:
            problems.append(
                f"{path.relative_to(root)} is damaged: it does not name an objective and the time of its registration"
            )
    return found


def _owners(root: Path, problems: list[str]) -> None:
    for tenant in _files(root / "owners"):
        for path in _files(tenant / "objectives"):
            record = _record(root, path, problems)
            if record is not None and codec.digest(str(record.get("tenant")).encode()) != tenant.name:
                problems.append(f"{path.relative_to(root)} is damaged: it is not that of its tenant")
        for path in _files(tenant / "checks"):
            _record(root, path, problems)


def _blobs(root: Path, problems: list[str]) -> tuple[Mapping[str, int], set[str]]:
    """Return the size of each blob, and the damaged blobs."""
    sizes, damaged = {}, set()
    for directory in _files(root / "blobs"):
        for path in _files(directory):
            try:
                with path.open("rb") as file:
                    found, sizes[path.name] = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
            except FileNotFoundError:  # A server has set it aside meanwhile.
                continue
            except OSError as error:
                found, sizes[path.name] = "", 0
                problems.append(f"{path.relative_to(root)} cannot be read: {error.strerror}")
                damaged.add(path.name)
                continue
            if found != path.name or not path.name.startswith(directory.name):
                problems.append(f"{path.relative_to(root)} is damaged: its bytes have the digest {found}")
                damaged.add(path.name)
    return sizes, damaged


def _parts(root: Path, digest: str, problems: list[str]) -> set[str]:
    """Return the digests of an objective's blobs, its bundle included."""
    try:
        bundle = objective_pb2.Bundle.FromString((root / "blobs" / digest[:2] / digest).read_bytes())
    except (DecodeError, OSError) as error:
        problems.append(f"objective {digest}: its blob {digest} is no bundle ({error})")
        return {digest}
    return {digest, *references(bundle)}


def _files(directory: Path) -> Iterator[Path]:
    """Yield the files of a directory, sorted. Files that are being written begin with a
    dot.
    """
    if directory.is_dir():
        yield from sorted(path for path in directory.iterdir() if not path.name.startswith("."))


def _record(root: Path, path: Path, problems: list[str]) -> Mapping[str, Any] | None:
    """Return the JSON object of a file; None if it is damaged or gone."""
    try:
        record = json.loads(path.read_bytes())
        if isinstance(record, dict):
            return record
        why = "it is no JSON object"
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        why = str(error)
    problems.append(f"{path.relative_to(root)} is damaged: {why}")
    return None
