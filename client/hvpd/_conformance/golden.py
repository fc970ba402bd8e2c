"""The golden frames: bytes that a client of revision 1 sends, and the truth."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib import resources

import numpy as np

from hvpd._wire import codec

PLACE = b"0" * 64
"""Stands for the id of a point in the frames of products. An id has 64 characters."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """The golden frames, with the closed forms of f(x) = sum(x^4) / 12, of float64."""

    frames: Mapping[str, bytes]
    """Serialized messages, by name."""
    blobs: Mapping[str, bytes]
    """The program and the bundle, by digest."""
    bundle: str
    """Digest of the bundle."""
    x: codec.Array
    """The first x, of shape (n,)."""
    far: codec.Array
    """The second x, of shape (n,)."""
    vectors: codec.Array
    """Vectors of shape (k, n)."""

    @property
    def n(self) -> int:
        """Return the number of elements of x."""
        return len(self.x)

    def value(self, x: codec.Array) -> float:
        """Return f(x)."""
        return float(np.sum(x**4) / 12)

    def gradient(self, x: codec.Array) -> codec.Array:
        """Return the gradient, x^3 / 3."""
        return x**3 / 3

    def product(self, x: codec.Array, V: codec.Array) -> codec.Array:
        """Return V[k,n] times the Hessian diag(x^2)."""
        product: codec.Array = V * x**2
        return product


@functools.cache
def load() -> Golden:
    """Return the golden frames of revision 1."""
    content = json.loads(resources.files("hvpd._conformance").joinpath("golden.json").read_text())
    return Golden(
        frames={name: bytes.fromhex(frame) for name, frame in content["frames"].items()},
        blobs={digest: bytes.fromhex(blob) for digest, blob in content["blobs"].items()},
        bundle=content["bundle"],
        x=np.array(content["x"]),
        far=np.array(content["far"]),
        vectors=np.array(content["vectors"]),
    )
