"""The steps of a solve in launches of several steps each. The vectors stay on the
device.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from hvpd._wire import codec
from hvpd_server.derivation import several_steps
from hvpd_server.derivation.programs import METHODS
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
        objective = operator.point.objective
        self._device = operator.engine.objectives.lane(objective).device
        self._spread = self._device.spread(objective.leaves)
        sizes = several_steps.Sizes(packed.width, operator.n, operator.dtype, fixed.form, self._spread)
        self._specs = several_steps.specs_of(METHODS[packed.prefix], sizes)
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
            fixed = [packed.constant, *self._fixed.preconditioner, *self._fixed.low_rank]
            specs = itertools.chain(*self._specs[1:4])
            self._placed = [self._put(array, spec) for array, spec in zip(fixed, specs, strict=True)]
        terms = np.array([operator.terms.scale, operator.terms.shift])
        numbers = [terms, packed.targets(targets), np.int32(steps)]
        state = self.arrays or packed.pack()
        if self._spread is not None and not self.arrays:
            state = [self._put(array, spec) for array, spec in zip(state, self._specs[0], strict=True)]
        front = [*state, *self._placed, *numbers]
        self.arrays, norms, facts = self._launcher.launch(packed.width, front, steps)
        taken, usual, ended = int(facts[0]), bool(facts[1]), bool(facts[2])
        packed.state.finished = ended
        self.taken += taken
        return packed.norms(norms[:taken]), usual

    def home(self) -> None:
        """Copy the state from the device to the iteration in NumPy."""
        if self.arrays:
            self._packed.unpack(self.copied())
            self.arrays = []

    def copied(self) -> list[codec.Array]:
        """Return the state in the host's memory."""
        return [
            host(array, spec.sharding and self._spread) for array, spec in zip(self.arrays, self._specs[0], strict=True)
        ]

    def _put(self, array: codec.Array, spec: Any) -> Any:
        """Copy an array to the device, split as its spec says."""
        if self._spread is None or spec.sharding is None:
            return self._device.put(array, owned=True)
        return self._device.put_spread(array, self._spread, len(spec.sharding.spec) - 1)
