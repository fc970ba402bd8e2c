"""The measurements of `hvpd bench`: closed loops of callers. Needs no jax."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hvpd._client import Client
    from hvpd._operators.curvature import CurvatureOperator


@dataclasses.dataclass(frozen=True)
class Reading:
    """Measurements of callers that each ask again as soon as they have an answer."""

    k: int
    """Vectors in a product."""
    callers: int
    """Number of callers at once, in threads of this process."""
    products: int
    """Number of answered products."""
    median_ms: float
    """Median time of a product, in milliseconds."""
    p90_ms: float
    """90th percentile of the time of a product, in milliseconds."""
    vectors_per_second: float
    """Vectors in a second, of all callers together."""
    queue_ms: float
    """Mean time of a product in the device's queue, in milliseconds."""
    compute_ms: float
    """Mean time of a product on the device, in milliseconds."""
    batch_width: float
    """Mean number of vectors in the launch of a product, of all clients."""


def measure(client: "Client", H: "CurvatureOperator", k: int, callers: int, seconds: float) -> Reading:
    """Multiply blocks of k vectors for some seconds.

    The first product of each caller does not count.
    """
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
