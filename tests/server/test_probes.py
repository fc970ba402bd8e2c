"""Probes of programs by running them. The programs are ordinary functions that are
right, wrong or silent.
"""

import concurrent.futures

import numpy as np
import pytest

from hvpd_server.device import data_sources
from hvpd_server.engine import probes

ROWS = np.random.default_rng(0).normal(size=(10, 3))


class Kernels:
    def __init__(self, gradient):
        self._gradient = gradient

    def request(self, name):
        assert name == "value_and_grad"
        compiled = concurrent.futures.Future()
        compiled.set_result(None)
        return compiled

    def call(self, name, width, x, rows):
        assert (name, width) == ("value_and_grad", 0)
        return None, self._gradient(x, rows)


def goes_by_rows(gradient, reduction, *, x=(1.0, 2.0, 3.0), spans=((0, 4), (4, 8), (8, 10)), multiple=1, sizes=None):
    """Return the verdict for an objective with this gradient(x, rows)."""
    source = data_sources.Streamed(None, [slice(*span) for span in spans], reduction, lambda rows: [ROWS[rows]], None)

    def kernels_of(rows):
        (sizes if sizes is not None else []).append(rows)
        return Kernels(gradient)

    return probes.goes_by_rows(source, kernels_of, np.array(x), 1e-8, multiple)


GRADIENTS = {
    "a mean": (lambda x, rows: rows.T @ (rows @ x) / len(rows), True, False),
    "a mean and a penalty": (lambda x, rows: rows.T @ (rows @ x) / len(rows) + x, True, False),
    "a sum": (lambda x, rows: rows.T @ (rows @ x), False, True),
    "a sum and a penalty": (lambda x, rows: rows.T @ (rows @ x) + 1e-4 * x, False, False),
    "a sum over all rows, divided by a number": (lambda x, rows: rows.T @ (rows @ x) / 10, False, True),
    "a square of a mean": (lambda x, rows: 2 * rows.mean(axis=0) * (rows.mean(axis=0) @ x), False, False),
    "nothing": (lambda x, rows: 0 * x, None, None),
    "not a number": (lambda x, rows: np.nan * x, None, None),
    "infinite": (lambda x, rows: np.inf * x, None, None),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_means_and_sums_over_rows_are_told_from_other_functions(kind, reduction):
    gradient, mean, sum_ = GRADIENTS[kind]
    assert goes_by_rows(gradient, reduction) is (mean if reduction == "mean" else sum_)


@pytest.mark.parametrize(
    ("spans", "multiple", "sizes"),
    [
        ([(0, 4), (4, 8), (8, 10)], 1, [4, 2, 2]),
        ([(0, 5), (5, 10)], 1, [5, 2, 3]),
        ([(0, 8), (8, 10)], 4, [8, 4, 4]),
        ([(0, 6), (6, 10)], 3, [6, 3, 3]),
        ([(row, row + 1) for row in range(10)], 1, [2, 1, 1]),
    ],
)
def test_a_chunk_is_cut_in_half_and_where_that_is_a_row_two_are_taken(spans, multiple, sizes):
    asked = []
    assert goes_by_rows(GRADIENTS["a mean"][0], "mean", spans=spans, multiple=multiple, sizes=asked)
    assert asked == sizes


def test_one_row_alone_tells_nothing():
    assert goes_by_rows(GRADIENTS["a mean"][0], "mean", spans=[(0, 1)]) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_place_nearby_is_near_and_another_and_always_the_same(dtype):
    for x in (np.zeros(1000), np.full(1000, 5.0), np.linspace(-1e6, 1e6, 1000)):
        near = probes.nearby(x.astype(dtype))
        assert near.dtype == dtype
        assert 0 < np.linalg.norm(near - x) < 0.2 * (np.sqrt(1000) + np.linalg.norm(x))
        np.testing.assert_array_equal(near, probes.nearby(x.astype(dtype)))
    assert np.isnan(probes.nearby(np.array([1.0, np.nan], dtype))).any()


# Bits


H = np.random.default_rng(1).normal(size=(6, 6))
V = np.random.default_rng(2).normal(size=(4, 6))


def row_by_row(block):
    return np.stack([H @ row for row in block])


def nudged(block, condition):
    """Return an array with one unit in the last place more, in one element of some
    rows.
    """
    found = row_by_row(block)
    rows = [row for row in range(len(block)) if condition(block, row)]
    found[rows, 2] = np.nextafter(found[rows, 2], np.inf)
    return found


MULTIPLY = {
    "each row by itself": (row_by_row, True),
    "the last row otherwise": (lambda block: nudged(block, lambda block, row: row == 3), False),
    "the first row otherwise": (lambda block: nudged(block, lambda block, row: row == 0), False),
    "odd rows otherwise": (lambda block: nudged(block, lambda block, row: row % 2), False),
    "beside zeros otherwise": (lambda block: nudged(block, lambda block, row: not block[-1].any()), False),
    "beside equals otherwise": (lambda block: nudged(block, lambda block, row: (block[0] == block[1]).all()), False),
    "all zero": (lambda block: np.zeros_like(block), None),
    "one row zero": (lambda block: row_by_row(block) * (np.arange(4) != 2)[:, None], None),
    "not a number": (lambda block: np.full_like(block, np.nan), None),
    "infinite": (lambda block: row_by_row(block) * np.inf, None),
}


@pytest.mark.parametrize("kind", MULTIPLY)
def test_bits_that_depend_on_the_place_or_the_neighbours_are_found(kind):
    multiply, expected = MULTIPLY[kind]
    assert probes.steady(multiply, V) is expected


def test_a_zero_that_changes_its_sign_is_another_bit():
    def multiply(block):
        found = row_by_row(block)
        found[:, 0] = 0.0
        found[3, 0] = -0.0
        return found

    assert probes.steady(multiply, V) is False


def test_a_block_of_one_is_steady():
    assert probes.steady(row_by_row, V[:1]) is True


def test_the_probe_takes_as_many_launches_at_every_width():
    launches = []

    def multiply(block):
        launches.append(len(block))
        return row_by_row(block)

    assert probes.steady(multiply, np.random.default_rng(3).normal(size=(64, 6)))
    assert launches == [64] * (probes.PROBES + 2)


def test_products_that_do_not_repeat_are_found():
    order = iter([0, 0, 1, 0])
    assert probes.repeats(row_by_row, V)
    assert probes.repeats(lambda block: row_by_row(block) + next(order), V)
    assert not probes.repeats(lambda block: row_by_row(block) + next(order), V)
