"""Blobs, objectives and names on disk, as plain files.

    STORE/blobs/ab/abcd...     bytes whose SHA-256 is the file's name
    STORE/objectives/DIGEST    JSON: when the objective was registered
    STORE/checks/DIGEST        JSON: the check after a registration without a tenant
    STORE/owners/              uploads and registrations of tenants; see `ownership`
    STORE/derived/DIGEST       JSON: the derivation of the bundle, and its version
    STORE/names/SHA256         JSON: a name and its digest; the file is named by the
                               SHA-256 of the name
    STORE/corrupt/             blobs whose bytes did not match their name
    STORE/incoming/            files that are being written; emptied at start
    STORE/cache/               compiled programs

A file is written aside, flushed and renamed, so a crash leaves the old or the new one.
Objectives and names are also in memory: a look-up reads no file.
"""

import collections
import contextlib
import difflib
import fcntl
import functools
import hashlib
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from hvpd import _text
from hvpd._wire import codec
from hvpd.v1 import objective_pb2, tensor_pb2
from hvpd_server.errors import Code, ServiceError
from hvpd_server.files import Version, atomic_file, version
from hvpd_server.store.rows import Rows, no_tensor, unreadable_file
from hvpd_server.store.upload import Upload

_log = logging.getLogger(__name__)


_PIECE = 1 << 20
"""Bytes to read at a time from a file that may be large."""

_PREFIX = 8
"""Least number of digits of a digest that can stand for an objective."""

_LONGEST = 300
"""Most characters of a name in an error, because HTTP/2 has 8 KiB for an error with its
details.
"""

_COMPARED = 1000
"""Most names to compare with a name that was not found."""


