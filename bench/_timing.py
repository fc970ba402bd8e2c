"""Fair clocks: contenders measured in turns, so that what disturbs one disturbs all; and closed loops of many callers."""

import concurrent.futures
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Call = Callable[[], object]


def interleave(contenders: Mapping[str, Call], *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Times each contender in every round: A B C, B C A, C A B, ...

    Args:
        contenders: By name. Each is called twice beforehand, which warms it and tells how often it fits into a round.
        rounds: How many.
        seconds: How long one contender is called in one round; once at least.

    Returns:
        For each contender the median time of a call, in seconds, for every round.
    """
    order = list(contenders)
    counts = {}
    for name, call in contenders.items():
        call()
        counts[name] = int(min(max(seconds / _time(call), 1), 2000))
    found: dict[str, list[float]] = {name: [] for name in order}
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            found[name].append(float(np.median([_time(contenders[name]) for _ in range(counts[name])])))
    return found


def _time(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def rate(callers: Sequence[Call], *, seconds: float) -> float:
    """Calls a second of callers that each call again as soon as they have their answer, each in a thread of its own.

    The first quarter of the time is not counted: they find their step. Each caller's own rate is taken from answer to answer,
    and each waits for two at least.
    """
    begin = threading.Barrier(len(callers))

    def loop(call: Call) -> float:
        begin.wait()
        counts_from = time.perf_counter() + seconds / 4
        ends = counts_from + seconds * 3 / 4
        first = last = 0.0
        answers = 0
        while last < ends or not answers:
            call()
            last = time.perf_counter()
            if first:
                answers += 1
            elif last >= counts_from:
                first = last
        return answers / (last - first)

    with concurrent.futures.ThreadPoolExecutor(len(callers)) as threads:
        return sum(threads.map(loop, callers))
