"""Conjugate gradients for one right-hand side, whose steps are launches of several
steps each. The vectors stay on the device.
"""

from collections.abc import Iterator

import numpy as np

from hvpd._krylov.conjugate_gradients import BlockCG
from hvpd._krylov.preconditioning import Diagonal
from hvpd._krylov.space import Multiply
from hvpd._wire import codec
from hvpd_server.derivation import conjugate_gradients
from hvpd_server.device.device import host
from hvpd_server.krylov.launcher import Launcher
from hvpd_server.krylov.operator import Operator


def is_possible(R: codec.Array, precondition: Multiply | None) -> bool:
    """Return whether the right-hand sides and the preconditioner are such that launches
    of several steps can solve the system.
    """
    return len(R) == 1 and (
        precondition is None or (isinstance(precondition, Diagonal) and bool((precondition.weights > 0).all()))
    )


class DeviceCG(BlockCG):
    """`BlockCG` in the device's launches, once their program is compiled.

    A launch takes the usual steps only. It ends before a step whose product is not
    finite, whose curvature is not positive, or whose residual vanishes. `BlockCG` takes
    that step, with a product of its own.

    Args:
        operator: Multiplies. `launcher.is_possible` holds for it.
        multiply: Multiplies by it.
        precondition: As for `BlockCG`. `is_possible` holds for it and R.
        R: As for `BlockCG`.
    """

    def __init__(self, operator: Operator, multiply: Multiply, precondition: Multiply | None, R: codec.Array) -> None:
        super().__init__(multiply, precondition, R)
        self._launcher = Launcher(operator, conjugate_gradients.PREFIX, conjugate_gradients.STEPS)
        self._terms = operator.terms
        self._M = precondition.weights[None] if isinstance(precondition, Diagonal) else np.ones_like(R)

    def advance(self, targets: codec.Array, most: int) -> Iterator[codec.Array]:
        """See `BlockCG.advance`."""
        if not self._launcher.ready():
            yield from super().advance(targets, most)
            return
        steps, length = self._launcher.steps(most), float(self.C[0, 0])
        numbers = np.array([self._terms.scale, self._terms.shift, self._norm, length, targets[0]])
        front = [self.X, self.Q, self.S, self._M, numbers, np.int32(steps)]
        (self.X, self.Q, self.S), norms, facts = self._launcher.launch(0, front, steps)
        taken, usual, self._norm, self.C = int(facts[0]), bool(facts[1]), float(facts[2]), facts[3:].reshape(1, 1)
        for norm in norms[:taken]:
            yield norm[None]
        if not usual:
            self.X, self.Q, self.S = np.array(host(self.X)), host(self.Q), host(self.S)
            yield from super().advance(targets, most)

    def solutions(self) -> codec.Array:
        """See `BlockCG.solutions`."""
        return host(self.X)
