"""How the computations of a server run: in launches of several steps where a program
for them is there, otherwise by products.
"""

from hvpd._krylov import trust_region
from hvpd._krylov.conjugate_gradients import BlockCG
from hvpd._krylov.runner import Runner
from hvpd._krylov.space import Multiply
from hvpd._wire import codec
from hvpd_server.krylov import device_cg, launcher
from hvpd_server.krylov.operator import Operator


class DeviceRunner(Runner):
    """Runs Krylov iterations next to the device.

    Args:
        operator: Multiplies.
    """

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator.multiply, operator.n, operator.dtype)
        self._operator = operator
        self._launches = launcher.is_possible(operator)

    def conjugate_gradients(self, R: codec.Array, precondition: Multiply | None) -> BlockCG:
        """See `Runner.conjugate_gradients`."""
        if self._launches and device_cg.is_possible(R, precondition):
            return device_cg.DeviceCG(self._operator, self.multiply, precondition, R)
        return super().conjugate_gradients(R, precondition)

    def region_step(
        self,
        gradient: codec.Array,
        radius: float,
        *,
        tol: float,
        maxiter: int,
        precondition: Multiply | None,
        tick: device_cg.Tick,
    ) -> trust_region.Step:
        """Return the step of a trust region; see `trust_region.steihaug`.

        `tick` is called with the steps so far and the norm of the residual.
        """
        state = None
        if self._launches and device_cg.is_possible(gradient[None], precondition):
            cg = device_cg.DeviceCG(self._operator, self.multiply, precondition, -gradient[None], radius)
            state = device_cg.region_state(cg, tol, maxiter, tick)

        def multiply(rows: codec.Array) -> codec.Array:
            tick(self.products, 0.0)
            return self.multiply(rows)

        return trust_region.steihaug(
            multiply, gradient, radius, tol=tol, maxiter=maxiter, precondition=precondition, state=state
        )
