"""What survives a restart: blobs by digest, objectives and names, as plain files.

    STORE/blobs/ab/abcd...     bytes whose SHA-256 is the file's name
    STORE/objectives/DIGEST    JSON: when it was registered
    STORE/checks/DIGEST        JSON: what was found when the objective was checked after a registration of no tenant
    STORE/owners/              who has uploaded and registered what; see _owners
    STORE/derived/DIGEST       JSON: what the server derived from the bundle, and by which version
    STORE/names/SHA256         JSON: a name, and the digest that it points at; the file is named by the name's own digest
    STORE/corrupt/             blobs whose bytes did not match their name, set aside
    STORE/incoming/            uploads under way; emptied at start
    STORE/cache/               compiled programs (jax's own persistent cache)

Every file is written aside, flushed and renamed, so a crash leaves the old state or the new one. Objectives and names are also in
memory: a look-up reads no file, and the files are for the next start. No jax, no gRPC.
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
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from google.protobuf import json_format

from hvpd import _codec
from hvpd.v1 import objective_pb2, tensor_pb2
from hvpd_server._errors import Code, ServiceError, to_service_error

_log = logging.getLogger(__name__)


_PIECE = 1 << 20
"""Bytes that are read at a time where all would be too many."""

_PREFIX = 8
"""Least digits of a digest that name an objective, where only one begins with them."""

_LONGEST = 300
"""No name has more characters, its tenant's among them. An error has to fit into what HTTP/2 has for it, 8 KiB with its details."""

_COMPARED = 1000
"""Most names that are compared with one that was not found."""