class Store:
    """A directory of blobs, objectives and names.

    Safe for many threads of one process. Other processes are locked out.

    Args:
        root: The directory, created if it is missing.

    Raises:
        ServiceError: Another process has the store open.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for part in ("blobs", "objectives", "checks", "derived", "names", "corrupt", "incoming", "cache"):
            (root / part).mkdir(parents=True, exist_ok=True)
        self._lock_file = (root / "lock").open("a")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.close()
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                "STORE_IN_USE",
                f"the store {root} is in use by another server: give each server its own store",
            ) from None
        for leftover in (root / "incoming").iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        self._names_lock = threading.Lock()
        """Held to change the next three.

        Their mappings are replaced, never changed, so readers need no lock.
        """
        self._created = {
            path.name: created
            for path in sorted((root / "objectives").iterdir())
            if (created := _created(path)) is not None
        }
        self._names = self._load_names()
        by_digest = collections.defaultdict(set)
        for name, digest in self._names.items():
            by_digest[digest].add(name)
        self._names_of = {digest: frozenset(names) for digest, names in by_digest.items()}
        self._named = collections.Counter(map(_first_part, self._names))
        self._verified: dict[str, Version | None] = {}

    def close(self) -> None:
        """Let other processes open the store."""
        self._lock_file.close()

    @property
    def cache(self) -> Path:
        """Directory of compiled programs."""
        return self.root / "cache"

    # Blobs

    def has(self, digest: str) -> bool:
        """Return whether a blob is stored."""
        return codec.is_digest(digest) and self._blob(digest).exists()

    def size(self, digest: str) -> int:
        """Return the size of a blob in bytes; 0 if it cannot be read."""
        try:
            return self._blob(digest).stat().st_size if codec.is_digest(digest) else 0
        except OSError:
            return 0

    def upload(self, digest: str, size_bytes: int) -> Upload:
        """Start to store a blob; see `Upload`.

        Raises:
            ServiceError: The digest or the size is wrong, or the disk is full.
        """
        if not codec.is_digest(digest):
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                "INVALID_DIGEST",
                f"a digest must be 64 lower-case hexadecimal digits, got {_text.quoted(digest, 80)}",
            )
        self.check_room([size_bytes], f"blob {digest[:12]}")
        return Upload(self.root / "incoming", self._blob(digest), digest, size_bytes)

    def check_room(self, sizes: Sequence[int], what: str = "these blobs") -> None:
        """Raise ServiceError if the disk has no room for blobs of these sizes in bytes.

        Args:
            sizes: Their sizes.
            what: Their name, for the message.
        """
        if any(size < 0 for size in sizes):
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                "INVALID_SIZE",
                f"the size of {what} must be 0 or more bytes, got {min(sizes)}",
            )
        if sum(sizes) > shutil.disk_usage(self.root).free:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                "DISK_FULL",
                f"the server's store has no room for {what} of {sum(sizes)} bytes",
            )

    def read(self, digest: str, *, set_aside: bool = True) -> bytes:
        """Read a blob, and verify it against its digest.

        Args:
            digest: Digest of the blob.
            set_aside: Whether to set a corrupt blob aside, so that it can be uploaded
                again.

        Raises:
            ServiceError: The blob is not stored, or it is corrupt.
        """
        path = self._existing(digest)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise unreadable_file(digest, error) from error
        if codec.digest(content) != digest:
            raise self._corrupt(digest, set_aside=set_aside)
        return content

    def verify(self, digest: str, *, set_aside: bool = True) -> None:
        """Verify a blob as `read` does, but read it piece by piece."""
        state = hashlib.sha256()
        try:
            with self._existing(digest).open("rb") as file:
                while piece := file.read(_PIECE):
                    state.update(piece)
                verified = version(file.fileno())
        except OSError as error:
            raise unreadable_file(digest, error) from error
        if state.hexdigest() != digest:
            raise self._corrupt(digest, set_aside=set_aside)
        self._verified[digest] = verified

    def _existing(self, digest: str) -> Path:
        if not self.has(digest):
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                "BLOBS_MISSING",
                f"blob {_text.quoted(digest, 80)} is not stored: upload it",
                {"digests": digest[:80]},
            )
        return self._blob(digest)

    def _corrupt(self, digest: str, *, set_aside: bool) -> ServiceError:
        if not set_aside:
            return ServiceError(Code.DATA_LOSS, "BLOB_CORRUPT", f"blob {digest} is corrupt on the server's disk")
        with contextlib.suppress(FileNotFoundError):
            self._blob(digest).rename(self.root / "corrupt" / f"{digest}.{time.time_ns()}")
        _log.error("blob %s is corrupt on disk and was set aside", digest)
        return ServiceError(
            Code.DATA_LOSS,
            "BLOB_CORRUPT",
            f"blob {digest} is corrupt on the server's disk; it was set aside: register the objective again to restore it",
            {"digests": digest},
        )

    def read_tensor(self, tensor: tensor_pb2.Tensor, *, set_aside: bool = True) -> codec.Array:
        """Read a tensor, and verify it against its digest; see `read`."""
        try:
            expected, size = math.prod(tensor.shape) * codec.dtype(tensor.dtype).itemsize, self.size(tensor.digest)
            if size > expected:  # The blob could be larger than the memory.
                raise no_tensor(tensor, f"{tensor.dtype}{list(tensor.shape)} takes {expected} bytes, got {size}")
            return codec.array(self.read(tensor.digest, set_aside=set_aside), tensor.dtype, tensor.shape)
        except (ValueError, TypeError) as error:
            raise no_tensor(tensor, str(error)) from None

    def open_tensor(self, tensor: tensor_pb2.Tensor, *, set_aside: bool = True) -> Rows:
        """Open a tensor that is too large to be read at once.

        Its digest is verified before, once for each version of the file.
        """
        known = self._verified.get(tensor.digest)
        if known is None or known != version(self._blob(tensor.digest)):
            self.verify(tensor.digest, set_aside=set_aside)
        return Rows(self._blob(tensor.digest), tensor, functools.partial(self.verify, set_aside=set_aside))

    def _blob(self, digest: str) -> Path:
        return self.root / "blobs" / digest[:2] / digest

    # Objectives and names

    def add_objective(self, digest: str, name: str) -> None:
        """Record a bundle as an objective, and point a name at it unless the name is
        empty.
        """
        with self._names_lock:
            if digest not in self._created:
                created = time.time_ns()
                self.keep(self._marker(digest), {"create_time_ns": created})
                self._created = {**self._created, digest: created}
            if name and self._names.get(name) != digest:
                self.keep(self._name_file(name), {"name": name, "digest": digest})
                self._point(name, digest)

    def objective(
        self, name: str, *, own: str = "", visible: Callable[[str, str], bool] = lambda name, digest: True
    ) -> tuple[str, str, int]:
        """Return name, digest and time of registration (ns since 1970) of an objective.

        Args:
            name: A name, a digest, or the beginning of a digest.
            own: Another name, to look up before `name`.
            visible: Whether the caller may know of a name and its digest. The name is
                empty for a digest alone.

        Raises:
            ServiceError: There is no such objective. The message suggests similar
                names.
        """
        names, created = self._names, self._created

        def usable(other: str, to: str) -> bool:
            return to in created and visible(other, to)

        name = next((each for each in (own, name) if each in names and visible(each, names[each])), name)
        named = name in names and visible(name, names[name])
        digest = names[name] if named else name
        if not usable("", digest) and len(name) >= _PREFIX:
            beginning = [other for other in created if other.startswith(name) and usable("", other)]
            digest = beginning[0] if len(beginning) == 1 else name
        if not usable("", digest):
            raise _not_found(name, [other for other, to in names.items() if other != name and usable(other, to)])
        called = self._names_of.get(digest, frozenset())
        shown = name if named else min((other for other in called if visible(other, digest)), default="")
        return shown, digest, created[digest]

    def _marker(self, digest: str) -> Path:
        return self.root / "objectives" / digest

    def registered(self, digest: str) -> bool:
        """Return whether an objective is registered. Each point asks: this is quick."""
        return codec.is_digest(digest) and self._marker(digest).exists()

    def objectives(self) -> list[tuple[str, str, int]]:
        """Return (name, digest, time of registration) of all names, sorted.

        Objectives without a name follow, with an empty name.
        """
        names, named, created = self._names, self._names_of, self._created
        listed = sorted(names.items()) + sorted(("", digest) for digest in created.keys() - named.keys())
        return [(name, digest, created[digest]) for name, digest in listed if digest in created]

    def names_of(self, digest: str) -> Collection[str]:
        """Return the names that point at an objective."""
        return self._names_of.get(digest, frozenset())

    def has_name(self, name: str) -> bool:
        """Return whether a name points at an objective."""
        return name in self._names

    def digest_of(self, name: str) -> str | None:
        """Return the digest that a name points at; None if there is no such name."""
        return self._names.get(name)

    def count_names(self, tenant: str) -> int:
        """Return the number of names that begin with a tenant's own."""
        return self._named[f"{tenant}/"]

    def remove_name(self, name: str) -> None:
        """Remove a name."""
        with self._names_lock:
            self._name_file(name).unlink(missing_ok=True)
            self._point(name, "")

    def remove_objective(self, digest: str) -> None:
        """Remove an objective with its records. Its names and blobs stay."""
        with self._names_lock:
            self._created = {other: created for other, created in self._created.items() if other != digest}
            # `objectives` comes first, so that a crash leaves nothing that is served.
            for part in ("objectives", "checks", "derived"):
                (self.root / part / digest).unlink(missing_ok=True)

    def remove_blob(self, digest: str) -> None:
        """Remove a blob."""
        self._verified.pop(digest, None)
        self._blob(digest).unlink(missing_ok=True)

    def blobs(self, older_than_seconds: float = 0.0) -> Iterator[str]:
        """Yield the digests of all blobs of at least this age."""
        latest = time.time() - older_than_seconds
        for path in (self.root / "blobs").glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                if codec.is_digest(path.name) and path.stat().st_mtime <= latest:
                    yield path.name

    def bundle(self, digest: str) -> objective_pb2.Bundle:
        """Return the parsed bundle of an objective."""
        return objective_pb2.Bundle.FromString(self.read(digest))

    def add_check(self, digest: str, found: objective_pb2.RegistrationCheck, tenant: str = "") -> None:
        """Keep the check of an objective for a tenant, in place of an older one."""
        self.keep(self._check(digest, tenant), json_format.MessageToDict(found, preserving_proto_field_name=True))

    def check(self, digest: str, tenant: str = "") -> objective_pb2.RegistrationCheck | None:
        """Return the check of an objective for a tenant; None if there is none."""
        return _read_check(self._check(digest, tenant))

    def checks(self, digest: str) -> list[objective_pb2.RegistrationCheck]:
        """Return the checks of an objective for all tenants."""
        paths = [self._check(digest, ""), *self.root.glob(f"owners/*/checks/{digest}")]
        return [found for found in map(_read_check, paths) if found is not None]

    def _check(self, digest: str, tenant: str) -> Path:
        directory = self.root / "owners" / codec.digest(tenant.encode()) if tenant else self.root
        return directory / "checks" / digest

    def add_derivation(self, digest: str, version: str, found: objective_pb2.Derivation) -> None:
        """Keep the derivation of a bundle, with the version of the code that derived
        it.
        """
        content = json_format.MessageToDict(found, preserving_proto_field_name=True)
        self.keep(self.root / "derived" / digest, {"version": version, "derivation": content})

    def derivation_bytes(self, digest: str) -> int:
        """Return the size of the kept derivation of a bundle; 0 if none is kept."""
        try:
            return (self.root / "derived" / digest).stat().st_size
        except OSError:
            return 0

    def derivation(self, digest: str, version: str) -> objective_pb2.Derivation | None:
        """Return the kept derivation of a bundle; None if this version kept none."""
        path = self.root / "derived" / digest
        record = read_record(path)
        content = record.get("derivation")
        if record.get("version") != version or not isinstance(content, dict):
            return None
        try:
            return json_format.ParseDict(content, objective_pb2.Derivation())
        except json_format.ParseError as error:
            _log.error("%s is damaged, and left aside: %s", path, error)
            return None

    def _load_names(self) -> Mapping[str, str]:
        found: dict[str, str] = {}
        for path in sorted((self.root / "names").iterdir()):
            record = read_record(path)
            name, digest = record.get("name"), record.get("digest")
            if not (isinstance(name, str) and isinstance(digest, str) and codec.is_digest(digest)):
                continue
            if path != self._name_file(name):  # `remove_name` would miss it, so the next start would restore the name.
                _log.error("%s is damaged, and left aside: it is not the file of its name", path)
                continue
            found[name] = digest
        return found

    def _name_file(self, name: str) -> Path:
        """Return the file of a name, which can have slashes and exceed a file name's
        length.
        """
        return self.root / "names" / codec.digest(name.encode())

    def _point(self, name: str, digest: str) -> None:
        """Point a name at an objective in memory; at none if the digest is empty."""
        names, names_of = dict(self._names), dict(self._names_of)
        before = names.pop(name, None)
        self._named[_first_part(name)] += bool(digest) - (before is not None)
        if before is not None:
            names_of[before] -= {name}
            if not names_of[before]:
                del names_of[before]
        if digest:
            names[name] = digest
            names_of[digest] = names_of.get(digest, frozenset()) | {name}
        self._names, self._names_of = names, names_of

    def keep(self, path: Path, content: Mapping[str, Any]) -> None:
        """Write a record below the root, in place of an older one."""
        with atomic_file(self.root / "incoming") as (file, commit):
            file.write(json.dumps(content).encode())
            commit(path)


