"""Vectors in POSIX shared memory, as clients of UM-Bridge name them.

The client makes and removes all segments. This process maps them for the time of one
request, and leaves nothing behind. Names are checked, so that a client reaches only
segments of UM-Bridge.
"""

import mmap
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from hvpd import _text
from hvpd._errors import HvpdError
from hvpd._wire import codec

_FOLDER: Final = Path("/dev/shm")  # noqa: S108 - where Linux shows shared memory

_NAME: Final = re.compile(r"/?(umbridge[A-Za-z0-9_.-]{0,200})")

_TID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


class SegmentError(HvpdError):
    """A segment is missing, has another size, or has a name that is not allowed."""


def read(request: Mapping[str, Any], sizes: Sequence[int]) -> list[codec.Array]:
    """Return the inputs of a request.

    Args:
        request: The request, with `shmem_name`, `tid`, `shmem_num_inputs` and
            `shmem_size_0`, ...
        sizes: Numbers of elements that the model expects.

    Raises:
        SegmentError: They do not fit, or a segment cannot be read.
    """
    count = request.get("shmem_num_inputs")
    if count != len(sizes) or type(count) is not int:
        raise SegmentError(f"shmem_num_inputs must be {len(sizes)}, got {_text.cut(repr(count), 100)}")
    found = []
    for index, size in enumerate(sizes):
        stated = request.get(f"shmem_size_{index}")
        if stated != size or type(stated) is not int:
            raise SegmentError(f"shmem_size_{index} must be {size}, got {_text.cut(repr(stated), 100)}")
        found.append(_get(_path(request, "in", index), size) if size else np.zeros(0))
    return found


def write(request: Mapping[str, Any], outputs: Sequence[codec.Array]) -> None:
    """Write vectors into the segments that the client made for them.

    Raises:
        SegmentError: A segment is missing or too small.
    """
    for index, output in enumerate(outputs):
        _put(_path(request, "out", index), output)


def echo(request: Mapping[str, Any]) -> None:
    """Copy the number of the client's test of shared memory, if it can be reached."""
    tid = _tid(request)
    _put(_FOLDER / f"umbridge_test_shmem_out_{tid}", _get(_FOLDER / f"umbridge_test_shmem_in_{tid}", 1))


def _path(request: Mapping[str, Any], direction: str, index: int) -> Path:
    name = _NAME.fullmatch(str(request.get("shmem_name")))
    if name is None:
        raise SegmentError(
            f"shmem_name must begin with umbridge, and have letters, digits and ._- only, got {_text.cut(repr(request.get('shmem_name')), 100)}"
        )
    return _FOLDER / f"{name[1]}_{direction}_{_tid(request)}_{index}"


def _tid(request: Mapping[str, Any]) -> str:
    tid = str(request.get("tid"))
    if not _TID.fullmatch(tid):
        raise SegmentError(f"tid must be a number of a thread, got {_text.cut(repr(tid), 100)}")
    return tid


def _get(path: Path, size: int) -> codec.Array:
    with _mapped(path, size * 8, write=False) as memory:
        return np.frombuffer(memory, np.float64, size).copy()


def _put(path: Path, vector: codec.Array) -> None:
    with _mapped(path, vector.size * 8, write=True) as memory:
        memory[: vector.size * 8] = np.ascontiguousarray(vector, np.float64).tobytes()


def _mapped(path: Path, size_bytes: int, *, write: bool) -> mmap.mmap:
    """Map a segment, which must have at least some bytes."""
    try:
        descriptor = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SegmentError(f"the shared memory {path.name} cannot be opened: {error.strerror}") from None
    try:
        if os.fstat(descriptor).st_size < size_bytes:
            raise SegmentError(
                f"the shared memory {path.name} has {os.fstat(descriptor).st_size} bytes, and {size_bytes} are needed"
            )
        return mmap.mmap(descriptor, size_bytes, access=mmap.ACCESS_WRITE if write else mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
