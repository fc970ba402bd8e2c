"""A Krylov space in the host's memory, with its products on the device.

It serves every operator: blocks of vectors, data that goes through the device in
chunks, several devices, and a fixed bucket.
"""

from collections.abc import Sequence

import numpy as np

from hvpd._krylov.space import LocalSpace
from hvpd._wire import codec
from hvpd_server.krylov.operator import Operator


class HostSpace(LocalSpace):
    """A `Space` that can go back to an earlier position.

    Args:
        operator: Multiplies.
        reorthogonalize: "full" or "none"; see `LocalSpace`.
    """

    place = "host"
    """Where steps are computed: "host", or "device" for launches of several steps."""

    def __init__(self, operator: Operator, reorthogonalize: str) -> None:
        super().__init__(operator.multiply, operator.n, operator.dtype, reorthogonalize=reorthogonalize)

    @property
    def waiting(self) -> int:
        """Rows that wait for their product."""
        return self._waiting

    def begin(self, rows: codec.Array) -> None:
        """Take orthonormal rows as the start."""
        self._push(np.array(rows, self.dtype), np.zeros((len(rows), len(rows))))

    def room_rows(self, rows: int) -> Sequence[int]:
        """Return numbers of rows to reserve memory for, the best one first, to hold so
        many rows of a basis.
        """
        return [min(rows, self.n) if self.reorthogonalize == "full" else 4 * max(self._waiting, 1)]

    def reserve(self, rows: int) -> None:
        """Get memory for so many rows of the basis."""
        if self.reorthogonalize == "full" and len(self._stored) < rows:
            grown = np.empty((rows, self.n), self.dtype)
            grown[: self._kept] = self._stored[: self._kept]
            self._stored = grown

    def restart(self, Y: codec.Array, *, waiting: bool = True) -> None:
        """See `Space.restart`."""
        self._waiting *= waiting
        super().restart(Y)

    def rewind(self, rows: int, waiting: int) -> bool:
        """Go back to an earlier position, unless rows after it have replaced others.
        Return whether that was possible.
        """
        if (rows, waiting) == (self.rows, self._waiting):
            return True
        if self.reorthogonalize != "full" or not 0 <= waiting <= rows <= self.rows:
            return False
        self.rows = self._kept = rows
        self._waiting = waiting
        return True
