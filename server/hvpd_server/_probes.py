"""What is found out about an objective by running its programs, before it is relied on. Knows no queue and no budget.

Any answer may be that it cannot be told here: where everything is zero, or not finite, anything holds.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from hvpd import _codec
from hvpd_server import _kernels
from hvpd_server._sources import Streamed

PROBES = 4
"""Vectors whose products are compared wherever they can stand in a block."""


def nearby(x: _codec.Array) -> _codec.Array:
    """A point near x that is special to nothing: no minimum, where gradients are all rounding, nor zero, where a penalty has none."""
    noise = np.random.default_rng(0).standard_normal(x.size)
    with np.errstate(all="ignore"):
        near: _codec.Array = (x + 0.1 * (1 + np.sqrt(np.mean(np.square(x)))) * noise).astype(x.dtype)
    return near


def goes_by_rows(
    source: Streamed,
    kernels_of: Callable[[int], _kernels.Kernels],
    x: Any,
    tolerance: float,
    multiple: int = 1,
    working: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> bool | None:
    """Whether the gradient over some rows is the mean, or the sum, of those over two parts of them.

    Args:
        source: Data that is to be gone through in chunks.
        kernels_of: The programs for a number of rows.
        x: Where to look, on the device; see `nearby`.
        tolerance: Of the difference, relative to the parts.
        multiple: Of which the parts should have whole numbers of rows.
        working: What to be in while something runs.
    """
    rows = max(source.spans[0].stop, 2)
    if rows > source.spans[-1].stop:
        return None
    cut = max(rows // 2 - rows // 2 % multiple, 1)
    gradients = []
    for span in (slice(0, rows), slice(0, cut), slice(cut, rows)):
        kernels, args = kernels_of(span.stop - span.start), source.load(span)
        kernels.request("value_and_grad").result()
        with working():
            _, gradient = kernels.call("value_and_grad", 0, x, *args)
            gradients.append(_kernels.host(gradient).astype(np.float64))
    if not np.isfinite(gradients).all() or not np.any(gradients):
        return None
    whole, *parts = gradients
    if source.reduction == "mean":
        parts = [cut / rows * parts[0], (1 - cut / rows) * parts[1]]
    scale = sum(float(np.linalg.norm(part)) for part in parts)
    return float(np.linalg.norm(whole - sum(parts))) <= tolerance * scale


def repeats(multiply: Callable[[_codec.Array], _codec.Array], vectors: _codec.Array) -> bool:
    """Whether the same launch has the same bits twice. Some of a GPU's kernels add in the order in which their threads come."""
    return _same(multiply(vectors), multiply(vectors))


def steady(multiply: Callable[[_codec.Array], _codec.Array], vectors: _codec.Array) -> bool | None:
    """Whether a vector's product has the same bits wherever in a block it stands, and whatever stands beside it.

    It depends on how the compiler cuts the block.

    Args:
        multiply: V[k,n] -> HV[k,n], k fixed.
        vectors: Some V.
    """
    expected = multiply(vectors)
    if not np.isfinite(expected).all() or not expected.any(axis=1).all():
        return None
    for vector, product in zip(vectors[:PROBES], expected, strict=False):
        found = multiply(np.repeat(vector[None], len(vectors), axis=0))
        if not all(_same(row, product) for row in found):
            return False
    alone = np.zeros_like(vectors)
    alone[0] = vectors[0]
    return _same(multiply(alone)[0], expected[0])


def _same(one: _codec.Array, other: _codec.Array) -> bool:
    """Whether the bits are."""
    return one.tobytes() == other.tobytes()
