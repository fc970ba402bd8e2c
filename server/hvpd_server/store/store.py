"""Blobs, objectives and names on disk, as plain files.

    STORE/blobs/ab/abcd...     bytes whose SHA-256 is the file's name
    STORE/objectives/DIGEST    JSON: when the objective was registered
    STORE/checks/DIGEST        JSON: the check after a registration without a tenant
    STORE/owners/              what tenants have uploaded and registered; see
                               `tenant_content`
    STORE/derived/DIGEST       JSON: the derivation of the bundle, and its version
    STORE/names/SHA256         JSON: a name and its digest; the file is named by the
                               SHA-256 of the name
    STORE/corrupt/             blobs whose bytes did not match their name
    STORE/incoming/            files that are being written; emptied at start
    STORE/cache/               compiled programs

A file is written aside, flushed and renamed, so a crash leaves the old or the new one.
Objectives and names are also in memory: a look-up reads no file.
"""

import functools
import hashlib
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from hvpd import _text
from hvpd._wire import codec
from hvpd.v1 import objective_pb2, tensor_pb2
from hvpd_server.errors import Code, ServiceError, invalid
from hvpd_server.files import Version, version
from hvpd_server.store.index import Index
from hvpd_server.store.objects import CorruptError, Directory, Objects
from hvpd_server.store.rows import Rows, no_tensor, unreadable_file
from hvpd_server.store.upload import Upload

_log = logging.getLogger(__name__)

_Message = TypeVar("_Message", bound=Message)


