"""Curvature at a point as SciPy's LinearOperator.

Multiples, shifts, low-rank updates and principal blocks of it stay one operator. A
product asks the point once, and everything that needs no curvature is computed here.
Results of many products have files of their own: `diagonal`, `sparse`, `low_rank`.
"""

import contextlib
import copy
import dataclasses
import numbers
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, overload

import numpy as np
import numpy.typing as npt
import scipy.sparse
from scipy.sparse.linalg import LinearOperator

from hvpd import _arrays, _html, krylov
from hvpd._arguments import check_choice, finite
from hvpd._errors import InvalidArgumentError
from hvpd._krylov.results import DiagonalEstimate, Origin
from hvpd._krylov.runner import Runner
from hvpd._operators.symmetric import SymmetricOperator
from hvpd._wire import codec, protocol, pytree
from hvpd.v1 import curvature_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hvpd._jax.functions import Structure
    from hvpd._operators.blocks import Multiply
    from hvpd._operators.diagonal import Diagonal
    from hvpd._operators.low_rank import LowRankOperator
    from hvpd._point import Point


class Update(NamedTuple):
    """A symmetric term U C U^T of low rank."""

    U: codec.Array
    """Factor of shape (n, r)."""
    C: codec.Array
    """Symmetric factor of shape (r, r)."""


