"""Counts of a client's products."""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

from hvpd.v1 import curvature_pb2


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The products of a client since it connected. Durations are sums, in seconds.

    Example:
        >>> before = client.statistics()
        >>> solve()
        >>> print((client.statistics() - before).mean_batch_width)
    """

    products: int = 0
    """Answered products of ended calls. A wide block may be several."""
    vectors: int = 0
    """Vectors that were multiplied."""
    seconds: float = 0.0
    """Time from call to result."""
    queue_seconds: float = 0.0
    """Part of `seconds` in which products waited for the device."""
    compute_seconds: float = 0.0
    """Part of `seconds` in which the device computed."""
    launched_vectors: int = 0
    """Sum over products of the vectors in the launch, of all clients."""
    retries: int = 0
    """Calls that were repeated: the server was away, busy, or had forgotten a point."""

    def __sub__(self, earlier: "Statistics") -> "Statistics":
        """Return the counts between two snapshots."""
        return Statistics(*(getattr(self, f.name) - getattr(earlier, f.name) for f in dataclasses.fields(self)))

    @property
    def mean_batch_width(self) -> float:
        """Return the mean vectors in the launch of a product, of all clients.

        Example:
            >>> client.statistics().mean_batch_width
        """
        return self.launched_vectors / self.products if self.products else 0.0


class Counts:
    """Counts for `Statistics`. Threads share them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, Any] = dataclasses.asdict(Statistics())

    def snapshot(self) -> Statistics:
        """Return the counts so far."""
        with self._lock:
            return Statistics(**self._counts)

    def add_retry(self) -> None:
        """Count a call that is repeated."""
        with self._lock:
            self._counts["retries"] += 1

    def add_products(self, infos: Sequence[curvature_pb2.ProductInfo], vectors: int = 0, seconds: float = 0.0) -> None:
        """Count answered products; count vectors once the whole block is answered."""
        with self._lock:
            counts = self._counts
            for info in infos:
                counts["products"] += 1
                counts["queue_seconds"] += info.queue_duration_ns / 1e9
                counts["compute_seconds"] += info.compute_duration_ns / 1e9
                counts["launched_vectors"] += info.batch_width
            counts["vectors"] += vectors
            counts["seconds"] += seconds