class Store(Index):
    """Blobs, objectives and names.

    Safe for many threads, and for several servers with the same files.

    Args:
        where: The directory, created if it is missing; or the files.

    Raises:
        ServiceError: The store cannot be used.
    """

    def __init__(self, where: Path | Objects) -> None:
        super().__init__(Directory(where) if isinstance(where, Path) else where)
        self.root = self.objects.local
        try:
            self.objects.open()
            for folder in (
                "blobs",
                "objectives",
                "checks",
                "derived",
                "names",
                "owners",
                "corrupt",
                "incoming",
                "cache",
            ):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServiceError(
                Code.FAILED_PRECONDITION, "STORE_UNAVAILABLE", f"--store {self.root} cannot be used: {error}"
            ) from None
        self._verified: dict[str, Version | None] = {}
        with self.changing():
            self.unsaid()  # Others must read what a server left that was killed in a change.

    def close(self) -> None:
        """Take part in the store no more."""
        self.objects.close()

    @property
    def cache(self) -> Path:
        """Directory of compiled programs."""
        return self.root / "cache"

    # Blobs

    def has(self, digest: str) -> bool:
        """Return whether a blob is stored."""
        return codec.is_digest(digest) and self.objects.exists(blob_key(digest))

    def size(self, digest: str) -> int:
        """Return the size of a blob in bytes; 0 if it cannot be read."""
        try:
            found = self.objects.stat(blob_key(digest)) if codec.is_digest(digest) else None
        except OSError:
            return 0
        return found.size if found is not None else 0

    def upload(self, digest: str, size_bytes: int) -> Upload:
        """Start to store a blob; see `Upload`.

        Raises:
            ServiceError: The digest or the size is wrong, or the disk is full.
        """
        if not codec.is_digest(digest):
            raise invalid(
                "INVALID_DIGEST", f"a digest must be 64 lower-case hexadecimal digits, got {_text.quoted(digest, 80)}"
            )
        self.check_room([size_bytes], f"blob {digest[:12]}")
        placed = functools.partial(self.objects.placed, blob_key(digest))
        return Upload(self.root / "incoming", self.root / blob_key(digest), digest, size_bytes, placed)

    def check_room(self, sizes: Sequence[int], what: str = "these blobs") -> None:
        """Raise ServiceError if the disk has no room for blobs of these sizes in bytes.

        Args:
            sizes: Their sizes.
            what: Their name, for the message.
        """
        if any(size < 0 for size in sizes):
            raise invalid("INVALID_SIZE", f"the size of {what} must be 0 or more bytes, got {min(sizes)}")
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
        path = self._existing(digest, set_aside=set_aside)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise unreadable_file(digest, error) from error
        if codec.digest(content) != digest:
            if self.objects.refetch(blob_key(digest)):
                return self.read(digest, set_aside=set_aside)
            raise self._corrupt(digest, set_aside=set_aside)
        return content

    def verify(self, digest: str, *, set_aside: bool = True) -> None:
        """Verify a blob as `read` does, but read it piece by piece."""
        try:
            with self._existing(digest, set_aside=set_aside).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                verified = version(file.fileno())
        except OSError as error:
            raise unreadable_file(digest, error) from error
        if found != digest:
            if self.objects.refetch(blob_key(digest)):
                return self.verify(digest, set_aside=set_aside)
            raise self._corrupt(digest, set_aside=set_aside)
        self._verified[digest] = verified
        return None

    def _existing(self, digest: str, *, set_aside: bool) -> Path:
        """Return a file of this machine with the content of a blob."""
        try:
            if codec.is_digest(digest):
                return self.objects.fetch(blob_key(digest))
        except FileNotFoundError:
            pass
        except CorruptError:
            raise self._corrupt(digest, set_aside=set_aside) from None
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            "BLOBS_MISSING",
            f"blob {_text.quoted(digest, 80)} is not stored: upload it",
            {"digests": digest[:80]},
        )

    def _corrupt(self, digest: str, *, set_aside: bool) -> ServiceError:
        if not set_aside:
            return ServiceError(Code.DATA_LOSS, "BLOB_CORRUPT", f"blob {digest} is corrupt on the server's disk")
        self.objects.move(blob_key(digest), f"corrupt/{digest}.{time.time_ns()}")
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

    def open_tensor(self, tensor: tensor_pb2.Tensor, *, set_aside: bool = True, verified: bool = False) -> Rows:
        """Open a tensor that is too large to be read at once.

        Its digest is verified before, once for each version of the file, unless another
        process has just verified it (`verified`).
        """
        path = self._existing(tensor.digest, set_aside=set_aside)
        known = self._verified.get(tensor.digest)
        if not verified and (known is None or known != version(path)):
            self.verify(tensor.digest, set_aside=set_aside)
        return Rows(path, tensor, functools.partial(self.verify, set_aside=set_aside))

    def remove_blob(self, digest: str) -> None:
        """Remove a blob."""
        self._verified.pop(digest, None)
        self.objects.delete(blob_key(digest))

    def blobs(self, older_than_seconds: float = 0.0) -> Iterator[str]:
        """Yield the digests of all blobs of at least this age."""
        latest = time.time() - older_than_seconds
        for entry in self.objects.walk("blobs"):
            if codec.is_digest(entry.name) and entry.modified <= latest:
                yield entry.name

    def bundle(self, digest: str) -> objective_pb2.Bundle:
        """Return the parsed bundle of an objective."""
        return objective_pb2.Bundle.FromString(self.read(digest))

    # What is known of objectives

    def add_check(self, digest: str, found: objective_pb2.RegistrationCheck, tenant: str = "") -> None:
        """Keep the check of an objective for a tenant, in place of an older one."""
        self.keep(_check_key(digest, tenant), json_format.MessageToDict(found, preserving_proto_field_name=True))

    def check(self, digest: str, tenant: str = "") -> objective_pb2.RegistrationCheck | None:
        """Return the check of an objective for a tenant; None if there is none."""
        return self._read_check(_check_key(digest, tenant))

    def checks(self, digest: str) -> list[objective_pb2.RegistrationCheck]:
        """Return the checks of an objective for all tenants."""
        keys = [_check_key(digest, ""), *(f"owners/{each}/checks/{digest}" for each in self.objects.folders("owners"))]
        return [found for found in map(self._read_check, keys) if found is not None]

    def _read_check(self, key: str) -> objective_pb2.RegistrationCheck | None:
        record = self.record(key)
        return _parsed(key, record, objective_pb2.RegistrationCheck(), ignore_unknown=True) if record else None

    def add_derivation(self, digest: str, version: str, found: objective_pb2.Derivation) -> None:
        """Keep the derivation of a bundle, with the version of the code that derived
        it.
        """
        content = json_format.MessageToDict(found, preserving_proto_field_name=True)
        self.keep(f"derived/{digest}", {"version": version, "derivation": content})

    def forget_derivation(self, digest: str) -> None:
        """Forget the derivation of a bundle that is no objective."""
        self.objects.delete(f"derived/{digest}")

    def derivation_bytes(self, digest: str) -> int:
        """Return the size of the kept derivation of a bundle; 0 if none is kept."""
        try:
            found = self.objects.stat(f"derived/{digest}")
        except OSError:
            return 0
        return found.size if found is not None else 0

    def derivation(self, digest: str, version: str) -> objective_pb2.Derivation | None:
        """Return the kept derivation of a bundle; None if this version kept none."""
        record = self.record(f"derived/{digest}")
        content = record.get("derivation")
        if record.get("version") != version or not isinstance(content, dict):
            return None
        return _parsed(f"derived/{digest}", content, objective_pb2.Derivation())


def _parsed(
    key: str, content: Mapping[str, Any], message: _Message, *, ignore_unknown: bool = False
) -> _Message | None:
    """Return a message of a record; None if the record is damaged."""
    try:
        return json_format.ParseDict(dict(content), message, ignore_unknown_fields=ignore_unknown)
    except json_format.ParseError as error:
        _log.error("%s is damaged, and left aside: %s", key, error)
        return None


def blob_key(digest: str) -> str:
    """Return the key of a blob."""
    return "/".join(("blobs", digest[:2], digest))


def _check_key(digest: str, tenant: str) -> str:
    return f"owners/{codec.digest(tenant.encode())}/checks/{digest}" if tenant else f"checks/{digest}"
