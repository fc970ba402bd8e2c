"""Rows in the memory of a device are written in place, and combined there."""

import numpy as np

from hvpd_server.device.basis import Basis


def test_rows_are_written_in_place(device):
    basis = Basis(device, 4, 3, np.dtype(np.float32))
    basis.write(np.ones((3, 3), np.float32), 2, 1)
    basis.write(2 * np.ones((1, 3), np.float32), 0, 1)
    assert np.asarray(basis.array)[:, 0].tolist() == [2, 0, 1, 0]
    np.testing.assert_array_equal(basis.row(2), [[1, 1, 1]])


def test_combinations_are_those_of_the_first_rows(device):
    basis = Basis(device, 4, 3, np.dtype(np.float64))
    rows, Y = np.arange(9.0).reshape(3, 3), np.array([[1.0, 0.0], [2.0, -1.0]])
    basis.write(rows, 0, 3)
    np.testing.assert_allclose(basis.combination(Y), Y.T @ rows[:2])
    np.testing.assert_array_equal(basis.first(2), rows[:2])
