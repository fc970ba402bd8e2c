"""Launches of several steps of an iteration. A launch takes as many steps as fit into a
time, by the time of the launch before it.
"""

from collections.abc import Sequence
from typing import Any

from hvpd_server.device import data_sources
from hvpd_server.engine.launches import Iteration
from hvpd_server.krylov.operator import Operator

LAUNCH_SECONDS = 0.02
"""Seconds that a launch of several steps should take."""

_FIRST_STEPS = 4
"""Steps of the first launch, when their time is not known."""


def is_possible(operator: Operator) -> bool:
    """Return whether several steps with an operator can be one launch.

    They cannot with a fixed bucket, because its bits depend on the program, with data
    in chunks, or on several devices.
    """
    point = operator.point
    device = operator.engine.objectives.lane(point.objective).device
    return (
        isinstance(point.source, data_sources.Resident)
        and len(device.parts) == 1
        and not point.objective.fixed_bucket
        and operator.program != "hvp@linearized"
    )


class Launcher:
    """Launches several steps with an operator. `is_possible` holds for it.

    Args:
        operator: Multiplies.
        prefix: Prefix of the program's name. The name of the operator's program
            follows.
        most: Most steps of a launch.
        seconds: Seconds that a launch should take.
    """

    def __init__(self, operator: Operator, prefix: str, most: int, seconds: float = LAUNCH_SECONDS) -> None:
        self._name = prefix + operator.program
        self._operator = operator
        # A queue has room for a block, and may have room for no more.
        self._most = min(most, operator.engine.limits.max_block_width)
        self._seconds = seconds
        self._step_seconds = 0.0
        self._requested: set[int] = set()

    def ready(self, width: int = 0) -> bool:
        """Return whether the program is compiled. Start its compile at the first call.

        A compile that failed for want of memory would fail again at each step.
        """
        kernels = self._operator.point.source.kernels
        if kernels.ready(self._name, width):
            return True
        if width not in self._requested:
            self._requested.add(width)
            kernels.request(self._name, width)
        return False

    def steps(self, left: int) -> int:
        """Return the steps of the next launch, by the time of the last one.

        Args:
            left: Most steps.
        """
        pace = int(self._seconds / self._step_seconds) if self._step_seconds else _FIRST_STEPS
        return min(left, self._most, max(pace, 1))

    def launch(self, width: int, front: Sequence[Any], steps: int) -> list[Any]:
        """Launch the program in its turn. Return its results.

        The first result stays where the device has it. The others are in the host's
        memory, and the last one of them begins with the steps that were taken.

        Args:
            width: The width that the program is compiled for.
            front: Its arguments after x.
            steps: Steps to take at most.
        """
        operator, work = self._operator, self._operator.work
        seed = operator.seed if operator.program.startswith("sampled_") else None
        operator.point.source.kernels.request(self._name, width).result()
        iteration = Iteration(operator.point, self._name, width, front, steps, seed)

        def launch() -> list[Any]:
            found, seconds = operator.engine.iterate(
                iteration,
                tenant=work.tenant,
                priority=operator.priority,
                deadline=work.deadline,
                on_queue=work.on_wait,
            )
            taken = int(found[-1][0])
            operator.device_seconds += seconds
            operator.products += taken
            self._step_seconds = seconds / max(taken, 1)
            return found

        return operator.in_turn(launch)
