"""The last quarter of an hour: samples of the metrics every two seconds.

A sample is the difference of two readings of the metrics, so products cost nothing.
"""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from hvpd._wire.distribution import Distribution
from hvpd_server.telemetry.metrics import Metrics
from hvpd_server.telemetry.readings import Totals, Use

_log = logging.getLogger(__name__)

INTERVAL = 2.0
"""Seconds from one sample to the next."""
MAX_SAMPLES = 450
"""Most samples that are kept."""
_WINDOW = 5
"""Samples whose mean is shown as the current rate."""

_NOTHING = Use()

Spread = tuple[float, float]
"""Median and 99th percentile."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """The events of an interval."""

    number: int
    """Number of the sample, from 1."""
    time: float
    """End of the interval, in seconds since 1970."""
    seconds: float
    """Length of the interval."""
    products: int
    columns: int
    failures: int
    request: Spread | None
    """Seconds; None if there were no products."""
    queue: Spread | None
    compute: Spread | None
    widths: Sequence[int]
    """Products by the width of their launch; see `History.width_bounds`."""
    pending: int
    """Vectors that wait at the end of the interval."""
    in_flight: int
    """Vectors in launches at the end of the interval."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates over the last samples, a second unless a field says otherwise."""

    seconds: float
    """Seconds that the rates are the mean of; 0 if there are no samples, and all rates
    are 0.
    """
    products: float = 0.0
    columns: float = 0.0
    failures: float = 0.0
    width: float | None = None
    """Mean width of the launches of products, in vectors; None if there were none."""
    usage: Mapping[tuple[str, str], Use] = dataclasses.field(default_factory=dict)
    """Use in all of these seconds, by objective and tenant."""


class History:
    """Samples of one server's metrics. Safe for many threads.

    Args:
        metrics: The metrics.
        clock: Seconds, monotonic.
        wall: Seconds since 1970.
    """

    def __init__(
        self,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._wall = wall
        self._lock = threading.Lock()
        self._read: collections.deque[tuple[float, Totals]] = collections.deque(maxlen=_WINDOW + 1)
        self._samples: collections.deque[Sample] = collections.deque(maxlen=MAX_SAMPLES)
        self._stopped = threading.Event()
        self.sample()

    def start(self) -> None:
        """Begin to take samples."""
        threading.Thread(target=self._run, name="hvpd-history", daemon=True).start()

    def close(self) -> None:
        """Stop taking samples."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(INTERVAL):
            try:
                self.sample()
            except Exception as error:  # noqa: BLE001 - the next one may be taken again
                _log.error("no sample could be taken for the status page", exc_info=error)

    def sample(self) -> None:
        """Take a sample."""
        totals, (live, _, _) = self._metrics.totals(), self._metrics.live()
        with self._lock:
            now = self._clock()
            before = self._read[-1] if self._read else None
            if before is not None and now <= before[0]:
                return
            self._read.append((now, totals))
            if before is None:
                return
            then, earlier = before
            self._samples.append(
                Sample(
                    number=self._samples[-1].number + 1 if self._samples else 1,
                    time=self._wall(),
                    seconds=now - then,
                    products=totals.products - earlier.products,
                    columns=totals.columns - earlier.columns,
                    failures=totals.failures - earlier.failures,
                    request=_spread(totals.requests.since(earlier.requests)),
                    queue=_spread(totals.queue.since(earlier.queue)),
                    compute=_spread(totals.compute.since(earlier.compute)),
                    widths=totals.widths.since(earlier.widths).counts,
                    pending=live.pending,
                    in_flight=live.in_flight,
                )
            )

    @property
    def width_bounds(self) -> Sequence[float]:
        """Return the largest width of each bucket of `Sample.widths` but the last."""
        with self._lock:
            return self._read[-1][1].widths.bounds

    def since(self, number: int) -> list[Sample]:
        """Return the samples after one, in order."""
        with self._lock:
            return [sample for sample in self._samples if sample.number > number]

    def rates(self) -> Rates:
        """Return the current rates."""
        with self._lock:
            (then, earlier), (now, totals) = self._read[0], self._read[-1]
        seconds = now - then
        if not seconds:
            return Rates(0.0)
        products = totals.products - earlier.products
        return Rates(
            seconds,
            products=products / seconds,
            columns=(totals.columns - earlier.columns) / seconds,
            failures=(totals.failures - earlier.failures) / seconds,
            width=(totals.width_sum - earlier.width_sum) / products if products else None,
            usage={who: use.since(earlier.usage.get(who, _NOTHING)) for who, use in totals.usage.items()},
        )


def _spread(found: Distribution) -> Spread | None:
    median, high = found.quantile(0.5), found.quantile(0.99)
    return None if median is None or high is None else (median, high)