class CurvatureOperator(SymmetricOperator):
    """The operator scale A + shift I + U C U^T, where A is the curvature at a point.

    It is symmetric and real, of shape (n, n), in the objective's dtype. Each of `A @ v`
    and `A @ V` takes one round trip, because a block is multiplied as a block. Vectors
    of another real dtype are converted.

    Multiples by a real number (`2 * A`, `-A`, `A / 3`) stay one operator, with one
    round trip. So do sums with a multiple of `scipy.sparse.identity`, and sums and
    differences of operators of the same curvature. SciPy's own arithmetic makes all
    other results.

    Attributes:
        point: The point of the curvature.
        kind: The curvature: a value of `hvpd.v1.curvature_pb2.Operator`.
        seed: Seed of curvature that is drawn.
        mode: How products of a Hessian are made; empty for the objective's mode.
        precision: Precision of matrix products that state none; empty for the
            objective's.
        scale: Factor of the curvature.
        shift: Added to the diagonal, on the client.
        update: The low-rank term, a pair `(U, C)`; None for none.
        leaves: Names of the leaves of x of a principal block; empty for the whole.

    Example:
        >>> H = objective.at(x).hessian(shift=1e-3)
        >>> step, info = scipy.sparse.linalg.cg(H, -gradient)
    """

    def __init__(
        self,
        point: "Point",
        kind: int = curvature_pb2.OPERATOR_HESSIAN,
        *,
        seed: int = 0,
        scale: float = 1.0,
        shift: float = 0.0,
        mode: protocol.ProductMode | Literal[""] = "",
        precision: protocol.ProductPrecision | Literal[""] = "",
    ) -> None:
        check_choice(mode, "mode", ("", *protocol.PRODUCT_MODES))
        check_choice(precision, "precision", ("", *protocol.PRODUCT_PRECISIONS))
        super().__init__(point.dtype, point.n)
        self.point = point
        self.kind = kind
        self.seed = seed
        self.mode = mode
        self.precision = precision
        self.scale = finite(scale, "scale")
        self.shift = finite(shift, "shift")
        self.update: Update | None = None
        self.leaves: tuple[str, ...] = ()
        self._positions: tuple[int, ...] = ()
        self._indices: codec.Array | None = None

    # Called by SciPy

    def _matmat(self, X: Any) -> codec.Array:
        return self._multiply(np.asarray(X).T).T

    def _matvec(self, x: Any) -> codec.Array:
        return self._multiply(np.asarray(x).reshape(1, -1)).reshape(-1)

    def _structure(self) -> "Structure | None":
        return None if self.leaves else self.point.objective

    # Products of vectors that are rows

    def quadratic_form(self, V: Any) -> codec.Array | float:
        """Return the curvature along directions, v'(scale A + shift I + U C U')v.

        Only these numbers come back from the server.

        Args:
            V: One direction of shape (n,), or k directions as columns of shape (n, k).

        Returns:
            A float for one direction; an array of shape (k,) for several.

        Raises:
            InvalidArgumentError: V has another shape, or is not real.

        Example:
            >>> curvature = H.quadratic_form(direction)
        """
        directions = _arrays.vectors(V, "V")
        if directions.ndim not in (1, 2) or len(directions) != self.shape[0]:
            raise InvalidArgumentError(
                f"directions must have the shape ({self.shape[0]},) or ({self.shape[0]}, k), got {directions.shape}",
                reason="SHAPE",
            )
        block = self._block(directions.reshape(self.shape[0], -1).T)
        form = self.point.quadratic_form(block, *self._asked) * self.dtype.type(self.scale)
        if self.shift:
            form += self.dtype.type(self.shift) * np.einsum("kn,kn->k", block, block)
        if self.update is not None:
            inner = block @ self.update.U
            form += np.einsum("kr,rs,ks->k", inner, self.update.C, inner)
        return float(form[0]) if directions.ndim == 1 else _arrays.back(form, V)

    def _block(self, rows: codec.Array) -> codec.Array:
        """Return V[k,n] in the objective's dtype."""
        if rows.dtype != self.dtype and not (codec.is_real_floating(rows.dtype) or rows.dtype.kind in "iub"):
            raise InvalidArgumentError(
                f"a Hessian multiplies real vectors, got dtype {rows.dtype}"
                + (": multiply the real and the imaginary part" if rows.dtype.kind == "c" else ""),
                reason="DTYPE",
            )
        return np.ascontiguousarray(rows, dtype=self.dtype)

    def _multiply(self, rows: codec.Array) -> codec.Array:
        """Multiply V[k,n] -> (scale A + shift I + U C U^T) V[k,n]."""
        block = self._block(rows)
        product = self._curvature(block)
        if self.scale != 1.0:
            product *= self.dtype.type(self.scale)
        if self.shift:
            product += self.dtype.type(self.shift) * block
        if self.update is not None:
            product += (block @ self.update.U) @ self.update.C @ self.update.U.T
        return product

    def _curvature(self, block: codec.Array) -> codec.Array:
        """Multiply V[k,n] -> A V[k,n], without scale, shift and update."""
        return self.point.multiply(block, *self._asked)

    @contextlib.contextmanager
    def _counted(self, name: str, total: int | None = None) -> "Iterator[Multiply]":
        """Yield `_curvature`, and show the number of vectors that it has multiplied."""
        with self.point.reporter.stage(f"{name} of {self.point.objective.label}", total, "products") as stage:

            def multiply(rows: codec.Array) -> codec.Array:
                found = self._curvature(rows)
                stage.done += len(rows)
                return found

            yield multiply

    @property
    def _asked(self) -> tuple[int, int, tuple[int, ...], str, str]:
        """Return the curvature as `Point.multiply` takes it."""
        return self.kind, self.seed, self._positions, self.mode, self.precision

    def _krylov(self) -> Runner:
        """Return what runs Krylov iterations of this operator; see `hvpd._krylov`."""
        objective = self.point.objective
        origin = Origin(
            digest=objective.digest,
            program=curvature_pb2.Operator.Name(self.kind).removeprefix("OPERATOR_").lower(),  # type: ignore[arg-type]  # an open enum
            precision=self.precision or objective.precision,
            dtype=self.dtype.name,
        )
        terms = (self.scale, self.shift, self.update)
        return self.point._runner(self._multiply, self.shape[0], origin, self._asked, *terms)  # noqa: SLF001 - its own point

    # Arithmetic that results in one operator

    def shifted(self, shift: float) -> Self:
        """Return this plus `shift` times the identity, still with one round trip.

        Example:
            >>> step, info = cg(H.shifted(1e-3), -gradient)
        """
        return self._changed(shift=self.shift + finite(shift, "shift"))

    def updated(self, U: Any, C: Any = None) -> Self:
        """Return this plus U C U^T, which the client computes.

        Args:
            U: Array of shape (n, r), or (n,) for one column.
            C: Symmetric array of shape (r, r), or a diagonal of shape (r,). None for
                the identity.

        Raises:
            InvalidArgumentError: The shapes do not fit, C is not symmetric, or elements
                are not real and finite.

        Example:
            >>> secant = H.updated(y, [1.0 / (y @ s)])
        """
        U = _real(U, "U")
        U = U[:, None] if U.ndim == 1 else U
        if U.ndim != 2 or len(U) != self.shape[0]:
            raise InvalidArgumentError(f"U must have the shape ({self.shape[0]}, r), got {U.shape}", reason="SHAPE")
        r = U.shape[1]
        C = np.eye(r) if C is None else _real(C, "C")
        C = np.diag(C) if C.ndim == 1 else C
        if C.shape != (r, r):
            raise InvalidArgumentError(
                f"C must have the shape ({r}, {r}) or ({r},), for U has {r} columns; got {C.shape}", reason="SHAPE"
            )
        if not np.allclose(C, C.T, rtol=1e-6, atol=0.0):
            raise InvalidArgumentError(
                "C must be symmetric, otherwise U C U^T is not: pass (C + C.T) / 2 if that is meant",
                reason="NOT_SYMMETRIC",
            )
        return self._changed(update=self._joined(Update(U.astype(self.dtype), C.astype(self.dtype))))

    def _joined(self, more: Update | None) -> Update | None:
        """Return the sum of the low-rank term and another."""
        if self.update is None or more is None:
            return self.update or more
        left, right = len(self.update.C), len(more.C)
        C = np.zeros((left + right, left + right), self.dtype)
        C[:left, :left], C[left:, left:] = self.update.C, more.C
        return Update(np.hstack([self.update.U, more.U]), C)

    def _scaled(self, factor: float) -> Self:
        factor = finite(factor, "the factor")
        update = self.update and Update(self.update.U, self.dtype.type(factor) * self.update.C)
        return self._changed(scale=factor * self.scale, shift=factor * self.shift, update=update)

    def _changed(self, **attributes: Any) -> Self:
        changed = copy.copy(self)
        for name, value in attributes.items():
            setattr(changed, name, value)
        return changed

    @overload  # type: ignore[override]  # the stubs promise a class that SciPy keeps to itself
    def __mul__(self, other: float) -> Self: ...
    @overload
    def __mul__(self, other: "LinearOperator[Any]") -> "LinearOperator[Any]": ...
    @overload
    def __mul__(self, other: npt.ArrayLike) -> codec.Array: ...
    def __mul__(self, other: Any) -> Any:
        return self._scaled(float(other)) if isinstance(other, numbers.Real) else super().__mul__(other)

    @overload  # type: ignore[override]  # as __mul__
    def __rmul__(self, other: float) -> Self: ...
    @overload
    def __rmul__(self, other: npt.ArrayLike) -> codec.Array: ...
    def __rmul__(self, other: Any) -> Any:
        return self._scaled(float(other)) if isinstance(other, numbers.Real) else super().__rmul__(other)

    def __truediv__(self, other: Any) -> Self:  # type: ignore[override]  # as __mul__
        if isinstance(other, numbers.Real) and other:
            return self._scaled(1.0 / float(other))
        refused: Any = super().__truediv__(other)
        return refused  # type: ignore[no-any-return]  # a complex number gives SciPy's own operator

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
        return self.point is other.point and self._asked == other._asked  # noqa: SLF001 - an operator, too

    # Principal blocks

    @property
    def indices(self) -> codec.Array:
        """Return the positions of the rows in the flat x, integers of shape (n,).

        Example:
            >>> block = H.block("out")
            >>> block @ v[block.indices]
        """
        return np.arange(self.point.n) if self._indices is None else self._indices

    def block(self, *names: str) -> Self:
        """Return the principal block of some leaves of x, without all other rows and
        columns.

        A product takes one round trip and costs as much as the block: only its elements
        travel, and nothing is differentiated by the other leaves. The first product of
        a block waits until the server has compiled it, unless the objective was
        registered with it (`register(blocks=...)`).

        Args:
            names: Keys, indices and fields of the registered pytree joined by slashes,
                such as "hidden/w" or "layers/0". A name above several leaves means all
                of them. `objective.slices()` lists the leaves. The block has the order
                of the flat x, with the names in any order.

        Raises:
            InvalidArgumentError: There is no such leaf; the message lists the leaves.

        Example:
            >>> block = H.block("hidden/w", "out")
            >>> block @ v[block.indices]
        """
        slices = self.point.objective.slices()
        every = tuple(slices)
        known = self.leaves or every
        kept = tuple(known[position] for position in pytree.select(known, names))
        positions = tuple(every.index(leaf) for leaf in kept)
        indices = np.concatenate([np.arange(slices[leaf].start, slices[leaf].stop) for leaf in kept])
        update = self.update and Update(self.update.U[np.isin(self.indices, indices)], self.update.C)
        return self._changed(
            shape=(len(indices),) * 2, leaves=kept, _positions=positions, _indices=indices, update=update
        )

    # Results of many products

    @overload  # type: ignore[override]  # exact for small n by default, unlike the operators without a point
    def diagonal(
        self, *, samples: int | None = None, seed: int = 0, method: Literal["hutchinson"] = ...
    ) -> "Diagonal": ...
    @overload
    def diagonal(
        self, *, samples: int | None = None, seed: int = 0, method: Literal["xdiag"], products: int | None = None
    ) -> "DiagonalEstimate": ...
    def diagonal(
        self,
        *,
        samples: int | None = None,
        seed: int = 0,
        method: Literal["hutchinson", "xdiag"] = "hutchinson",
        products: int | None = None,
    ) -> "Diagonal | DiagonalEstimate":
        """Return the diagonal of shape (n,): exact for small n, otherwise an estimate.

        The exact diagonal takes n products, by blocks of unit vectors. The estimate is
        Hutchinson's with random signs v: the mean of v * (A v)
        (https://doi.org/10.1016/j.apnum.2007.01.003). The variance of one sample of
        element i is the sum of the squares of row i of A without its diagonal. Shift
        and low-rank update are added exactly and cost no accuracy. With method="xdiag",
        the estimate is that of `hvpd.krylov.diagonal`, which is better if eigenvalues
        decay.

        Args:
            samples: Number of random vectors, at least 2. From n on, the diagonal is
                exact. None: exact up to n = 2048, and 256 samples above.
            seed: Seed of the random signs.
            method: "hutchinson" or "xdiag".
            products: Number of products for "xdiag"; None for 100.

        Returns:
            `values`, `standard_error` (0 for an exact diagonal) and the number of
            `products`.

        Example:
            >>> found = H.diagonal(samples=64)
            >>> found.values, found.standard_error
        """
        from hvpd._operators import diagonal as _diagonal

        check_choice(method, "method", ("hutchinson", "xdiag"))
        if method == "xdiag":
            bare = self._changed(shift=0.0, update=None)
            estimate = krylov.diagonal(bare, method, products if samples is None else samples, seed)
            exact = (estimate.values + self._exact_diagonal()).astype(self.dtype)
            return dataclasses.replace(estimate, values=exact)
        with self._counted("diagonal") as multiply:
            found = _diagonal.diagonal(multiply, self.shape[0], self.dtype, samples=samples, seed=seed)
        values = self.scale * found.values + self._exact_diagonal()
        return found._replace(
            values=values.astype(self.dtype), standard_error=(abs(self.scale) * found.standard_error).astype(self.dtype)
        )

    def _exact_diagonal(self) -> codec.Array:
        """Return the diagonal of shift I + U C U^T."""
        values = np.full(self.shape[0], self.shift)
        if self.update is not None:
            values += np.einsum("ij,jk,ik->i", self.update.U, self.update.C, self.update.U)
        return values

    def sparse(
        self, pattern: Any = None, *, max_products: int = 2048, verify: bool = True, seed: int = 0
    ) -> "scipy.sparse.csr_array":
        """Return the sparse, exactly symmetric matrix from as few products as possible.

        With a pattern, columns that can be told apart share a product. All products go
        in one block. Their number is the number of colours in a star colouring of the
        pattern's graph: 3 for a tridiagonal matrix, 2 for an arrow. Sources: Curtis,
        Powell, Reid 1974; Coleman, Moré 1984 (https://doi.org/10.1007/BF02612334);
        Gebremedhin, Manne, Pothen 2005 (https://doi.org/10.1137/S0036144504444711).

        Without a pattern it takes n products, by blocks of unit vectors, and drops
        exact zeros. Fewer products cannot find a pattern. Elements that are zero at
        this x only are dropped too, so the result is a pattern for this x.
        `asdex.hessian_sparsity(fun, x)` gives the pattern for all x from the function,
        and can be passed as it is.

        Args:
            pattern: The pattern of A: a sparse array with its stored entries, a dense
                array with its nonzero elements, or asdex's SparsityPattern. One
                triangle is enough, and the diagonal may be missing.
            max_products: Largest number of products to take.
            verify: Whether to compare the result with one more product, by a random
                vector in the same block.
            seed: Seed of this random vector.

        Raises:
            InvalidArgumentError: The pattern has another shape, misses entries, or
                takes more than `max_products`. Or the operator has a low-rank update,
                which is dense.

        Example:
            >>> band = np.abs(np.subtract.outer(range(n), range(n))) <= 1
            >>> tridiagonal = H.sparse(band)
        """
        from hvpd._operators import sparse as _sparse

        if self.update is not None:
            raise InvalidArgumentError(
                f"with its rank-{len(self.update.C)} update this operator is a dense matrix: call sparse() before updated()",
                reason="SPARSITY_PATTERN",
            )
        n = self.shape[0]
        with self._counted("sparse") as multiply:
            if pattern is None:
                matrix = _sparse.detect(multiply, n, self.dtype, max_products=max_products)
            else:
                structure = _sparse.structure(pattern, n)
                matrix = _sparse.recover(
                    multiply, structure, self.dtype, max_products=max_products, verify=verify, seed=seed
                )
        if self.scale != 1.0:
            matrix.data *= self.dtype.type(self.scale)
        if self.shift:
            diagonal: Any = np.full((1, n), self.shift, self.dtype)
            matrix = scipy.sparse.csr_array(matrix + scipy.sparse.dia_array((diagonal, [0]), shape=(n, n)))
        return matrix

    def low_rank(self, rank: int, *, seed: int = 0, oversampling: int = 10, passes: int = 2) -> "LowRankOperator":
        """Return the eigenpairs of largest magnitude, as an operator without round
        trips.

        They are approximate, from a randomized eigendecomposition: Rayleigh-Ritz on the
        block Krylov space of random vectors. It takes `passes` round trips of min(rank
        + oversampling, n) vectors. Sources: Halko, Martinsson, Tropp 2011
        (https://doi.org/10.1137/090771806); Musco, Musco 2015
        (https://arxiv.org/abs/1504.05477). The shift is left out, and is added to the
        result.

        Args:
            rank: Number of eigenpairs to keep, from 1 to n.
            seed: Seed of the random vectors.
            oversampling: Number of vectors beyond the rank.
            passes: Number of blocks of products. More give more accuracy if eigenvalues
                decay slowly.

        Example:
            >>> H.low_rank(10).eigenvalues
        """
        from hvpd._operators import low_rank as _lowrank

        with self.point.reporter.stage(f"low_rank of {self.point.objective.label}"):
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

    def _repr_html_(self) -> str:
        kind = curvature_pb2.Operator.Name(self.kind).removeprefix("OPERATOR_").lower()  # type: ignore[arg-type]  # an open enum
        facts = {
            "curvature": kind.replace("_", " "),
            "shape": f"{self.shape[0]} x {self.shape[1]}",
            "dtype": self.dtype,
            "leaves": ", ".join(self.leaves),
            "mode": self.mode,
            "precision": self.precision,
            "scale": f"{self.scale:g}" if self.scale != 1.0 else "",
            "shift": f"{self.shift:g}" if self.shift else "",
            "update": f"rank {len(self.update.C)}" if self.update is not None else "",
        }
        return _html.facts(f"{type(self).__name__} of {self.point.objective.label}", facts)


