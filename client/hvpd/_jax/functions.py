"""Operators and objectives as functions of jax arrays, flat or in the registered
pytree.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hvpd._errors import HvpdError, InvalidArgumentError
from hvpd._jax.primitives import point_p, product_p
from hvpd._registration import trees
from hvpd._wire import codec, pytree


class Structure(Protocol):
    """The structure of x: what this module uses of `hvpd.Objective`."""

    @property
    def label(self) -> str:
        """Return the name of the objective."""

    def _leaf_structure(self) -> tuple[pytree.Spec, list[str], list[tuple[int, ...]]]:
        """Return the tree of x, and the names and shapes of its leaves."""


class Operator(Protocol):
    """A symmetric operator: what this module uses of `SymmetricOperator`."""

    shape: tuple[int, int]
    dtype: "np.dtype[Any]"

    def matvec(self, x: Any) -> codec.Array:
        """Multiply a vector of shape (n,)."""

    def matmat(self, X: Any) -> codec.Array:
        """Multiply a block of shape (n, k)."""


class Objective(Structure, Protocol):
    """An objective: what this module uses of `hvpd.Objective`."""

    n: int
    dtype: "np.dtype[Any]"

    def at(self, x: Any, *data: Any) -> Any:
        """Return the point at x."""


# Sources of the primitives


def _multiplied(operator: Operator, rows: codec.Array) -> codec.Array:
    """Multiply V[k,n] -> AV[k,n], in blocks that fit this machine."""
    if len(rows) == 1:
        return operator.matvec(rows[0]).reshape(1, -1)
    result = np.empty_like(rows)
    for span in codec.spans(len(rows), rows.shape[1], rows.dtype):
        result[span] = operator.matmat(rows[span].T).T
    return result


def _outlived(error: HvpdError) -> HvpdError:
    """Return the error of a call, which says what a traced function can do about it."""
    if error.reason != "CLIENT_CLOSED":
        return error
    return HvpdError(
        f"{error}. A function that jax has traced still uses the closed client: make the function again from an "
        "operator or an objective of the new client, and trace that",
        reason=error.reason,
    )


def _alive(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapped(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except HvpdError as error:
            outlived = _outlived(error)
            if outlived is error:
                raise
            raise outlived from error

    return wrapped


@dataclasses.dataclass(frozen=True)
class _Fixed:
    """Products with one operator."""

    operator: Operator

    @_alive
    def multiply(self, x: codec.Array | None, rows: codec.Array) -> codec.Array:
        return _multiplied(self.operator, rows)


class _Moving:
    """Points of an objective, and products with its Hessian at any x.

    Two are equal if objective and data are the same objects.
    """

    def __init__(self, objective: Objective, data: Sequence[Any]) -> None:
        self._objective, self._data = objective, tuple(data)
        self._key = (id(objective), *map(id, data))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Moving) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @_alive
    def visit(self, x: codec.Array) -> tuple[float, codec.Array]:
        point = self._objective.at(x, *self._data)
        return point.value, point.gradient

    @_alive
    def multiply(self, x: codec.Array | None, rows: codec.Array) -> codec.Array:
        return _multiplied(self._objective.at(x, *self._data).hessian(), rows)


# Functions


@dataclasses.dataclass(frozen=True, repr=False)
class Linear:
    """v -> A v as a linear function of jax arrays; made by `as_jax` of an operator.

    It works under `jit`, `vmap` (one block product), `jvp`, `vjp`, `scan` and
    `while_loop`. It is its own transpose.

    Attributes:
        shape: (n, n).
        dtype: dtype of the products.

    Example:
        >>> A = H.as_jax()
        >>> step, _ = jax.scipy.sparse.linalg.cg(A, -gradient)
    """

    _operator: Operator
    _structure: Structure | None = dataclasses.field(default=None, compare=False)
    """The structure of x; None if only flat vectors are multiplied."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (n, n).

        Example:
            >>> n, _ = H.as_jax().shape
        """
        return self._operator.shape

    @property
    def dtype(self) -> "np.dtype[Any]":
        """Return the dtype of the products.

        Example:
            >>> v = jnp.ones(A.shape[0], A.dtype)
        """
        return self._operator.dtype

    def __call__(self, v: Any) -> Any:
        flat, restore = flattened(v, "v", self.shape[0], self.dtype, self._structure)
        return restore(product_p.bind(flat, source=_Fixed(self._operator)))

    def __repr__(self) -> str:
        return f"<jax function of {self._operator!r}>"


@dataclasses.dataclass(frozen=True, repr=False)
class Function:
    """f(x) as a function of jax arrays; made by `Objective.as_jax`.

    It is twice differentiable. The gradient and its derivative come from the server.

    Example:
        >>> f = objective.as_jax()
        >>> jax.value_and_grad(f)(params)
    """

    _objective: Objective
    _source: _Moving

    def __call__(self, x: Any) -> jax.Array:
        objective = self._objective
        flat, _ = flattened(x, "x", objective.n, objective.dtype, objective)
        return _value(self._source, flat)

    def __repr__(self) -> str:
        return f"<jax function of {self._objective!r}>"


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value(source: _Moving, x: jax.Array) -> jax.Array:
    value: jax.Array = point_p.bind(x, source=source)[0]
    return value


@_value.defjvp
def _value_jvp(source: _Moving, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # Not the rule of `point`, which also has a product as the derivative of the
    # gradient. Outside of `jit`, a first derivative would then compute this product.
    value, gradient = point_p.bind(*primals, source=source)
    return value, jnp.vdot(gradient, tangents[0])


def function(objective: Objective, data: Sequence[Any]) -> Function:
    """Return f as a function of jax arrays, with the registered data or with other
    data.

    Raises:
        InvalidArgumentError: The data is traced by jax.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tuple(data))):
        raise InvalidArgumentError(
            "the data of as_jax() is traced by jax (jit, vmap, grad), and the server differentiates f by x only: pass arrays "
            "outside of the traced function; to differentiate by data, register the function with this data as a part of x",
            reason="TRACED_BY_JAX",
        )
    return Function(objective, _Moving(objective, data))


