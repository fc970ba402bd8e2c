"""The benchmarks `samehost` and `restart`, on the device."""

import dataclasses
from collections.abc import Iterable, Iterator

from bench import restart as _restart
from bench import samehost as _samehost
from bench._report import Figure
from bench.gpu._scale import BENCH, Scale


def samehost(scale: Scale) -> Iterator[Figure]:
    """Yield `samehost`: the vector port, the Unix socket and shared memory."""
    yield from _renamed("samehost", _samehost.run(quick=scale.quick))


def restart(scale: Scale) -> Iterator[Figure]:
    """Yield `restart`: seconds until a server is warm again."""
    yield from _renamed("restart", _restart.run(quick=scale.quick))


def _renamed(label: str, figures: Iterable[Figure]) -> Iterator[Figure]:
    for figure in figures:
        yield dataclasses.replace(figure, bench=BENCH, figure=f"{label}: {figure.figure}")
