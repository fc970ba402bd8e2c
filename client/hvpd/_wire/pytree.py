"""Flattens and rebuilds pytrees by a TreeSpec, in jax's order and without jax.

It covers dict, list, tuple, named tuple and None. Only jax flattens other containers
(see `_registration.trees`). They are rebuilt as dicts of their children.
https://docs.jax.dev/en/latest/pytrees.html
"""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

from hvpd._errors import InvalidArgumentError
from hvpd._wire import codec, sparse
from hvpd.v1 import tensor_pb2

Spec = tensor_pb2.TreeSpec
_NAME_CHARACTERS = 1 << 27
"""Most characters of the names of all leaves of a tree."""

_KEYED = (Spec.KIND_DICT, Spec.KIND_NAMED_TUPLE, Spec.KIND_CUSTOM)


class StructureError(ValueError):
    """The tree does not have the structure of the spec."""


def flatten(tree: Any) -> tuple[Spec, list[Any]]:
    """Return structure and leaves of a tree.

    Its nodes are dicts, lists, tuples, named tuples and None. Any other object is a
    leaf.

    Raises:
        InvalidArgumentError: The keys of a dict are neither all strings nor all
            integers, or an OrderedDict is not sorted.
    """
    found: list[Any] = []
    return _structure(tree, found), found


def _structure(tree: Any, found: list[Any]) -> Spec:
    if tree is None:
        return Spec(kind=Spec.KIND_NONE)
    if isinstance(tree, dict):
        if {type(key) for key in tree} not in ({str}, {int}, set()):
            raise InvalidArgumentError(
                f"a dict in x or data must have strings or integers as keys, got {list(tree)!r}", reason="STRUCTURE"
            )
        keys = sorted(tree)
        if isinstance(tree, collections.OrderedDict) and list(tree) != keys:
            raise InvalidArgumentError(
                f"an OrderedDict in x or data has the order {list(tree)!r}, and leaves go by sorted keys: pass a dict",
                reason="STRUCTURE",
            )
        children = [_structure(tree[key], found) for key in keys]
        named = [Spec.Key(number=key) if isinstance(key, int) else Spec.Key(text=key) for key in keys]
        return Spec(kind=Spec.KIND_DICT, children=children, keys=named)
    if isinstance(tree, (list, tuple)):
        children = [_structure(child, found) for child in tree]
        if hasattr(tree, "_fields"):
            named = [Spec.Key(text=field) for field in tree._fields]
            return Spec(kind=Spec.KIND_NAMED_TUPLE, children=children, keys=named, type_name=type(tree).__name__)
        return Spec(kind=Spec.KIND_LIST if isinstance(tree, list) else Spec.KIND_TUPLE, children=children)
    found.append(tree)
    return Spec(kind=Spec.KIND_LEAF)


def leaves(spec: Spec, tree: Any, path: str = "") -> list[Any]:
    """Return the leaves of a tree in flattening order.

    Raises:
        StructureError: The tree has another structure; the message names the first
            difference.
        InvalidArgumentError: A sparse matrix has another shape or class.
    """
    found: list[Any] = []
    _flatten(spec, tree, path, found)
    return found


def _flatten(spec: Spec, tree: Any, path: str, found: list[Any]) -> None:
    kind = spec.kind
    if kind == Spec.KIND_LEAF:
        if isinstance(tree, (dict, list, tuple)) or tree is None:
            array = ": pass numpy.asarray(...) of it" if isinstance(tree, (list, tuple)) else ""
            raise StructureError(f"{path or 'it'} must be an array, got {described(tree)}{array}")
        found.append(tree)
        return
    if spec.HasField("sparse") and (arrays := sparse.arrays(spec, tree, path or "data")) is not None:
        found.extend(arrays)
        return
    children = _children(spec, tree)
    if children is None or len(children) != len(spec.children):
        raise StructureError(f"{path or 'it'} must be {describe(spec)}, got {described(tree)}")
    for key, child_spec, child in zip(_paths(spec), spec.children, children, strict=True):
        _flatten(child_spec, child, path + key, found)


