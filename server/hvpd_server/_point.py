"""A point in memory: (objective, data, x), on the device."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvpd import _codec
from hvpd.v1 import curvature_pb2, tensor_pb2
from hvpd_server import _sources
from hvpd_server._crowd import Crowd
from hvpd_server._objective import Objective


@dataclasses.dataclass(frozen=True, eq=False)
class Shares(_sources.Resident):
    """What small points with the same data have in common: products at several of them can share a launch. Compared by
    identity of the arrays on the device.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shares) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[int, ...]:
        return id(self.kernels), *map(id, self.args)


@dataclasses.dataclass(eq=False)
class Point:
    """(objective, data, x) on the device. Compared by identity: products of the same resident point are coalesced."""

    id: str
    objective: Objective
    source: "_sources.Source"
    """The captured arrays and the data, with the programs for as many rows as it has."""
    x: Any
    """x[n] on the device."""
    value: float
    gradient: _codec.Array
    """In the host's memory."""
    nonfinite_x: int
    data_digests: Sequence[str] = ()
    """Of its tensors of data."""
    seconds: float = 0.0
    """Of the device's time, that value and gradient took."""
    launches: int = 0
    """So far: residuals pay from the second on."""
    launchable: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    """Programs and widths of products for which all is compiled that they wait for, or want."""
    crowds: dict[str, Crowd] = dataclasses.field(default_factory=dict)
    """Who asks for products here, by program."""

    @functools.cached_property
    def shares(self) -> Shares | None:
        """What others must share to be multiplied in one launch with this point; None where the objective has no pairs."""
        objective, source = self.objective, self.source
        pairs = "hvp_pairs" in objective.described.programs
        if not pairs or objective.fixed_bucket or not isinstance(source, _sources.Resident):
            return None
        return Shares(source.kernels, source.args)

    def crowd(self, program: str) -> Crowd:
        """Who asks for a program's products here."""
        found = self.crowds.get(program)
        if found is None:
            found = self.crowds.setdefault(program, Crowd(self.objective.habits(program)))
        return found

    def message(self) -> curvature_pb2.Point:
        return curvature_pb2.Point(
            id=self.id,
            value=self.value,
            nonfinite_x=self.nonfinite_x,
            nonfinite_value=not np.isfinite(self.value),
            nonfinite_gradient=nonfinite(self.gradient),
        )


def point_id(objective_digest: str, data: Sequence[tensor_pb2.Tensor], x_digest: str) -> str:
    """Names a point by what it is made of."""
    leaves = (f"{tensor.dtype}{list(tensor.shape)}{tensor.digest}" for tensor in data)
    return _codec.digest("\n".join((objective_digest, *leaves, x_digest)).encode())


def nonfinite(array: _codec.Array) -> int:
    """How many elements are NaN or infinite."""
    return int(array.size - np.count_nonzero(np.isfinite(array)))
