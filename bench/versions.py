"""Compares products of this checkout and of another one in turns: one caller, eight
callers at one point, and eight callers at eight points.

`python -m bench versions --before DIR` shows whether a change costs time. Two runs one
after the other cannot show a few per cent, because the machine changes between them.
Both versions start several times. A server measures once which program is faster, and
two servers of one version may choose differently.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench import _processes
from bench._objectives import mlp
from bench._report import Figure, Goal, measured

BENCH = "versions"
GOAL = Goal("<=", 1.03)
PREDICTED = 1.0
SIZES = {6_160: ((64, 82, 10), 500), 269_322: ((784, 256, 256, 10), 250)}
CALLERS = ((1, 1), (8, 1), (8, 8))
"""Numbers of callers and of points."""

Seconds = NDArray[np.float64]

_ROOT = Path(__file__).resolve().parents[1]


def run(*, quick: bool, before: Path | None = None) -> Iterator[Figure]:
    """Yield the time of a product now over the time before, for each size and number of
    callers.
    """
    if before is None:
        raise SystemExit("bench versions needs --before DIR, another checkout of hvpd")
    folders = {"now": _ROOT, "before": before.resolve()}
    starts, rounds, seconds = (2, 2, 0.02) if quick else (6, 14, 0.1)
    for n, (layers, rows) in list(SIZES.items())[: 1 if quick else None]:
        assert mlp(layers, rows).n == n
        times: dict[str, list[list[float]]] = {name: [[] for _ in CALLERS] for name in folders}
        for start in range(starts):
            with contextlib.ExitStack() as stack:
                children = {
                    name: stack.enter_context(_version(folders[name], layers, rows))
                    for name in _in_turn(folders, start)
                }
                for index, (callers, points) in enumerate(CALLERS):
                    for turn in range(rounds):
                        for name in _in_turn(folders, turn):
                            times[name][index].append(_asked(children[name], callers, points, seconds))
        for index, (callers, points) in enumerate(CALLERS):
            yield from _compared(n, callers, points, *(np.array(times[name][index]) for name in folders))


def _in_turn(folders: Mapping[str, Path], turn: int) -> list[str]:
    return list(folders)[:: 1 if turn % 2 else -1]


def _compared(n: int, callers: int, points: int, now: Seconds, before: Seconds) -> Iterator[Figure]:
    label = "one caller" if callers == 1 else f"{callers} callers at {points} point{'s' if points > 1 else ''}"
    facts = {"n": n, "k": callers}
    yield measured(
        BENCH, f"{label}: product, now over before", "", now / before, predicted=PREDICTED, goal=GOAL, **facts
    )
    yield measured(BENCH, f"{label}: product now", "ms", now * 1e3, **facts)
    yield measured(BENCH, f"{label}: product before", "ms", before * 1e3, **facts)


@contextlib.contextmanager
def _version(folder: Path, layers: tuple[int, ...], rows: int) -> Iterator[_processes.Child]:
    """Start the client and the server of a checkout, with an MLP registered and
    warm.
    """
    roots = os.pathsep.join(map(str, (folder / "client", folder / "server", _ROOT)))
    argv = ["env", f"PYTHONPATH={roots}", sys.executable, "-m", "bench._version", str(rows), *map(str, layers)]
    with _processes.child(argv, "ready", talks=True) as child:
        yield child


def _asked(child: _processes.Child, callers: int, points: int, seconds: float) -> float:
    """Return the seconds of a product, by one of so many callers at so many points."""
    process = child.process
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{callers} {points} {seconds}\n")
    process.stdin.flush()
    return float(process.stdout.readline())
