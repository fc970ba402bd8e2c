"""What an operator sees: Prometheus metrics. Names are a contract, listed in the README; durations are in seconds."""

from collections.abc import Callable, Iterable, Mapping

import prometheus_client
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hvpd_server._batcher import Job

_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        registry = self.registry
        self.build = prometheus_client.Info("hvpd_build", "Version of the server.", registry=registry)
        self.points = prometheus_client.Counter("hvpd_points", "Points made resident.", registry=registry)
        self._launches = prometheus_client.Counter(
            "hvpd_launches", "Launches on the device.", ["program"], registry=registry
        )
        self._by_program: dict[str, prometheus_client.Counter] = {}
        self.evictions = prometheus_client.Counter(
            "hvpd_evictions", "Entries dropped from the device for want of room.", ["kind"], registry=registry
        )
        self.uploads = prometheus_client.Counter("hvpd_blobs_stored", "Blobs uploaded and stored.", registry=registry)
        self.checks = prometheus_client.Counter(
            "hvpd_registration_checks", "Objectives checked after registration.", ["verdict"], registry=registry
        )
        self._products = prometheus_client.Counter("hvpd_products", "Products answered.", registry=registry)
        self._columns = prometheus_client.Counter("hvpd_columns", "Vectors multiplied.", registry=registry)
        self._queue = prometheus_client.Histogram(
            "hvpd_queue_seconds", "From a product's arrival to its launch.", buckets=_SECONDS, registry=registry
        )
        self._compute = prometheus_client.Histogram(
            "hvpd_compute_seconds", "From launch to result.", buckets=_SECONDS, registry=registry
        )
        self._width = prometheus_client.Histogram(
            "hvpd_batch_width", "Vectors in the launch of a product.", buckets=_WIDTHS, registry=registry
        )
        self._compile = prometheus_client.Histogram(
            "hvpd_compile_seconds", "Compiling one program for one width.", buckets=_SECONDS, registry=registry
        )

    def product(self, job: Job) -> None:
        """Counts a product that was answered."""
        self._products.inc()
        self._columns.inc(len(job.block))
        self._queue.observe(job.started - job.queued)
        self._compute.observe(job.finished - job.started)
        self._width.observe(job.width)

    def launched(self, program: str) -> None:
        """Counts a launch."""
        counter = self._by_program.get(program)
        if counter is None:
            counter = self._by_program[program] = self._launches.labels(program=program)
        counter.inc()

    def compiled(self, seconds: float) -> None:
        """Counts a compile."""
        self._compile.observe(seconds)

    def checked(self, verdict: str) -> None:
        """Counts an objective that was checked after its registration."""
        self.checks.labels(verdict=verdict).inc()

    def evicted(self, kind: str) -> None:
        """Counts an entry that was dropped."""
        self.evictions.labels(kind=kind).inc()

    def observe(self, used_bytes: Callable[[], Mapping[str, int]], pending: Callable[[], int]) -> None:
        """Reads these whenever the metrics are scraped."""
        self.registry.register(_Live(used_bytes, pending))


class _Live(Collector):
    def __init__(self, used_bytes: Callable[[], Mapping[str, int]], pending: Callable[[], int]) -> None:
        self._used_bytes = used_bytes
        self._pending = pending

    def collect(self) -> Iterable[Metric]:
        resident = GaugeMetricFamily("hvpd_resident_bytes", "Bytes on the device.", labels=["kind"])
        for kind, size in self._used_bytes().items():
            resident.add_metric([kind], size)
        yield resident
        yield GaugeMetricFamily("hvpd_pending_vectors", "Vectors that wait for the device.", value=self._pending())
