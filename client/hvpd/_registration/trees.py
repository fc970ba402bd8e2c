"""The structure of pytrees that jax knows. Needs jax."""

from collections.abc import Sequence
from typing import Any

import jax

from hvpd._wire import sparse
from hvpd._wire.pytree import Spec


def tree_spec(tree: Any) -> Spec:
    """Return the structure of a pytree, with the names of its children."""
    children, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    if tree is None:
        return Spec(kind=Spec.KIND_NONE)
    if len(children) == 1 and children[0][1] is tree:
        return Spec(kind=Spec.KIND_LEAF)
    if type(tree).__module__.startswith("jax.experimental.sparse") and type(tree).__name__ in sparse.FIELDS:
        return sparse.spec_of(tree)
    kind = _kind(tree, [path[-1] for path, _ in children])
    named = kind not in (Spec.KIND_LIST, Spec.KIND_TUPLE)
    return Spec(
        kind=kind,
        children=[tree_spec(child) for _, child in children],
        keys=[_key(path[-1]) for path, _ in children] if named else (),
        type_name=type(tree).__name__ if kind in (Spec.KIND_NAMED_TUPLE, Spec.KIND_CUSTOM) else "",
    )


def _kind(tree: Any, keys: Sequence[Any]) -> Spec.Kind.ValueType:
    if type(tree) is list:
        return Spec.KIND_LIST
    if type(tree) is tuple:
        return Spec.KIND_TUPLE
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return Spec.KIND_NAMED_TUPLE
    plain = type(tree) is dict and all(type(getattr(key, "key", None)) in (str, int) for key in keys)
    return Spec.KIND_DICT if plain else Spec.KIND_CUSTOM


def _key(key: Any) -> Spec.Key:
    name = next((getattr(key, field) for field in ("key", "name", "idx") if hasattr(key, field)), str(key))
    if type(name) is int:
        return Spec.Key(number=name)
    return Spec.Key(text=name if isinstance(name, str) else repr(name))


def flatten(tree: Any) -> tuple[Spec, list[Any]]:
    """Return structure and leaves of a pytree."""
    return tree_spec(tree), jax.tree.leaves(tree)


def with_jax_matrices(tree: Any) -> Any:
    """Return a pytree with a BCOO in place of each scipy.sparse matrix."""

    def converted(path: Any, leaf: Any) -> Any:
        if not sparse.is_scipy(leaf):
            return leaf
        from jax.experimental.sparse import BCOO

        arrays: Any = sparse.coordinates(leaf, f"data{jax.tree_util.keystr(path)}")
        # jax would narrow the elements unless it is in 64 bits.
        with jax.enable_x64(True):
            return BCOO(arrays, shape=leaf.shape, indices_sorted=True, unique_indices=True)

    return jax.tree_util.tree_map_with_path(converted, tree)


def paths(tree: Any) -> list[str]:
    """Return the place of each leaf in Python's notation, such as `['w'][0]`."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
