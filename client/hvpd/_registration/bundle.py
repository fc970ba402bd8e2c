"""A bundle and the blobs that it refers to, from arrays and programs. Needs no jax."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hvpd import _codec
from hvpd._pytree import Spec
from hvpd.v1 import objective_pb2, tensor_pb2

FORMAT = 2
"""Bundle.format that this file writes."""


@dataclasses.dataclass(frozen=True)
class Export:
    """A bundle with everything that it refers to."""

    bundle: objective_pb2.Bundle
    """What is registered."""
    blobs: Mapping[str, _codec.Buffer]
    """Programs, tensors and the serialized bundle itself, by digest."""
    digest: str
    """Digest of the serialized bundle: the objective's."""
    unflatten: Callable[[Sequence[Any]], Any] | None
    """Puts the leaves of x into the user's own containers; None for the containers of `_pytree`."""


@dataclasses.dataclass(frozen=True)
class Arrays:
    """The arrays of an objective, with their structure."""

    x_tree: Spec
    """Structure of x."""
    x: Sequence[_codec.Array]
    """Leaves of x."""
    data_tree: Spec
    """Structure of the trailing arguments, a tuple."""
    data: Sequence[_codec.Array]
    """Leaves of data."""
    captured: Sequence[_codec.Array] = ()
    """Large arrays that the function closes over."""


def flat_dtype_of(leaves: Sequence[_codec.Array]) -> "np.dtype[Any]":
    """Return the dtype of the flat x: float64 if a leaf is, else float32."""
    return np.result_type(np.float32, *(np.float64 for leaf in leaves if leaf.dtype == np.float64))


def assemble(
    arrays: Arrays,
    programs: Mapping[str, bytes],
    options: objective_pb2.Bundle,
    unflatten: Callable[[Sequence[Any]], Any] | None = None,
) -> Export:
    """Make a bundle of arrays, programs by name, and the fields that `options` has set."""
    blobs: dict[str, _codec.Buffer] = {}

    def blob(content: _codec.Buffer) -> str:
        digest = _codec.digest(content)
        blobs[digest] = content
        return digest

    def tensor(array: _codec.Array) -> tensor_pb2.Tensor:
        return tensor_pb2.Tensor(dtype=array.dtype.name, shape=array.shape, digest=blob(_codec.payload(array)))

    bundle = objective_pb2.Bundle(
        format=FORMAT,
        n=sum(array.size for array in arrays.x),
        dtype=flat_dtype_of(arrays.x).name,
        x_tree=arrays.x_tree,
        x_leaves=[tensor_pb2.ArraySpec(dtype=array.dtype.name, shape=array.shape) for array in arrays.x],
        data_tree=arrays.data_tree,
        data=[tensor(array) for array in arrays.data],
        captured=[tensor(array) for array in arrays.captured],
        programs={
            name: objective_pb2.Program(digest=blob(content), size_bytes=len(content))
            for name, content in programs.items()
        },
    )
    bundle.MergeFrom(options)
    digest = blob(bundle.SerializeToString(deterministic=True))
    return Export(bundle, blobs, digest, unflatten)
