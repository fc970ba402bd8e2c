"""Whether a store, or a backup of one, is whole: reads all of it, and changes nothing. Neither jax nor gRPC.

Needs no lock: what refers to something is read before that, and the other way round it was written. What was deleted meanwhile is
no problem.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from hvpd import _codec
from hvpd.v1 import objective_pb2
from hvpd_server._admission import references


@dataclasses.dataclass(frozen=True)
class Found:
    """What is in a store."""

    objectives: int
    """How many are registered."""
    names: int
    """How many names point at them."""
    blobs: int
    """How many are stored."""
    blob_bytes: int
    """Their size."""
    problems: Sequence[str]
    """What is damaged or missing, a line each; empty where the store is whole."""
    unreferenced: Sequence[str]
    """Digests of blobs that no objective needs: data of other points, and what was uploaded only. No fault."""
    unreferenced_bytes: int
    """Their size."""


def verify(root: Path) -> Found:
    """Reads a whole store.

    Args:
        root: Its directory: a backup, or what a server uses now.

    Raises:
        ValueError: There is no store.
        OSError: A directory of it cannot be looked into.
    """
    if not ((root / "blobs").is_dir() and (root / "objectives").is_dir()):
        raise ValueError(f"{root} is no store of hvpd: it has no directories blobs and objectives")
    problems: list[str] = []
    names = _names(root, problems)
    objectives = _objectives(root, problems)
    problems += [
        f"name {name!r} points at {digest}, which is not registered"
        for name, digest in names.items()
        if digest not in objectives and (root / "names" / _codec.digest(name.encode())).exists()
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
        if isinstance(name, str) and isinstance(digest, str) and path.name == _codec.digest(name.encode()):
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
        if _codec.is_digest(path.name) and isinstance(record.get("create_time_ns"), int):
            found.append(path.name)
        else:
            problems.append(f"{path.relative_to(root)} is damaged: it does not say when what was registered")
    return found


def _owners(root: Path, problems: list[str]) -> None:
    for tenant in _files(root / "owners"):
        for path in _files(tenant / "objectives"):
            record = _record(root, path, problems)
            if record is not None and _codec.digest(str(record.get("tenant")).encode()) != tenant.name:
                problems.append(f"{path.relative_to(root)} is damaged: it is not that of its tenant")
        for path in _files(tenant / "checks"):
            _record(root, path, problems)


def _blobs(root: Path, problems: list[str]) -> tuple[Mapping[str, int], set[str]]:
    """The size of each blob, and those whose bytes are not what they were."""
    sizes, damaged = {}, set()
    for directory in _files(root / "blobs"):
        for path in _files(directory):
            try:
                with path.open("rb") as file:
                    found, sizes[path.name] = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
            except FileNotFoundError:  # A server has found it corrupt meanwhile, and set it aside.
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
    """The digests of the blobs that an objective needs, its bundle first."""
    try:
        bundle = objective_pb2.Bundle.FromString((root / "blobs" / digest[:2] / digest).read_bytes())
    except (DecodeError, OSError) as error:
        problems.append(f"objective {digest}: its blob {digest} is no bundle ({error})")
        return {digest}
    return {digest, *references(bundle)}


def _files(directory: Path) -> Iterator[Path]:
    """What is in a directory, sorted, if there is one. What begins with a dot is being written."""
    if directory.is_dir():
        yield from sorted(path for path in directory.iterdir() if not path.name.startswith("."))


def _record(root: Path, path: Path, problems: list[str]) -> Mapping[str, Any] | None:
    """The JSON object of a file; None where it is none, or gone meanwhile."""
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
