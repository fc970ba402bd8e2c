"""Accounts of objectives and tenants, with the histograms and counters that they are
made of.

Clients choose some labels' values. So the number of label values that have series of
their own is bounded here.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Bounds of histograms of durations, in seconds."""
COARSE = (2.5e-4, 1e-3, 5e-3, 2.5e-2, 0.1, 0.5, 2.5, 10, 60)
"""The bounds among these that each objective and tenant is exported with."""

OTHER = "other"
"""The label value for everything that has no series of its own."""

_MOST_SERIES = 100
"""Most label values, or pairs of them, that have series of their own."""
_IDLE = 3600.0
"""Seconds without a product after which an objective and tenant give their series to
another pair.

If this were less, many clients in turn would become many series in Prometheus, although
few at a time.
"""


class Histogram:
    """Counts by bucket. The last bucket has the values above all bounds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def merge(self, other: "Histogram") -> None:
        self.counts = [mine + more for mine, more in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum

    def buckets(self, told: Sequence[float] | None = None) -> list[tuple[str, float]]:
        """Return (upper bound, count up to it), for all bounds or the given ones."""
        up_to = list(itertools.accumulate(self.counts))
        kept = [
            (str(float(bound)), float(count))
            for bound, count in zip(self.bounds, up_to, strict=False)
            if told is None or bound in told
        ]
        return [*kept, ("+Inf", float(up_to[-1]))]


class LabelCounter:
    """Counts by the values of labels. If there are too many values, the rest is counted
    as "other".

    Args:
        known: Values that are exported from the beginning, so that their first increase
            is seen.
    """

    def __init__(self, *known: tuple[str, ...]) -> None:
        self._counts = dict.fromkeys(known, 0)

    def add(self, values: tuple[str, ...]) -> None:
        if values not in self._counts and len(self._counts) >= _MOST_SERIES:
            values = (OTHER,) * len(values)
        self._counts[values] = self._counts.get(values, 0) + 1

    def counts(self) -> dict[tuple[str, ...], int]:
        """Return a copy of the counts."""
        return dict(self._counts)

    def family(self, name: str, documentation: str, *labels: str) -> CounterMetricFamily:
        family = CounterMetricFamily(name, documentation, labels=labels)
        for values, count in self._counts.items():
            family.add_metric(values, count)
        return family


class Account:
    """One tenant's use of one objective."""

    __slots__ = ("columns", "compute", "device_seconds", "products", "queue", "used")

    def __init__(self) -> None:
        self.products = 0
        self.columns = 0
        self.device_seconds = 0.0
        self.queue = Histogram(SECONDS)
        self.compute = Histogram(SECONDS)
        self.used = 0.0

    def copy(self) -> "Account":
        copy = Account()
        copy.merge(self)
        return copy

    def merge(self, other: "Account") -> None:
        self.products += other.products
        self.columns += other.columns
        self.device_seconds += other.device_seconds
        self.queue.merge(other.queue)
        self.compute.merge(other.compute)


class Usage:
    """The accounts of objectives and tenants: a limited number of their own, and one
    for the rest.

    A new pair gets the account of the pair that has been idle for longest, if that was
    long enough. The old pair's counts remain in the totals only. If they were added to
    the rest, they would seem to have happened now.
    """

    def __init__(self) -> None:
        self._accounts: dict[tuple[str, str], Account] = {}  # By label values.
        self._by_digest: dict[tuple[str, str], Account] = {}  # The same accounts, found without a look at the names.
        self._names: dict[str, str] = {}
        self._rest = Account()
        self._gone = Account()
        self._full_until = float("-inf")

    def named(self, digest: str, name: str) -> None:
        if not name or digest in self._names:
            return
        self._names[digest] = name
        self._by_digest = {key: account for key, account in self._by_digest.items() if key[0] != digest}

    def label(self, digest: str) -> str:
        """Return the label value of an objective."""
        return self._names.get(digest, digest[:12])

    def accounts(self) -> Iterator[tuple[tuple[str, str] | None, Account]]:
        """Yield the accounts that add up to the totals, with their labels. Pairs that
        are gone have None.
        """
        yield from self._accounts.items()
        yield (OTHER, OTHER), self._rest
        yield None, self._gone

    def account(self, digest: str, tenant: str, now: float) -> Account:
        """Return the account of a product that ends now."""
        found = self._by_digest.get((digest, tenant))
        if found is None:
            found = self._open(digest, tenant, now)
        found.used = now
        return found

    def _open(self, digest: str, tenant: str, now: float) -> Account:
        labels = self.label(digest), tenant
        found = self._accounts.get(labels)
        if found is None:
            if labels == (OTHER, OTHER) or not self._has_room(now):
                return self._rest
            found = self._accounts[labels] = Account()
        self._by_digest[digest, tenant] = found
        return found

    def _has_room(self, now: float) -> bool:
        if len(self._accounts) < _MOST_SERIES:
            return True
        # The search below takes longer than all else that a product costs here.
        if now < self._full_until:
            return False
        labels, idle = min(self._accounts.items(), key=lambda item: item[1].used)
        self._full_until = idle.used + _IDLE
        if now < self._full_until:
            return False
        del self._accounts[labels]
        self._by_digest = {key: account for key, account in self._by_digest.items() if account is not idle}
        self._gone.merge(idle)
        return True

    def copy(self) -> "Usage":
        """Return a copy of the exported values."""
        copy = Usage()
        copy._accounts = {labels: account.copy() for labels, account in self._accounts.items()}
        copy._rest, copy._gone = self._rest.copy(), self._gone.copy()
        return copy

    def total(self) -> Account:
        """Return the sum of all accounts, gone ones too."""
        total = Account()
        for account in (*self._accounts.values(), self._rest, self._gone):
            total.merge(account)
        return total

    def families(self) -> Iterator[Metric]:
        labels = ("objective", "tenant")
        products = CounterMetricFamily("hvpd_usage_products", "Products answered.", labels=labels)
        columns = CounterMetricFamily("hvpd_usage_columns", "Vectors multiplied.", labels=labels)
        device = CounterMetricFamily("hvpd_usage_device_seconds", "Shares of launches, by vectors.", labels=labels)
        queue = HistogramMetricFamily("hvpd_usage_queue_seconds", "From arrival to launch.", labels=labels)
        compute = HistogramMetricFamily("hvpd_usage_compute_seconds", "From launch to result.", labels=labels)
        rest = {(OTHER, OTHER): self._rest} if self._rest.products else {}
        for values, account in (self._accounts | rest).items():
            products.add_metric(values, account.products)
            columns.add_metric(values, account.columns)
            device.add_metric(values, account.device_seconds)
            queue.add_metric(values, account.queue.buckets(COARSE), account.queue.sum)
            compute.add_metric(values, account.compute.buckets(COARSE), account.compute.sum)
        yield from (products, columns, device, queue, compute)
