"""Measures all contenders of a size in turns: products a second, and how long a product
takes, with 1 and with 16 callers; its bytes on the wire; and the memory of both sides.
"""

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench._objectives import mlp
from bench._report import Figure, Goal, measured, skipped
from bench.peers import _environments
from bench.peers._contender import Contender, FailedError, started
from bench.peers._kernel import Kernel
from bench.peers._peer import NAMES, peer
from bench.peers._predictions import GOALS, PREDICTED
from bench.peers._spec import MOST, SPECS, Spec, Vector, give, vector

BENCH = "peers"
OWN = "own"
COUNTS = (1, MOST)

CHECKED = 99
"""Seed of the vector whose product is checked; `_caller.CHECKED`."""
_ROUNDS = 4
_SECONDS = 1.0
"""Seconds of a contender in a round."""
_MOST_SECONDS = 10.0
"""Seconds for all rounds of a slow contender, which gets at least one round."""
_TOO_LONG = 30.0
"""A contender is left out if one round would take longer, in seconds."""

Rounds = dict[str, list["Round"]]


@dataclasses.dataclass(frozen=True)
class Round:
    """What one contender did in one round."""

    number: int
    rate: float
    """Products a second."""
    p50: float
    """Seconds."""
    p99: float
    """Seconds."""


def install() -> None:
    """Make the environments of all peers, and say which cannot be made."""
    for name in NAMES:
        about = peer(name).ABOUT
        if about.installed:
            try:
                _environments.python(name, system=about.system_python)
                outcome = "installed"
            except _environments.NotInstalledError as error:
                outcome = f"not installed: {error}"
            print(f"peers: {about.label}: {outcome}", file=sys.stderr, flush=True)


def run(*, quick: bool, part: str | None) -> Iterator[Figure]:
    """Yield the figures of each size, or of one."""
    for label in [part] if part else list(SPECS)[: 1 if quick else None]:
        yield from _size(SPECS[label], quick=quick)


def _size(spec: Spec, *, quick: bool) -> Iterator[Figure]:
    problem = mlp(spec.sizes, spec.rows)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hvpd-bench-")))
        give(folder, problem.flat(), *problem.data)
        expected = Kernel(spec, most=1).multiply(problem.flat(), vector(spec.n, CHECKED))
        contenders, failed = _started(stack, spec, folder, expected, quick=quick)
        if OWN not in contenders:
            raise SystemExit(f"hvpd itself cannot be measured: {failed[OWN]}")
        for count in COUNTS[: 1 if quick else None]:
            rounds, others = _rounds(contenders, count, quick=quick)
            yield from _figures(spec, count, contenders, rounds, {**failed, **others})
        for contender in contenders.values():
            yield from _sizes_of(spec, contender)


def _started(
    stack: contextlib.ExitStack, spec: Spec, folder: Path, expected: Vector, *, quick: bool
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return those contenders that run, and for the others the reason."""
    found, failed = {}, {}
    for name in NAMES:
        if quick and peer(name).ABOUT.installed:
            failed[name] = "needs an environment of its own, which --quick does not make"
            continue
        print(f"peers: {spec.part}: starting {peer(name).ABOUT.label}", file=sys.stderr, flush=True)
        try:
            found[name] = stack.enter_context(started(name, spec, folder, expected))
        except FailedError as error:
            failed[name] = str(error)
            print(f"peers: {spec.part}: {peer(name).ABOUT.label}: {error}", file=sys.stderr, flush=True)
    return found, failed


def _rounds(contenders: Mapping[str, Contender], count: int, *, quick: bool) -> tuple[Rounds, dict[str, str]]:
    """Measure in turns, each round beginning with another contender."""
    rounds, seconds = (2, 0.1) if quick else (_ROUNDS, _SECONDS)
    failed, times = dict[str, str](), dict[str, int]()
    for name, contender in contenders.items():
        try:
            alone = contender.once()
            expected = alone * (1 if contender.about.in_process else count)
            if expected <= _TOO_LONG:
                contender.time(count, seconds / 4)  # Opens connections and warms caches.
                times[name] = max(1, min(rounds, int(_MOST_SECONDS / max(expected, seconds))))
            else:
                failed[name] = f"a product takes {alone:.1f} s, so {count} callers would take {expected:.0f} s"
        except FailedError as error:
            failed[name] = str(error)
    order, found = list(times), {name: list[Round]() for name in times}
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            if number < times[name] and name not in failed:
                try:
                    rate, taken = contenders[name].time(count, seconds)
                except FailedError as error:
                    failed[name] = str(error)
                    continue
                p50, p99 = (float(each) for each in np.quantile(taken, (0.5, 0.99)))
                found[name].append(Round(number, rate, p50, p99))
    return found, failed


def _figures(
    spec: Spec, count: int, contenders: Mapping[str, Contender], rounds: Rounds, failed: Mapping[str, str]
) -> Iterator[Figure]:
    own, facts = rounds[OWN], {"n": spec.n, "k": count}
    for name in NAMES:
        about, start = peer(name).ABOUT, f"{spec.part}: {peer(name).ABOUT.label}"
        if name in failed:
            yield skipped(BENCH, f"{start}: products", "/s", failed[name], **facts)
            continue
        of_it = rounds[name]
        note = "" if about.x == "on the server" else f"x {about.x}"
        if name != OWN:
            beside = [own[each.number] for each in of_it]
            ratios = {
                "products of hvpd over its": [ours.rate / each.rate for ours, each in zip(beside, of_it, strict=True)],
                "p50 over that of hvpd": [each.p50 / ours.p50 for ours, each in zip(beside, of_it, strict=True)],
                "p99 over that of hvpd": [each.p99 / ours.p99 for ours, each in zip(beside, of_it, strict=True)],
            }
            goal: Goal | None = GOALS[spec.part] if about.kind == "peer" else None
            for index, (figure, values) in enumerate(ratios.items()):
                first: dict[str, Any] = {}
                if not index:
                    first = {"predicted": PREDICTED[spec.part][name][COUNTS.index(count)], "goal": goal}
                yield measured(BENCH, f"{start}: {figure}", "", values, **facts, **first)
        yield measured(BENCH, f"{start}: products", "/s", [each.rate for each in of_it], note=note, **facts)
        yield measured(BENCH, f"{start}: p50", "ms", _milliseconds([each.p50 for each in of_it]), **facts)
        yield measured(BENCH, f"{start}: p99", "ms", _milliseconds([each.p99 for each in of_it]), **facts)
        server, callers = (size / 2**20 for size in contenders[name].memory_bytes())
        if not about.in_process:
            yield measured(BENCH, f"{start}: memory of the server", "MiB", [server], **facts)
        yield measured(BENCH, f"{start}: memory of the callers", "MiB", [callers], **facts)


def _sizes_of(spec: Spec, contender: Contender) -> Iterator[Figure]:
    """Yield the bytes on the wire, over those of v and Hv."""
    if contender.about.in_process:
        return
    figure = f"{spec.part}: {contender.about.label}: bytes on the wire, over those of v and Hv"
    try:
        found = contender.bytes_a_product() / (8 * spec.n)
    except FailedError as error:
        yield skipped(BENCH, figure, "", str(error), n=spec.n, k=1)
        return
    note = "by gRPC, as through a proxy" if contender.name == OWN else ""
    yield measured(BENCH, figure, "", [found], n=spec.n, k=1, note=note)


def _milliseconds(seconds: Sequence[float]) -> npt.NDArray[np.float64]:
    return np.array(seconds) * 1e3
