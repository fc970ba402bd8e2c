"""Between pytrees, flat vectors and tensors: the structure of x and of data."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hvpd import _arrays, _modules, _text
from hvpd._errors import HvpdError, InvalidArgumentError
from hvpd._wire import codec, pytree, sparse
from hvpd.v1 import objective_pb2, tensor_pb2

_ANY_ROWS = ": an objective registered with any_rows=True takes data of any number of rows"

_FIXED_ROWS = ": the shapes of a PyTorch module are fixed; register it again for a batch of another size"


_FLAT = "; a flat vector must be an array: pass numpy.asarray(...) of the list"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of x; see `Objective.leaves`.

    Example:
        >>> leaf = objective.leaves[0]
        >>> flat[leaf.offset : leaf.offset + leaf.size].reshape(leaf.shape)
    """

    name: str
    """Keys, fields and indices that lead to it, joined by slashes; empty for an x that
    is one array."""
    shape: tuple[int, ...]
    """Its shape."""
    dtype: str
    """Its registered dtype. The flat vector has the objective's dtype."""
    offset: int
    """Position of its first element in the flat vector."""

    @property
    def size(self) -> int:
        """Return the number of its elements.

        Example:
            >>> assert sum(leaf.size for leaf in objective.leaves) == objective.n
        """
        return math.prod(self.shape)


