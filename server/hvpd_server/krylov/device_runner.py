"""How the computations of a server run: in launches of several steps where a program
for them is there, otherwise by products.
"""

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
