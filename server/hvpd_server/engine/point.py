"""A point, which is (objective, data, x), on the device."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvpd._wire import codec
from hvpd.v1 import curvature_pb2, tensor_pb2
from hvpd_server.device import data_sources
from hvpd_server.engine.objective import Objective
from hvpd_server.engine.pairs import PROGRAM, PairKey
from hvpd_server.scheduling.holdback import Holdback


@dataclasses.dataclass(eq=False)
class Point:
    """A point on the device. Points are compared by identity, and products at the same
    point are coalesced.
    """

    id: str
    objective: Objective
    source: "data_sources.Source"
    """The captured arrays and the data, with the programs for as many rows as
    it has.
    """
    x: Any
    """x[n] on the device."""
    value: float
    gradient: codec.Array
    """The gradient, in the host's memory."""
    nonfinite_x: int
    data_digests: Sequence[str] = ()
    """Digests of the data."""
    seconds: float = 0.0
    """Seconds of the device for value and gradient."""
    launches: int = 0
    """Launches so far. Residuals pay from the second on."""
    launchable: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    """Programs and widths whose products find everything compiled."""
    holdbacks: dict[str, Holdback] = dataclasses.field(default_factory=dict)
    """The callers that ask for products at this point, by program."""

    @functools.cached_property
    def pair_key(self) -> PairKey | None:
        """The key that points must share for a common launch; None if the objective has
        no program for pairs.
        """
        objective, source = self.objective, self.source
        pairs = PROGRAM in objective.described.programs
        if not pairs or objective.fixed_bucket or not isinstance(source, data_sources.Resident):
            return None
        return PairKey(source.kernels, source.args)

    def holdback(self, program: str) -> Holdback:
        """Return the hold-back of a program's products at this point."""
        found = self.holdbacks.get(program)
        if found is None:
            found = self.holdbacks.setdefault(program, Holdback(self.objective.timing(program)))
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
    """Return the id of a point, a digest of its parts."""
    leaves = (f"{tensor.dtype}{list(tensor.shape)}{tensor.digest}" for tensor in data)
    return codec.digest("\n".join((objective_digest, *leaves, x_digest)).encode())


def nonfinite(array: codec.Array) -> int:
    """Return how many elements are NaN or infinite."""
    return int(array.size - np.count_nonzero(np.isfinite(array)))