def _first_part(name: str) -> str:
    """Return the tenant in a full name, with its slash; empty if there is none."""
    tenant, slash, _ = name.partition("/")
    return tenant + slash if slash else ""


def _not_found(name: str, usable: Sequence[str]) -> ServiceError:
    # No stored name is longer, and comparing long names takes time.
    near = difflib.get_close_matches(name, usable[:_COMPARED], n=3, cutoff=0.5) if len(name) <= _LONGEST else []
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; no stored name is similar"
    kind = "digest" if codec.is_digest(name) else "name"
    return ServiceError(
        Code.NOT_FOUND,
        "OBJECTIVE_NOT_FOUND",
        f"no objective of {kind} {_text.quoted(name, _LONGEST)}{hint}",
        {"near": ",".join(near)},
    )


def read_record(path: Path) -> Mapping[str, Any]:
    """Return the JSON object of a file; empty if the file is missing or damaged.

    One damaged file must not stop others from being served.
    """
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if not isinstance(error, FileNotFoundError):
            _log.error("%s is damaged, and left aside: %s", path, error)
        return {}
    return record if isinstance(record, dict) else {}


def _read_check(path: Path) -> objective_pb2.RegistrationCheck | None:
    record = read_record(path)
    if not record:
        return None
    try:
        return json_format.ParseDict(dict(record), objective_pb2.RegistrationCheck(), ignore_unknown_fields=True)
    except json_format.ParseError as error:
        _log.error("%s is damaged, and left aside: %s", path, error)
        return None


def _created(marker: Path) -> int | None:
    """Return when an objective was registered; None if its marker is missing or
    damaged.
    """
    created = read_record(marker).get("create_time_ns")
    return created if isinstance(created, int) else None
