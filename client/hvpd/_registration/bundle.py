"""A bundle with its blobs, from arrays and programs. Needs no jax."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hvpd import _arrays
from hvpd._errors import InvalidArgumentError
from hvpd._wire import codec
from hvpd._wire.pytree import Spec
from hvpd.v1 import objective_pb2, tensor_pb2

FORMAT = 2
"""Number of the bundle format that this file writes."""


@dataclasses.dataclass(frozen=True)
class Export:
    """A bundle with its blobs."""

    bundle: objective_pb2.Bundle
    """The bundle to register."""
    blobs: Mapping[str, codec.Buffer]
    """Programs, tensors and the serialized bundle itself, by digest."""
    digest: str
    """Digest of the serialized bundle, and of the objective."""
    unflatten: Callable[[Sequence[Any]], Any] | None
    """Puts the leaves of x into the user's own containers. None for
    `pytree.rebuild`."""


@dataclasses.dataclass(frozen=True)
class Arrays:
    """The arrays of an objective, with their structure."""

    x_tree: Spec
    """Structure of x."""
    x: Sequence[codec.Array]
    """Leaves of x."""
    data_tree: Spec
    """Structure of the trailing arguments, a tuple."""
    data: Sequence[codec.Array]
    """Leaves of data."""
    captured: Sequence[codec.Array] = ()
    """Large arrays that the function closes over."""


def flat_dtype_of(leaves: Sequence[codec.Array]) -> "np.dtype[Any]":
    """Return the dtype of the flat x: float64 if a leaf has it, otherwise float32."""
    return np.result_type(np.float32, *(np.float64 for leaf in leaves if leaf.dtype == np.float64))


def floating_array(leaf: Any, where: str) -> codec.Array:
    """Return a leaf of x as an array.

    Raises:
        InvalidArgumentError: The leaf has another dtype than float64, float32, bfloat16
            or float16.
    """
    array = codec.native(_arrays.host(leaf, where))
    if array.dtype.kind in "USO":
        raise InvalidArgumentError(
            f"{where} must be an array of floating numbers, got {codec.unsent(leaf, array)}", reason="DTYPE"
        )
    if array.dtype.name not in ("float64", "float32", "bfloat16", "float16"):
        raise InvalidArgumentError(
            f"{where} is of dtype {array.dtype}, and derivatives need float64, float32, bfloat16 or float16: convert it, for "
            "instance with .astype(float), or pass it as data; split it off from a module by eqx.partition or nnx.split",
            reason="DTYPE",
        )
    return array


def assemble(
    arrays: Arrays,
    programs: Mapping[str, bytes],
    options: objective_pb2.Bundle,
    unflatten: Callable[[Sequence[Any]], Any] | None = None,
) -> Export:
    """Make a bundle from arrays, programs by name, and the fields set in `options`."""
    blobs: dict[str, codec.Buffer] = {}

    def blob(content: codec.Buffer) -> str:
        digest = codec.digest(content)
        blobs[digest] = content
        return digest

    def tensor(array: codec.Array) -> tensor_pb2.Tensor:
        return tensor_pb2.Tensor(dtype=array.dtype.name, shape=array.shape, digest=blob(codec.payload(array)))

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
