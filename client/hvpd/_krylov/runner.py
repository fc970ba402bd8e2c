"""How the Krylov iterations of one operator run: here, one product at a time.

`Runner` is what an operator's method `_krylov()` returns, and `runner(A)` makes one for
any symmetric operator. All calls of `hvpd.krylov`, and all methods of operators, go
through a runner. A runner that has a server overrides its primitives:

- `space`: where `lanczos` and `eigsh` keep a basis;
- `stepping`: the steps of a solve;
- `tridiagonals`: independent Lanczos iterations from random vectors;
- `sketch`: the small matrices of a randomized range, for traces;
- `estimate`: means over random vectors, for traces and diagonals;
- `solve` and `steihaug`: whole linear solves.

All that it does not override runs through `multiply`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from hvpd._errors import InvalidArgumentError
from hvpd._krylov import trust_region
from hvpd._krylov.computed import Estimated, Solved
from hvpd._krylov.conjugate_gradients import BlockCG
from hvpd._krylov.preconditioning import preconditioner
from hvpd._krylov.probes import BASIS_BYTES, Sketch, Ticking, Tridiagonals, sketched, spherical, tridiagonals
from hvpd._krylov.results import Origin
from hvpd._krylov.short_recurrence import ShortRecurrence
from hvpd._krylov.space import LocalSpace, Multiply, Space
from hvpd._krylov.symmetry import check_symmetric
from hvpd._krylov.vectors import Array
from hvpd._progress import Reporter

Advance = Callable[[Array, int], Iterator[Array]]
"""Takes steps until the residuals are at most its first argument, and at most as many
as its second. Yields the norms of the residuals after each step.
"""


class Runner:
    """Runs Krylov iterations of one symmetric operator by streamed products.

    Args:
        multiply: Multiplies a block V[k, n] in the dtype.
        n: Number of elements of a vector.
        dtype: dtype of products: float32 or float64.
        origin: What results say about the operator.
        reporter: Shows progress.
        label: Name of the operator in progress and messages.

    Attributes:
        products: Number of vectors that this runner has multiplied.
    """

    def __init__(
        self,
        multiply: Multiply,
        n: int,
        dtype: np.dtype[Any],
        *,
        origin: Origin | None = None,
        reporter: Reporter | None = None,
        label: str = "",
    ) -> None:
        self.n = n
        self.dtype = dtype
        self.origin = origin or Origin(dtype=dtype.name)
        self.label = label
        self.products = 0
        self._multiply = multiply
        self._reporter = reporter or Reporter()

    def multiply(self, rows: Array) -> Array:
        """Multiply V[k, n] -> A V[k, n]."""
        found = self._multiply(np.ascontiguousarray(rows, self.dtype))
        self.products += len(rows)
        return found

    def space(self, reorthogonalize: str = "full") -> Space:
        """Return an empty Krylov space."""
        return LocalSpace(self.multiply, self.n, self.dtype, reorthogonalize=reorthogonalize)

    @contextlib.contextmanager
    def stepping(self, state: BlockCG | ShortRecurrence, precondition: Multiply | None) -> Iterator[Advance]:
        """Yield the function that takes steps of an iteration; see `BlockCG.advance`.

        The state has all steps after the `with` statement.

        Args:
            state: The iteration.
            precondition: Its preconditioner.
        """
        yield state.advance

    def solve(
        self,
        B: Array,
        X: Array | None,
        shifts: Array,
        M: Any,
        *,
        tol: float,
        maxiter: int,
        method: str,
        tick: Ticking,
    ) -> Solved | None:
        """Return the solutions of linear systems, or None to compute them by products;
        see `solve.solved`. M is what the user gave.
        """
        return None

    def estimate(self, of_diagonal: bool, method: str, products: int, seed: int, tick: Ticking) -> Estimated | None:
        """Return an estimate, or None to compute it by products; see
        `trace.estimated`.
        """
        return None

    def tridiagonals(
        self, *, seed: int, probes: int, steps: int, tick: Ticking, basis_bytes: int = BASIS_BYTES
    ) -> Tridiagonals:
        """Run Lanczos iteration from the random signs of a seed; see `probes`."""
        return tridiagonals(
            self.multiply,
            self.n,
            self.dtype,
            seed=seed,
            probes=probes,
            steps=steps,
            tick=tick,
            basis_bytes=basis_bytes,
        )

    def sketch(self, seed: int, count: int) -> Sketch:
        """Return the sketch from `count` spherical vectors of a seed; see `probes`."""
        return sketched(self.multiply, spherical(seed, count, self.n, self.dtype)).sketch

    def steihaug(self, gradient: Array, radius: float, *, tol: float, maxiter: int, M: Any = None) -> trust_region.Step:
        """Return the step of a trust region; see `trust_region.steihaug`. M is what the
        user gave.
        """
        precondition = preconditioner(M, self.n, self.dtype)
        return trust_region.steihaug(
            self.multiply, gradient.astype(self.dtype), radius, tol=tol, maxiter=maxiter, precondition=precondition
        )

    def seeded(self, seed: int) -> Origin:
        """Return what results from random vectors say about the operator."""
        return dataclasses.replace(self.origin, seed=seed)

    @contextlib.contextmanager
    def running(self, name: str, total: int | None = None) -> Iterator[Ticking]:
        """Show progress during a `with` statement. Yield the function to call."""
        title = f"{name} of {self.label}" if self.label else name
        with self._reporter.stage(title, total, "steps") as stage:

            def tick(done: int, residual: float) -> None:
                stage.done = done
                stage.name = f"{title}, residual {residual:.1e}" if residual else title

            yield tick


def runner(A: Any) -> Runner:
    """Return the runner of a symmetric operator.

    Args:
        A: An operator with a method `_krylov`; or any real square array, sparse matrix
            or LinearOperator, which must be symmetric.

    Raises:
        InvalidArgumentError: A is not square or not real, or an array or a sparse
            matrix is not symmetric.
    """
    make = getattr(A, "_krylov", None)
    if make is not None:
        found: Runner = make()
        return found
    try:
        operator: Any = aslinearoperator(A)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"A must be a symmetric array, sparse matrix or LinearOperator, got {type(A).__name__}: {error}",
            reason="NOT_SYMMETRIC",
        ) from error
    dtype = np.dtype(operator.dtype if operator.dtype is not None else np.float64)
    if operator.shape[0] != operator.shape[1] or dtype.kind not in "fiub":
        raise InvalidArgumentError(
            f"A must be a real symmetric operator, got shape {operator.shape}, dtype {dtype}", reason="NOT_SYMMETRIC"
        )
    working: np.dtype[Any] = np.dtype(np.float32 if dtype in (np.float32, np.float16) else np.float64)
    if scipy.sparse.issparse(A) or isinstance(A, np.ndarray):
        check_symmetric(A, "A", working, 1e3 * float(np.finfo(working).eps))
    program = type(A).__name__

    def multiply(rows: Array) -> Array:
        return np.asarray(_columns(operator, rows.T), working).T

    return Runner(multiply, operator.shape[0], working, origin=Origin(program=program, dtype=working.name))


def _columns(operator: "LinearOperator[Any]", columns: Array) -> Array:
    found: Array = operator.matmat(columns) if columns.shape[1] > 1 else operator.matvec(columns[:, 0]).reshape(-1, 1)
    return found
