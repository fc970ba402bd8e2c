"""Liveness: memory in which a server shows its supervisor that it lives, and which work
runs.

The supervisor can read it also when the server hangs, or has just died.
"""

import contextlib
import dataclasses
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator

from hvpd_server.scheduling.probation import OnWait, Probation

_HEADER = struct.Struct("<dii")  # Time of the last heartbeat; port; metrics port.
_SINCE = struct.Struct("<d")
_WORK = struct.Struct("<64s?")  # Digest; whether it is compiled.
_FIRST, _STRIDE, _SLOTS = 64, 128, 255
SIZE = _FIRST + _STRIDE * _SLOTS
"""Bytes of the memory."""

_NONE = -1

LOST = 71
"""Exit code of a server whose device has failed for good."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Work that runs on a device, or a compile."""

    digest: str
    """Digest of the objective."""
    compiling: bool
    """Whether the objective is compiled."""
    since: float
    """When the work began, on time.monotonic's clock, which all processes share."""


class Liveness:
    """Memory that one process writes and another reads, without locks between them.

    Args:
        descriptor: Descriptor of the shared memory; None: the memory is private.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._memory = mmap.mmap(-1 if descriptor is None else descriptor, SIZE)
        # The slot that was freed last is used next, because the CPU has it in a cache.
        self._free = list(range(_SLOTS))
        self._thread = threading.local()
        self.probation = Probation()
        """The probation of objectives that may have crashed the server. Callers of
        `begin` take its turn themselves.
        """

    @staticmethod
    def share() -> int:
        """Return the descriptor of new memory to share."""
        descriptor = os.memfd_create("hvpd-liveness")
        os.ftruncate(descriptor, SIZE)
        return descriptor

    # The server's side

    def beat(self, port: int, metrics_port: int) -> None:
        """Record a heartbeat, and the ports on which the server listens; 0: not yet."""
        _HEADER.pack_into(self._memory, 0, time.monotonic(), port, metrics_port)

    def begin(self, digest: str, *, compiling: bool = False) -> int:
        """Record that work, or a compile, begins. Return the slot, for `end`."""
        try:
            slot = self._free.pop()
        except IndexError:  # All slots are taken; the supervisor does not need more.
            return _NONE
        start = _FIRST + _STRIDE * slot
        _WORK.pack_into(self._memory, start + _SINCE.size, digest.encode(), compiling)
        _SINCE.pack_into(self._memory, start, time.monotonic())
        self._thread.slot = slot
        return slot

    def renew(self) -> None:
        """Record progress of the work that this thread began last: its time begins
        anew.
        """
        slot = getattr(self._thread, "slot", _NONE)
        if slot != _NONE:
            _SINCE.pack_into(self._memory, _FIRST + _STRIDE * slot, time.monotonic())

    def end(self, slot: int) -> None:
        """Record that the work in a slot ended."""
        if slot != _NONE:
            self._thread.slot = _NONE
            _SINCE.pack_into(self._memory, _FIRST + _STRIDE * slot, 0.0)
            self._free.append(slot)

    @contextlib.contextmanager
    def working(
        self,
        digest: str,
        *,
        compiling: bool = False,
        deadline: float = float("inf"),
        on_wait: OnWait = lambda cancel: None,
    ) -> Iterator[None]:
        """Record work in the body of a `with` statement. An objective on probation
        waits for its turn first.

        Args:
            digest: Digest of the objective.
            compiling: Whether a program is compiled, or an executable loaded.
            deadline: When the caller gives up, on time.monotonic's clock.
            on_wait: Called with a function that cancels the wait.

        Raises:
            ServiceError: The deadline passed, or the caller cancelled.
        """
        with self.probation.turn(digest, load=compiling, deadline=deadline, on_wait=on_wait):
            slot = self.begin(digest, compiling=compiling)
            try:
                yield
            finally:
                self.end(slot)

    def oldest_seconds(self) -> float:
        """Return the age of the oldest work on a device; 0 if there is none. Compiles
        do not count.
        """
        now = time.monotonic()
        return max((now - work.since for work in self.work() if not work.compiling), default=0.0)

    # The supervisor's side

    def last_beat(self) -> tuple[float, int, int]:
        """Return the time of the last heartbeat, 0 if there was none, and the two
        ports.
        """
        found: tuple[float, int, int] = _HEADER.unpack_from(self._memory)
        return found

    def work(self) -> list[Work]:
        """Return the work that runs, the oldest first."""
        found = []
        for slot in range(_SLOTS):
            start = _FIRST + _STRIDE * slot
            (since,) = _SINCE.unpack_from(self._memory, start)
            digest, compiling = _WORK.unpack_from(self._memory, start + _SINCE.size)
            if since and (since,) == _SINCE.unpack_from(self._memory, start):
                found.append(Work(digest.rstrip(b"\0").decode("ascii", "replace"), compiling, since))
        return sorted(found, key=lambda work: work.since)

    def clear(self) -> None:
        """Erase everything, before another server writes."""
        self._memory[:] = bytes(SIZE)
