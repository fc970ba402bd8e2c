"""A Krylov space whose steps are launches of several steps each, with the
orthogonalization in the launch.

It needs a program for each size of the basis, which is compiled in the background.
Until the program is there, the steps are those of `HostSpace`. On a CPU, the device
reads the basis where it is, without a copy.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from hvpd._krylov.space import NotFiniteError, Step
from hvpd._wire import codec
from hvpd_server.derivation import lanczos
from hvpd_server.device.device import host
from hvpd_server.krylov.host_space import HostSpace
from hvpd_server.krylov.launcher import Launcher
from hvpd_server.krylov.operator import Operator
from hvpd_server.scheduling import blocks
from hvpd_server.scheduling.holdback import bucket_of

_SMALLEST, _LARGEST = 32, 1024
"""Rows of the smallest and of the largest basis that a program is compiled for."""


def capacity(rows: int) -> int:
    """Return the rows of the smallest program for a basis of so many rows."""
    return max(bucket_of(rows), _SMALLEST)


class Launched(NamedTuple):
    """The results of a launch."""

    new: Any
    """New rows: on an accelerator, in its memory."""
    alphas: codec.Array
    betas: codec.Array
    taken: int
    """Steps that were taken."""
    finite: bool
    """Whether the last product was finite."""
    scale: float
    """Largest norm of a product so far."""


class LanczosLauncher:
    """Launches steps of Lanczos's iteration.

    Args:
        operator: Multiplies.
    """

    def __init__(self, operator: Operator) -> None:
        self._terms = operator.terms
        # An accelerator multiplies all rows of the basis, see `lanczos._ROWS`.
        device = operator.engine.objectives.lane(operator.point.objective).device
        self._growth = 1 if device.platform == "cpu" else 0
        self._launcher = Launcher(operator, lanczos.PREFIX, lanczos.steps_of(operator.n))
        self.ready = self._launcher.ready

    def launch(self, Q: Any, bucket: int, rows: int, left: int, scale: float) -> Launched:
        """Take at most `left` steps, and as many as fit into the time.

        Args:
            Q: The basis, of as many rows as the bucket.
            bucket: Rows that the program is compiled for.
            rows: Rows that count.
            left: Most steps.
            scale: Largest norm of a product so far.
        """
        growth, work = self._growth, rows if self._growth else bucket
        steps = self._launcher.steps(left, work, growth)
        numbers, counts = np.array([self._terms.scale, self._terms.shift, scale]), np.array([rows, steps], np.int32)
        new, alphas, betas, facts = self._launcher.launch(bucket, [Q, numbers, counts], steps, work, growth)
        return Launched(new, alphas, betas, int(facts[0]), bool(facts[1]), float(facts[2]))


class DeviceSpace(HostSpace):
    """A `Space` with full reorthogonalization in the device's launches.

    Args:
        operator: Multiplies. `is_possible` holds for it.
    """

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator, "full")
        self.place = "host"
        self._launcher = LanczosLauncher(operator)

    def room_rows(self, rows: int) -> Sequence[int]:
        """Return numbers of rows to reserve memory for, the best one first."""
        rows = min(rows, self.n)
        bucket = capacity(rows)
        return [bucket, rows] if rows < bucket <= _LARGEST else [rows]

    def reserve(self, rows: int) -> None:
        """Get memory for so many rows of the basis, aligned for the device."""
        if len(self._stored) < rows:
            grown = blocks.empty((rows, self.n), self.dtype)
            grown[: self._kept] = self._stored[: self._kept]
            grown[self._kept :] = 0  # A launch multiplies these rows by 0, and they must be finite.
            self._stored = grown

    def extend(self, steps: int) -> Iterator[Step]:
        """See `Space.extend`."""
        left = steps
        while left and self._waiting:
            bucket = self._ready()
            if not bucket:
                self.place = "host"
                yield from super().extend(1)
                left -= 1
                continue
            self.place = "device"
            found = self._launcher.launch(self._stored[:bucket], bucket, self.rows, left, self._scale)
            new, taken, self._scale = host(found.new), found.taken, found.scale
            for row, alpha, beta in zip(new[:taken], found.alphas[:taken], found.betas[:taken], strict=True):
                ended = not beta or self.rows >= self.n
                self._push(new[:0] if ended else row[None], np.zeros((0, 1)) if ended else np.array([[beta]]))
                self.products += 1
                left -= 1
                yield Step(np.array([[alpha]]), self._beta)
            if not found.finite:
                raise NotFiniteError

    def _ready(self) -> int:
        """Return the bucket of the program for the next steps; 0 if there is none yet.
        Start its compile.
        """
        bucket = capacity(self.rows)
        if self._waiting != 1 or bucket > min(_LARGEST, len(self._stored)):
            return 0
        return bucket if self._launcher.ready(bucket) else 0