class Store:
    """A directory of blobs, objectives and names. Safe for many threads of one process; other processes are locked out.

    Args:
        root: The directory; created where it is missing.

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
                f"the store {root} is in use by another server: give each its own",
            ) from None
        for leftover in (root / "incoming").iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        self._names_lock = threading.Lock()
        """Held to change the next three, whose mappings are replaced and never changed: so readers need no lock."""
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
        self._verified: dict[str, tuple[int, int, int]] = {}

    def close(self) -> None:
        """Lets other processes open the store."""
        self._lock_file.close()

    @property
    def cache(self) -> Path:
        """The directory for compiled programs."""
        return self.root / "cache"

    def trim_cache(self, most_bytes: int) -> int:
        """Drops compiled programs, those first that were read longest ago, until the rest has so many bytes; returns how many went."""
        found = []
        for path in self.cache.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
        excess, gone = sum(size for _, size, _ in found) - most_bytes, 0
        for _, size, path in sorted(found):
            if excess <= 0:
                break
            with contextlib.suppress(OSError):  # A directory, or gone already.
                path.unlink()
                excess, gone = excess - size, gone + 1
        return gone

    # Blobs

    def has(self, digest: str) -> bool:
        """Whether a blob is stored."""
        return _codec.is_digest(digest) and self._blob(digest).exists()

    def size(self, digest: str) -> int:
        """The bytes of a blob; 0 where it cannot be read, which `read` says."""
        try:
            return self._blob(digest).stat().st_size if _codec.is_digest(digest) else 0
        except OSError:
            return 0

    def upload(self, digest: str, size_bytes: int) -> "Upload":
        """Starts to store a blob; see `Upload`.

        Raises:
            ServiceError: Not a digest, or not a size, or no room on the disk.
        """
        if not _codec.is_digest(digest):
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                "INVALID_DIGEST",
                f"a digest is 64 lower-case hexadecimal digits, got {digest[:80]!r}",
            )
        free = shutil.disk_usage(self.root).free
        if not 0 <= size_bytes <= free:
            code = Code.INVALID_ARGUMENT if size_bytes < 0 else Code.RESOURCE_EXHAUSTED
            raise ServiceError(
                code,
                "INVALID_SIZE" if size_bytes < 0 else "DISK_FULL",
                f"blob {digest[:12]} is announced with {size_bytes} bytes, the server's store has {free} free",
            )
        return Upload(self, digest, size_bytes)

    def read(self, digest: str, *, set_aside: bool = True) -> bytes:
        """The bytes of a blob, verified against its digest.

        Args:
            digest: Of the blob.
            set_aside: Whether a corrupt one is; if not, whoever reads it next is told of it again.

        Raises:
            ServiceError: Not stored; or corrupt on the disk, then it is set aside and can be uploaded again.
        """
        path = self._existing(digest)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise _unreadable_file(digest, error) from error
        if _codec.digest(content) != digest:
            raise self._corrupt(digest, set_aside=set_aside)
        return content

    def verify(self, digest: str, *, set_aside: bool = True) -> None:
        """Does as `read`, and holds no more than a piece of the blob in memory."""
        state = hashlib.sha256()
        try:
            with self._existing(digest).open("rb") as file:
                while piece := file.read(_PIECE):
                    state.update(piece)
                version = _version(os.fstat(file.fileno()))
        except OSError as error:
            raise _unreadable_file(digest, error) from error
        if state.hexdigest() != digest:
            raise self._corrupt(digest, set_aside=set_aside)
        self._verified[digest] = version

    def _existing(self, digest: str) -> Path:
        if not self.has(digest):
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                "BLOBS_MISSING",
                f"blob {digest[:80]!r} is not stored: upload it",
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

    def read_tensor(self, tensor: tensor_pb2.Tensor, *, set_aside: bool = True) -> _codec.Array:
        """The array of a tensor, verified against its digest; see `read`."""
        try:
            expected, size = math.prod(tensor.shape) * _codec.dtype(tensor.dtype).itemsize, self.size(tensor.digest)
            if size > expected:  # It could be larger than the memory.
                raise _no_tensor(tensor, f"{tensor.dtype}{list(tensor.shape)} takes {expected} bytes, got {size}")
            return _codec.array(self.read(tensor.digest, set_aside=set_aside), tensor.dtype, tensor.shape)
        except (ValueError, TypeError) as error:
            raise _no_tensor(tensor, str(error)) from None

    def open_tensor(self, tensor: tensor_pb2.Tensor, *, set_aside: bool = True) -> "Rows":
        """A tensor that is too large to be read at once, to be read by rows; its digest is verified first, once for each file."""
        known = self._verified.get(tensor.digest)
        try:
            unchanged = known is not None and known == _version(self._existing(tensor.digest).stat())
        except OSError:
            unchanged = False
        if not unchanged:
            self.verify(tensor.digest, set_aside=set_aside)
        return Rows(self._blob(tensor.digest), tensor, functools.partial(self.verify, set_aside=set_aside))

    def _blob(self, digest: str) -> Path:
        return self.root / "blobs" / digest[:2] / digest

    # Objectives and names

    def add_objective(self, digest: str, name: str) -> None:
        """Records a bundle as an objective and, where `name` is not empty, points the name at it."""
        with self._names_lock:
            if digest not in self._created:
                created = time.time_ns()
                self._write(self._marker(digest), {"create_time_ns": created})
                self._created = {**self._created, digest: created}
            if name and self._names.get(name) != digest:
                self._write(self._name_file(name), {"name": name, "digest": digest})
                self._point(name, digest)

    def objective(
        self, name: str, *, own: str = "", visible: Callable[[str, str], bool] = lambda name, digest: True
    ) -> tuple[str, str, int]:
        """Name, digest and time of registration (ns since 1970) of the objective with this name or digest.

        Args:
            name: Or digest, or the beginning of one.
            own: A name that comes before this one.
            visible: Whether who asks may know of a name and its digest, or of a digest alone, its name empty.

        Raises:
            ServiceError: There is none; the message suggests near names.
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
        """Whether an objective of this digest is registered: quick, for every point asks."""
        return _codec.is_digest(digest) and self._marker(digest).exists()

    def objectives(self) -> list[tuple[str, str, int]]:
        """(name, digest, time of registration) of every name, sorted, then ("", digest, time) of the nameless objectives."""
        names, named, created = self._names, self._names_of, self._created
        listed = sorted(names.items()) + sorted(("", digest) for digest in created.keys() - named.keys())
        return [(name, digest, created[digest]) for name, digest in listed if digest in created]

    def names_of(self, digest: str) -> Collection[str]:
        """Return the names that point at an objective."""
        return self._names_of.get(digest, frozenset())

    def remove_name(self, name: str) -> None:
        """Takes a name off what it points at."""
        with self._names_lock:
            self._name_file(name).unlink(missing_ok=True)
            self._point(name, "")

    def remove_objective(self, digest: str) -> None:
        """Takes an objective out, with what was recorded of it; its names and blobs are others' business."""
        with self._names_lock:
            self._created = {other: created for other, created in self._created.items() if other != digest}
            for part in ("objectives", "checks", "derived"):  # In this order: what is no objective is not served.
                (self.root / part / digest).unlink(missing_ok=True)

    def remove_blob(self, digest: str) -> None:
        """Takes a blob out."""
        self._verified.pop(digest, None)
        self._blob(digest).unlink(missing_ok=True)

    def blobs(self, older_than_seconds: float = 0.0) -> Iterator[str]:
        """The digests of all blobs that were stored so long ago."""
        latest = time.time() - older_than_seconds
        for path in (self.root / "blobs").glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                if _codec.is_digest(path.name) and path.stat().st_mtime <= latest:
                    yield path.name

    def bundle(self, digest: str) -> objective_pb2.Bundle:
        """The parsed bundle of an objective."""
        return objective_pb2.Bundle.FromString(self.read(digest))

    def add_check(self, digest: str, found: objective_pb2.RegistrationCheck, tenant: str = "") -> None:
        """Keeps what was found when an objective was checked for a tenant, in place of what there was."""
        self._write(self._check(digest, tenant), json_format.MessageToDict(found, preserving_proto_field_name=True))

    def check(self, digest: str, tenant: str = "") -> objective_pb2.RegistrationCheck | None:
        """What was found when an objective was checked for a tenant; None where nothing was kept, or it is damaged."""
        return _read_check(self._check(digest, tenant))

    def checks(self, digest: str) -> list[objective_pb2.RegistrationCheck]:
        """Return what was found for all who have registered an objective."""
        paths = [self._check(digest, ""), *self.root.glob(f"owners/*/checks/{digest}")]
        return [found for found in map(_read_check, paths) if found is not None]

    def _check(self, digest: str, tenant: str) -> Path:
        directory = self.root / "owners" / _codec.digest(tenant.encode()) if tenant else self.root
        return directory / "checks" / digest

    def add_derivation(self, digest: str, version: str, found: objective_pb2.Derivation) -> None:
        """Keep what was derived from a bundle, with the version of the code that derived it."""
        content = json_format.MessageToDict(found, preserving_proto_field_name=True)
        self._write(self.root / "derived" / digest, {"version": version, "derivation": content})

    def derivation(self, digest: str, version: str) -> objective_pb2.Derivation | None:
        """Return what this version of the code derived from a bundle; None if nothing was kept, or it is damaged."""
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
            if not (isinstance(name, str) and isinstance(digest, str) and _codec.is_digest(digest)):
                continue
            if path != self._name_file(
                name
            ):  # `remove_name` would miss it, and the next start would bring the name back.
                _log.error("%s is damaged, and left aside: it is not the file of its name", path)
                continue
            found[name] = digest
        return found

    def _name_file(self, name: str) -> Path:
        """Return where a name is kept: it can be longer than a file's may be, and has slashes."""
        return self.root / "names" / _codec.digest(name.encode())

    def _point(self, name: str, digest: str) -> None:
        """Points a name at an objective in memory; an empty digest: at none."""
        names, names_of = dict(self._names), dict(self._names_of)
        before = names.pop(name, None)
        if before is not None:
            names_of[before] -= {name}
            if not names_of[before]:
                del names_of[before]
        if digest:
            names[name] = digest
            names_of[digest] = names_of.get(digest, frozenset()) | {name}
        self._names, self._names_of = names, names_of

    def keep(self, path: Path, content: Mapping[str, Any]) -> None:
        """Keeps a record of somebody else's below the root, in place of what there was."""
        self._write(path, content)

    def _write(self, path: Path, content: Mapping[str, Any]) -> None:
        with self._incoming() as (file, commit):
            file.write(json.dumps(content).encode())
            commit(path)

    @contextlib.contextmanager
    def _incoming(self) -> Iterator[Any]:
        """A new file, and the function that makes it durable under its final name. Gone where that was not called."""
        descriptor, name = tempfile.mkstemp(dir=self.root / "incoming")
        try:
            with os.fdopen(descriptor, "wb") as file:

                def commit(path: Path) -> None:
                    file.flush()
                    os.fsync(file.fileno())
                    path.parent.mkdir(exist_ok=True)
                    Path(name).rename(path)
                    _flush_directory(path.parent)

                yield file, commit
        finally:
            with contextlib.suppress(FileNotFoundError):
                Path(name).unlink()


