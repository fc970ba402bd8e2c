"""A point in memory: (objective, data, x), on the device."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvpd import _codec
from hvpd.v1 import curvature_pb2, tensor_pb2
from hvpd_server import _sources
from hvpd_server._objective import Objective


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
    launches: int = 0
    """So far: residuals pay from the second on."""

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
