"""Probes find properties of an objective by running its programs. Knows no queue and no
budget.

A probe returns None if the property cannot be decided: if all results are zero, or not
finite, it would always hold.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from hvpd._wire import codec
from hvpd_server.device.data_sources import Streamed
from hvpd_server.device.device import host
from hvpd_server.device.programs import Kernels

PROBES = 4
"""Number of vectors whose products are compared at all positions in a block."""


def nearby(x: codec.Array) -> codec.Array:
    """Return a generic point near x: neither a minimum, where gradients are only
    rounding, nor zero, where a penalty is.
    """
    noise = np.random.default_rng(0).standard_normal(x.size)
    with np.errstate(all="ignore"):
        near: codec.Array = (x + 0.1 * (1 + np.sqrt(np.mean(np.square(x)))) * noise).astype(x.dtype)
    return near


def goes_by_rows(
    source: Streamed,
    kernels_of: Callable[[int], Kernels],
    x: Any,
    tolerance: float,
    multiple: int = 1,
    working: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> bool | None:
    """Return whether the gradient over some rows is the mean, or the sum, of the
    gradients over two parts of them.

    Args:
        source: Data that goes through the device in chunks.
        kernels_of: Returns the programs for a number of rows.
        x: The point, on the device; see `nearby`.
        tolerance: Largest difference, relative to the parts.
        multiple: A part should have a multiple of so many rows.
        working: Makes a context for each launch.
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
            gradients.append(host(gradient).astype(np.float64))
    if not np.isfinite(gradients).all() or not np.any(gradients):
        return None
    whole, *parts = gradients
    if source.reduction == "mean":
        parts = [cut / rows * parts[0], (1 - cut / rows) * parts[1]]
    scale = sum(float(np.linalg.norm(part)) for part in parts)
    return float(np.linalg.norm(whole - sum(parts))) <= tolerance * scale


def repeats(multiply: Callable[[codec.Array], codec.Array], vectors: codec.Array) -> bool:
    """Return whether a launch repeats its bits. Some kernels of a GPU add in the order
    in which their threads arrive.
    """
    return _same(multiply(vectors), multiply(vectors))


def steady(multiply: Callable[[codec.Array], codec.Array], vectors: codec.Array) -> bool | None:
    """Return whether a product has the same bits at all positions in a block, beside
    any other vectors.

    This depends on how the compiler tiles the block.

    Args:
        multiply: V[k,n] -> HV[k,n], k fixed.
        vectors: A block V to try.
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


def _same(one: codec.Array, other: codec.Array) -> bool:
    """Return whether two arrays have the same bits."""
    return one.tobytes() == other.tobytes()
