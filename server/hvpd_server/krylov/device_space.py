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
from hvpd_server.derivation import iterations
from hvpd_server.device import data_sources
from hvpd_server.engine.launches import Iteration
from hvpd_server.krylov.host_space import HostSpace
from hvpd_server.krylov.operator import Operator
from hvpd_server.scheduling import blocks

LAUNCH_SECONDS = 0.02
"""Seconds that a launch of several steps should take."""

_SMALLEST, _LARGEST = 32, 1024
"""Rows of the smallest and of the largest basis that a program is compiled for."""

_FIRST_STEPS = 4
"""Steps of the first launch, when their time is not known."""


def is_possible(operator: Operator) -> bool:
    """Return whether the steps of an operator can be launched several at a time.

    They cannot with a fixed bucket, because its bits depend on the program, with data
    in chunks, or on several devices.
    """
    point = operator.point
    device = operator.engine.objectives.lane(point.objective).device
    return (
        isinstance(point.source, data_sources.Resident)
        and len(device.parts) == 1
        and not point.objective.fixed_bucket
        and operator.terms.U is None
        and operator.program != "hvp@linearized"
    )


def capacity(rows: int) -> int:
    """Return the rows of the smallest program for a basis of so many rows."""
    bucket = _SMALLEST
    while bucket < rows:
        bucket *= 2
    return bucket


class Launched(NamedTuple):
    """The results of a launch."""

    new: Any
    """New rows: on an accelerator, in its memory."""
    alphas: codec.Array
    betas: codec.Array
    facts: codec.Array
    """Steps that were taken, whether the last product was finite, and the largest norm
    of a product.
    """


class Launcher:
    """Launches several steps of an operator.

    Args:
        operator: Multiplies.
        seconds: Seconds that a launch should take.
    """

    def __init__(self, operator: Operator, seconds: float) -> None:
        self.name = iterations.PREFIX + operator.program
        self._operator = operator
        self._seconds = seconds
        self._step_seconds = 0.0

    def ready(self, bucket: int) -> bool:
        """Return whether the program is compiled; else start its compile."""
        kernels = self._operator.point.source.kernels
        if not kernels.ready(self.name, bucket):
            kernels.request(self.name, bucket)
            return False
        return True

    def launch(self, Q: Any, bucket: int, rows: int, left: int, scale: float) -> Launched:
        """Take at most `left` steps, and as many as fit into the time.

        Args:
            Q: The basis, of as many rows as the bucket.
            bucket: Rows that the program is compiled for.
            rows: Rows that count.
            left: Most steps.
            scale: Largest norm of a product so far.
        """
        operator, work, terms = self._operator, self._operator.work, self._operator.terms
        count = min(left, self._pace())
        numbers, counts = np.array([terms.scale, terms.shift, scale]), np.array([rows, count], np.int32)
        seed = operator.seed if operator.program.startswith("sampled_") else None
        operator.point.source.kernels.request(self.name, bucket).result()
        iteration = Iteration(operator.point, self.name, bucket, [Q, numbers, counts], count, seed)

        def launch() -> Launched:
            found, seconds = operator.engine.iterate(
                iteration,
                tenant=work.tenant,
                priority=operator.priority,
                deadline=work.deadline,
                on_queue=work.on_wait,
            )
            launched = Launched(*found)
            taken = int(launched.facts[0])
            operator.device_seconds += seconds
            operator.products += taken
            self._step_seconds = seconds / max(taken, 1)
            return launched

        return operator.in_turn(launch)

    def _pace(self) -> int:
        """Return the steps of the next launch, by the time of the last one."""
        most = iterations.steps_of(self._operator.n)
        if not self._step_seconds:
            return min(most, _FIRST_STEPS)
        return min(max(int(self._seconds / self._step_seconds), 1), most)


class DeviceSpace(HostSpace):
    """A `Space` with full reorthogonalization in the device's launches.

    Args:
        operator: Multiplies. `is_possible` holds for it.
    """

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator, "full")
        self.place = "host"
        self._launcher = Launcher(operator, LAUNCH_SECONDS)

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
            taken, finite, self._scale = int(found.facts[0]), bool(found.facts[1]), float(found.facts[2])
            for row, alpha, beta in zip(found.new[:taken], found.alphas[:taken], found.betas[:taken], strict=True):
                ended = not beta or self.rows >= self.n
                self._push(found.new[:0] if ended else row[None], np.zeros((0, 1)) if ended else np.array([[beta]]))
                self.products += 1
                left -= 1
                yield Step(np.array([[alpha]]), self._beta)
            if not finite:
                raise NotFiniteError

    def _ready(self) -> int:
        """Return the bucket of the program for the next steps; 0 if there is none yet.
        Start its compile.
        """
        bucket = capacity(self.rows)
        if self._waiting != 1 or bucket > min(_LARGEST, len(self._stored)):
            return 0
        return bucket if self._launcher.ready(bucket) else 0