# Between the caller's x and flat vectors


def flattened(
    tree: Any, what: str, n: int, dtype: "np.dtype[Any]", structure: Structure | None
) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """Return a flat vector of shape (n,) in `dtype`, and the way back to the caller's
    form.

    Args:
        tree: A flat vector; or a pytree of the registered structure, or a mapping of
            the names of leaves to arrays, if there is a structure.
        what: Name of the argument, for messages.
        n: Number of elements.
        dtype: dtype of the operator or objective.
        structure: Structure of x; None for flat vectors only.

    Raises:
        InvalidArgumentError: The argument does not fit, is not real, or `dtype` has 64
            bits and jax has none.
    """
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise InvalidArgumentError(
            f"the objective is {dtype}, and jax computes with 32 bits here: call jax.config.update('jax_enable_x64', True) "
            "first, or register the objective with a float32 x",
            reason="X64_DISABLED",
        )
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [_real(leaf, what) for leaf in leaves]
    if len(arrays) == 1 and jax.tree_util.treedef_is_leaf(treedef) and arrays[0].shape == (n,):
        return arrays[0].astype(dtype), lambda flat: flat
    order = _order(tree, arrays, what, n, structure)
    flat = jnp.concatenate([arrays[place].reshape(-1).astype(dtype) for place in order])

    def restore(flat: jax.Array) -> Any:
        found: list[Any] = [None] * len(arrays)
        start = 0
        for place in order:
            size = arrays[place].size
            found[place] = flat[start : start + size].reshape(arrays[place].shape)
            start += size
        return jax.tree.unflatten(treedef, found)

    return flat, restore


def _real(leaf: Any, what: str) -> jax.Array:
    try:
        array = jnp.asarray(leaf)
    except TypeError:
        raise InvalidArgumentError(
            f"{what} must consist of arrays of jax or NumPy, got a {type(leaf).__name__}", reason="DTYPE"
        ) from None
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise InvalidArgumentError(f"{what} must have real elements, got dtype {array.dtype}", reason="DTYPE")
    return array


def _order(tree: Any, arrays: Sequence[jax.Array], what: str, n: int, structure: Structure | None) -> Sequence[int]:
    """Return the positions of the leaves of a tree, in the order of the flat x."""
    got = f"got {_described(tree, arrays)}"
    if structure is None:
        raise InvalidArgumentError(f"{what} must be a vector of shape ({n},), {got}", reason="SHAPE")
    spec, names, shapes = structure._leaf_structure()  # noqa: SLF001 - our own
    if isinstance(tree, Mapping) and len(arrays) == len(tree) and tree.keys() == set(names) and "" not in names:
        keys = sorted(tree)
        order = [keys.index(name) for name in names]
    elif trees.tree_spec(tree) == spec:
        order = list(range(len(arrays)))
    else:
        raise InvalidArgumentError(
            f"{what} must be a vector of shape ({n},), or {pytree.describe(spec)} as {structure.label} was registered, {got}",
            reason="STRUCTURE",
        )
    for place, name, shape in zip(order, names, shapes, strict=True):
        if arrays[place].shape != shape:
            wanted = f"the leaf {name!r} of {what} must have the shape {shape}"
            if not name:  # x is a single array.
                wanted = f"{what} must be a vector of shape ({n},)" + f" or an array of shape {shape}" * (shape != (n,))
            raise InvalidArgumentError(f"{wanted}, got {arrays[place].shape}", reason="SHAPE")
    return order


def _described(tree: Any, arrays: Sequence[jax.Array]) -> str:
    is_array = len(arrays) == 1 and jax.tree_util.all_leaves([tree])
    return f"shape {arrays[0].shape}" if is_array else pytree.described(tree)
