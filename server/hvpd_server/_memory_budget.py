"""How many bytes of the device and of the host the server may use."""

import contextlib
import logging
import os
from pathlib import Path

from hvpd_server._kernels import Device

_log = logging.getLogger(__name__)

_CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
"""Where a container finds how much memory it may use, in the second and the first version of cgroups."""


def budget(asked: int | None, device: Device, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes for what is resident: as asked; else three quarters of the memory that jax gives out, on a CPU a quarter of the machine's, or
    of the container's.

    Raises:
        ValueError: Nothing was asked for, and the device does not tell.
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
    """Return the most memory that one program may take beside its arguments; None if the device's allocator limits it.

    On a CPU nothing else does: the kernel gives memory that it does not have, and then ends the server.
    """
    return host_bytes(cgroup) * 3 // 4 if device.platform == "cpu" else None


def host_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The memory of the machine, or of the container."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # There is none, or it is "max".
            limits.append(int((cgroup / name).read_text()))
    return min(limits)
