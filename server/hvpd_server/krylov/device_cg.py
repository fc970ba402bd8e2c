"""Conjugate gradients for one right-hand side, whose steps are launches of several
steps each. The vectors stay on the device. Steps of a trust region run by them, too.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hvpd._krylov import trust_region
from hvpd._krylov.conjugate_gradients import BlockCG
from hvpd._krylov.preconditioning import Diagonal
from hvpd._krylov.space import Multiply
from hvpd._wire import codec
from hvpd_server.derivation import conjugate_gradients
from hvpd_server.device.device import host
from hvpd_server.krylov.launcher import Launcher
from hvpd_server.krylov.operator import Operator, Terms
from hvpd_server.scheduling import blocks

Tick = Callable[[int, float], object]


def is_possible(R: codec.Array, precondition: Multiply | None) -> bool:
    """Return whether the right-hand sides and the preconditioner are such that launches
    of several steps can solve the system.
    """
    return len(R) == 1 and (
        precondition is None or (isinstance(precondition, Diagonal) and bool((precondition.weights > 0).all()))
    )


def padded(terms: Terms) -> list[codec.Array]:
    """Return U and C of a low-rank term with a rank that is a power of two, so that few
    programs serve all ranks; nothing if there is no such term.
    """
    if terms.U is None or terms.C is None:
        return []
    n, rank = terms.U.shape
    width = 1 << (rank - 1).bit_length()
    U, C = blocks.empty((n, width), terms.U.dtype), np.zeros((width, width), terms.U.dtype)
    U[:, :rank], U[:, rank:] = terms.U, 0
    C[:rank, :rank] = terms.C
    return [U, C]


class DeviceCG(BlockCG):
    """`BlockCG` in the device's launches, once their program is compiled.

    A launch takes the usual steps only. It ends before a step whose product is not
    finite, whose curvature is not positive, whose end is not within a ball, or whose
    residual vanishes. `BlockCG` takes that step, with a product of its own.

    Args:
        operator: Multiplies. `launcher.is_possible` holds for it.
        multiply: Multiplies by it.
        precondition: As for `BlockCG`. `is_possible` holds for it and R.
        R: As for `BlockCG`.
        radius: Radius of the ball around 0, in the norm of the inverse of M.

    Attributes:
        taken: Steps of all launches.
    """

    def __init__(
        self,
        operator: Operator,
        multiply: Multiply,
        precondition: Multiply | None,
        R: codec.Array,
        radius: float = np.inf,
    ) -> None:
        super().__init__(multiply, precondition, R)
        self._launcher = Launcher(operator, conjugate_gradients.PREFIX, conjugate_gradients.STEPS)
        self.taken = 0
        self._operator = operator
        self._terms, self._radius = operator.terms, radius
        low_rank = padded(operator.terms)
        self._rank = low_rank[0].shape[1] if low_rank else 0
        self._fixed = [precondition.weights[None] if isinstance(precondition, Diagonal) else np.ones_like(R), *low_rank]
        self._placed: list[Any] = []
        self._ball = np.array([0.0, 0.0, 1.0])
        """Inner products of X X, X S and S S."""

    def ready(self) -> bool:
        """Return whether the program is compiled. Start its compile at the first
        call.
        """
        return self._launcher.ready(self._rank)

    def advance(self, targets: codec.Array, most: int) -> Iterator[codec.Array]:
        """See `BlockCG.advance`."""
        if not self.ready():
            yield from super().advance(targets, most)
            return
        norms, usual = self.launch(float(targets[0]), most)
        for norm in norms:
            yield norm[None]
        if not usual:
            self.X, self.Q, self.S = np.array(host(self.X)), host(self.Q), host(self.S)
            yield from super().advance(targets, most)

    def launch(self, target: float, most: int) -> tuple[codec.Array, bool]:
        """Take steps in one launch, and at least one step if it is usual. Return the
        norms of the residuals after them, and whether the next step is a usual one.

        Args:
            target: Norm of the residual that ends the steps.
            most: Most steps.
        """
        steps = self._launcher.steps(most)
        state = [self._norm, float(self.C[0, 0]), *self._ball]
        numbers = np.array([self._terms.scale, self._terms.shift, target, self._radius, *state])
        if not self._placed:
            device = self._operator.engine.objectives.lane(self._operator.point.objective).device
            self._placed = [device.put(array, owned=True) for array in self._fixed]
        M, *low_rank = self._placed
        front = [self.X, self.Q, self.S, M, numbers, np.int32(steps), *low_rank]
        (self.X, self.Q, self.S), norms, facts = self._launcher.launch(self._rank, front, steps)
        taken, usual = int(facts[0]), bool(facts[1])
        self._norm, self.C, self._ball = float(facts[2]), facts[3:4].reshape(1, 1), facts[4:]
        self.taken += taken
        return norms[:taken], usual

    def solutions(self) -> codec.Array:
        """See `BlockCG.solutions`."""
        return host(self.X)

    def in_region(self) -> trust_region.State:
        """Return the state as that of a step of a trust region."""
        C, (XX, XS, SS) = float(self.C[0, 0]), map(float, self._ball)
        Q, S = host(self.Q), host(self.S)
        size = S.dtype.type(C)
        return trust_region.State(np.array(host(self.X)), -size * Q, size * S, C**2, XX, C * XS, C**2 * SS, self.taken)


def region_state(cg: DeviceCG, tol: float, maxiter: int, tick: Tick) -> trust_region.State | None:
    """Take the usual steps towards a step of a trust region, in launches. Return the
    state before the next step, or None if there is no program for launches yet.

    Args:
        cg: The iteration for the right-hand side -g, within the ball.
        tol: Norm of the residual that ends the steps.
        maxiter: Most steps.
        tick: Called with the steps so far and the norm of the residual.
    """
    if not len(cg.Q) or not cg.ready():
        return None
    usual, latest = True, np.inf
    while usual and latest > tol and cg.taken < maxiter:
        norms, usual = cg.launch(tol, maxiter - cg.taken)
        latest = float(norms[-1]) if len(norms) else latest
        tick(cg.taken, latest)
    return cg.in_region()
