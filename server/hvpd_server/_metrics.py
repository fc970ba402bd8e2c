"""What an operator sees: Prometheus metrics. Names are a contract, listed in docs/metrics.md; durations are in seconds.

Recording is on the path of every product, so it is a few additions under one lock, and what is known before the answer leaves is only
noted until then; families are made of the numbers when they are scraped. Labels whose values clients choose have a bounded number of them (`_Usage`, `_Counter`).
"""

import bisect
import collections
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias, TypeVar

import prometheus_client
from google.rpc import error_details_pb2, status_pb2
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from hvpd_server._batcher import Job
from hvpd_server._errors import Code
from hvpd_server._failures import Failures

_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_COARSE = (2.5e-4, 1e-3, 5e-3, 2.5e-2, 0.1, 0.5, 2.5, 10, 60)
"""Those of `_SECONDS` that are told of each objective and tenant."""
_WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

OTHER = "other"
"""Stands for all for which there is no series of their own."""
ANONYMOUS = "anonymous"
"""The tenant of whoever has no name."""

_MOST_SERIES = 100
"""Most label values, or pairs of them, that have series of their own."""
_IDLE = 3600.0
"""Seconds without a product after which an objective and tenant give their series up to others. Were it less, many clients in turn
would be many series in Prometheus, although few at a time."""
_REMEMBERED = 4096
"""Most points of which it is known that they were made before."""

_SERIOUS = (
    ("DATA_LOSS", "BLOB_CORRUPT"),
    ("INTERNAL", "INTERNAL"),
    ("NOT_FOUND", "POINT_NOT_RESIDENT"),
    ("RESOURCE_EXHAUSTED", "DEVICE_MEMORY"),
    ("RESOURCE_EXHAUSTED", "DISK_FULL"),
    ("RESOURCE_EXHAUSTED", "QUEUE_FULL"),
)
"""Failures that are told from the beginning: an increase from nothing to one is none, to Prometheus."""
_KINDS = ("data", "point", "residuals", "direction")
_ByKind = TypeVar("_ByKind", CounterMetricFamily, GaugeMetricFamily)
_CODES = {code.value[0]: code.name for code in Code}
_PRODUCTS = ("ComputeProduct", "StreamProducts")
"""The methods that ask for products."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Of one device, as its driver tells."""

    device: str
    in_use_bytes: int
    limit_bytes: int


@dataclasses.dataclass(frozen=True)
class Live:
    """What is read when somebody scrapes. Bytes, hits and misses are by kind."""

    resident_bytes: Mapping[str, int]
    budget_bytes: int = 0
    hits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    misses: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pending: int = 0
    """Vectors that wait."""
    pending_limit: int = 0
    in_flight: int = 0
    """Vectors in launches."""
    memory: Sequence[Memory] = ()


@dataclasses.dataclass(frozen=True)
class Distribution:
    """A histogram as it was at one time, or what came to it between two."""

    bounds: Sequence[float]
    """Of the buckets, each the most that is counted there."""
    counts: Sequence[int]
    """By bucket; the last is for what is above all bounds."""

    def since(self, earlier: "Distribution") -> "Distribution":
        """What came to it since then."""
        pairs = zip(self.counts, earlier.counts, strict=True)
        return Distribution(self.bounds, [max(now - before, 0) for now, before in pairs])

    def quantile(self, share: float) -> float | None:
        """About what that share is not above: interpolated within a bucket, as Prometheus does. None of nothing."""
        rank = share * sum(self.counts)
        if not rank:
            return None
        below, lower = 0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if count and below + count >= rank:
                return lower + (bound - lower) * (rank - below) / count
            below, lower = below + count, bound
        return self.bounds[-1]


@dataclasses.dataclass(frozen=True)
class Use:
    """What somebody had of the device."""

    products: int = 0
    columns: int = 0
    device_seconds: float = 0.0

    def since(self, earlier: "Use") -> "Use":
        """What came to it since then; all of it where it began anew, for somebody else."""
        if self.products < earlier.products:
            return self
        return Use(
            self.products - earlier.products,
            self.columns - earlier.columns,
            self.device_seconds - earlier.device_seconds,
        )


