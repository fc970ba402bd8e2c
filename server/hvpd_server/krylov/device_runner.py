"""How the computations of a server run: in launches of several steps where a program
for them is there, otherwise by products.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np

from hvpd._krylov import trust_region
from hvpd._krylov.conjugate_gradients import BlockCG
from hvpd._krylov.preconditioning import Applied
from hvpd._krylov.runner import Advance, Runner
from hvpd._krylov.short_recurrence import ShortRecurrence
from hvpd._krylov.space import Multiply
from hvpd._wire import codec
from hvpd_server.derivation import conjugate_gradients
from hvpd_server.krylov import launcher, packing
from hvpd_server.krylov.device_iteration import DeviceIteration
from hvpd_server.krylov.operator import Operator
from hvpd_server.krylov.packing import Packed, PackedCG, PackedShortRecurrence

Tick = Callable[[int, float], object]


class DeviceRunner(Runner):
    """Runs Krylov iterations next to the device.

    Args:
        operator: Multiplies.
    """

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator.multiply, operator.n, operator.dtype)
        self.operator = operator
        # In a group, the state goes to all ranks with each launch: few vectors.
        self._launches = launcher.is_possible(operator, basis=False)

    @contextlib.contextmanager
    def stepping(self, state: BlockCG | ShortRecurrence, precondition: Multiply | None) -> Iterator[Advance]:
        """See `Runner.stepping`."""
        packed = PackedCG(state) if isinstance(state, BlockCG) else PackedShortRecurrence(state)
        iteration = self._iteration(packed, precondition)
        if iteration is None:
            yield state.advance
            return
        try:
            yield iteration.advance
        finally:
            iteration.home()

    def region_step(
        self,
        gradient: codec.Array,
        radius: float,
        *,
        tol: float,
        maxiter: int,
        precondition: Multiply | None,
        tick: Tick,
    ) -> trust_region.Step:
        """Return the step of a trust region; see `trust_region.steihaug`.

        `tick` is called with the steps so far and the norm of the residual.
        """
        cg, state = BlockCG(self.multiply, precondition, -gradient[None]), None
        iteration = None if cg.finished else self._iteration(PackedCG(cg, radius), precondition, brief=True)
        if iteration is not None:
            state = _region_state(iteration, tol, maxiter, tick)

        def multiply(rows: codec.Array) -> codec.Array:
            tick(self.products, 0.0)
            return self.multiply(rows)

        return trust_region.steihaug(
            multiply, gradient, radius, tol=tol, maxiter=maxiter, precondition=precondition, state=state
        )

    def _iteration(
        self, packed: Packed, precondition: Multiply | None, *, brief: bool = False
    ) -> DeviceIteration | None:
        """Return an iteration in launches; None if there is no program for it.

        A program for other layers than those of the objective is refused, because a
        client could ask for any number of programs.
        """
        if not self._launches or not (precondition is None or isinstance(precondition, Applied)):
            return None
        objective = self.operator.point.objective
        fixed = packing.fixed(packed.shifts, self.operator.terms, precondition, self.operator.dtype)
        if fixed.form.M == "kronecker" and fixed.form.sizes != packing.layer_sizes(
            objective.described, objective.bundle
        ):
            return None
        return DeviceIteration(self.operator, packed, fixed, brief=brief)


def _region_state(iteration: DeviceIteration, tol: float, maxiter: int, tick: Tick) -> trust_region.State | None:
    """Take the usual steps towards a step of a trust region, in launches. Return the
    state before the next step, or None if there is no program for launches yet.

    Args:
        iteration: Conjugate gradients for the right-hand side -g, within the ball.
        tol: Norm of the residual that ends the steps.
        maxiter: Most steps.
        tick: Called with the steps so far and the norm of the residual.
    """
    if not iteration.ready():
        return None
    usual, latest = True, np.inf
    while usual and latest > tol and iteration.taken < maxiter:
        norms, usual = iteration.launch(np.array([tol]), maxiter - iteration.taken)
        latest = float(norms[-1, 0]) if len(norms) else latest
        tick(iteration.taken, latest)
    X, Q, S, *numbers = iteration.copied()
    found = conjugate_gradients.State(X, Q, S, *numbers)
    C, XX, XS, SS = (float(array[0, 0]) for array in (found.C, found.XX, found.XS, found.SS))
    size = S.dtype.type(C)
    return trust_region.State(np.array(X), -size * Q, size * S, C**2, XX, C * XS, C**2 * SS, iteration.taken)