class Rows:
    """A tensor on the disk, of which `rows[start:stop]` is read.

    Not a mapping into memory, where a disk that fails, or a file that somebody cuts short, ends the whole process.

    Args:
        path: Its file.
        tensor: What it is.
        verify: Raises an error that says what is wrong with a blob, given its digest, where anything is.

    Raises:
        ServiceError: The file is not of the tensor's size, or the dtype is none.
    """

    def __init__(self, path: Path, tensor: tensor_pb2.Tensor, verify: Callable[[str], None]) -> None:
        try:
            self._dtype = _codec.dtype(tensor.dtype)
        except TypeError as error:
            raise _no_tensor(tensor, str(error)) from None
        self._verify = verify
        self._path = path
        self._digest = tensor.digest
        self._row = tuple(tensor.shape[1:])
        self._row_bytes = math.prod(self._row) * self._dtype.itemsize
        expected, size = self._row_bytes * tensor.shape[0], path.stat().st_size
        if size != expected:
            raise _no_tensor(tensor, f"{tensor.dtype}{list(tensor.shape)} takes {expected} bytes, got {size}")

    def __getitem__(self, rows: slice) -> _codec.Array:
        """Reads some rows.

        Raises:
            ServiceError: They cannot be read any more; a file that is found corrupt is set aside.
        """
        count = rows.stop - rows.start
        try:
            read = np.fromfile(self._path, np.uint8, count * self._row_bytes, offset=rows.start * self._row_bytes)
        except FileNotFoundError as error:  # Somebody has found it corrupt meanwhile.
            raise _unreadable(
                self._digest, "it is not there any more; register the objective again to restore it"
            ) from error
        except OSError as error:
            self._verify(self._digest)
            raise _unreadable_file(self._digest, error) from error
        if len(read) < count * self._row_bytes:
            self._verify(self._digest)
            raise _unreadable(self._digest, "it is shorter than it was")
        found: _codec.Array = read.view(self._dtype).reshape(count, *self._row)
        return found


