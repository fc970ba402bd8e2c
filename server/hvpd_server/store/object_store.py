"""A store in S3, Google Cloud Storage or Azure Blob Storage, by the library obstore.

Records change by conditional writes. Blobs never change, so this machine keeps copies
of them on its disk, within a number of bytes. obstore takes credentials from the
environment only, and retries throttling, server errors and lost connections.
"""

import builtins
import contextlib
import datetime
import hashlib
import logging
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hvpd_server.errors import Code, ServiceError
from hvpd_server.files import atomic_file
from hvpd_server.store.lease import Lease
from hvpd_server.store.objects import CorruptError, Directory, Entry

if TYPE_CHECKING:
    from obstore import ObjectMeta

_log = logging.getLogger(__name__)

_RETRIES = 6
"""Most retries of a request."""


class _Patience(NamedTuple):
    """How long requests may take, in seconds."""

    request: float
    """Most seconds of one try."""
    retry: float
    """Seconds from the first try after which a try that fails is the last one."""
    backoff: float
    """Most seconds between two tries."""

    @property
    def most(self) -> float:
        """The most seconds of a request with its retries."""
        return self.retry + self.backoff + self.request


_READS = _Patience(60, 30, 5)
"""For reads, and for blobs, which never change: a late write of one does no harm."""

_WRITES = _Patience(4, 2, 1)
"""For records and deletions, which must end within the lease of the store."""

_PIECE = 8 << 20
"""Bytes to take at a time from a blob that arrives."""

_KEPT = 15 / 16
"""Share of the most bytes of copies that stays when they are too many."""

_CREDENTIALS = (
    "ExpiredToken",
    "TokenRefreshRequired",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "AuthenticationFailed",
    "AuthorizationFailure",
    "401 Unauthorized",
    "400 Bad Request",  # The answer to HEAD has no code; S3 answers so for expired tokens.
    "credential",
)
_MISSING = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")


