"""`hvpd bench`: how fast a server answers, measured by closed loops of callers."""

import argparse
import concurrent.futures
import dataclasses
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hvpd._cli.common import connect, connection, show_number
from hvpd._errors import InvalidArgumentError

if TYPE_CHECKING:
    from hvpd._client import Client
    from hvpd._operators.curvature import CurvatureOperator


_ROW = "{:>5} {:>8} {:>9} {:>10} {:>10} {:>10} {:>9} {:>11} {:>6}"


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    bench = commands.add_parser(
        "bench",
        help="measure how fast a server answers products of an objective",
        description="Ask for products at one point as fast as they are answered, with each block width and each number of callers, and "
        "say how long they take and where the time goes.",
    )
    bench.add_argument("name", metavar="NAME", help="name or digest of the objective")
    bench.add_argument("--k", default="1,4,16", help="block widths (default: 1,4,16)")
    bench.add_argument("--callers", default="1", help="callers at once, threads of this process (default: 1)")
    bench.add_argument("--seconds", type=float, default=2.0, help="seconds for each line (default: 2)")
    bench.add_argument("--seed", type=int, default=0, help="seed of x, which is standard normal (default: 0)")
    bench.add_argument("--json", action="store_true", help="one JSON object a line")
    connection(bench)
    bench.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import numpy as np

    widths, callers = _numbers(arguments.k, "--k"), _numbers(arguments.callers, "--callers")
    if not 0 <= arguments.seconds < float("inf") or arguments.seed < 0:
        raise InvalidArgumentError("--seconds and --seed must be from 0", reason="INVALID_OPTION")
    with connect(arguments) as client:
        objective = client.objective(arguments.name)
        H = objective.at(np.random.default_rng(arguments.seed).standard_normal(objective.n)).hessian()
        if not arguments.json:
            print(f"{objective.label}: n = {objective.n}, {objective.dtype}, at {client.address}")
            print(
                _ROW.format(
                    "K", "CALLERS", "PRODUCTS", "MEDIAN ms", "P90 ms", "VECTORS/s", "QUEUE ms", "COMPUTE ms", "WIDTH"
                )
            )
        for k in widths:
            for count in callers:
                reading = measure(client, H, k, count, arguments.seconds)
                row = dataclasses.astuple(reading)
                print(
                    json.dumps({"name": objective.label, "n": objective.n} | dataclasses.asdict(reading))
                    if arguments.json
                    else _ROW.format(*(show_number(cell) if isinstance(cell, float) else str(cell) for cell in row))
                )
    return 0


def _numbers(text: str, flag: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.isdecimal() and 0 < int(number) <= 4096 for number in numbers):
        raise InvalidArgumentError(
            f"{flag} must be numbers from 1 to 4096 joined by commas, got {text!r}", reason="INVALID_OPTION"
        )
    return [int(number) for number in numbers]


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
    import numpy as np

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