class Layout:
    """The part of `Objective` that knows the structure of x and of data."""

    def __init__(
        self, message: objective_pb2.Objective, unflatten: Callable[[Sequence[Any]], Any] | None = None
    ) -> None:
        bundle = message.bundle
        _check_structure(bundle)
        self._bundle = bundle
        self._unflatten = unflatten or self._rebuilt
        self._check_data: Callable[[Sequence[Any]], None] | None = None
        sizes = [math.prod(leaf.shape) for leaf in bundle.x_leaves]
        ends = itertools.accumulate(sizes)
        self._spans = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self.n: int = bundle.n
        self.dtype: np.dtype[Any] = np.dtype(bundle.dtype)
        self.digest: str = message.digest
        self.name: str = message.name

    def containers(self, unflatten: Callable[[Sequence[Any]], Any]) -> None:
        """Set what `unravel` makes of the leaves of x.

        Args:
            unflatten: Gets the leaves, as arrays of NumPy, and returns the user's
                container.

        Example:
            >>> objective.containers(lambda leaves: Params(*leaves))
        """
        self._unflatten = unflatten

    def data_check(self, check: Callable[[Sequence[Any]], None] | None) -> None:
        """Set a check of data that `at` gets in place of the registered data.

        Args:
            check: Gets the data arguments, and raises InvalidArgumentError if they do
                not fit. None for no further check.

        Example:
            >>> objective.data_check(check_labels)
        """
        self._check_data = check

    @property
    def label(self) -> str:
        """Return the name, or the beginning of the digest.

        Example:
            >>> print(objective.label)
        """
        return _text.printable(self.name or self.digest[:12])

    def ravel(self, tree: Any) -> codec.Array:
        """Return the flat vector of shape (n,) of a pytree of the registered structure.

        Leaves are in jax's flattening order. They get the objective's dtype. The result
        has the kind of the leaves, if all have the same.

        Raises:
            InvalidArgumentError: The tree has another structure or shape, or a leaf is
                not real floating.

        Example:
            >>> flat = objective.ravel(params)
        """
        leaves = self._x_leaves(tree)
        return _arrays.common(leaves)(self._joined(leaves, "x"))  # type: ignore[no-any-return]

    def _joined(self, leaves: Sequence[Any], what: str) -> codec.Array:
        """Return the flat vector of leaves of any kind."""
        parts = []
        for path, leaf, spec in zip(pytree.leaf_paths(self._bundle.x_tree), leaves, self._bundle.x_leaves, strict=True):
            array = _arrays.host(leaf, f"{what}{path}")
            if array.shape != tuple(spec.shape):
                raise InvalidArgumentError(
                    f"{what}{path} must have the shape {tuple(spec.shape)}, got {array.shape}", reason="SHAPE"
                )
            if what == "x" and _arrays.kind_of(leaf) is _arrays.TORCH:
                self._check_narrow(array, f"x{path}")
            parts.append(self._real(array, f"{what}{path}").reshape(-1))
        return np.concatenate(parts)

    def unravel(self, vector: Any) -> Any:
        """Return the pytree of a flat vector of shape (n,).

        It has the registered structure, shapes and dtypes. An objective from
        `Client.register` restores the user's own containers. Any other objective makes
        dicts, lists, tuples, named tuples and None. It replaces other containers by
        dicts of their children. The leaves have the kind of the vector.

        Example:
            >>> params = objective.unravel(found.x)
        """
        flat = self._flat(vector, "the argument of unravel", exact="")
        leaves = []
        for spec, span in zip(self._bundle.x_leaves, self._spans, strict=True):
            leaf = flat[span].reshape(tuple(spec.shape))
            try:
                dtype = codec.dtype(spec.dtype)
            except TypeError:  # bfloat16, and ml_dtypes is not installed
                dtype = self.dtype
            leaves.append(_arrays.back(leaf.astype(dtype), vector))
        return self._unflatten(leaves)

    def slices(self) -> dict[str, slice]:
        """Return the slice of each leaf of x in the flat vector, in its order.

        The name of a leaf consists of the keys, fields and indices that lead to it,
        joined by slashes: "hidden/w", "layers/0". If x is a single array, the name is
        "".

        Example:
            >>> bias = gradient[objective.slices()["hidden/b"]]
        """
        return dict(zip(pytree.leaf_names(self._bundle.x_tree), self._spans, strict=True))

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """Return the leaves of x, in the order of the flat vector.

        The order is jax's: dicts by sorted keys. A flat vector in the order of another
        framework has the right length and the wrong meaning. To be safe, pass a mapping
        of these names to arrays wherever x is expected.

        Example:
            >>> [(leaf.name, leaf.shape) for leaf in objective.leaves]
            >>> H = objective.at({"hidden/w": w, "hidden/b": b}).hessian()
        """
        named = self.slices().items()
        return tuple(
            Leaf(name, tuple(leaf.shape), leaf.dtype, span.start)
            for (name, span), leaf in zip(named, self._bundle.x_leaves, strict=True)
        )

    def vector(self, x: Any, what: str = "x") -> codec.Array:
        """Return a flat vector of shape (n,) in the objective's dtype.

        Args:
            x: A flat vector, a pytree of the registered structure, a mapping of the
                names of `leaves` to arrays, or a PyTorch module whose parameters have
                these names.
            what: Name of the argument, for messages.

        Example:
            >>> flat = objective.vector({"hidden/w": w, "hidden/b": b})
        """
        if _modules.is_module(x):
            x = _modules.tensors(x, self.slices(), self.label)
            for name, array in x.items():
                self._check_narrow(array, f"the parameter {name!r}")
        if isinstance(x, Mapping) and self._names_leaves(x):
            x = self._rebuilt([x[name] for name in self.slices()])
        spec = self._bundle.x_tree
        if spec.type_name == _modules.PARAMETERS and isinstance(x, (list, tuple, Iterator)):
            raise InvalidArgumentError(
                f"{what} is a {type(x).__name__}, and {self.label} is of a PyTorch module: pass the module, a state dict of its "
                "parameters, or a flat vector",
                reason="STRUCTURE",
            )
        if spec.kind == spec.KIND_LEAF or _arrays.is_array(x):
            array = _arrays.host(x, what)
            if spec.kind == spec.KIND_LEAF and array.shape == tuple(self._bundle.x_leaves[0].shape):
                array = array.reshape(-1)
            return self._flat(array, what, exact="x")
        return self._joined(self._x_leaves(x, what, _FLAT), what)

    def _check_narrow(self, array: codec.Array, what: str) -> None:
        """Refuse parameters in float64 for an objective in float32.

        Flat vectors are rounded, because SciPy's solvers compute in float64.
        """
        if self.dtype == np.float32 and array.dtype == np.float64:
            raise InvalidArgumentError(
                f"{what} is float64, and {self.label} is float32: pass it in float32, for instance from "
                "copy.deepcopy(module).float()",
                reason="DTYPE",
            )

    def _kind(self, x: Any) -> Callable[[codec.Array], Any]:
        """Return a function that gives flat results the kind of the arrays of x."""
        if type(x) is np.ndarray:
            return lambda result: result
        if _arrays.is_array(x):
            return _arrays.common([x])
        if isinstance(x, Mapping) and self._names_leaves(x):
            return _arrays.common(x.values())
        try:
            return _arrays.common(self._x_leaves(x))
        except InvalidArgumentError:  # Plain numbers in place of a vector.
            return lambda result: result

    def _x_leaves(self, tree: Any, what: str = "x", hint: str = "") -> list[Any]:
        try:
            return self._leaves(self._bundle.x_tree, tree, what)
        except InvalidArgumentError as error:
            if not isinstance(tree, (list, tuple)) or not all(map(np.isscalar, tree)):
                raise
            raise InvalidArgumentError(f"{error}{hint}", reason=error.reason) from None

    def _leaf_structure(self) -> tuple[pytree.Spec, list[str], list[tuple[int, ...]]]:
        """Return the tree of x, and the names and shapes of its leaves."""
        shapes = [tuple(leaf.shape) for leaf in self._bundle.x_leaves]
        return self._bundle.x_tree, list(self.slices()), shapes

    def _names_leaves(self, x: Mapping[Any, Any]) -> bool:
        """Return whether the keys of a mapping are the names of the leaves, and x was
        not registered as such a dict.
        """
        names = self.slices()
        spec = self._bundle.x_tree
        if x.keys() != names.keys() or "" in names:
            return False
        return spec.kind != spec.KIND_DICT or any("/" in name for name in names)

    def _rebuilt(self, leaves: Sequence[Any]) -> Any:
        """Return the pytree of leaves, with dicts in place of the user's containers."""
        try:
            return pytree.rebuild(self._bundle.x_tree, leaves)
        except (TypeError, ValueError) as error:
            raise HvpdError(
                f"the structure of x that the server stated for {self.label} is not a valid structure in Python: {error}",
                reason="BAD_ANSWER",
            ) from None

    def _flat(self, vector: Any, what: str, *, exact: str) -> codec.Array:
        array = _arrays.host(vector, what)
        if array.shape == () and self.n == 1:
            array = array.reshape(1)
        if array.shape != (self.n,):
            structure = pytree.describe(self._bundle.x_tree)
            if array.dtype == object and array.shape == ():
                raise InvalidArgumentError(
                    f"{what} must be a vector of shape ({self.n},), got {pytree.described(array.item())}",
                    reason="SHAPE",
                )
            raise InvalidArgumentError(
                f"{what} must be a vector of shape ({self.n},)"
                + (f" or {structure} as registered" if exact else "")
                + f", got shape {array.shape}",
                reason="SHAPE",
            )
        return self._real(array, what)

    def _real(self, array: codec.Array, what: str) -> codec.Array:
        if array.dtype.kind not in "iub" and not codec.is_real_floating(array.dtype):
            raise InvalidArgumentError(f"{what} must have real elements, got dtype {array.dtype}", reason="DTYPE")
        return np.ascontiguousarray(array, dtype=self.dtype)

    def _leaves(self, spec: pytree.Spec, tree: Any, what: str) -> list[Any]:
        try:
            return pytree.leaves(spec, tree, what)
        except pytree.StructureError as error:
            if "jax" in sys.modules:  # jax can flatten the user's own containers.
                from hvpd._registration import trees

                structure, leaves = trees.flatten(tree)
                if structure == spec:
                    return leaves
            raise InvalidArgumentError(
                f"{what} has another structure than the registered one: {error}", reason="STRUCTURE"
            ) from None

    def _data_of(self, x: Any, data: Sequence[Any]) -> tuple[list[tensor_pb2.Tensor], dict[str, codec.Buffer]]:
        """Return the tensors of other data than the registered data, and their bytes.

        A module brings its buffers along. They are the first data argument.
        """
        trees = self._bundle.data_tree.children
        if not _modules.is_module(x) or not trees or trees[0].type_name != _modules.BUFFERS:
            return self._tensors(data) if data else ([], {})
        buffers = _modules.tensors(x, [key.text for key in trees[0].keys], self.label)
        if data:
            return self._tensors((buffers, *data))
        changed = list(self._bundle.data)
        payloads: dict[str, codec.Buffer] = {}
        for position, (name, array) in enumerate(buffers.items()):
            registered = changed[position]
            payload = codec.payload(array.copy())
            digest = codec.digest(payload)
            if digest == registered.digest:
                continue
            if (array.dtype.name, array.shape) != (registered.dtype, tuple(registered.shape)):
                raise InvalidArgumentError(
                    f"the buffer {name!r} of the module must be {registered.dtype}{list(registered.shape)} as registered, got "
                    f"{array.dtype}{list(array.shape)}",
                    reason="DATA_MISMATCH",
                )
            changed[position] = tensor_pb2.Tensor(dtype=registered.dtype, shape=registered.shape, digest=digest)
            payloads[digest] = payload
        return (changed, payloads) if payloads else ([], {})

    def _tensors(self, data: Sequence[Any]) -> tuple[list[tensor_pb2.Tensor], dict[str, codec.Buffer]]:
        """Return the tensors of other data, and their bytes by digest."""
        bundle = self._bundle
        takes = len(bundle.data_tree.children)
        if len(data) != takes:
            raise InvalidArgumentError(
                f"{self.label} takes {takes} data arguments after x, got {len(data)}", reason="DATA_MISMATCH"
            )
        if self._check_data is not None:
            self._check_data(data)
        leaves = self._leaves(bundle.data_tree, tuple(data), "data")
        paths = pytree.leaf_paths(bundle.data_tree)
        found = [
            codec.data_array(leaf, f"data{path}", x_dtype=self.dtype, x64=bundle.x64)
            for leaf, path in zip(leaves, paths, strict=True)
        ]
        for first, node in pytree.sparse_nodes(bundle.data_tree):
            place = slice(first, first + len(node.children))
            where = f"data{paths[first]}".rpartition(".")[0]
            found[place] = sparse.padded(node, found[place], math.prod(bundle.data[first].shape[:1]), where)
        arrays: list[codec.Array] = []
        for path, array, spec in zip(paths, found, bundle.data, strict=True):
            expected, shape, why = codec.dtype(spec.dtype), tuple(spec.shape), "as registered"
            other_rows = array.ndim > 0 and array.shape[1:] == shape[1:] and array.shape != shape
            if len(arrays) in bundle.row_leaves and array.ndim > 0:
                first = bundle.row_leaves[0]
                rows = len(arrays[first]) if len(arrays) > first else len(array)
                if not rows:
                    raise InvalidArgumentError(
                        f"data needs at least one row, and data{path} has the shape {list(array.shape)}",
                        reason="DATA_MISMATCH",
                    )
                shape = (rows, *shape[1:])
                if len(array) != rows:
                    why = f"as long as data{paths[first]}"
            if array.shape != shape or not np.can_cast(array.dtype, expected, "safe"):
                raise InvalidArgumentError(
                    f"data{path} must be {spec.dtype}{list(shape)} {why}, got {array.dtype}{list(array.shape)}"
                    + (self._rows_hint() if other_rows and not bundle.row_leaves else ""),
                    reason="DATA_MISMATCH",
                )
            arrays.append(array.astype(expected, copy=False))
        payloads = [codec.payload(array) for array in arrays]
        digests = [codec.digest(payload) for payload in payloads]
        tensors = [
            tensor_pb2.Tensor(dtype=spec.dtype, shape=array.shape, digest=digest)
            for spec, array, digest in zip(bundle.data, arrays, digests, strict=True)
        ]
        return tensors, dict(zip(digests, payloads, strict=True))

    def _rows_hint(self) -> str:
        trees = self._bundle.data_tree.children
        return _FIXED_ROWS if trees and trees[0].type_name == _modules.BUFFERS else _ANY_ROWS

    def _size_of(self, leaves: Sequence[int]) -> int:
        """Return the elements of x at these positions of leaves; n for no positions."""
        return sum(math.prod(self._bundle.x_leaves[leaf].shape) for leaf in leaves) if leaves else self.n


def _check_structure(bundle: objective_pb2.Bundle) -> None:
    """Raise ValueError if the trees and shapes of a server's bundle contradict each
    other, or are too large.
    """
    if bundle.dtype not in codec.VECTOR_DTYPES:
        raise ValueError(f"x must have one of the dtypes {', '.join(codec.VECTOR_DTYPES)}, got {bundle.dtype!r}")
    for tree, leaves in ((bundle.x_tree, bundle.x_leaves), (bundle.data_tree, bundle.data)):
        pytree.check(tree)
        pytree.check_names(tree)
        if pytree.count(tree) != len(leaves):
            raise ValueError(f"a tree has {pytree.count(tree)} leaves, and {len(leaves)} are described")
    sizes = sum(codec.count(leaf.shape) for leaf in bundle.x_leaves)
    if sizes != bundle.n:
        raise ValueError(f"the leaves of x have {sizes} elements, and n is {bundle.n}")
