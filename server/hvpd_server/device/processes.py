"""jax over the processes of a group: how they find each other, what they have in
common, and the parts of arrays that each of them holds.
"""

import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax._src.clusters import ClusterEnv

import hvpd
from hvpd._wire import codec
from hvpd_server.derivation.compiling import Target
from hvpd_server.device.executables import processor
from hvpd_server.importer import refusals
from hvpd_server.store.rows import Rows

_START_SECONDS = 300
"""Most seconds in which jax's own connections between the ranks are made."""


class Place(NamedTuple):
    """The place of this process in a group."""

    leader: str
    """HOST:PORT of the leader."""
    rank: int
    size: int


def detect() -> Place:
    """Return the place that the launcher of this process gives it: Slurm, Open MPI, or
    an indexed Job of Kubernetes.

    Raises:
        ValueError: There is no such launcher, or it does not tell the place.
    """
    try:
        leader, size, rank, _ = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, _START_SECONDS
        )
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"--group cannot read this process's place from its launcher: {error}") from error
    if leader is None or size is None or rank is None:
        raise ValueError(
            "--group finds neither Slurm, nor Open MPI, nor an indexed Job of Kubernetes (which needs the package kubernetes): start "
            "the process by one of them, or give --leader, --rank and --size"
        )
    return Place(leader, rank, size)


def software() -> Mapping[str, str]:
    """Return what must be equal on all ranks before jax connects them."""
    return {
        "version of hvpd": hvpd.__version__,
        "derivation": refusals.version(),
        "version of jax": jax.__version__,
        "version of jaxlib": importlib.metadata.version("jaxlib"),
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", ""),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def hardware() -> Mapping[str, str]:
    """Return what must be equal on all ranks once jax has connected them."""
    first = jax.local_devices()[0]
    facts = {
        "platform": first.platform,
        "kind of device": first.device_kind,
        "driver": first.client.platform_version,
    }
    if first.platform == "cpu":  # Compiled programs are for one processor.
        facts["processor"] = hashlib.sha256(processor().encode()).hexdigest()[:16]
        # XLA adds in another sequence with other threads, and a loop on all ranks must
        # end everywhere at once.
        facts["number of CPUs"] = str(len(os.sched_getaffinity(0)))
    return facts


def connect(coordinator: str, place: Place, *, listening: str = "", detected: bool) -> None:
    """Connect jax with the other processes of the group, before it finds its devices.

    Args:
        coordinator: Address of jax's coordinator, which the leader starts.
        place: The place of this process.
        listening: The address that the leader listens on; empty for all.
        detected: Whether the launcher chooses one device for each process of a host, as
            with Slurm.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Otherwise jax takes SIGTERM, which tells a server to stop.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator,
        place.size,
        place.rank,
        cluster_detection_method=None if detected else "deactivate",
        initialization_timeout=_START_SECONDS,
        coordinator_bind_address=coordinator if listening else None,
    )


def assembled(
    target: Target, shape: Sequence[int], read: Callable[[slice], codec.Array], *, data: bool, first: int = 0
) -> jax.Array:
    """Return an array of the whole group, of which this process places its own part.

    Args:
        target: The devices of the group.
        shape: Shape of the array.
        read: Returns some rows, or for an array that is not split, all of it.
        data: Whether the array is split by rows, if they can be divided.
        first: The number of the first row, for `read`.
    """
    split = data and target.splits(shape)
    sharding = target.split if split else target.whole
    rows = slice(first, first + (shape[0] if shape else 1))
    whole = None if split else read(rows)
    parts = []
    for device, (index, *_) in _indices(sharding, shape):
        part = whole.reshape(shape) if whole is not None else read(slice(first + index.start, first + index.stop))
        parts.append(jax.device_put(part, device))
    found: jax.Array = jax.make_array_from_single_device_arrays(tuple(shape), sharding, parts)
    jax.block_until_ready(found)
    return found


def assembled_rows(target: Target, part: Rows, rows: slice) -> jax.Array:
    """Return some rows of a tensor of the store, of which this process reads its own.

    Args:
        target: The devices of the group.
        part: The opened tensor.
        rows: The rows.
    """
    shape = [rows.stop - rows.start, *part.tensor.shape[1:]] if part.tensor.shape else []
    return assembled(target, shape, part.__getitem__, data=True, first=rows.start)


def _indices(sharding: Any, shape: Sequence[int]) -> list[tuple[jax.Device, tuple[slice, ...]]]:
    """Return the devices of this process, with the parts that they hold."""
    found = sharding.addressable_devices_indices_map(tuple(shape))
    return [(device, index or (slice(None),)) for device, index in found.items()]
