"""Fair clocks for contenders, and closed loops of many callers.

Contenders are measured in turns, so that a disturbance affects all of them.
"""

import concurrent.futures
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Call = Callable[[], object]


def interleave(contenders: Mapping[str, Call], *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Time each contender in every round: A B C, B C A, C A B, ...

    Args:
        contenders: Functions by name. A call beforehand warms each of them. A second
            one shows how often it fits into a round.
        rounds: Number of rounds.
        seconds: Seconds to call one contender in one round; it is called at least once.
            With 0 it is called once, and needs no second call beforehand.

    Returns:
        For each contender the median time of a call, in seconds, for every round.
    """
    order = list(contenders)
    counts = {}
    for name, call in contenders.items():
        call()
        counts[name] = int(min(max(seconds / _time(call), 1), 2000)) if seconds else 1
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
    """Return the calls a second of callers that each call again as soon as they have
    their answer, each in a thread of its own.

    The first quarter of the time is not counted: the rate is not steady. Each caller's
    own rate is taken from answer to answer, of which each waits for at least two.
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