def _children(spec: Spec, tree: Any) -> Sequence[Any] | None:
    """Return the children in the order of the spec; None for another kind of node."""
    match spec.kind:
        case Spec.KIND_NONE:
            return () if tree is None else None
        case Spec.KIND_LIST:
            return tree if isinstance(tree, list) else None
        case Spec.KIND_TUPLE:
            return tree if isinstance(tree, tuple) and not hasattr(tree, "_fields") else None
        case Spec.KIND_NAMED_TUPLE:
            fields = tuple(key.text for key in spec.keys)
            return tree if isinstance(tree, tuple) and getattr(tree, "_fields", None) == fields else None
        case Spec.KIND_DICT | Spec.KIND_CUSTOM:
            keys = [_key(key) for key in spec.keys]
            same = isinstance(tree, dict) and tree.keys() == set(keys)
            return [tree[key] for key in keys] if same else None
        case _:
            return None


def rebuild(spec: Spec, values: Sequence[Any]) -> Any:
    """Return the tree with these leaves.

    Custom containers become dicts, keyed by the names of their children.
    """
    iterator = iter(values)
    tree = _unflatten(spec, iterator)
    if next(iterator, iterator) is not iterator:
        raise ValueError(f"{len(values)} leaves are too many for {describe(spec)}")
    return tree


def _unflatten(spec: Spec, values: Iterator[Any]) -> Any:
    if spec.kind == Spec.KIND_LEAF:
        return next(values)
    if spec.kind == Spec.KIND_NONE:
        return None
    children = [_unflatten(child, values) for child in spec.children]
    match spec.kind:
        case Spec.KIND_LIST:
            return children
        case Spec.KIND_TUPLE:
            return tuple(children)
        case Spec.KIND_NAMED_TUPLE:
            fields = [key.text for key in spec.keys]
            return collections.namedtuple(spec.type_name, fields)(*children)  # noqa: PYI024
        case _:
            return dict(zip(map(_key, spec.keys), children, strict=True))


def check(spec: Spec) -> None:
    """Raise StructureError if a spec from elsewhere describes no tree."""
    leaf_like = spec.kind in (Spec.KIND_LEAF, Spec.KIND_NONE)
    keyed = spec.kind in _KEYED
    known = leaf_like or keyed or spec.kind in (Spec.KIND_LIST, Spec.KIND_TUPLE)
    if not known or (leaf_like and spec.children) or len(spec.keys) != (len(spec.children) if keyed else 0):
        raise StructureError(
            f"a node of kind {spec.kind} with {len(spec.children)} children and {len(spec.keys)} keys is no part of a tree"
        )
    if spec.HasField("sparse"):
        try:
            codec.count(spec.sparse.shape)
        except ValueError as error:
            raise StructureError(f"a sparse matrix: {error}") from None
        fields = sparse.FIELDS.get(spec.type_name, ())
        leaves = [child.kind for child in spec.children] == [Spec.KIND_LEAF] * len(fields)
        if spec.kind != Spec.KIND_CUSTOM or not fields or not leaves:
            raise StructureError("a sparse matrix must be a custom node of a known class, with its arrays as children")
    for child in spec.children:
        check(child)


def check_names(spec: Spec) -> None:
    """Raise StructureError if a spec's names of leaves would take too much memory."""
    characters = count(spec) * _longest(spec)
    if characters > _NAME_CHARACTERS:
        raise StructureError(
            f"the names of the leaves may have {characters} characters, and {_NAME_CHARACTERS} are allowed"
        )


def _longest(spec: Spec) -> int:
    """Return an upper bound of the characters of a leaf's name."""
    key = max((len(str(_key(key))) for key in spec.keys), default=8)
    return key + 1 + max(map(_longest, spec.children), default=0)


def count(spec: Spec) -> int:
    """Return the number of leaves."""
    return 1 if spec.kind == Spec.KIND_LEAF else sum(map(count, spec.children))