@dataclasses.dataclass(frozen=True)
class Totals:
    """What was counted by one time."""

    products: int
    columns: int
    failures: int
    launched_columns: int
    padding_columns: int
    queue: Distribution
    """Seconds, of products."""
    compute: Distribution
    """Likewise."""
    requests: Distribution
    """Likewise, errors too."""
    widths: Distribution
    """Of the launches of products, in vectors."""
    width_sum: float
    usage: Mapping[tuple[str, str], Use]
    """By objective and tenant, as they are told apart here; the rest as `OTHER`."""
    evictions: Mapping[str, int]
    """By kind."""
    compiles: Mapping[str, int]
    """By outcome."""
    points: int
    points_remade: int


_NotedProduct: TypeAlias = tuple[str, str, int, int, float, float, float, float]
"""What is counted of a product when its answer has left: digest, tenant, columns, width, queue, compute and device seconds, and when it ended."""
_NotedLaunch: TypeAlias = tuple[str, int, int]
"""Of a launch, likewise: program, columns, padding."""


class Metrics(Collector):
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._build: Mapping[str, str] = {}
        self._live: Callable[[], Live] = lambda: Live({})
        self._open_streams: Callable[[], int] = lambda: 0
        self._open_calls = 0
        self._usage = _Usage()
        self._width = _Histogram(_WIDTHS)
        self._requests: dict[str, _Histogram] = {}
        self._transfers = {name: _Histogram(_SECONDS) for name in ("receive", "to_device", "send")}
        self._compile = _Histogram(_SECONDS)
        self._compiles = _Counter(("compiled",), ("cached",), ("failed",))
        self._noted_products: collections.deque[_NotedProduct] = collections.deque()
        self._noted_launches: collections.deque[_NotedLaunch] = collections.deque()
        self._launches = _Counter(("hvp",), ("apply",))
        self._launched_columns = 0
        self._padding_columns = 0
        self._refused = 0
        self._failures = _Counter(*_SERIOUS)
        self._points = self._points_found = self._points_remade = 0
        self._made: dict[str, None] = {}
        self._evictions = _Counter(*((kind,) for kind in _KINDS))
        self._uploads = 0
        self._checks = _Counter(("passed",), ("failed",), ("undecided",))
        self.failures = Failures()
        self.registry = prometheus_client.CollectorRegistry(auto_describe=True)
        self.registry.register(self)
        prometheus_client.ProcessCollector(registry=self.registry)

    # Products

    def product(self, job: Job) -> None:
        """Counts a product that was made: notes it, since its answer is yet to leave."""
        queue, compute = job.started - job.queued, job.finished - job.started
        digest, columns = job.point.objective.digest, len(job.block)
        self._noted_products.append(
            (digest, job.tenant, columns, job.width, queue, compute, job.device_seconds, job.finished)
        )

    def _settle(self) -> None:
        """Counts what was noted. Under the lock: with every answer, and before anything is told."""
        while self._noted_products:
            digest, tenant, columns, width, queue, compute, device, finished = self._noted_products.popleft()
            account = self._usage.account(digest, _called(tenant), finished)
            account.products += 1
            account.columns += columns
            account.device_seconds += device
            account.queue.add(queue)
            account.compute.add(compute)
            self._width.add(width)
        while self._noted_launches:
            program, columns, padding = self._noted_launches.popleft()
            self._launches.add((program,))
            self._launched_columns += columns
            self._padding_columns += padding

    def answered(self, method: str, seconds: float, receive: float | None = None, send: float | None = None) -> None:
        """Counts a request that has its answer, be it an error.

        Args:
            method: Of the service.
            seconds: From its arrival.
            receive: Of these, from the first chunk to the last, where it came in several.
            send: Of these, from the result until the transport had taken it.
        """
        with self._lock:
            self._settle()
            found = self._requests.get(method)
            if found is None:
                found = self._requests[method] = _Histogram(_SECONDS)
            found.add(seconds)
            if receive is not None:
                self._transfers["receive"].add(receive)
            if send is not None:
                self._transfers["send"].add(send)

    def put(self, seconds: float) -> None:
        """Counts a copy to the device."""
        with self._lock:
            self._transfers["to_device"].add(seconds)

    def launched(self, program: str, columns: int, padding: int) -> None:
        """Counts a launch, likewise.

        Args:
            program: What was launched.
            columns: Its width.
            padding: Vectors among these that nobody asked for.
        """
        base, block, _ = program.partition("[")  # One series for all blocks: any leaves of any x can be one.
        self._noted_launches.append((f"{base}[]" if block else base, columns, padding))

    def refused(self) -> None:
        """Counts a product that found the queue full."""
        with self._lock:
            self._refused += 1

    def failed(self, status: status_pb2.Status, method: str = "", tenant: str = "") -> None:
        """Counts a failure, as it is answered.

        Args:
            status: The answer.
            method: Of the service; empty where it is not known.
            tenant: Who asked.
        """
        if status.code == Code.CANCELLED.value[0]:  # The caller went away.
            return
        info, request = error_details_pb2.ErrorInfo(), error_details_pb2.RequestInfo()
        for detail in status.details:
            detail.Unpack(info) or detail.Unpack(request)
        code, reason = _CODES.get(status.code, "UNKNOWN"), info.reason or "UNKNOWN"
        with self._lock:
            self._failures.add((code, reason))
        self.failures.add(code, reason, method, _called(tenant), status.message, request.request_id)

    # Calls

    def opened(self) -> None:
        """Notes that a call began."""
        with self._lock:
            self._open_calls += 1

    def closed(self) -> None:
        """Notes that a call ended."""
        with self._lock:
            self._open_calls -= 1

    # What is kept

    def found(self) -> None:
        """Counts a point that was asked for and was there."""
        with self._lock:
            self._points_found += 1

    def made(self, identity: str) -> None:
        """Counts a point that was made resident."""
        with self._lock:
            self._points += 1
            if identity in self._made:
                self._points_remade += 1
                del self._made[identity]
            elif len(self._made) == _REMEMBERED:
                del self._made[next(iter(self._made))]
            self._made[identity] = None

    def evicted(self, kind: str) -> None:
        """Counts an entry that was dropped."""
        with self._lock:
            self._evictions.add((kind,))

    def compiled(self, seconds: float, outcome: str) -> None:
        """Counts a compile: "compiled", "cached" or "failed". Failures have no duration."""
        with self._lock:
            self._compiles.add((outcome,))
            if outcome != "failed":
                self._compile.add(seconds)

    def uploaded(self) -> None:
        """Counts a blob that was stored."""
        with self._lock:
            self._uploads += 1

    def checked(self, verdict: str) -> None:
        """Counts an objective that was checked after its registration."""
        with self._lock:
            self._checks.add((verdict,))

    # Facts

    def named(self, digest: str, name: str) -> None:
        """Notes the name under which an objective is counted; of several the first."""
        with self._lock:
            self._settle()  # By the digest, as they came.
            self._usage.named(digest, name)

    def build(self, facts: Mapping[str, str]) -> None:
        """Says what this server is."""
        self._build = facts

    def observe(self, live: Callable[[], Live]) -> None:
        """Reads this whenever the metrics are scraped."""
        self._live = live

    def observe_streams(self, count: Callable[[], int]) -> None:
        """Likewise, how many product streams are open."""
        self._open_streams = count

    # What is told

    def live(self) -> tuple[Live, int, int]:
        """What is so now; how many calls are open, and how many product streams among them."""
        return self._live(), self._open_calls, self._open_streams()

    def totals(self) -> Totals:
        """What was counted so far. Products wait for the lock, so it is held for copies alone."""
        with self._lock:
            self._settle()
            accounts = [
                (
                    labels,
                    account.products,
                    account.columns,
                    account.device_seconds,
                    account.queue.counts[:],
                    account.compute.counts[:],
                )
                for labels, account in self._usage.accounts()
            ]
            requests = [self._requests[method].counts[:] for method in _PRODUCTS if method in self._requests]
            widths, width_sum = self._width.counts[:], self._width.sum
            failures, evictions = self._failures.counts(), self._evictions.counts()
            compiles = self._compiles.counts()
            launched, padding = self._launched_columns, self._padding_columns
            points, remade = self._points, self._points_remade
        nothing = [0] * (len(_SECONDS) + 1)
        return Totals(
            products=sum(account[1] for account in accounts),
            columns=sum(account[2] for account in accounts),
            failures=sum(failures.values()),
            launched_columns=launched,
            padding_columns=padding,
            queue=Distribution(_SECONDS, _sums(nothing, *(account[4] for account in accounts))),
            compute=Distribution(_SECONDS, _sums(nothing, *(account[5] for account in accounts))),
            requests=Distribution(_SECONDS, _sums(nothing, *requests)),
            widths=Distribution(_WIDTHS, widths),
            width_sum=width_sum,
            usage={
                labels: Use(products, columns, seconds) for labels, products, columns, seconds, *_ in accounts if labels
            },
            evictions={kind: count for (kind,), count in evictions.items()},
            compiles={outcome: count for (outcome,), count in compiles.items()},
            points=points,
            points_remade=remade,
        )

    def counted_as(self, digests: Iterable[str]) -> dict[str, str]:
        """What each objective goes by here, by digest."""
        with self._lock:
            return {digest: self._usage.label(digest) for digest in digests}

    def collect(self) -> Iterator[Metric]:
        """All families. What may be many series is made of copies: products wait for the lock."""
        live, streams = self._live(), self._open_streams()
        with self._lock:
            self._settle()
            usage, calls = self._usage.copy(), self._open_calls
            counted = list(self._counted())
        yield InfoMetricFamily("hvpd_build", "What this server is.", dict(self._build))
        yield from self._products(usage.total())
        yield from usage.families()
        yield from counted
        yield from self._gauges(live, streams, calls)

    def _products(self, total: "_Account") -> Iterator[Metric]:
        yield _counter("hvpd_products", "Products answered.", total.products)
        yield _counter("hvpd_columns", "Vectors multiplied.", total.columns)
        yield _histogram("hvpd_queue_seconds", "From a product's arrival to its launch.", total.queue)
        yield _histogram("hvpd_compute_seconds", "From launch to result.", total.compute)

    def _counted(self) -> Iterator[Metric]:
        yield _histogram("hvpd_request_seconds", "From a request to its answer.", self._requests, "method")
        yield _histogram("hvpd_transfer_seconds", "Moving vectors.", self._transfers, "direction")
        yield _histogram("hvpd_batch_width", "Vectors in the launch of a product.", self._width)
        yield self._launches.family("hvpd_launches", "Launches on the device.", "program")
        yield _counter("hvpd_launched_columns", "Vectors launched, padding too.", self._launched_columns)
        yield _counter("hvpd_padding_columns", "Vectors launched for nobody.", self._padding_columns)
        yield _counter("hvpd_refused_products", "Products that found the queue full.", self._refused)
        yield self._failures.family("hvpd_failures", "Requests answered with an error.", "code", "reason")
        yield _histogram("hvpd_compile_seconds", "Compiling one program for one width.", self._compile)
        yield self._compiles.family("hvpd_compiles", "Compiles.", "outcome")
        yield _counter("hvpd_points", "Points made resident.", self._points)
        yield _counter("hvpd_points_found", "Points that were asked for and were resident.", self._points_found)
        yield _counter("hvpd_points_remade", "Points made resident that had been before.", self._points_remade)
        yield self._evictions.family("hvpd_evictions", "Entries dropped from the device for want of room.", "kind")
        yield _counter("hvpd_blobs_stored", "Blobs uploaded and stored.", self._uploads)
        yield self._checks.family("hvpd_registration_checks", "Objectives checked after registration.", "verdict")

    def _gauges(self, live: Live, streams: int, calls: int) -> Iterator[Metric]:
        for name, text, by_kind in (
            ("hvpd_residency_hits", "Entries that were asked for and were resident.", live.hits),
            ("hvpd_residency_misses", "Entries that had to be made.", live.misses),
        ):
            yield _by_kind(CounterMetricFamily(name, text, labels=["kind"]), by_kind)
        resident = GaugeMetricFamily("hvpd_resident_bytes", "Bytes on the device.", labels=["kind"])
        yield _by_kind(resident, live.resident_bytes)
        yield GaugeMetricFamily("hvpd_budget_bytes", "Bytes that may be resident.", live.budget_bytes)
        in_use = GaugeMetricFamily("hvpd_device_memory_in_use_bytes", "As the driver tells.", labels=["device"])
        limit = GaugeMetricFamily("hvpd_device_memory_limit_bytes", "As the driver tells.", labels=["device"])
        for memory in live.memory:
            in_use.add_metric([memory.device], memory.in_use_bytes)
            limit.add_metric([memory.device], memory.limit_bytes)
        yield in_use
        yield limit
        yield GaugeMetricFamily("hvpd_pending_vectors", "Vectors that wait for the device.", live.pending)
        yield GaugeMetricFamily("hvpd_pending_limit_vectors", "Vectors that may wait.", live.pending_limit)
        yield GaugeMetricFamily("hvpd_in_flight_vectors", "Vectors in launches.", live.in_flight)
        yield GaugeMetricFamily("hvpd_open_calls", "Calls that are served, streams too.", calls)
        yield GaugeMetricFamily("hvpd_open_streams", "Product streams that are open.", streams)


