"""Blobs on their way into the store."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Self

from hvpd._wire import codec
from hvpd_server.errors import ServiceError, invalid
from hvpd_server.files import atomic_file


class Upload:
    """A blob that arrives in chunks: a context manager that drops an incomplete blob.

    Args:
        incoming: Directory for the bytes until the blob is complete.
        path: Final path of the blob.
        digest: SHA-256 that the bytes must have.
        size_bytes: Size that the blob must have.
        placed: Called once the blob is complete at its path; may raise.

    Raises:
        ServiceError: From `append` and `commit`: bytes out of order, too many, too few,
            or not those of the digest.
    """

    def __init__(self, incoming: Path, path: Path, digest: str, size_bytes: int, placed: Callable[[], None]) -> None:
        self._incoming = incoming
        self._path = path
        self._digest = digest
        self._size = size_bytes
        self._placed = placed
        self._received = 0
        self._hash = hashlib.sha256()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._file, self._commit = self._stack.enter_context(atomic_file(self._incoming))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def append(self, offset_bytes: int, chunk: codec.Buffer) -> None:
        """Add the next bytes."""
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
        """Verify and store the blob; return its size in bytes."""
        if self._received != self._size:
            raise self._refusal("UPLOAD_SIZE", f"{self._received} bytes came of the announced {self._size}")
        if self._hash.hexdigest() != self._digest:
            raise self._refusal("DIGEST_MISMATCH", f"the bytes that came have the digest {self._hash.hexdigest()}")
        self._commit(self._path)
        self._placed()
        return self._received

    def _refusal(self, reason: str, what: str) -> ServiceError:
        return invalid(reason, f"upload of blob {self._digest}: {what}; nothing was stored, upload it again")
