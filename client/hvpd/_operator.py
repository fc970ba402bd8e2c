"""Curvature at a point as SciPy's LinearOperator, and what stays one: multiples, shifts, low-rank updates, principal blocks.

A product asks the point once, whatever was composed: all that needs no curvature is computed here. What is made of many
products has files of its own: `_diagonal`, `_sparse`, `_lowrank`.
"""

import copy
import numbers
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import scipy.sparse

from hvpd import _blocks, _codec, _pytree
from hvpd._errors import InvalidArgumentError
from hvpd._objective import Point
from hvpd._symmetric import SymmetricOperator
from hvpd.v1 import curvature_pb2

if TYPE_CHECKING:
    from hvpd._diagonal import Diagonal
    from hvpd._lowrank import LowRankOperator


class Update(NamedTuple):
    """U C U^T, symmetric, of low rank."""

    U: _codec.Array
    """Shape (n, r)."""
    C: _codec.Array
    """Shape (r, r), symmetric."""


class CurvatureOperator(SymmetricOperator):
    """scale A + shift I + U C U^T, where A is the curvature at a point: symmetric, real, in the objective's dtype.

    `A @ v` and `A @ V` are one round trip each: a block is multiplied as a block. Vectors of another real dtype are converted.
    Multiples by a real number (`2 * A`, `-A`, `A / 3`), sums with a multiple of `scipy.sparse.identity`, and sums and differences
    of operators of the same curvature stay one operator, with one round trip. All else is SciPy's own arithmetic.

    Attributes:
        point: Where the curvature is taken.
        kind: Which curvature: a value of `hvpd.v1.curvature_pb2.Operator`.
        seed: Of curvature that is drawn.
        mode: How products of a Hessian are made; empty for the objective's mode.
        precision: Precision of matrix products that state none; empty for the objective's.
        scale: Multiplies the curvature.
        shift: Added to the diagonal, on the client.
        update: The low-rank term, an `(U, C)`; None where there is none.
        leaves: Names of the leaves of x that it is restricted to; empty for the whole.
    """

    def __init__(
        self,
        point: Point,
        kind: int = curvature_pb2.OPERATOR_HESSIAN,
        *,
        seed: int = 0,
        scale: float = 1.0,
        shift: float = 0.0,
        mode: str = "",
        precision: str = "",
    ) -> None:
        super().__init__(point.dtype, point.n)
        self.point = point
        self.kind = kind
        self.seed = seed
        self.mode = mode
        self.precision = precision
        self.scale = _blocks.finite(scale, "scale")
        self.shift = _blocks.finite(shift, "shift")
        self.update: Update | None = None
        self.leaves: tuple[str, ...] = ()
        self._positions: tuple[int, ...] = ()
        self._indices: _codec.Array | None = None

    # What SciPy calls

    def _matmat(self, X: Any) -> _codec.Array:
        return self._multiply(np.asarray(X).T).T

    def _matvec(self, x: Any) -> _codec.Array:
        return self._multiply(np.asarray(x).reshape(1, -1)).reshape(-1)

    # Products, of vectors that are rows

    def quadratic_form(self, V: Any) -> _codec.Array | float:
        """The curvature along directions, v'(scale A + shift I + U C U')v: only these numbers come back from the server.

        Args:
            V: One direction, of shape (n,), or k of them as columns, of shape (n, k).

        Returns:
            A float for one direction, an array of shape (k,) for several.

        Raises:
            InvalidArgumentError: V has another shape, or is not real.
        """
        directions = np.asarray(V)
        if directions.ndim not in (1, 2) or len(directions) != self.shape[0]:
            raise InvalidArgumentError(
                f"directions must have the shape ({self.shape[0]},) or ({self.shape[0]}, k), got {directions.shape}"
            )
        block = self._block(directions.reshape(self.shape[0], -1).T)
        form = self.point.quadratic_form(block, *self.asked) * self.dtype.type(self.scale)
        if self.shift:
            form += self.dtype.type(self.shift) * np.einsum("kn,kn->k", block, block)
        if self.update is not None:
            inner = block @ self.update.U
            form += np.einsum("kr,rs,ks->k", inner, self.update.C, inner)
        return float(form[0]) if directions.ndim == 1 else form

    def _block(self, rows: _codec.Array) -> _codec.Array:
        """V[k,n] in the objective's dtype."""
        if rows.dtype != self.dtype and not (_codec.is_real_floating(rows.dtype) or rows.dtype.kind in "iub"):
            raise InvalidArgumentError(
                f"a Hessian multiplies real vectors, got dtype {rows.dtype}"
                + (": multiply the real and the imaginary part" if rows.dtype.kind == "c" else "")
            )
        return np.ascontiguousarray(rows, dtype=self.dtype)

    def _multiply(self, rows: _codec.Array) -> _codec.Array:
        """V[k,n] -> (scale A + shift I + U C U^T) V[k,n]."""
        block = self._block(rows)
        product = self._curvature(block)
        if self.scale != 1.0:
            product *= self.dtype.type(self.scale)
        if self.shift:
            product += self.dtype.type(self.shift) * block
        if self.update is not None:
            product += (block @ self.update.U) @ self.update.C @ self.update.U.T
        return product

    def _curvature(self, block: _codec.Array) -> _codec.Array:
        """V[k,n] -> A V[k,n]: neither scaled, nor shifted, nor updated."""
        return self.point.multiply(block, *self.asked)

    @property
    def asked(self) -> tuple[int, int, tuple[int, ...], str, str]:
        """The curvature, as `Point.multiply` takes it."""
        return self.kind, self.seed, self._positions, self.mode, self.precision

    # Arithmetic that stays one operator

    def shifted(self, shift: float) -> Self:
        """This plus `shift` times the identity, of one round trip as before."""
        return self._changed(shift=self.shift + _blocks.finite(shift, "shift"))

    def updated(self, U: Any, C: Any = None) -> Self:
        """This plus U C U^T, computed on the client.

        Args:
            U: Shape (n, r), or (n,) for one column.
            C: Symmetric, of shape (r, r); or (r,), a diagonal; the identity without.

        Raises:
            InvalidArgumentError: The shapes do not fit, C is not symmetric, or elements are not real and finite.
        """
        U = _real(U, "U")
        U = U[:, None] if U.ndim == 1 else U
        if U.ndim != 2 or len(U) != self.shape[0]:
            raise InvalidArgumentError(f"U must have the shape ({self.shape[0]}, r), got {U.shape}")
        r = U.shape[1]
        C = np.eye(r) if C is None else _real(C, "C")
        C = np.diag(C) if C.ndim == 1 else C
        if C.shape != (r, r):
            raise InvalidArgumentError(
                f"C must have the shape ({r}, {r}) or ({r},), for U has {r} columns; got {C.shape}"
            )
        if not np.allclose(C, C.T, rtol=1e-6, atol=0.0):
            raise InvalidArgumentError("C must be symmetric, or U C U^T is not; pass (C + C.T) / 2 if that is meant")
        return self._changed(update=self._joined(Update(U.astype(self.dtype), C.astype(self.dtype))))

    def _joined(self, more: Update | None) -> Update | None:
        """The sum of the low-rank term and another."""
        if self.update is None or more is None:
            return self.update or more
        left, right = len(self.update.C), len(more.C)
        C = np.zeros((left + right, left + right), self.dtype)
        C[:left, :left], C[left:, left:] = self.update.C, more.C
        return Update(np.hstack([self.update.U, more.U]), C)

    def _scaled(self, factor: float) -> Self:
        factor = _blocks.finite(factor, "the factor")
        update = self.update and Update(self.update.U, self.dtype.type(factor) * self.update.C)
        return self._changed(scale=factor * self.scale, shift=factor * self.shift, update=update)

    def _changed(self, **attributes: Any) -> Self:
        changed = copy.copy(self)
        for name, value in attributes.items():
            setattr(changed, name, value)
        return changed

    def __mul__(self, other: Any) -> Any:
        return self._scaled(float(other)) if isinstance(other, numbers.Real) else super().__mul__(other)

    def __rmul__(self, other: Any) -> Any:
        return self._scaled(float(other)) if isinstance(other, numbers.Real) else super().__rmul__(other)

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, numbers.Real) and other:
            return self._scaled(1.0 / float(other))
        return super().__truediv__(other)

    def __neg__(self) -> Self:  # type: ignore[override]  # the stubs promise a class that SciPy keeps to itself
        return self._scaled(-1.0)

    def __add__(self, other: Any) -> Any:
        if isinstance(other, CurvatureOperator) and self._same_curvature(other):
            return self._changed(
                scale=self.scale + other.scale, shift=self.shift + other.shift, update=self._joined(other.update)
            )
        multiple = _multiple_of_identity(other, self.shape[0])
        return super().__add__(other) if multiple is None else self.shifted(multiple)

    def __radd__(self, other: Any) -> Any:
        multiple = _multiple_of_identity(other, self.shape[0])
        return NotImplemented if multiple is None else self.shifted(multiple)

    def __rsub__(self, other: Any) -> Any:
        return (-self).__radd__(other)

    def _same_curvature(self, other: "CurvatureOperator") -> bool:
        return self.point is other.point and self.asked == other.asked

    # Principal blocks

    @property
    def indices(self) -> _codec.Array:
        """Which elements of the flat x the rows belong to, of shape (n,): `H.block("out") @ v[H.block("out").indices]`."""
        return np.arange(self.point.n) if self._indices is None else self._indices

    def block(self, *names: str) -> Self:
        """The principal block of some leaves of x: rows and columns of all others are left out.

        A product is one round trip and costs what the block costs: only its elements travel, and nothing is differentiated by the
        others. The first product of a block waits until the server has compiled it, unless the objective was registered with it
        (`register(blocks=...)`).

        Args:
            names: Keys, indices and fields of the registered pytree joined by slashes, such as "hidden/w" or "layers/0"; a name
                that is no leaf means all leaves below it. `objective.slices()` lists them. The block has the order of the
                flat x, whatever the order of the names.

        Raises:
            InvalidArgumentError: No such leaf; the message lists those that there are.
        """
        slices = self.point.objective.slices()
        every = tuple(slices)
        known = self.leaves or every
        kept = tuple(known[position] for position in _pytree.select(known, names))
        positions = tuple(every.index(leaf) for leaf in kept)
        indices = np.concatenate([np.arange(slices[leaf].start, slices[leaf].stop) for leaf in kept])
        update = self.update and Update(self.update.U[np.isin(self.indices, indices)], self.update.C)
        return self._changed(
            shape=(len(indices),) * 2, leaves=kept, _positions=positions, _indices=indices, update=update
        )

    # What is made of many products

    def diagonal(self, *, samples: int | None = None, seed: int = 0) -> "Diagonal":
        """The diagonal, of shape (n,): exact for small n, estimated with its standard error for large.

        Exact means n products, by blocks of unit vectors. The estimate is Hutchinson's with random signs v: the mean of v * (A v)
        (https://doi.org/10.1016/j.apnum.2007.01.003). The variance of one sample of element i is the sum of the squares of A's
        row i without its diagonal: shift and low-rank update are added exactly and cost no accuracy.

        Args:
            samples: Random vectors to take, at least 2; as many as n or more: exact. None: exact up to n = 2048, else 256.
            seed: Of the random signs.

        Returns:
            `values`, `standard_error` (zeros where exact) and the number of `products`.
        """
        from hvpd import _diagonal

        found = _diagonal.diagonal(self._curvature, self.shape[0], self.dtype, samples=samples, seed=seed)
        values = self.scale * found.values + self.shift
        if self.update is not None:
            values += np.einsum("ij,jk,ik->i", self.update.U, self.update.C, self.update.U)
        return found._replace(
            values=values.astype(self.dtype), standard_error=(abs(self.scale) * found.standard_error).astype(self.dtype)
        )

    def sparse(
        self, pattern: Any = None, *, max_products: int = 2048, verify: bool = True, seed: int = 0
    ) -> "scipy.sparse.csr_array":
        """The matrix itself, sparse and exactly symmetric, from as few products as its pattern allows.

        With a pattern, columns that do not disturb each other share a product: as many products as a star colouring of the
        pattern's graph has colours (3 for a tridiagonal matrix, 2 for an arrow), all in one block. Sources: Curtis, Powell, Reid
        1974; Coleman, Moré 1984 (https://doi.org/10.1007/BF02612334); Gebremedhin, Manne, Pothen 2005
        (https://doi.org/10.1137/S0036144504444711).

        Without one, it takes n products, by blocks of unit vectors, and drops what is exactly zero. Products alone tell no
        pattern for less. What is zero at this x only is dropped too, so the result is a pattern for this x. Whoever has the
        function can have the pattern for all x: `asdex.hessian_sparsity(fun, x)`, taken here as it is.

        Args:
            pattern: Of A: a sparse array whose stored entries are the pattern, whatever their values; a dense array, whose nonzero
                elements are; or what has `rows`, `cols` and `shape`, as asdex's SparsityPattern. One triangle is enough, and the
                diagonal may be missing.
            max_products: Refuse to take more.
            verify: Compare with one more product, by a random vector in the same block, and refuse a pattern that misses entries.
            seed: Of that vector.

        Raises:
            InvalidArgumentError: The pattern has another shape, misses entries, or takes more than `max_products`; or there is a
                low-rank update, which is dense.
        """
        from hvpd import _sparse

        if self.update is not None:
            raise InvalidArgumentError(
                f"with its rank-{len(self.update.C)} update this operator is a dense matrix: call sparse() before updated()"
            )
        n = self.shape[0]
        if pattern is None:
            matrix = _sparse.detect(self._curvature, n, self.dtype, max_products=max_products)
        else:
            structure = _sparse.structure(pattern, n)
            matrix = _sparse.recover(
                self._curvature, structure, self.dtype, max_products=max_products, verify=verify, seed=seed
            )
        if self.scale != 1.0:
            matrix.data *= self.dtype.type(self.scale)
        if self.shift:
            diagonal: Any = np.full((1, n), self.shift, self.dtype)
            matrix = scipy.sparse.csr_array(matrix + scipy.sparse.dia_array((diagonal, [0]), shape=(n, n)))
        return matrix

    def low_rank(self, rank: int, *, seed: int = 0, oversampling: int = 10, passes: int = 2) -> "LowRankOperator":
        """The eigenpairs of largest magnitude, approximately, as an operator that multiplies without round trips.

        A randomized eigendecomposition: Rayleigh-Ritz on the block Krylov space of random vectors, `passes` round trips of
        min(rank + oversampling, n) vectors. Sources: Halko, Martinsson, Tropp 2011 (https://doi.org/10.1137/090771806);
        Musco, Musco 2015 (https://arxiv.org/abs/1504.05477). The shift does not take part: it is kept, and added back.

        Args:
            rank: Eigenpairs to keep, 1 to n.
            seed: Of the random vectors.
            oversampling: Vectors beyond the rank.
            passes: Blocks of products; more are more accurate where eigenvalues decay slowly.
        """
        from hvpd import _lowrank

        return _lowrank.low_rank(self, rank, seed=seed, oversampling=oversampling, passes=passes)

    def __repr__(self) -> str:
        kind = "" if type(self) is not CurvatureOperator else f"{curvature_pb2.Operator.Name(self.kind)} "  # type: ignore[arg-type]  # an open enum
        terms = [
            *([", ".join(self.leaves)] if self.leaves else []),
            *([f"scale={self.scale:g}"] if self.scale != 1.0 else []),
            *([f"shift={self.shift:g}"] if self.shift else []),
            *([f"rank-{len(self.update.C)} update"] if self.update is not None else []),
        ]
        n, label = self.shape[0], self.point.objective.label
        return f"<{type(self).__name__} {kind}{n}x{n} {self.dtype} of {label}{''.join(f', {term}' for term in terms)}>"


class HessianOperator(CurvatureOperator):
    """scale H + shift I + U C U^T, where H is the Hessian at a point. Made by `Point.hessian`; see `CurvatureOperator`."""

    def __init__(self, point: Point, shift: float = 0.0, *, mode: str = "", precision: str = "") -> None:
        super().__init__(point, curvature_pb2.OPERATOR_HESSIAN, shift=shift, mode=mode, precision=precision)


def _real(array: Any, what: str) -> _codec.Array:
    found = np.asarray(array)
    if found.dtype.kind not in "fiub" or not np.isfinite(found).all():
        raise InvalidArgumentError(f"{what} must hold finite real numbers, got dtype {found.dtype}")
    return found


def _multiple_of_identity(other: Any, n: int) -> float | None:
    """The number c where `other` is the sparse matrix c I, else None."""
    matrix: Any = other if scipy.sparse.issparse(other) else None
    if matrix is None or matrix.shape != (n, n) or matrix.dtype.kind not in "fiub":
        return None
    diagonal, entries = matrix.diagonal(), matrix.tocoo()
    alone = not entries.data[entries.row != entries.col].any()
    return float(diagonal[0]) if alone and (diagonal == diagonal[0]).all() else None