class HessianOperator(CurvatureOperator):
    """The operator scale H + shift I + U C U^T, where H is the Hessian at a point.

    Made by `Point.hessian`; see `CurvatureOperator`.

    Example:
        >>> H = objective.at(x).hessian()
        >>> top = scipy.sparse.linalg.eigsh(H, k=5, return_eigenvectors=False)
    """

    def __init__(
        self,
        point: "Point",
        shift: float = 0.0,
        *,
        mode: protocol.ProductMode | Literal[""] = "",
        precision: protocol.ProductPrecision | Literal[""] = "",
    ) -> None:
        super().__init__(point, curvature_pb2.OPERATOR_HESSIAN, shift=shift, mode=mode, precision=precision)


def _real(array: Any, what: str) -> codec.Array:
    found = np.asarray(array)
    if found.dtype.kind not in "fiub" or not np.isfinite(found).all():
        raise InvalidArgumentError(f"{what} must hold finite real numbers, got dtype {found.dtype}", reason="DTYPE")
    return found


def _multiple_of_identity(other: Any, n: int) -> float | None:
    """Return c if `other` is the sparse matrix c I; otherwise None."""
    matrix: Any = other if scipy.sparse.issparse(other) else None
    if matrix is None or matrix.shape != (n, n) or matrix.dtype.kind not in "fiub":
        return None
    diagonal, entries = matrix.diagonal(), matrix.tocoo()
    alone = not entries.data[entries.row != entries.col].any()
    return float(diagonal[0]) if alone and (diagonal == diagonal[0]).all() else None
