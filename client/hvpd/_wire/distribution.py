"""Histograms at one time, and their quantiles. Client and server share this file."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Distribution:
    """A histogram at one time, or its growth between two times."""

    bounds: Sequence[float]
    """The upper bounds of the buckets."""
    counts: Sequence[int]
    """Counts by bucket. The last bucket has the values above all bounds."""

    def since(self, earlier: "Distribution") -> "Distribution":
        """Return the growth since an earlier time."""
        pairs = zip(self.counts, earlier.counts, strict=True)
        return Distribution(self.bounds, [max(now - before, 0) for now, before in pairs])

    def quantile(self, share: float) -> float | None:
        """Return a quantile, interpolated within a bucket as Prometheus does. Return
        None if nothing was counted.
        """
        rank = share * sum(self.counts)
        if not rank:
            return None
        below, lower = 0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if count and below + count >= rank:
                return lower + (bound - lower) * (rank - below) / count
            below, lower = below + count, bound
        return self.bounds[-1]
