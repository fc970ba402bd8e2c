"""Shared memory for the large vectors of one connection on one machine.

The caller makes a segment, and passes its descriptor to the server. Both map it. It has
no name. It is gone when both ends are, however they end.

The caller may do anything with its segment. If it could shrink the memory, a signal
(SIGBUS) would kill the server that reads what is no longer there. So the server takes
only plain memory that is sealed against shrinking.
"""

import mmap
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from hvpd._wire import codec

if sys.platform == "linux":
    import fcntl

_NAME: Final = "hvpd-vectors"
"""The name in /proc/PID/maps, after "memfd:". Nothing finds memory by it."""

_NEVER_OVERCOMMITS: Final = "2"
"""The setting of vm.overcommit_memory with which plain memory may be missing, too."""


class SegmentError(OSError):
    """A descriptor is not that of a segment."""


class Segment:
    """Mapped memory, which is freed with the last reference to it.

    Args:
        descriptor: Descriptor of the memory. The caller of this function closes it.
        size: Bytes to map.

    Attributes:
        memory: The bytes.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        mapped = mmap.mmap(descriptor, size)
        # A child process, which may live longer, must not keep the memory.
        mapped.madvise(mmap.MADV_DONTFORK)
        self.memory: codec.Array = np.frombuffer(mapped, np.uint8)

    @property
    def size(self) -> int:
        """Return the number of bytes."""
        return len(self.memory)

    def write(self, payload: "codec.Buffer") -> None:
        """Copy bytes to the beginning, without the interpreter's lock."""
        np.copyto(self.memory[: len(payload)], np.frombuffer(payload, np.uint8))

    def read_into(self, target: memoryview) -> None:
        """Copy bytes from the beginning, without the interpreter's lock."""
        np.copyto(np.frombuffer(target, np.uint8), self.memory[: len(target)])


def available() -> bool:
    """Return whether this machine can share memory safely.

    If the kernel never promises more memory than there is, a caller can still let the
    server run into a page that the kernel does not have.
    """
    if not hasattr(os, "memfd_create"):
        return False
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() != _NEVER_OVERCOMMITS
    except OSError:
        return False


def create(size: int) -> tuple[Segment, int]:
    """Return a new segment, and its descriptor, which the caller closes.

    Raises:
        OSError: The system gives no such memory.
    """
    descriptor = _memory()
    try:
        os.ftruncate(descriptor, size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        return Segment(descriptor, size), descriptor
    except BaseException:
        os.close(descriptor)
        raise


def attach(descriptor: int, size: int) -> Segment:
    """Map the segment of another process.

    Args:
        descriptor: A descriptor that another process sent. The caller of this function
            closes it.
        size: Bytes that the segment must have at least.

    Raises:
        SegmentError: It is not plain memory, is too small, or may shrink.
        OSError: The memory cannot be mapped, or not for writing.
    """
    found = os.fstat(descriptor)
    if found.st_dev != _plain_device():
        raise SegmentError("the descriptor is not plain memory of memfd_create")
    if found.st_size < size:
        raise SegmentError(f"the memory has {found.st_size} bytes, expected {size}")
    if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise SegmentError("the memory is not sealed against shrinking (F_SEAL_SHRINK)")
    return Segment(descriptor, size)


def _memory() -> int:
    return os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def _plain_device() -> int:
    """Return the device number of plain memory.

    Files elsewhere, and huge pages, can run out of space under a mapping.
    """
    descriptor = _memory()
    try:
        return os.fstat(descriptor).st_dev
    finally:
        os.close(descriptor)
