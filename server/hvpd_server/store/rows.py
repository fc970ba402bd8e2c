"""Tensors that are too large to read at once, and are read from the disk by rows.
`device.data_sources` takes them through the device.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hvpd._wire import codec
from hvpd.v1 import tensor_pb2
from hvpd_server.errors import Code, ServiceError, invalid, to_service_error


class Rows:
    """A tensor on the disk. `rows[start:stop]` reads a part of it. A scalar has one
    row.

    The file is not mapped into memory: if the disk fails, or the file is cut short, a
    mapping ends the process.

    Args:
        path: File of the tensor.
        tensor: Shape and dtype.
        verify: Raises an error that names the problem of a digest's blob, if
            anything is.

    Raises:
        ServiceError: The file has not the tensor's size, or the dtype is unknown.
    """

    def __init__(self, path: Path, tensor: tensor_pb2.Tensor, verify: Callable[[str], None]) -> None:
        try:
            self._dtype = codec.dtype(tensor.dtype)
        except TypeError as error:
            raise no_tensor(tensor, str(error)) from None
        self._verify = verify
        self._path = path
        self._digest = tensor.digest
        self.tensor = tensor
        """Shape, dtype and digest."""
        self._row = tuple(tensor.shape[1:])
        self._row_bytes = math.prod(self._row) * self._dtype.itemsize
        expected, size = self._row_bytes * (tensor.shape[0] if tensor.shape else 1), path.stat().st_size
        if size != expected:
            raise no_tensor(tensor, f"{tensor.dtype}{list(tensor.shape)} takes {expected} bytes, got {size}")

    def __getitem__(self, rows: slice) -> codec.Array:
        """Read some rows.

        Raises:
            ServiceError: The rows cannot be read. A corrupt file is set aside.
        """
        count = rows.stop - rows.start
        try:
            try:
                read = self._read(rows.start, count)
            except FileNotFoundError:  # The copy of an object store's blob has gone for others.
                self._verify(self._digest)
                read = self._read(rows.start, count)
        except (FileNotFoundError, ServiceError) as error:  # Another call has set it aside.
            raise unreadable(
                self._digest, "it is not there any more; register the objective again to restore it"
            ) from error
        except OSError as error:
            self._verify(self._digest)
            raise unreadable_file(self._digest, error) from error
        if len(read) < count * self._row_bytes:
            self._verify(self._digest)
            raise unreadable(self._digest, "it is shorter than it was")
        found: codec.Array = read.view(self._dtype).reshape(count, *self._row)
        return found

    def _read(self, first: int, count: int) -> codec.Array:
        found: codec.Array = np.fromfile(self._path, np.uint8, count * self._row_bytes, offset=first * self._row_bytes)
        return found


def unreadable(digest: str, why: str | None) -> ServiceError:
    """Return the error for a blob that cannot be read."""
    return ServiceError(
        Code.DATA_LOSS,
        "BLOB_CORRUPT",
        f"blob {digest} cannot be read from the server's disk: {why}",
        {"digests": digest},
    )


def unreadable_file(digest: str, error: OSError) -> ServiceError:
    """Return the error for a blob whose file cannot be read.

    If the machine has no descriptor or memory left, the blob is not to blame.
    """
    known = to_service_error(error)
    return known if known.code is Code.RESOURCE_EXHAUSTED else unreadable(digest, error.strerror)


def no_tensor(tensor: tensor_pb2.Tensor, why: str) -> ServiceError:
    """Return the error for a blob that is not the tensor that it should be."""
    return invalid("INVALID_TENSOR", f"tensor {tensor.digest[:12]}: {why}")
