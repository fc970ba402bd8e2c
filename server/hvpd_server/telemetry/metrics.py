"""Prometheus metrics. Their names are a contract, listed in
docs/reference/metrics.md. Durations are in seconds.

Recording is on the path of every product, so it is a few additions under one lock. The
families are made when they are scraped.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

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

from hvpd._wire.distribution import Distribution
from hvpd_server.errors import Code
from hvpd_server.telemetry.readings import Live, Totals, Use
from hvpd_server.telemetry.recent_failures import Failures
from hvpd_server.telemetry.usage import SECONDS, Account, Histogram, LabelCounter, Usage

_WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Bounds of the histogram of batch widths, in vectors."""

ANONYMOUS = "anonymous"
"""The label value of a tenant that has no name."""

_REMEMBERED = 4096
"""Most points that are remembered, to count those that are made again."""

_SERIOUS = (
    ("DATA_LOSS", "BLOB_CORRUPT"),
    ("INTERNAL", "INTERNAL"),
    ("NOT_FOUND", "POINT_NOT_RESIDENT"),
    ("NOT_FOUND", "RUN_NOT_RESIDENT"),
    ("RESOURCE_EXHAUSTED", "DEVICE_MEMORY"),
    ("RESOURCE_EXHAUSTED", "DISK_FULL"),
    ("RESOURCE_EXHAUSTED", "QUEUE_FULL"),
)
"""Failures that start at 0: Prometheus's increase() misses a series that starts at 1.
"""

_KINDS = ("data", "point", "residuals", "direction", "run")
"""The kinds of entries on a device."""

_ORDERS = ("load", "place", "put", "launch")
"""The kinds of orders in a group."""

_RUNS = ("lanczos", "solve", "step", "tridiagonals", "trace", "diagonal")
"""The kinds of Krylov runs and computations."""

_ByKind = TypeVar("_ByKind", CounterMetricFamily, GaugeMetricFamily)
_CODES = {code.value[0]: code.name for code in Code}
_PRODUCTS = ("ComputeProduct", "StreamProducts")
"""The methods that ask for products."""


class ProductRecord(NamedTuple):
    """The facts that are counted of one product."""

    digest: str
    """The objective's digest."""
    tenant: str
    columns: int
    """The product's vectors."""
    width: int
    """The vectors of its launch."""
    queue_seconds: float
    """Seconds from the product's arrival to its launch."""
    compute_seconds: float
    """Seconds from the launch to the result."""
    device_seconds: float
    """The product's share of the device's time."""
    finished: float
    """When the launch ended, on a monotonic clock."""


