"""Sparse matrices as data: their arrays, for clients without jax."""

import numpy as np
import pytest
import scipy.sparse

import hvpd
from hvpd._wire import pytree, sparse
from hvpd._wire.pytree import Spec

SHAPE = (4, 5)
DENSE = np.zeros(SHAPE)
DENSE[[3, 0, 0, 2], [1, 4, 2, 0]] = [1.0, 2.0, 3.0, 4.0]


def node(name="BCOO", facts=("indices_sorted", "unique_indices"), shape=SHAPE):
    fields = sparse.FIELDS[name]
    return Spec(
        kind=Spec.KIND_CUSTOM,
        type_name=name,
        children=[Spec(kind=Spec.KIND_LEAF)] * len(fields),
        keys=[Spec.Key(text=field) for field in fields],
        sparse=Spec.Sparse(shape=shape, facts=facts),
    )


def tree(*children):
    return Spec(kind=Spec.KIND_TUPLE, children=children)


LEAF = Spec(kind=Spec.KIND_LEAF)


def dense(spec, arrays):
    """Return the matrix that the arrays stand for, without elements outside of it."""
    values, indices, *ends = arrays
    found = np.zeros(np.add(spec.sparse.shape, 1))
    rows = np.searchsorted(ends[0], np.arange(len(values)), side="right") - 1 if ends else indices[:, 0]
    np.add.at(found, (rows, indices if ends else indices[:, 1]), values)
    return found[:-1, :-1]


@pytest.mark.parametrize("make", ["csr", "csc", "coo", "dok", "lil", "dia", "bsr"])
@pytest.mark.parametrize("name", ["BCOO", "BCSR"])
@pytest.mark.parametrize("old", [False, True], ids=["array", "matrix"])
def test_every_format_of_scipy_gives_sorted_arrays(make, name, old):
    given = scipy.sparse.csr_matrix(DENSE) if old else scipy.sparse.csr_array(DENSE)
    values, indices, *ends = arrays = pytree.leaves(node(name), given.asformat(make))
    assert np.array_equal(dense(node(name), arrays), DENSE)
    assert indices.dtype == np.int32
    assert np.array_equal(values[values != 0], [3.0, 2.0, 4.0, 1.0])
    assert [end.dtype for end in ends] == [np.int32] * (name == "BCSR")


def test_elements_stored_twice_are_added_and_the_matrix_stays():
    given = scipy.sparse.coo_array(([1.0, 2.0, 5.0], ([3, 3, 0], [1, 1, 2])), shape=SHAPE)
    values, indices = pytree.leaves(node(), given)
    assert np.array_equal(values, [5.0, 3.0])
    assert np.array_equal(indices, [[0, 2], [3, 1]])
    assert given.nnz == 3


def test_explicit_zeros_stay():
    given = scipy.sparse.coo_array(([0.0, 2.0], ([3, 0], [1, 2])), shape=SHAPE)
    assert len(pytree.leaves(node(), given)[0]) == 2


@pytest.mark.parametrize("name", ["BCOO", "BCSR"])
def test_missing_elements_are_zeros_outside(name):
    spec = node(name)
    arrays = pytree.leaves(spec, scipy.sparse.csr_array(DENSE))
    padded = sparse.padded(spec, arrays, 9, "data[0]")
    assert [len(each) for each in padded[:2]] == [9, 9]
    assert np.array_equal(dense(spec, padded), DENSE)
    assert not padded[0][4:].any()
    assert (padded[1][4:] == (SHAPE if name == "BCOO" else SHAPE[1])).all()
    assert [each is other for each, other in zip(arrays, sparse.padded(spec, arrays, 4, "data[0]"), strict=True)]


def test_more_elements_are_refused_with_both_numbers():
    arrays = pytree.leaves(node(), scipy.sparse.csr_array(DENSE))
    with pytest.raises(hvpd.InvalidArgumentError, match=r"data\[0\] stores 4 elements.*stores 3.*explicit zeros"):
        sparse.padded(node(), arrays, 3, "data[0]")


@pytest.mark.parametrize(
    ("spec", "given", "says"),
    [
        (
            node(),
            scipy.sparse.eye_array(4),
            r"a BCOO or a scipy.sparse matrix of shape \(4, 5\).*eye|dia_array of shape",
        ),
        (node("COO"), scipy.sparse.csr_array(DENSE), r"must be a COO of shape \(4, 5\).*got a scipy.sparse csr_array"),
        (node(shape=(20,)), scipy.sparse.coo_array(np.ones(20)), "must have two axes"),
    ],
)
def test_other_matrices_are_refused(spec, given, says):
    with pytest.raises(hvpd.InvalidArgumentError, match=says):
        pytree.leaves(tree(spec), (given,))


def test_a_dense_array_is_no_sparse_matrix_and_its_arrays_are():
    with pytest.raises(pytree.StructureError, match=r"must be a BCOO\(data, indices\), got a ndarray"):
        pytree.leaves(node(), DENSE)
    assert pytree.leaves(node(), {"data": 1, "indices": 2}) == [1, 2]


def test_nodes_have_the_position_of_their_first_array():
    spec = tree(LEAF, node("BCSR"), Spec(kind=Spec.KIND_LIST, children=[LEAF, node()]))
    assert [first for first, _ in pytree.sparse_nodes(spec)] == [1, 5]
    assert pytree.leaf_paths(spec)[1] == "[1].data"


@pytest.mark.parametrize(
    "spec",
    [
        Spec(kind=Spec.KIND_LEAF, sparse=Spec.Sparse(shape=SHAPE)),
        Spec(kind=Spec.KIND_CUSTOM, type_name="BCOO", sparse=Spec.Sparse(shape=SHAPE)),
        node(shape=(-1, 3)),
        node(shape=(1 << 40, 1 << 40)),
    ],
    ids=["leaf", "childless", "negative", "huge"],
)
def test_a_spec_from_elsewhere_that_is_no_matrix_is_refused(spec):
    with pytest.raises(ValueError, match=r"sparse matrix|cannot exist"):
        pytree.check(spec)


def test_a_right_spec_passes():
    pytree.check(tree(node(), node("BCSR"), LEAF))