def _version(status: os.stat_result) -> tuple[int, int, int]:
    """What changes when a file does."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _unreadable(digest: str, why: str | None) -> ServiceError:
    return ServiceError(
        Code.DATA_LOSS,
        "BLOB_CORRUPT",
        f"blob {digest} cannot be read from the server's disk: {why}",
        {"digests": digest},
    )


def _unreadable_file(digest: str, error: OSError) -> ServiceError:
    """Return why a blob cannot be read. If the machine has no descriptor or memory left, nothing is wrong with the blob."""
    known = to_service_error(error)
    return known if known.code is Code.RESOURCE_EXHAUSTED else _unreadable(digest, error.strerror)


def _no_tensor(tensor: tensor_pb2.Tensor, why: str) -> ServiceError:
    return ServiceError(Code.INVALID_ARGUMENT, "INVALID_TENSOR", f"tensor {tensor.digest[:12]}: {why}")


class Upload:
    """A blob on its way in: a context manager, so that what was not committed is gone.

    Raises:
        ServiceError: From `append` and `commit`: bytes out of order, too many, too few, or not those of the digest.
    """

    def __init__(self, store: Store, digest: str, size_bytes: int) -> None:
        self._store = store
        self._digest = digest
        self._size = size_bytes
        self._received = 0
        self._hash = hashlib.sha256()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._file, self._commit = self._stack.enter_context(self._store._incoming())  # noqa: SLF001 - its other half
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def append(self, offset_bytes: int, chunk: _codec.Buffer) -> None:
        """Adds the next bytes."""
        if offset_bytes != self._received:
            raise self._refusal(
                "UPLOAD_OUT_OF_ORDER", f"a chunk for offset {offset_bytes} came, expected {self._received}"
            )
        if self._received + len(chunk) > self._size:
            raise self._refusal("UPLOAD_SIZE", f"more than the announced {self._size} bytes came")
        self._file.write(chunk)
        self._hash.update(chunk)
        self._received += len(chunk)

    def commit(self) -> int:
        """Verifies and stores; returns the size in bytes."""
        if self._received != self._size:
            raise self._refusal("UPLOAD_SIZE", f"{self._received} bytes came of the announced {self._size}")
        if self._hash.hexdigest() != self._digest:
            raise self._refusal("DIGEST_MISMATCH", f"the bytes that came have the digest {self._hash.hexdigest()}")
        self._commit(self._store._blob(self._digest))  # noqa: SLF001 - its other half
        return self._received

    def _refusal(self, reason: str, what: str) -> ServiceError:
        return ServiceError(
            Code.INVALID_ARGUMENT, reason, f"upload of blob {self._digest}: {what}; nothing was stored, upload it again"
        )


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_found(name: str, usable: Sequence[str]) -> ServiceError:
    # A longer name than any that is stored is near none of them, and comparing takes its time.
    near = difflib.get_close_matches(name, usable[:_COMPARED], n=3, cutoff=0.5) if len(name) <= _LONGEST else []
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; none of the stored names is near"
    kind = "digest" if _codec.is_digest(name) else "name"
    return ServiceError(
        Code.NOT_FOUND,
        "OBJECTIVE_NOT_FOUND",
        f"no objective of {kind} {name[:_LONGEST]!r}{hint}",
        {"near": ",".join(near)},
    )


def read_record(path: Path) -> Mapping[str, Any]:
    """The JSON object of a file; empty, with a line in the log, where there is none: one damaged file is nobody else's loss."""
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
    """When the objective of a marker was registered; None where it was not, or the marker is damaged."""
    created = read_record(marker).get("create_time_ns")
    return created if isinstance(created, int) else None
