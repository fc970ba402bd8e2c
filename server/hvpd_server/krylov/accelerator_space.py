"""A Krylov space in the memory of an accelerator, or of several devices that split x.
Its vectors stay there: launches of several steps add rows, and only small matrices and
combinations come back.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from hvpd._krylov.space import LocalSpace, NotFiniteError, Step
from hvpd._wire import codec
from hvpd_server.device import basis
from hvpd_server.errors import invalid
from hvpd_server.krylov.device_space import LanczosLauncher, capacity
from hvpd_server.krylov.operator import Operator


class AcceleratorSpace:
    """A `Space` with full reorthogonalization on the device.

    Args:
        operator: Multiplies. `launcher.is_possible` holds for it.
    """

    place = "device"
    reorthogonalize = "full"

    def __init__(self, operator: Operator) -> None:
        self.n = operator.n
        self.dtype = operator.dtype
        self.rows = 0
        self.products = 0
        self.waiting = 0
        self._device = operator.engine.objectives.lane(operator.point.objective).device
        self._spread = self._device.spread(operator.point.objective.leaves)
        self._launcher = LanczosLauncher(operator)
        self._basis = self._empty(0)
        self._scale = 0.0

    def room_rows(self, rows: int) -> Sequence[int]:
        """Return numbers of rows to reserve memory for, the best one first."""
        return [capacity(min(rows, self.n))]

    def reserve(self, rows: int) -> None:
        """Get memory for so many rows of the basis."""
        if rows > self._basis.rows:
            grown = self._empty(rows)
            if self.rows:
                grown.write(self._basis.first(self.rows), 0, self.rows)
            self._basis = grown

    def begin(self, rows: codec.Array) -> None:
        """Take one orthonormal row as the start."""
        self._add(rows)

    def rewind(self, rows: int, waiting: int) -> bool:
        """Go back to an earlier position. Return whether that was possible."""
        if not 0 <= waiting <= rows <= self.rows:
            return False
        self.rows, self.waiting = rows, waiting
        return True

    def append(self, V: codec.Array) -> codec.Array:
        """See `Space.append`. The basis comes to the host for it, which is rare."""
        if len(V) != 1:
            raise invalid("BLOCK_WIDTH", f"a run that starts with one vector appends one, got {len(V)}")
        local = LocalSpace(_never, self.n, self.dtype)
        local.append(self._basis.host(self._basis.first(self.rows)))
        before = local.rows
        beta = local.append(V)
        self._add(local.combine(np.eye(local.rows))[before:])
        return beta

    def extend(self, steps: int) -> Iterator[Step]:
        """See `Space.extend`."""
        left = steps
        while left and self.waiting:
            found = self._launcher.launch(self._basis.array, self._basis.rows, self.rows, left, self._scale)
            taken, self._scale = found.taken, found.scale
            self._basis.write(found.new, self.rows, min(taken, self.n - self.rows))
            for alpha, beta in zip(found.alphas[:taken], found.betas[:taken], strict=True):
                ended = not beta or self.rows >= self.n
                self.waiting = 0 if ended else 1
                self.rows += self.waiting
                self.products += 1
                left -= 1
                yield Step(np.array([[alpha]]), np.zeros((0, 1)) if ended else np.array([[beta]]))
            if not found.finite:
                raise NotFiniteError

    def combine(self, Y: codec.Array) -> codec.Array:
        """See `Space.combine`."""
        return self._basis.host(self._basis.combination(Y))

    def restart(self, Y: codec.Array, *, waiting: bool = True) -> None:
        """See `Space.restart`."""
        new = self._empty(self._basis.rows)
        kept = Y.shape[1]
        new.write(self._basis.combination(Y), 0, kept)
        self.waiting *= waiting
        if self.waiting:
            new.write(self._basis.row(self.rows - 1), kept, 1)
        self._basis, self.rows = new, kept + self.waiting

    def close(self) -> None:
        """See `Space.close`."""
        self._basis, self.rows, self.waiting = self._empty(0), 0, 0

    def _empty(self, rows: int) -> basis.Basis:
        return basis.Basis(self._device, rows, self.n, self.dtype, self._spread)

    def _add(self, rows: codec.Array) -> None:
        self._basis.put(rows, self.rows)
        self.rows += len(rows)
        self.waiting = len(rows)


def _never(rows: codec.Array) -> codec.Array:
    raise AssertionError(f"{rows.shape} needs no product")