def sparse_nodes(spec: Spec, first: int = 0) -> Iterator[tuple[int, Spec]]:
    """Yield the sparse matrices of a tree, each with the position of its first leaf."""
    if spec.HasField("sparse"):
        yield first, spec
        return
    for child in spec.children:
        yield from sparse_nodes(child, first)
        first += count(child)


def leaf_paths(spec: Spec, path: str = "") -> list[str]:
    """Return the place of each leaf in Python's notation, such as `['w'][0]`."""
    if spec.kind == Spec.KIND_LEAF:
        return [path]
    return [
        found for key, child in zip(_paths(spec), spec.children, strict=True) for found in leaf_paths(child, path + key)
    ]


def leaf_names(spec: Spec) -> list[str]:
    """Return the name of each leaf.

    A name is made of keys, fields and indices joined by slashes, such as `w/0`. It is
    empty if the tree is one leaf. If leaves would share a name, because keys hold
    slashes, their names are their `leaf_paths`.
    """
    names = _names(spec)
    shared = collections.Counter(names)
    return [path if shared[name] > 1 else name for name, path in zip(names, leaf_paths(spec), strict=True)]


def select(known: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the positions of the leaves with these names, or below them.

    Raises:
        InvalidArgumentError: There is no such leaf; the message lists the leaves.
    """
    if not names:
        raise InvalidArgumentError(
            f"name the leaves of the block: any of {_listed(known)}, or names above them", reason="UNKNOWN_BLOCK"
        )
    if list(known) == [""] and any(names):
        raise InvalidArgumentError(
            f"x is one array: it has no named leaves, such as {next(filter(None, names))!r}", reason="UNKNOWN_BLOCK"
        )
    for name in names:
        if not any(_below(leaf, name) for leaf in known):
            raise InvalidArgumentError(
                f"no leaf of x is named {name!r}, and none is below it; there are {_listed(known)}",
                reason="UNKNOWN_BLOCK",
            )
    return [position for position, leaf in enumerate(known) if any(_below(leaf, name) for name in names)]


def _below(leaf: str, name: str) -> bool:
    """Return whether a leaf has the name, or is below it."""
    return name in ("", leaf) or leaf.startswith(f"{name}/")


def _listed(names: Sequence[str], most: int = 50) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _names(spec: Spec) -> list[str]:
    if spec.kind == Spec.KIND_LEAF:
        return [""]
    keys = [str(_key(key)) for key in spec.keys] or [str(index) for index in range(len(spec.children))]
    return [
        f"{key}/{below}" if below else key
        for key, child in zip(keys, spec.children, strict=True)
        for below in _names(child)
    ]


def _paths(spec: Spec) -> Iterator[str]:
    """Yield the place of each child in its parent, in Python's notation."""
    for index in range(len(spec.children)):
        if spec.kind == Spec.KIND_DICT:
            yield f"[{_key(spec.keys[index])!r}]"
        elif spec.kind in _KEYED:
            yield f".{_key(spec.keys[index])}"
        else:
            yield f"[{index}]"


def _key(key: Spec.Key) -> str | int:
    return key.number if key.WhichOneof("kind") == "number" else key.text


def describe(spec: Spec) -> str:
    """Describe a node in a few words."""
    keys = ", ".join(str(_key(key)) for key in spec.keys)
    match spec.kind:
        case Spec.KIND_LEAF:
            return "an array"
        case Spec.KIND_NONE:
            return "None"
        case Spec.KIND_LIST | Spec.KIND_TUPLE:
            return f"a {'list' if spec.kind == Spec.KIND_LIST else 'tuple'} of {len(spec.children)}"
        case Spec.KIND_DICT:
            return f"a dict with the keys {{{keys}}}"
        case _:
            return f"a {spec.type_name}({keys})"


def described(tree: Any) -> str:
    """Describe a tree that a user gave, in a few words."""
    if tree is None:
        return "None"
    if isinstance(tree, dict):
        return f"a dict with the keys {{{', '.join(sorted(map(str, tree)))}}}"
    if isinstance(tree, (list, tuple)):
        return f"a {type(tree).__name__} of {len(tree)}"
    return f"a {type(tree).__name__}"
