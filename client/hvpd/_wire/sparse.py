"""Sparse matrices of jax.experimental.sparse and of scipy.sparse, as nodes of pytrees.

Such a node has some arrays as children, and states the matrix's shape and what the
program relies on. Neither jax nor SciPy is imported here.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvpd._errors import InvalidArgumentError
from hvpd._wire.codec import Array
from hvpd.v1 import tensor_pb2

Spec = tensor_pb2.TreeSpec

FIELDS = {
    "BCOO": ("data", "indices"),
    "BCSR": ("data", "indices", "indptr"),
    "COO": ("data", "row", "col"),
    "CSR": ("data", "indices", "indptr"),
    "CSC": ("data", "indices", "indptr"),
}
"""The arrays of each class of jax.experimental.sparse, in flattening order."""


def is_scipy(value: Any) -> bool:
    """Return whether a value is a matrix or an array of scipy.sparse."""
    return type(value).__module__.startswith("scipy.sparse") and hasattr(value, "tocoo")


def spec_of(matrix: Any) -> Spec:
    """Return the structure of a matrix of jax.experimental.sparse."""
    name = type(matrix).__name__
    arrays, facts = matrix.tree_flatten()
    return Spec(
        kind=Spec.KIND_CUSTOM,
        type_name=name,
        children=[Spec(kind=Spec.KIND_LEAF)] * len(arrays),
        keys=[Spec.Key(text=field) for field in FIELDS[name]],
        sparse=Spec.Sparse(shape=matrix.shape, facts=sorted(fact for fact, value in facts.items() if value is True)),
    )


def coordinates(matrix: Any, where: str) -> tuple[Array, Array]:
    """Return data[nse] and indices[nse, 2] of a scipy.sparse matrix.

    Rows and columns ascend, and no element is stored twice.

    Raises:
        InvalidArgumentError: The matrix has no two axes, or too many rows or columns.
    """
    if len(matrix.shape) != 2 or max(matrix.shape) > np.iinfo(np.int32).max:
        raise InvalidArgumentError(
            f"{where} is a scipy.sparse array of shape {matrix.shape}, and must have two axes of less than 2**31: pass its arrays",
            reason="SHAPE",
        )
    rows = matrix.tocsr(copy=True)
    rows.sum_duplicates()
    found = rows.tocoo()
    return found.data, np.stack([found.row, found.col], axis=1).astype(np.int32)


def arrays(spec: Spec, matrix: Any, where: str) -> list[Any] | None:
    """Return the arrays of a matrix for a node; None for what is no sparse matrix.

    Args:
        spec: The node, which has `sparse`.
        matrix: A matrix of scipy.sparse or jax.experimental.sparse.
        where: Name of the matrix, for messages.

    Raises:
        InvalidArgumentError: It is a matrix of another class or shape.
    """
    name, shape = spec.type_name, tuple(spec.sparse.shape)
    ours = is_scipy(matrix)
    if not ours and not (type(matrix).__module__.startswith("jax.") and type(matrix).__name__ in FIELDS):
        return None
    either = f"a {name} or a scipy.sparse matrix" if name in ("BCOO", "BCSR", "CSR") else f"a {name}"
    wanted = f"{where} must be {either} of shape {shape}, as registered"
    if tuple(matrix.shape) != shape:
        raise InvalidArgumentError(
            f"{wanted}; got a {type(matrix).__name__} of shape {tuple(matrix.shape)}", reason="DATA_MISMATCH"
        )
    if not ours:
        found, facts = matrix.tree_flatten()
        missing = [fact for fact in spec.sparse.facts if facts.get(fact) is not True]
        if type(matrix).__name__ != name or missing:
            lacks = f" without {' and '.join(missing)}" if missing else ""
            raise InvalidArgumentError(f"{wanted}; got a {type(matrix).__name__}{lacks}", reason="DATA_MISMATCH")
        return list(found)
    data, indices = coordinates(matrix, where)
    if name == "BCOO" and indices.shape[1] == len(shape):
        return [data, indices]
    if name in ("BCSR", "CSR"):
        ends = np.searchsorted(indices[:, 0], np.arange(shape[0] + 1)).astype(np.int32)
        return [data, indices[:, 1], ends]
    raise InvalidArgumentError(f"{wanted}; got a scipy.sparse {type(matrix).__name__}", reason="DATA_MISMATCH")


def padded(spec: Spec, found: Sequence[Array], stored: int, where: str) -> list[Array]:
    """Return the arrays of a matrix with as many stored elements as registered.

    Added elements are zeros beyond the matrix's shape, which jax ignores.

    Args:
        spec: The node.
        found: The arrays of the matrix, in the order of `FIELDS`.
        stored: Number of stored elements of the registered matrix.
        where: Name of the matrix, for messages.

    Raises:
        InvalidArgumentError: The matrix stores more elements.
    """
    data, indices, *ends = found
    more = stored - len(data) if data.ndim == 1 and data.shape == indices.shape[:1] else 0
    if more < 0:
        raise InvalidArgumentError(
            f"{where} stores {len(data)} elements, and the registered matrix stores {stored}: register a matrix that stores "
            "at least as many, for instance with explicit zeros",
            reason="DATA_MISMATCH",
        )
    if not more or spec.type_name not in ("BCOO", "BCSR"):
        return list(found)
    shape = np.array(spec.sparse.shape, indices.dtype)
    outside = np.broadcast_to(shape[-1] if indices.ndim == 1 else shape[: indices.shape[1]], (more, *indices.shape[1:]))
    return [np.concatenate([data, np.zeros(more, data.dtype)]), np.concatenate([indices, outside]), *ends]
