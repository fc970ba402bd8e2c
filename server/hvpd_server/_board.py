"""What a server is doing, in memory that its supervisor reads: also when the server hangs, or has just died."""

import contextlib
import dataclasses
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator

_HEADER = struct.Struct("<dii")  # Time of the last beat; port; metrics port.
_SINCE = struct.Struct("<d")
_WHAT = struct.Struct("<64s?")  # Digest; whether it is compiled.
_FIRST, _STRIDE, _SLOTS = 64, 128, 255
SIZE = _FIRST + _STRIDE * _SLOTS
"""Bytes."""

_NONE = -1

LOST = 71
"""The exit code with which a server says, last of all, that its device does nothing any more."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Something that runs on a device, or is compiled."""

    digest: str
    """The objective that it belongs to."""
    compiling: bool
    """Whether it is compiled."""
    since: float
    """When it began, on time.monotonic's clock, which all processes share."""


class Board:
    """Written by one process and read by another, without locks between them.

    Args:
        descriptor: Of the memory to share; without one it is this process's own.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._memory = mmap.mmap(-1 if descriptor is None else descriptor, SIZE)
        self._free = list(range(_SLOTS))  # What was freed last is used next: it is in the caches.
        self._thread = threading.local()

    @staticmethod
    def share() -> int:
        """The descriptor of new memory for a board."""
        descriptor = os.memfd_create("hvpd-board")
        os.ftruncate(descriptor, SIZE)
        return descriptor

    # The server's side

    def beat(self, port: int, metrics_port: int) -> None:
        """Says that the server is alive, and where it listens; 0 is nowhere yet."""
        _HEADER.pack_into(self._memory, 0, time.monotonic(), port, metrics_port)

    def begin(self, digest: str, *, compiling: bool = False) -> int:
        """Notes that something begins to run, or to be compiled; returns what `end` takes."""
        try:
            slot = self._free.pop()
        except IndexError:  # So much at once is more than anybody needs to see.
            return _NONE
        start = _FIRST + _STRIDE * slot
        _WHAT.pack_into(self._memory, start + _SINCE.size, digest.encode(), compiling)
        _SINCE.pack_into(self._memory, start, time.monotonic())
        self._thread.slot = slot
        return slot

    def renew(self) -> None:
        """Says that what this thread began last gets on: its time begins anew."""
        slot = getattr(self._thread, "slot", _NONE)
        if slot != _NONE:
            _SINCE.pack_into(self._memory, _FIRST + _STRIDE * slot, time.monotonic())

    def end(self, slot: int) -> None:
        """Notes that it ended."""
        if slot != _NONE:
            self._thread.slot = _NONE
            _SINCE.pack_into(self._memory, _FIRST + _STRIDE * slot, 0.0)
            self._free.append(slot)

    @contextlib.contextmanager
    def working(self, digest: str, *, compiling: bool = False) -> Iterator[None]:
        """Notes what runs, or is compiled, meanwhile."""
        slot = self.begin(digest, compiling=compiling)
        try:
            yield
        finally:
            self.end(slot)

    # The supervisor's side

    def beaten(self) -> tuple[float, int, int]:
        """Time of the last beat, 0 where there was none; the ports."""
        found: tuple[float, int, int] = _HEADER.unpack_from(self._memory)
        return found

    def work(self) -> list[Work]:
        """What runs, the oldest first."""
        found = []
        for slot in range(_SLOTS):
            start = _FIRST + _STRIDE * slot
            (since,) = _SINCE.unpack_from(self._memory, start)
            digest, compiling = _WHAT.unpack_from(self._memory, start + _SINCE.size)
            if since and (since,) == _SINCE.unpack_from(self._memory, start):
                found.append(Work(digest.rstrip(b"\0").decode("ascii", "replace"), compiling, since))
        return sorted(found, key=lambda work: work.since)

    def clear(self) -> None:
        """Before another server writes."""
        self._memory[:] = bytes(SIZE)
