"""The contents of the metrics at one time, for the status page and other readers."""

import dataclasses
from collections.abc import Mapping, Sequence

from hvpd._wire.distribution import Distribution


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of one device, as its driver reports it."""

    device: str
    in_use_bytes: int
    limit_bytes: int


@dataclasses.dataclass(frozen=True)
class Live:
    """The engine's contents at one time.

    Bytes, entries, hits and misses are by kind.
    """

    resident_bytes: Mapping[str, int]
    resident_entries: Mapping[str, int] = dataclasses.field(default_factory=dict)
    budget_bytes: int = 0
    hits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    misses: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pending: int = 0
    """Vectors that wait for the device."""
    pending_limit: int = 0
    in_flight: int = 0
    """Vectors in launches."""
    oldest_work_seconds: float = 0.0
    """Age of the oldest work on a device, without compiles; 0 if there is none."""
    memory: Sequence[Memory] = ()
    program_bytes: int = 0
    """Bytes of compiled programs in the host's memory."""
    program_budget_bytes: int = 0
    ranks: int = 1
    """Processes of the group; 1 without a group."""
    orders: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Orders to the other ranks, by kind."""
    pending_orders: int = 0
    """Orders that the slowest rank has not executed yet."""


@dataclasses.dataclass(frozen=True)
class Use:
    """One tenant's use of one objective."""

    products: int = 0
    columns: int = 0
    device_seconds: float = 0.0

    def since(self, earlier: "Use") -> "Use":
        """Return the growth since an earlier time, or all of it if another pair has
        taken the account.
        """
        if self.products < earlier.products:
            return self
        return Use(
            self.products - earlier.products,
            self.columns - earlier.columns,
            self.device_seconds - earlier.device_seconds,
        )


@dataclasses.dataclass(frozen=True)
class Totals:
    """Everything that was counted by one time."""

    products: int
    columns: int
    failures: int
    launched_columns: int
    padding_columns: int
    queue: Distribution
    """Seconds that products waited for their launch."""
    compute: Distribution
    """Seconds from launch to result."""
    requests: Distribution
    """Seconds from a request for a product to its answer, or its error."""
    widths: Distribution
    """Vectors in the launch of each product."""
    width_sum: float
    usage: Mapping[tuple[str, str], Use]
    """Use by objective and tenant. Those that have no series of their own are together
    `OTHER`.
    """
    evictions: Mapping[str, int]
    """Evictions by kind."""
    compiles: Mapping[str, int]
    """Compiles by outcome."""
    points: int
    points_remade: int
