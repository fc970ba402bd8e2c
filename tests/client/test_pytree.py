"""Flattening without jax agrees with jax, for any tree of plain containers."""

import collections
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvpd import InvalidArgumentError
from hvpd._registration.trees import tree_spec
from hvpd._wire import pytree

keys = st.text(max_size=5) | st.integers(-5, 5)
leaves = st.floats(allow_nan=False).map(np.float64)
trees = st.recursive(
    leaves | st.none(),
    lambda children: (
        st.lists(children, max_size=3)
        | st.lists(children, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5), children, max_size=3)
        | st.dictionaries(st.integers(-5, 5), children, max_size=3)
    ),
    max_leaves=10,
)


class Layer(NamedTuple):
    kernel: Any
    bias: Any


named_trees = st.recursive(
    trees,
    lambda children: (
        st.builds(Layer, children, children)
        | st.lists(children, max_size=2)
        | st.tuples(children)
        | st.dictionaries(st.text(max_size=5), children, max_size=2)
    ),
    max_leaves=10,
)


@given(named_trees)
def test_structure_and_leaves_are_those_of_jax(tree):
    spec, found = pytree.flatten(tree)
    assert found == jax.tree.leaves(tree)
    assert spec == tree_spec(tree)
    assert pytree.leaves(spec, tree) == found


@pytest.mark.parametrize(
    ("tree", "kind", "count"),
    [
        ({}, "DICT", 0),
        ([], "LIST", 0),
        ((), "TUPLE", 0),
        (None, "NONE", 0),
        (Layer(None, ()), "NAMED_TUPLE", 0),
        (np.ones((2, 2)), "LEAF", 1),
        (1.5, "LEAF", 1),
        ("text", "LEAF", 1),
        ({2: 0.0, 10: 1.0, -1: 2.0}, "DICT", 3),
        (collections.OrderedDict(a=1.0, b=2.0), "DICT", 2),
        (collections.defaultdict(float, {"b": 1.0, "a": 2.0}), "DICT", 2),
    ],
    ids=str,
)
def test_kinds_of_containers(tree, kind, count):
    spec, found = pytree.flatten(tree)
    assert spec.kind == getattr(pytree.Spec, f"KIND_{kind}")
    assert len(found) == count == pytree.count(spec)
    assert all(one is other for one, other in zip(found, jax.tree.leaves(tree), strict=True))
    pytree.check(spec)


@pytest.mark.parametrize(
    "tree", [{1: 0.0, "a": 1.0}, {(1, 2): 0.0}, {True: 0.0}, {None: 0.0}, [{"a": {1.5: 0.0}}]], ids=str
)
def test_keys_that_cannot_be_sent_are_refused(tree):
    with pytest.raises(InvalidArgumentError, match="must have strings or integers as keys"):
        pytree.flatten(tree)


def test_an_order_of_its_own_is_refused():
    """jax has this order. Another order would exchange arguments of equal shape."""
    with pytest.raises(
        InvalidArgumentError, match=r"has the order \['b', 'a'\], and leaves go by sorted keys: pass a dict"
    ):
        pytree.flatten([collections.OrderedDict(b=1.0, a=2.0)])


@given(trees)
def test_leaves_come_in_jaxs_order_and_go_back(tree):
    spec = pytree.Spec.FromString(tree_spec(tree).SerializeToString())
    flat = pytree.leaves(spec, tree)
    assert flat == jax.tree.leaves(tree)
    assert pytree.count(spec) == len(flat) == len(pytree.leaf_paths(spec))
    back = pytree.rebuild(spec, flat)
    assert back == tree
    assert jax.tree.structure(back) == jax.tree.structure(tree)


@given(trees, trees)
def test_another_structure_is_an_error(tree, other):
    spec = tree_spec(tree)
    if jax.tree.structure(tree) == jax.tree.structure(other):
        assert pytree.leaves(spec, other) == jax.tree.leaves(other)
    else:
        with pytest.raises(pytree.StructureError, match="must be"):
            pytree.leaves(spec, other)


def test_paths_read_as_python():
    spec = tree_spec({"w": [1.0, (2.0,)], "b": {3: 4.0}})
    assert pytree.leaf_paths(spec) == ["['b'][3]", "['w'][0]", "['w'][1][0]"]


def test_the_error_names_the_place():
    spec = tree_spec({"w": [1.0, (2.0,)]})
    with pytest.raises(pytree.StructureError, match=r"^\['w'\]\[1\] must be a tuple of 1, got a list of 2$"):
        pytree.leaves(spec, {"w": [1.0, [2.0, 3.0]]})


@pytest.mark.parametrize("count", [1, 3])
def test_a_wrong_number_of_leaves(count):
    with pytest.raises((ValueError, StopIteration, RuntimeError)):
        pytree.rebuild(tree_spec([1.0, 2.0]), [0.0] * count)


def test_names_join_keys_with_slashes():
    spec = tree_spec({"w": [1.0, (2.0,)], "b": {3: 4.0}, "none": None})
    assert pytree.leaf_names(spec) == ["b/3", "w/0", "w/1/0"]
    assert pytree.leaf_names(tree_spec(1.0)) == [""]


def test_names_that_would_be_shared_are_paths():
    spec = tree_spec({"a": {"b": 1.0, "c": 2.0}, "a/b": 3.0})
    assert pytree.leaf_names(spec) == ["['a']['b']", "a/c", "['a/b']"]
