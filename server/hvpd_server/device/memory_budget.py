"""The bytes of the device and of the host that the server may use."""

import contextlib
import logging
import os
from pathlib import Path

from hvpd_server.device.device import Device

_log = logging.getLogger(__name__)

_CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
"""Files with the memory limit of a container, in versions 2 and 1 of cgroups."""


def budget(asked: int | None, device: Device, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that resident arrays may take.

    These are the bytes asked for; else three quarters of the memory that jax may
    allocate, or on a CPU a quarter of the memory of the machine or the container.

    Raises:
        ValueError: No budget was asked for, and the device does not report its memory.
    """
    memory = device.memory_bytes()
    if asked:
        if memory is not None and asked > memory:
            _log.warning(
                "the memory budget is %d bytes, and jax has %d of the device's (XLA_CLIENT_MEM_FRACTION)", asked, memory
            )
        return asked
    if memory is not None:
        return memory * 3 // 4
    if device.platform != "cpu":
        raise ValueError(f"{device.kind} does not tell how much memory it has: say --memory-budget")
    return host_bytes(cgroup) // 4


def program_bytes(device: Device, cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the most memory that one program may take beside its arguments; None if
    the device's allocator limits it.

    On a CPU nothing else does: the kernel gives memory that it does not have, and then
    ends the server.
    """
    return host_bytes(cgroup) * 3 // 4 if device.platform == "cpu" else None


def host_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory of the machine, or of the container."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # There is no such file, or it says "max".
            limits.append(int((cgroup / name).read_text()))
    return min(limits)