class Metrics(Collector):
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._build: Mapping[str, str] = {}
        self._live: Callable[[], Live] = lambda: Live({})
        self._open_streams: Callable[[], int] = lambda: 0
        self._expires: Callable[[], float | None] = lambda: None
        self._open_calls = 0
        self._usage = Usage()
        self._width = Histogram(_WIDTHS)
        self._requests: dict[str, Histogram] = {}
        self._transfers = {name: Histogram(SECONDS) for name in ("receive", "to_device", "send")}
        self._compile = Histogram(SECONDS)
        self._compiles = LabelCounter(("compiled",), ("cached",), ("failed",))
        self._launches = LabelCounter(("hvp",), ("apply",))
        self._launched_columns = 0
        self._padding_columns = 0
        self._refused = 0
        self._failures = LabelCounter(*_SERIOUS)
        self._points = self._points_found = self._points_remade = 0
        self._made: dict[str, None] = {}
        self._evictions = LabelCounter(*((kind,) for kind in _KINDS))
        self._unloaded = 0
        self._uploads = 0
        self._checks = LabelCounter(("passed",), ("failed",), ("undecided",))
        self._runs = LabelCounter(*((kind, "done") for kind in _RUNS))
        self.failures = Failures()
        self.registry = prometheus_client.CollectorRegistry(auto_describe=True)
        self.registry.register(self)
        prometheus_client.ProcessCollector(registry=self.registry)

    # Products

    def product(self, record: ProductRecord) -> None:
        """Count a product."""
        with self._lock:
            account = self._usage.account(record.digest, _called(record.tenant), record.finished)
            account.products += 1
            account.columns += record.columns
            account.device_seconds += record.device_seconds
            account.queue.add(record.queue_seconds)
            account.compute.add(record.compute_seconds)
            self._width.add(record.width)

    def answered(self, method: str, seconds: float, receive: float | None = None, send: float | None = None) -> None:
        """Count a request that has its answer, or its error.

        Args:
            method: The method's name.
            seconds: From the request's arrival to its answer.
            receive: From the first chunk of the vectors to the last, if they came in
                several.
            send: From the result until the transport had taken it.
        """
        with self._lock:
            found = self._requests.get(method)
            if found is None:
                found = self._requests[method] = Histogram(SECONDS)
            found.add(seconds)
            if receive is not None:
                self._transfers["receive"].add(receive)
            if send is not None:
                self._transfers["send"].add(send)

    def put(self, seconds: float) -> None:
        """Count a copy to the device."""
        with self._lock:
            self._transfers["to_device"].add(seconds)

    def launched(self, program: str, columns: int, padding: int) -> None:
        """Count a launch.

        Args:
            program: The program.
            columns: The launch's width, in vectors.
            padding: The vectors among these that fill the launch up.
        """
        # One series for all blocks and forms: any leaves of any x can be a block.
        base, block, _ = program.partition("{")[0].partition("[")
        with self._lock:
            self._launches.add((f"{base}[]" if block else base,))
            self._launched_columns += columns
            self._padding_columns += padding

    def refused(self) -> None:
        """Count a product that found the queue full."""
        with self._lock:
            self._refused += 1

    def failed(self, status: status_pb2.Status, method: str = "", tenant: str = "") -> None:
        """Count a failure.

        Args:
            status: The answer.
            method: The method's name, or empty if it is not known.
            tenant: The tenant that asked.
        """
        if status.code == Code.CANCELLED.value[0]:  # The client went away.
            return
        info, request = error_details_pb2.ErrorInfo(), error_details_pb2.RequestInfo()
        for detail in status.details:
            detail.Unpack(info) or detail.Unpack(request)
        code, reason = _CODES.get(status.code, "UNKNOWN"), info.reason or "UNKNOWN"
        with self._lock:
            self._failures.add((code, reason))
        self.failures.add(code, reason, method, _called(tenant), status.message, request.request_id)

    def ran(self, kind: str, outcome: str) -> None:
        """Count the steps of a Krylov run, or a computation, that have ended.

        Args:
            kind: "lanczos", or the computation.
            outcome: "done", "failed", or "left" if the caller went away.
        """
        with self._lock:
            self._runs.add((kind, outcome))

    # Calls

    def opened(self) -> None:
        """Count a call that begins."""
        with self._lock:
            self._open_calls += 1

    def closed(self) -> None:
        """Count a call that ends."""
        with self._lock:
            self._open_calls -= 1

    # Kept values

    def found(self) -> None:
        """Count a point that a client asked for and that was resident."""
        with self._lock:
            self._points_found += 1

    def made(self, identity: str) -> None:
        """Count a point that was made resident."""
        with self._lock:
            self._points += 1
            if identity in self._made:
                self._points_remade += 1
                del self._made[identity]
            elif len(self._made) == _REMEMBERED:
                del self._made[next(iter(self._made))]
            self._made[identity] = None

    def evicted(self, kind: str) -> None:
        """Count an entry that was evicted."""
        with self._lock:
            self._evictions.add((kind,))

    def compiled(self, seconds: float, outcome: str) -> None:
        """Count a compile: "compiled", "cached" or "failed", which has no duration."""
        with self._lock:
            self._compiles.add((outcome,))
            if outcome != "failed":
                self._compile.add(seconds)

    def unloaded(self) -> None:
        """Count an objective that was unloaded, because compiled programs had filled
        their memory.
        """
        with self._lock:
            self._unloaded += 1

    def uploaded(self) -> None:
        """Count a blob that was stored."""
        with self._lock:
            self._uploads += 1

    def checked(self, verdict: str) -> None:
        """Count an objective that was checked after its registration."""
        with self._lock:
            self._checks.add((verdict,))

    # Facts

    def named(self, digest: str, name: str) -> None:
        """Note the name of an objective. The first name is its label value."""
        with self._lock:
            self._usage.named(digest, name)

    def build(self, facts: Mapping[str, str]) -> None:
        """Set the facts of the build."""
        self._build = facts

    def observe(self, live: Callable[[], Live]) -> None:
        """Set the function that is read when the metrics are scraped."""
        self._live = live

    def observe_streams(self, count: Callable[[], int]) -> None:
        """Set the function that returns the number of open product streams."""
        self._open_streams = count

    def observe_certificate(self, expires: Callable[[], float | None]) -> None:
        """Set the function that returns when the certificate ends, in seconds since
        1970.
        """
        self._expires = expires

    # Readings

    def live(self) -> tuple[Live, int, int]:
        """Return the engine's holdings now, the number of open calls, and of product
        streams among them.
        """
        return self._live(), self._open_calls, self._open_streams()

    def totals(self) -> Totals:
        """Return the counts so far. Products wait for the lock, so it is held for
        copies only.
        """
        with self._lock:
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
        nothing = [0] * (len(SECONDS) + 1)
        return Totals(
            products=sum(account[1] for account in accounts),
            columns=sum(account[2] for account in accounts),
            failures=sum(failures.values()),
            launched_columns=launched,
            padding_columns=padding,
            queue=Distribution(SECONDS, _sums(nothing, *(account[4] for account in accounts))),
            compute=Distribution(SECONDS, _sums(nothing, *(account[5] for account in accounts))),
            requests=Distribution(SECONDS, _sums(nothing, *requests)),
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
        """Return the label value of each objective, by digest."""
        with self._lock:
            return {digest: self._usage.label(digest) for digest in digests}

    def collect(self) -> Iterator[Metric]:
        """Yield all families. Families of many series are made of copies, because
        products wait for the lock.
        """
        live, streams = self._live(), self._open_streams()
        with self._lock:
            usage, calls = self._usage.copy(), self._open_calls
            counted = list(self._counted())
        yield InfoMetricFamily("hvpd_build", "What this server is.", dict(self._build))
        yield from self._products(usage.total())
        yield from usage.families()
        yield from counted
        yield from self._gauges(live, streams, calls)

    def _products(self, total: Account) -> Iterator[Metric]:
        yield CounterMetricFamily("hvpd_products", "Products answered.", total.products)
        yield CounterMetricFamily("hvpd_columns", "Vectors multiplied.", total.columns)
        yield _histogram("hvpd_queue_seconds", "From a product's arrival to its launch.", total.queue)
        yield _histogram("hvpd_compute_seconds", "From launch to result.", total.compute)

    def _counted(self) -> Iterator[Metric]:
        yield _histogram("hvpd_request_seconds", "From a request to its answer.", self._requests, "method")
        yield _histogram("hvpd_transfer_seconds", "Moving vectors.", self._transfers, "direction")
        yield _histogram("hvpd_batch_width", "Vectors in the launch of a product.", self._width)
        yield self._launches.family("hvpd_launches", "Launches on the device.", "program")
        yield CounterMetricFamily("hvpd_launched_columns", "Vectors launched, padding too.", self._launched_columns)
        yield CounterMetricFamily("hvpd_padding_columns", "Vectors that fill launches up.", self._padding_columns)
        yield CounterMetricFamily("hvpd_refused_products", "Products that found the queue full.", self._refused)
        yield self._failures.family("hvpd_failures", "Requests answered with an error.", "code", "reason")
        yield _histogram("hvpd_compile_seconds", "Compiling one program for one width.", self._compile)
        yield self._compiles.family("hvpd_compiles", "Compiles.", "outcome")
        yield CounterMetricFamily("hvpd_points", "Points made resident.", self._points)
        yield CounterMetricFamily(
            "hvpd_points_found", "Points that were asked for and were resident.", self._points_found
        )
        yield CounterMetricFamily(
            "hvpd_points_remade", "Points made resident that had been before.", self._points_remade
        )
        yield self._evictions.family("hvpd_evictions", "Entries dropped from the device for want of room.", "kind")
        yield CounterMetricFamily("hvpd_unloaded_objectives", "Objectives unloaded for want of room.", self._unloaded)
        yield CounterMetricFamily("hvpd_blobs_stored", "Blobs uploaded and stored.", self._uploads)
        yield self._runs.family("hvpd_runs", "Krylov runs and computations that ended.", "kind", "outcome")
        yield self._checks.family("hvpd_registration_checks", "Objectives checked after registration.", "verdict")

    def _gauges(self, live: Live, streams: int, calls: int) -> Iterator[Metric]:
        for name, text, by_kind in (
            ("hvpd_residency_hits", "Entries that were asked for and were resident.", live.hits),
            ("hvpd_residency_misses", "Entries that had to be made.", live.misses),
        ):
            yield _by_kind(CounterMetricFamily(name, text, labels=["kind"]), by_kind)
        resident = GaugeMetricFamily("hvpd_resident_bytes", "Bytes on the device.", labels=["kind"])
        yield _by_kind(resident, live.resident_bytes)
        entries = GaugeMetricFamily("hvpd_resident_entries", "Entries on the device.", labels=["kind"])
        yield _by_kind(entries, live.resident_entries)
        yield GaugeMetricFamily("hvpd_budget_bytes", "Bytes that may be resident.", live.budget_bytes)
        yield GaugeMetricFamily("hvpd_program_bytes", "Memory of compiled programs.", live.program_bytes)
        yield GaugeMetricFamily("hvpd_program_budget_bytes", "Memory that they may take.", live.program_budget_bytes)
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
        oldest = live.oldest_work_seconds
        yield GaugeMetricFamily("hvpd_oldest_work_seconds", "Age of the oldest work on a device.", oldest)
        yield GaugeMetricFamily("hvpd_group_ranks", "Processes of the group.", live.ranks)
        orders = CounterMetricFamily("hvpd_group_orders", "Orders to other ranks.", labels=["kind"])
        for kind in _ORDERS:
            orders.add_metric([kind], live.orders.get(kind, 0))
        yield orders
        yield GaugeMetricFamily("hvpd_group_pending_orders", "Orders not executed by all ranks.", live.pending_orders)
        yield GaugeMetricFamily("hvpd_open_calls", "Calls that are served, streams too.", calls)
        yield GaugeMetricFamily("hvpd_open_streams", "Product streams that are open.", streams)
        expires = self._expires()  # None, without TLS, is no sample.
        yield GaugeMetricFamily("hvpd_certificate_expiry_timestamp_seconds", "When the certificate ends.", expires)


def _called(tenant: str) -> str:
    """Return the label value of a tenant. An address is none, because every connection
    has another one.
    """
    return ANONYMOUS if not tenant or ":" in tenant else tenant


def _sums(*columns: Sequence[int]) -> list[int]:
    return [sum(values) for values in zip(*columns, strict=True)]


def _by_kind(family: _ByKind, values: Mapping[str, int]) -> _ByKind:
    for kind, value in {**dict.fromkeys(_KINDS, 0), **values}.items():
        family.add_metric([kind], value)
    return family


def _histogram(
    name: str, documentation: str, found: Histogram | Mapping[str, Histogram], label: str = ""
) -> HistogramMetricFamily:
    """Return the family of one histogram, or of one for each value of a label."""
    if isinstance(found, Histogram):
        return HistogramMetricFamily(name, documentation, found.buckets(), found.sum)
    family = HistogramMetricFamily(name, documentation, labels=[label])
    for value, histogram in found.items():
        family.add_metric([value], histogram.buckets(), histogram.sum)
    return family
