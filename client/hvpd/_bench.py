"""How fast a server answers, as one who asks sees it: closed loops of callers at one point. For `hvpd bench`; needs no jax."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hvpd._client import Client
    from hvpd._operator import CurvatureOperator


@dataclasses.dataclass(frozen=True)
class Reading:
    """What callers saw who each asked again as soon as they had their answer."""

    k: int
    """Vectors in a product."""
    callers: int
    """How many asked at once, in threads of this process."""
    products: int
    """How many were answered."""
    median_ms: float
    """Time of a product, in milliseconds: the median."""
    p90_ms: float
    """Likewise, what nine of ten did not exceed."""
    vectors_per_second: float
    """Of all callers together."""
    queue_ms: float
    """Of a product's time, waiting for the device, on average."""
    compute_ms: float
    """Of a product's time, on the device."""
    batch_width: float
    """Vectors in the launch of a product, of all clients, on average."""


def measure(client: "Client", H: "CurvatureOperator", k: int, callers: int, seconds: float) -> Reading:
    """Multiplies blocks of k vectors for some seconds, after one product of each caller that is not counted."""
    V = np.random.default_rng(0).standard_normal((H.shape[0], k)).astype(H.dtype)
    call: Callable[[], Any] = (lambda: H @ V[:, 0]) if k == 1 else (lambda: H @ V)
    with concurrent.futures.ThreadPoolExecutor(callers) as threads:
        list(threads.map(lambda _: call(), range(callers)))
        before, started = client.statistics(), time.perf_counter()
        times = np.concatenate(list(threads.map(lambda _: _loop(call, started + seconds), range(callers))))
        took, counts = time.perf_counter() - started, client.statistics() - before
    return Reading(
        k=k,
        callers=callers,
        products=len(times),
        median_ms=float(np.median(times)) * 1e3,
        p90_ms=float(np.quantile(times, 0.9)) * 1e3,
        vectors_per_second=k * len(times) / took,
        queue_ms=counts.queue_seconds / counts.products * 1e3,
        compute_ms=counts.compute_seconds / counts.products * 1e3,
        batch_width=counts.mean_batch_width,
    )


def _loop(call: Callable[[], Any], until: float) -> list[float]:
    times: list[float] = []
    while not times or time.perf_counter() < until:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times
