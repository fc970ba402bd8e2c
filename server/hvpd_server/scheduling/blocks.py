"""Blocks of vectors in the host's memory: joins several to one, and splits one into
several.

New blocks are aligned, because XLA on a CPU copies an argument that is not.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvpd._wire import codec
from hvpd_server.scheduling.job import Block

ALIGNMENT = 64
"""Alignment of new blocks in bytes, as in xla/backends/cpu/alignment.h."""


def empty(shape: Sequence[int], dtype: "np.dtype[Any]") -> codec.Array:
    """Return an aligned array that is not initialised."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def join(blocks: Sequence[Block], width: int) -> Block:
    """Stack the blocks, and fill up with rows of zeros to `width` rows. One block of
    that width is returned as it is.
    """
    if len(blocks) == 1 and len(blocks[0]) == width:
        return blocks[0]
    joined = empty((width, *blocks[0].shape[1:]), blocks[0].dtype)
    row = 0
    for block in blocks:
        joined[row : row + len(block)] = block
        row += len(block)
    joined[row:] = 0
    return joined


def split(block: Block, widths: Sequence[int]) -> list[Block]:
    """Undo `join`: return views of the first rows, one for each width."""
    found, row = [], 0
    for width in widths:
        found.append(block[row : row + width])
        row += width
    return found