class ObjectStore:
    """The files below a URL.

    Args:
        url: Bucket and prefix, such as `s3://bucket/prefix`.
        local: Directory of this machine for copies of blobs, arriving blobs and
            compiled programs.
        most_bytes: Most bytes of the copies.

    Raises:
        ServiceError: obstore is not installed, or the URL is wrong.
    """

    quick = False

    def __init__(self, url: str, local: Path, most_bytes: int) -> None:
        self.name = url
        self.local = local
        self._disk = Directory(local)
        self._most_bytes = most_bytes
        self._lease = Lease(self)
        self._lock = threading.Lock()
        self._downloading: dict[str, threading.Lock] = {}
        self._generations = url.startswith("gs://")  # Google's conditions are on generations, not on ETags.
        try:
            import obstore
            from obstore import store
        except ImportError:
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                "STORE_UNAVAILABLE",
                f"--store {url} needs obstore: pip install 'hvpd[objectstore]'",
            ) from None
        self._obstore = obstore

        def connected(patience: _Patience) -> Any:
            return store.from_url(
                url,
                client_options={
                    "connect_timeout": datetime.timedelta(seconds=min(5.0, patience.request)),
                    "timeout": datetime.timedelta(seconds=patience.request),
                    # obstore reads this variable only if it gets no options.
                    "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true"),
                },
                retry_config={
                    "max_retries": _RETRIES,
                    "retry_timeout": datetime.timedelta(seconds=patience.retry),
                    "backoff": {
                        "init_backoff": datetime.timedelta(milliseconds=100),
                        "max_backoff": datetime.timedelta(seconds=patience.backoff),
                        "base": 2,
                    },
                },
            )

        try:
            self._store, self._writes = connected(_READS), connected(_WRITES)
        except Exception as error:
            raise ServiceError(
                Code.FAILED_PRECONDITION, "STORE_UNAVAILABLE", f"--store {url} cannot be used: {error}"
            ) from error

    def open(self) -> None:
        """Take part in the store; see `Objects.open`."""
        self._disk.open()

    def close(self) -> None:
        """Take part in the store no more."""
        self._disk.close()

    # Records

    def get(self, key: str) -> bytes | None:
        """Return the content of a file; None if there is none."""
        found = self.read(key)
        return found[0] if found is not None else None

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Return the content and the tag of a file; None if there is none."""
        with self._told():
            try:
                found = self._obstore.get(self._store, key)
                return bytes(found.bytes()), self._tag(found.meta)
            except FileNotFoundError:
                return None

    def put(self, key: str, content: bytes) -> None:
        """Write a file, in place of an older one."""
        self._lease.keep()
        with self._told():
            try:
                self._obstore.put(self._writes, key, content)
            except FileNotFoundError as error:
                raise self._error(error) from error

    def replace(self, key: str, content: bytes, tag: str | None) -> str | None:
        """Write a file only if its version is that of `tag`; see `Objects.replace`."""
        self._lease.keep()
        mode: Any = "create"
        if tag is not None:
            mode = {"version" if self._generations else "e_tag": tag}
        with self._told():
            try:
                return self._tag(self._obstore.put(self._writes, key, content, mode=mode))
            except (
                self._obstore.exceptions.AlreadyExistsError,
                self._obstore.exceptions.PreconditionError,
            ):
                pass
            except FileNotFoundError as error:
                if tag is None:
                    raise self._error(error) from error
        # A retry of a write that was done, but whose answer was lost, fails, too.
        found = self.read(key)
        return found[1] if found is not None and found[0] == content else None

    def delete(self, key: str) -> None:
        """Remove a file, if it is there."""
        self._lease.keep()
        if key.startswith("blobs/"):
            self._disk.delete(key)
        with self._told(), contextlib.suppress(FileNotFoundError):
            self._obstore.delete(self._writes, key)

    def move(self, key: str, to: str) -> None:
        """Give a file another key, if it is there."""
        self._disk.delete(key)
        with self._told(), contextlib.suppress(FileNotFoundError):
            self._obstore.copy(self._store, key, to)
            self.delete(key)

    def stat(self, key: str) -> Entry | None:
        """Return a file without its content; None if there is none."""
        with self._told():
            try:
                return self._entry(self._obstore.head(self._store, key))
            except FileNotFoundError:
                return None

    def exists(self, key: str) -> bool:
        """Return whether there is a file."""
        return self.stat(key) is not None

    def list(self, folder: str) -> Iterator[Entry]:
        """Yield the files of a folder, sorted."""
        with self._told():
            found = self._obstore.list_with_delimiter(self._store, f"{folder}/")["objects"]
        yield from sorted(map(self._entry, found))

    def folders(self, folder: str) -> builtins.list[str]:
        """Return the names of the folders in a folder, sorted."""
        with self._told():
            found = self._obstore.list_with_delimiter(self._store, f"{folder}/")["common_prefixes"]
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def walk(self, folder: str) -> Iterator[Entry]:
        """Yield the files of the folders in a folder."""
        with self._told():
            for part in self._obstore.list(self._store, f"{folder}/", chunk_size=1000):
                yield from map(self._entry, part)

    def _entry(self, found: "ObjectMeta") -> Entry:
        return Entry(found["path"], found["size"], found["last_modified"].timestamp(), self._tag(found))

    def _tag(self, found: Any) -> str:
        return str(found["version"] if self._generations else found["e_tag"])

    # Changes

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Exclude changes by other servers; see `Objects.locked`."""
        return self._lease.held()

    def version(self, key: str) -> str:
        """Return the tag of a file that `bump` writes."""
        found = self.stat(key)
        return found.tag if found is not None else "0"

    def bump(self, key: str, known: str) -> tuple[str, bool]:
        """Count a change; see `Objects.bump`."""
        content = secrets.token_hex(16).encode()
        if known:
            tag = self.replace(key, content, None if known == "0" else known)
            if tag is not None:
                return tag, True
        self.put(key, content)
        return "", False

    # Blobs

    def fetch(self, key: str) -> Path:
        """Return the copy of a blob on this machine, which is made if there is none."""
        path = self.local / key
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)  # The copies that were used last stay.
            return path
        with self._lock:
            lock = self._downloading.setdefault(key, threading.Lock())
        with lock:  # Another thread may be downloading the blob.
            try:
                if not path.exists():
                    self._download(key, path)
            finally:
                with self._lock:
                    self._downloading.pop(key, None)
        return path

    def pieces(self, key: str) -> Iterator[bytes]:
        """Yield the content of a blob piece by piece; see `Objects.pieces`."""
        with self._told():
            size = self._obstore.head(self._store, key)["size"]
        for start in range(0, size, _PIECE):  # Each piece has a time limit of its own.
            with self._told():
                piece = self._obstore.get_range(self._store, key, start=start, end=min(start + _PIECE, size))
            yield bytes(piece)

    def _download(self, key: str, path: Path) -> None:
        for last in (False, True):
            state = hashlib.sha256()
            with atomic_file(self.local / "incoming", durable=False) as (file, commit):
                for piece in self.pieces(key):
                    state.update(piece)
                    file.write(piece)
                if state.hexdigest() == path.name:
                    self._make_room(file.tell())
                    commit(path)
                    return
            if last:
                raise CorruptError(key)
            _log.warning("%s of %s came with other bytes than its name says; it is asked for again", key, self.name)

    def refetch(self, key: str) -> bool:
        """Drop the copy of a blob; see `Objects.refetch`."""
        self._disk.delete(key)
        return True

    def placed(self, key: str) -> None:
        """Send a blob that is complete on this machine. It appears whole, or not."""
        path = self.local / key
        try:
            with self._told():
                try:
                    self._obstore.put(self._store, key, path)
                except FileNotFoundError as error:
                    raise self._error(error) from error
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self._make_room(0)

    def _make_room(self, size_bytes: int) -> None:
        """Remove the copies that were not used for longest, if they are too many."""
        found = [(entry.modified, entry.size, entry.key) for entry in self._disk.walk("blobs")]
        used = sum(size for _, size, _ in found) + size_bytes
        if used <= self._most_bytes:
            return
        for _, size, key in sorted(found):
            if used <= self._most_bytes * _KEPT:
                return
            self._disk.delete(key)
            used -= size

    # Errors

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn errors of obstore into errors for clients, without the details."""
        try:
            yield
        except self._obstore.exceptions.BaseError as error:
            _log.error("the store %s: %s", self.name, error)
            raise self._error(error) from error

    def _error(self, error: Exception) -> ServiceError:
        text, kinds = str(error), self._obstore.exceptions
        if isinstance(error, FileNotFoundError) or any(word in text for word in _MISSING):
            why, remedy = "its bucket does not exist", "create the bucket, or correct --store"
        elif isinstance(error, kinds.UnauthenticatedError) or any(word in text for word in _CREDENTIALS):
            why, remedy = "the server's credentials are missing, wrong or expired", "renew them in its environment"
        elif isinstance(error, kinds.PermissionDeniedError) or "AccessDenied" in text:
            why, remedy = "the server may not read or write it", "give it the rights to list, get, put and delete"
        else:
            return ServiceError(
                Code.UNAVAILABLE,
                "STORE_AWAY",
                f"the store {self.name} does not answer, or asks for fewer requests, also when asked again: try again later; "
                "the server's log has more",
                retry_after=1.0,
            )
        return ServiceError(
            Code.FAILED_PRECONDITION,
            "STORE_UNAVAILABLE",
            f"the store {self.name} cannot be used, because {why}: its operator must {remedy}; the server's log has more",
        )
