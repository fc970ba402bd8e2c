"""Memory in the host that a device takes as it lies: XLA on a CPU copies what is not aligned, before it computes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvpd import _codec

ALIGNMENT = 64
"""Bytes; XLA's own, xla/backends/cpu/alignment.h."""


def empty(shape: Sequence[int], dtype: "np.dtype[Any]") -> _codec.Array:
    """An aligned array whose elements are whatever lies there."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
