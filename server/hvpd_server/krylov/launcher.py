"""Launches of several steps of an iteration. A launch takes as many steps as fit into a
time, by the time of the launches before it.
"""

import weakref
from collections.abc import Sequence
from typing import Any

from hvpd_server.device import data_sources
from hvpd_server.engine.launches import Iteration
from hvpd_server.engine.objective import LINEARIZED
from hvpd_server.krylov.operator import Operator

LAUNCH_SECONDS = 0.02
"""Seconds that a launch of several steps should take."""


def is_possible(operator: Operator, *, basis: bool = True) -> bool:
    """Return whether several steps with an operator can be one launch.

    Several steps cannot be one launch with data in chunks, or with a fixed bucket,
    whose bits depend on the steps of each launch.

    Args:
        operator: Multiplies.
        basis: Whether the steps need a basis. On several devices that do not split x,
            they are then no launch, because in a group the basis would go to all ranks
            each time.
    """
    point = operator.point
    device = operator.engine.objectives.lane(point.objective).device
    return (
        isinstance(point.source, data_sources.Resident)
        and (len(device.parts) == 1 or not basis or bool(point.objective.leaves))
        and not point.objective.fixed_bucket
    )


class Pace:
    """The times of a program's last two launches, and how many steps fit into a time.

    A step has two parts. The product takes the same time in each step. The work on the
    basis, if there is one, grows with its rows. So with more rows a step's time grows
    in proportion to the rows at most.
    """

    def __init__(self) -> None:
        self._latest: list[tuple[float, float]] = []
        """Mean seconds of a step and mean rows, of each launch."""

    def note(self, seconds: float, steps: int, rows: float, growth: float) -> None:
        """Note the seconds of a launch.

        Args:
            seconds: Its seconds.
            steps: Steps that it took.
            rows: Rows of the first step.
            growth: Rows that each step adds.
        """
        self._latest = [*self._latest[-1:], (seconds / max(steps, 1), rows + growth * (steps - 1) / 2)]

    def steps(self, seconds: float, most: int, rows: float, growth: float) -> int:
        """Return how many steps fit into a time, by the slower one of the last two
        launches; 1 if there was no launch.

        Args:
            seconds: The time.
            most: Most steps.
            rows: As in `note`.
            growth: As in `note`.
        """
        latest, total, number = self._latest, 0.0, 0
        while latest and number < most and total <= seconds:
            total += max(step * max((rows + growth * number) / base, 1.0) for step, base in latest)
            number += total <= seconds
        return max(number, 1)


_paces: "weakref.WeakKeyDictionary[Any, dict[tuple[str, int], Pace]]" = weakref.WeakKeyDictionary()
"""The pace of each program and number of vectors, by the object that has the compiled
programs. So the first launch of a run is planned by the runs before it.
"""


class Launcher:
    """Launches several steps with an operator. `is_possible` holds for it.

    Args:
        operator: Multiplies.
        prefix: Prefix of the program's name. The name of the operator's program
            follows.
        most: Most steps of a launch.
        form: The end of the program's name.
        vectors: Vectors that each step multiplies.
        seconds: Seconds that a launch should take.
        brief: Whether few steps follow, so that residuals do not pay.
    """

    def __init__(
        self,
        operator: Operator,
        prefix: str,
        most: int,
        *,
        form: str = "",
        vectors: int = 1,
        seconds: float = LAUNCH_SECONDS,
        brief: bool = False,
    ) -> None:
        self._operator = operator
        self._prefix, self._form = prefix, form
        whole = operator.program in ("hvp", LINEARIZED)
        # A block shares what depends on x, so residuals pay for single vectors only.
        pays = whole and vectors == 1 and not brief and operator.point.objective.plan_of(LINEARIZED).needs_apply
        self._product = "apply" if pays else _fused(operator)
        self._vectors = vectors
        # The queue may have room for one block only, so a launch is no wider.
        self._most = max(min(most, operator.engine.limits.max_block_width // vectors), 1)
        self._seconds = seconds
        self._requested: set[tuple[str, int]] = set()

    @property
    def _name(self) -> str:
        return self._prefix + self._product + self._form

    @property
    def _pace(self) -> Pace:
        paces = _paces.setdefault(self._operator.point.source.kernels, {})
        return paces.setdefault((self._name, self._vectors), Pace())

    def _programs(self, width: int) -> list[tuple[str, int]]:
        """Return the programs of a launch, with their widths."""
        return [(self._name, width), *([("prepare", 0)] if self._product == "apply" else [])]

    def ready(self, width: int) -> bool:
        """Return whether the program is compiled for a width. Start its compile at the
        first call.

        A compile is requested once, because one that found no memory would fail again
        at each step.
        """
        kernels = self._operator.point.source.kernels
        missing = [program for program in self._programs(width) if not kernels.ready(*program)]
        for program in missing:
            if program not in self._requested:
                self._requested.add(program)
                kernels.request(*program)
        return not missing

    def steps(self, left: int, rows: float = 1.0, growth: float = 0.0) -> int:
        """Return the steps of the next launch.

        Args:
            left: Most steps.
            rows: Rows that the first step multiplies beside its product.
            growth: Rows that each step adds to them.
        """
        return self._pace.steps(self._seconds, min(left, self._most), rows, growth)

    def launch(self, width: int, front: Sequence[Any], steps: int, rows: float = 1.0, growth: float = 0.0) -> list[Any]:
        """Launch the program in its turn. Return its results.

        The first result stays where the device has it. The others are in the host's
        memory, and the last one of them begins with the steps that were taken.

        Args:
            width: The width that the program is compiled for.
            front: Its arguments after x.
            steps: Steps to take at most.
            rows: As in `steps`.
            growth: As in `steps`.
        """
        operator, kernels = self._operator, self._operator.point.source.kernels
        while True:
            for program in self._programs(width):
                kernels.request(*program).result()
            found = operator.in_turn(lambda: self._launch(width, front, steps, rows, growth))
            if found:
                return found
            self._product = _fused(operator)  # There is no room for residuals.

    def _launch(self, width: int, front: Sequence[Any], steps: int, rows: float, growth: float) -> list[Any]:
        """Launch the program. Return no results if there is no room for residuals."""
        operator, work = self._operator, self._operator.work
        found, seconds = operator.engine.iterate(
            Iteration(
                operator.point,
                self._name,
                width,
                front,
                steps,
                self._vectors,
                operator.seed if operator.program.startswith("sampled_") else None,
                by_apply=self._product == "apply",
            ),
            tenant=work.tenant,
            priority=operator.priority,
            deadline=work.deadline,
            on_queue=work.on_wait,
        )
        operator.device_seconds += seconds
        if found:
            taken = int(found[-1][0])
            operator.products += taken * self._vectors
            self._pace.note(seconds, taken, rows, growth)
        return found


def _fused(operator: Operator) -> str:
    """Return the program that recomputes in each product what depends on x."""
    return "hvp" if operator.program == LINEARIZED else operator.program