class _Histogram:
    """Counts by bucket; the last is for what is above all bounds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def merge(self, other: "_Histogram") -> None:
        self.counts = [mine + more for mine, more in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum

    def buckets(self, told: Sequence[float] | None = None) -> list[tuple[str, float]]:
        """(upper bound, count up to there), of all bounds or of these."""
        up_to = list(itertools.accumulate(self.counts))
        kept = [
            (str(float(bound)), float(count))
            for bound, count in zip(self.bounds, up_to, strict=False)
            if told is None or bound in told
        ]
        return [*kept, ("+Inf", float(up_to[-1]))]


class _Counter:
    """Counts by the values of labels, which are few: when there are too many, the rest is counted as "other".

    Args:
        known: Values that are told from the beginning, so that their first increase is seen.
    """

    def __init__(self, *known: tuple[str, ...]) -> None:
        self._counts = dict.fromkeys(known, 0)

    def add(self, values: tuple[str, ...]) -> None:
        if values not in self._counts and len(self._counts) >= _MOST_SERIES:
            values = (OTHER,) * len(values)
        self._counts[values] = self._counts.get(values, 0) + 1

    def counts(self) -> dict[tuple[str, ...], int]:
        """A copy."""
        return dict(self._counts)

    def family(self, name: str, documentation: str, *labels: str) -> CounterMetricFamily:
        family = CounterMetricFamily(name, documentation, labels=labels)
        for values, count in self._counts.items():
            family.add_metric(values, count)
        return family


class _Account:
    """What one tenant had of one objective."""

    __slots__ = ("columns", "compute", "device_seconds", "products", "queue", "used")

    def __init__(self) -> None:
        self.products = 0
        self.columns = 0
        self.device_seconds = 0.0
        self.queue = _Histogram(_SECONDS)
        self.compute = _Histogram(_SECONDS)
        self.used = 0.0

    def copy(self) -> "_Account":
        copy = _Account()
        copy.merge(self)
        return copy

    def merge(self, other: "_Account") -> None:
        self.products += other.products
        self.columns += other.columns
        self.device_seconds += other.device_seconds
        self.queue.merge(other.queue)
        self.compute.merge(other.compute)


class _Usage:
    """The accounts of objectives and tenants: so many have their own, and the rest has one together.

    A newcomer gets the account of the pair that has been idle for longest, if that was for long enough. What was counted there
    is told no more, except in the totals: were it added to the rest, that would seem to have happened now.
    """

    def __init__(self) -> None:
        self._accounts: dict[tuple[str, str], _Account] = {}  # By label values.
        self._by_digest: dict[tuple[str, str], _Account] = {}  # Those that are found without looking for a name.
        self._names: dict[str, str] = {}
        self._rest = _Account()
        self._gone = _Account()
        self._full_until = float("-inf")

    def named(self, digest: str, name: str) -> None:
        if not name or digest in self._names:
            return
        self._names[digest] = name
        self._by_digest = {key: account for key, account in self._by_digest.items() if key[0] != digest}

    def label(self, digest: str) -> str:
        """What an objective is counted as."""
        return self._names.get(digest, digest[:12])

    def accounts(self) -> Iterator[tuple[tuple[str, str] | None, _Account]]:
        """All that add up to the totals, with their labels; of those that are gone None."""
        yield from self._accounts.items()
        yield (OTHER, OTHER), self._rest
        yield None, self._gone

    def account(self, digest: str, tenant: str, now: float) -> _Account:
        """Where to count a product that ends now."""
        found = self._by_digest.get((digest, tenant))
        if found is None:
            found = self._open(digest, tenant, now)
        found.used = now
        return found

    def _open(self, digest: str, tenant: str, now: float) -> _Account:
        labels = self.label(digest), tenant
        found = self._accounts.get(labels)
        if found is None:
            if labels == (OTHER, OTHER) or not self._has_room(now):
                return self._rest
            found = self._accounts[labels] = _Account()
        self._by_digest[digest, tenant] = found
        return found

    def _has_room(self, now: float) -> bool:
        if len(self._accounts) < _MOST_SERIES:
            return True
        if now < self._full_until:  # Looking for who is idle takes longer than all else that a product costs here.
            return False
        labels, idle = min(self._accounts.items(), key=lambda item: item[1].used)
        self._full_until = idle.used + _IDLE
        if now < self._full_until:
            return False
        del self._accounts[labels]
        self._by_digest = {key: account for key, account in self._by_digest.items() if account is not idle}
        self._gone.merge(idle)
        return True

    def copy(self) -> "_Usage":
        """What is told, as it is now."""
        copy = _Usage()
        copy._accounts = {labels: account.copy() for labels, account in self._accounts.items()}
        copy._rest, copy._gone = self._rest.copy(), self._gone.copy()
        return copy

    def total(self) -> _Account:
        """Of all, ever."""
        total = _Account()
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
            queue.add_metric(values, account.queue.buckets(_COARSE), account.queue.sum)
            compute.add_metric(values, account.compute.buckets(_COARSE), account.compute.sum)
        yield from (products, columns, device, queue, compute)


def _called(tenant: str) -> str:
    """The name by which a tenant is told."""
    return ANONYMOUS if not tenant or ":" in tenant else tenant  # An address: whoever connects has another one.


def _sums(*columns: Sequence[int]) -> list[int]:
    return [sum(values) for values in zip(*columns, strict=True)]


def _counter(name: str, documentation: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, documentation, value)


def _by_kind(family: _ByKind, values: Mapping[str, int]) -> _ByKind:
    for kind, value in {**dict.fromkeys(_KINDS, 0), **values}.items():
        family.add_metric([kind], value)
    return family


def _histogram(
    name: str, documentation: str, found: _Histogram | Mapping[str, _Histogram], label: str = ""
) -> HistogramMetricFamily:
    """One histogram, or one for each value of a label."""
    if isinstance(found, _Histogram):
        return HistogramMetricFamily(name, documentation, found.buckets(), found.sum)
    family = HistogramMetricFamily(name, documentation, labels=[label])
    for value, histogram in found.items():
        family.add_metric([value], histogram.buckets(), histogram.sum)
    return family
