"""The states of iterations as the arrays that programs of several steps take.

The arrays are padded with zeros to sizes that are powers of two, so that few programs
serve all numbers of right-hand sides, shifts and ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hvpd._krylov.conjugate_gradients import BlockCG
from hvpd._krylov.preconditioning import PARTS, Applied, layer_count
from hvpd._krylov.short_recurrence import CG, Links, ShortRecurrence
from hvpd._wire import codec
from hvpd.v1 import objective_pb2
from hvpd_server.derivation import conjugate_gradients, short_recurrences
from hvpd_server.derivation.names import Form
from hvpd_server.krylov.operator import Terms
from hvpd_server.scheduling import blocks
from hvpd_server.scheduling.holdback import bucket_of

Arrays = Sequence[codec.Array]


def padded(array: codec.Array, *sizes: int) -> codec.Array:
    """Return a copy whose first axes have larger sizes, with zeros at their ends."""
    found = blocks.empty((*sizes, *array.shape[len(sizes) :]), array.dtype)
    found[...] = 0
    found[tuple(map(slice, array.shape))] = array
    return found


class PackedCG:
    """The state of block conjugate gradients.

    Args:
        cg: The iteration.
        radius: Radius of the ball that its steps end within.

    Attributes:
        state: The iteration.
        prefix: Prefix of the program's name.
        rows: Right-hand sides.
        width: Right-hand sides of the program.
        shifts: Shifts of the program.
        constant: The array that stays the same.
    """

    prefix = conjugate_gradients.PREFIX
    shifts = 1

    def __init__(self, cg: BlockCG, radius: float = np.inf) -> None:
        self.state = cg
        self.rows = len(cg.X)
        self.width = bucket_of(self.rows)
        self.constant = np.array(radius)

    def pack(self) -> Arrays:
        """Return the arrays of the state. The inner products for the ball are as they
        are before the first step.
        """
        cg, k = self.state, self.width
        no = np.zeros((k, k))
        X, Q, S = (padded(array, k) for array in (cg.X, cg.Q, cg.S))
        return conjugate_gradients.State(X, Q, S, padded(cg.C, k, k), np.array(cg.norm), no, no, np.eye(k))

    def unpack(self, arrays: Arrays) -> None:
        """Set the state to that of some arrays."""
        found, cg = conjugate_gradients.State(*arrays), self.state
        live = found.S.any(axis=1)
        cg.X, cg.Q, cg.S = np.array(found.X[: self.rows]), found.Q[live], found.S[live]
        cg.C, cg.norm = found.C[live, : self.rows], float(found.norm)

    def targets(self, targets: codec.Array) -> codec.Array:
        """Return the targets of the program."""
        found = np.full((self.width, 1), np.inf)
        found[: self.rows, 0] = targets
        return found

    def norms(self, norms: codec.Array) -> codec.Array:
        """Return the norms of the residuals after each step, by those of the program:
        (steps, rows).
        """
        found: codec.Array = norms[:, : self.rows, 0]
        return found


class PackedShortRecurrence:
    """The state of MINRES, or of CG for several shifts; see `PackedCG`.

    Args:
        state: The iteration.
    """

    def __init__(self, state: ShortRecurrence) -> None:
        self.state = state
        cg = isinstance(state.solved, CG)
        self.prefix = short_recurrences.CG_PREFIX if cg else short_recurrences.MINRES_PREFIX
        self.rows, self._shifts = state.shifts.shape
        self.width, self.shifts = bucket_of(self.rows), bucket_of(self._shifts)
        self.constant = padded(state.shifts, self.width, self.shifts)

    def pack(self) -> Arrays:
        """See `PackedCG.pack`."""
        links = [padded(array, self.width) for array in self.state.links]
        solved = self.state.solved
        solved = type(solved)(*(padded(array, self.width, self.shifts) for array in solved))
        if isinstance(solved, CG):  # The step divides by the pivots, and padded ones are zero.
            solved = solved._replace(d=np.where(solved.d == 0, 1.0, solved.d))
        return [*links, *solved]

    def unpack(self, arrays: Arrays) -> None:
        """See `PackedCG.unpack`."""
        links, solved = arrays[: len(Links._fields)], arrays[len(Links._fields) :]
        kind = type(self.state.solved)
        self.state.links = Links(*(array[: self.rows] for array in links))
        self.state.solved = kind(*(array[: self.rows, : self._shifts] for array in solved))

    def targets(self, targets: codec.Array) -> codec.Array:
        """See `PackedCG.targets`."""
        found = np.full((self.width, self.shifts), np.inf)
        found[: self.rows, : self._shifts] = targets.reshape(self._shifts, self.rows).T
        return found

    def norms(self, norms: codec.Array) -> codec.Array:
        """See `PackedCG.norms`."""
        found: codec.Array = norms[:, : self.rows, : self._shifts].transpose(0, 2, 1)
        return found.reshape(len(found), self.rows * self._shifts)


Packed = PackedCG | PackedShortRecurrence


def layer_sizes(described: objective_pb2.Derivation, bundle: objective_pb2.Bundle) -> tuple[int, ...]:
    """Return p and q of each dense layer of an objective, as K-FAC's inverse has them:
    the rows of a kernel, with a bias as the last one, and its columns.
    """
    found = list[int]()
    for layer in described.dense_layers:
        rows, columns = list(bundle.x_leaves[layer.kernel].shape)[:: -1 if layer.transposed else 1]
        found += [rows + layer.HasField("bias"), columns]
    return tuple(found)


class Fixed(NamedTuple):
    """What a program takes beside a state."""

    form: Form
    """Sizes of the arrays."""
    preconditioner: Arrays
    """The shift of M, and its arrays."""
    low_rank: Arrays
    """U and C of the operator's low-rank term."""


def fixed(shifts: int, terms: Terms, precondition: Applied | None, dtype: "np.dtype[np.floating]") -> Fixed:
    """Return what a program takes beside a state.

    Args:
        shifts: Shifts of the program.
        terms: The terms around the curvature.
        precondition: The preconditioner; None for the identity.
        dtype: dtype of vectors.
    """
    low_rank, rank = [], 0
    if terms.U is not None and terms.C is not None:
        rank = bucket_of(terms.U.shape[1])
        low_rank = [padded(terms.U, len(terms.U), rank), padded(terms.C, rank, rank)]
    if precondition is None:
        return Fixed(Form(shifts, rank), [], low_rank)
    kind, arrays, shift = precondition.described
    sizes, found = list[int](), [np.array(shift, dtype)]
    if kind == "diagonal":
        found.append(arrays["M"])
    if kind == "low_rank":
        U, weights = arrays["M_U"], arrays["M_weights"]
        sizes = [bucket_of(max(len(weights), 1))]
        found += [padded(U, len(U), *sizes), padded(weights, *sizes)]
    for number in range(layer_count(arrays)):
        elements, *others = (arrays[f"M_{part}_{number}"] for part in PARTS)
        sizes += elements.shape
        found += [elements.astype(np.int32), *others]
    return Fixed(Form(shifts, rank, kind, tuple(sizes)), found, low_rank)
