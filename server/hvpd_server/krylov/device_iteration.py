"""The steps of a solve in launches of several steps each. The vectors stay on the
device.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from hvpd._wire import codec
from hvpd_server.derivation import several_steps
from hvpd_server.device.device import host
from hvpd_server.krylov import packing
from hvpd_server.krylov.launcher import Launcher
from hvpd_server.krylov.operator import Operator


class DeviceIteration:
    """Takes the steps of an iteration in launches, once their program is compiled.

    A launch takes the usual steps only. It ends before a step whose product is not
    finite, or that the iteration may not take, such as one along a direction without
    positive curvature. The iteration in NumPy takes that step, with a product of its
    own, and says why it ends.

    Args:
        operator: Multiplies. `launcher.is_possible` holds for it.
        packed: The iteration.
        fixed: What its program takes beside its state.
        brief: Whether few steps follow.

    Attributes:
        taken: Steps of all launches.
        arrays: The state on the device, as the program has it; empty if the iteration
            in NumPy has the state.
    """

    def __init__(
        self, operator: Operator, packed: packing.Packed, fixed: packing.Fixed, *, brief: bool = False
    ) -> None:
        self._operator = operator
        self._packed = packed
        self._fixed = fixed
        self._placed: list[Any] = []
        self._launcher = Launcher(
            operator,
            packed.prefix,
            several_steps.STEPS,
            form=str(fixed.form),
            vectors=packed.rows,
            brief=brief,
        )
        self.taken = 0
        self.arrays: list[Any] = []

    def ready(self) -> bool:
        """Return whether the program is compiled. Start its compile at the first
        call.
        """
        return self._launcher.ready(self._packed.width)

    def advance(self, targets: codec.Array, most: int) -> Iterator[codec.Array]:
        """See `BlockCG.advance`."""
        if not self.ready():
            yield from self._packed.state.advance(targets, most)
            return
        norms, usual = self.launch(targets, most)
        yield from norms
        if not usual:
            self.home()
            yield from self._packed.state.advance(targets, most)

    def launch(self, targets: codec.Array, most: int) -> tuple[codec.Array, bool]:
        """Take steps in one launch, and at least one step if it is usual. Return the
        norms of the residuals after each, and whether the next step is a usual one.

        Args:
            targets: Norms of the residuals that end the steps.
            most: Most steps.
        """
        packed, operator = self._packed, self._operator
        steps = self._launcher.steps(most)
        if not self._placed:
            device = operator.engine.objectives.lane(operator.point.objective).device
            fixed = [packed.constant, *self._fixed.preconditioner, *self._fixed.low_rank]
            self._placed = [device.put(array, owned=True) for array in fixed]
        terms = np.array([operator.terms.scale, operator.terms.shift])
        numbers = [terms, packed.targets(targets), np.int32(steps)]
        front = [*(self.arrays or packed.pack()), *self._placed, *numbers]
        self.arrays, norms, facts = self._launcher.launch(packed.width, front, steps)
        taken, usual, ended = int(facts[0]), bool(facts[1]), bool(facts[2])
        packed.state.finished = ended
        self.taken += taken
        return packed.norms(norms[:taken]), usual

    def home(self) -> None:
        """Copy the state from the device to the iteration in NumPy."""
        if self.arrays:
            self._packed.unpack([host(array) for array in self.arrays])
            self.arrays = []
