"""Flattening without jax gives what jax gives, for any tree of plain containers."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvpd import _export, _pytree

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


@given(trees)
def test_leaves_come_in_jaxs_order_and_go_back(tree):
    spec = _pytree.Spec.FromString(_export.tree_spec(tree).SerializeToString())
    flat = _pytree.leaves(spec, tree)
    assert flat == jax.tree.leaves(tree)
    assert _pytree.count(spec) == len(flat) == len(_pytree.leaf_paths(spec))
    back = _pytree.rebuild(spec, flat)
    assert back == tree
    assert jax.tree.structure(back) == jax.tree.structure(tree)


@given(trees, trees)
def test_another_structure_is_an_error(tree, other):
    spec = _export.tree_spec(tree)
    if jax.tree.structure(tree) == jax.tree.structure(other):
        assert _pytree.leaves(spec, other) == jax.tree.leaves(other)
    else:
        with pytest.raises(_pytree.StructureError, match="must be"):
            _pytree.leaves(spec, other)


def test_paths_read_as_python():
    spec = _export.tree_spec({"w": [1.0, (2.0,)], "b": {3: 4.0}})
    assert _pytree.leaf_paths(spec) == ["['b'][3]", "['w'][0]", "['w'][1][0]"]


def test_the_error_names_the_place():
    spec = _export.tree_spec({"w": [1.0, (2.0,)]})
    with pytest.raises(_pytree.StructureError, match=r"^\['w'\]\[1\] must be a tuple of 1, got a list of 2$"):
        _pytree.leaves(spec, {"w": [1.0, [2.0, 3.0]]})


@pytest.mark.parametrize("count", [1, 3])
def test_a_wrong_number_of_leaves(count):
    with pytest.raises((ValueError, StopIteration, RuntimeError)):
        _pytree.rebuild(_export.tree_spec([1.0, 2.0]), [0.0] * count)


def test_names_join_keys_with_slashes():
    spec = _export.tree_spec({"w": [1.0, (2.0,)], "b": {3: 4.0}, "none": None})
    assert _pytree.leaf_names(spec) == ["b/3", "w/0", "w/1/0"]
    assert _pytree.leaf_names(_export.tree_spec(1.0)) == [""]


def test_names_that_would_be_shared_are_paths():
    spec = _export.tree_spec({"a": {"b": 1.0, "c": 2.0}, "a/b": 3.0})
    assert _pytree.leaf_names(spec) == ["['a']['b']", "a/c", "['a/b']"]
