"""Lanczos iteration: a run that can be extended, and that says why it stopped.

The run keeps the projected matrix T = Q A Q^T, of a few numbers for each step. The
basis Q stays in the run's space (see `space`).

Source: Golub and Van Loan, Matrix Computations, 10.1 to 10.3; Wu and Simon 2000
(https://doi.org/10.1137/S0895479898334605) for the form of T after a restart.
"""

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Concatenate, NoReturn, ParamSpec, Self, TypeVar

import numpy as np
import scipy.linalg

from hvpd import _arrays
from hvpd._arguments import check_choice, integer
from hvpd._errors import HvpdError, InvalidArgumentError
from hvpd._krylov.results import Eigenpairs, Origin
from hvpd._krylov.ritz import WHICH, select, tolerance
from hvpd._krylov.runner import Runner
from hvpd._krylov.space import NotFiniteError, Resident, Space
from hvpd._krylov.vectors import Array, check_scale, scaled

REORTHOGONALIZE = ("full", "none")
"""Choices of `reorthogonalize`."""

DONE = "all steps that were asked for are done"
INVARIANT = "the space is invariant under the operator: all of its Ritz pairs are exact, up to rounding"
NOT_FINITE = "a product holds NaN or infinity: the run keeps the steps before it"

Progress = Callable[[int, float], object]
"""Called after each step with the steps so far, and with the current residual."""


def start_block(n: int, dtype: np.dtype[Any], v0: Any, seed: int, block: int) -> Array:
    """Return the start vectors as rows of shape (block, n).

    Args:
        n: Number of elements.
        dtype: float32 or float64.
        v0: Vector of shape (n,), or vectors as columns (n, block); None for random
            ones. They are drawn in float64 and rounded, so that a seed means the same
            vectors in both dtypes.
        seed: Seed of random vectors.
        block: Number of vectors.

    Raises:
        InvalidArgumentError: v0 has another shape, is zero or is not finite.
    """
    if v0 is None:
        return np.random.default_rng(seed).standard_normal((block, n)).astype(dtype)
    found = _arrays.vectors(v0, "v0")
    rows = found.reshape(1, -1) if found.ndim == 1 else found.T
    if found.ndim > 2 or rows.shape != (block, n) or found.dtype.kind not in "fiub":
        shape = f"({n},)" if block == 1 else f"({n}, {block})"
        raise InvalidArgumentError(
            f"v0 must be real, of shape {shape}, got {found.dtype} of shape {found.shape}", reason=_arrays.fault(found)
        )
    if not np.isfinite(rows).all():
        raise InvalidArgumentError(
            "v0 holds NaN or infinity: pass a finite start vector, or None for a random one", reason="NOT_FINITE"
        )
    if not rows.any(axis=1).all():
        raise InvalidArgumentError(
            "v0 is zero: a Krylov space needs a start vector, pass None for a random one", reason="DEGENERATE"
        )
    return np.ascontiguousarray(scaled(rows)[0], dtype)


_P = ParamSpec("_P")
_T = TypeVar("_T")


def _alone(method: "Callable[Concatenate[Lanczos, _P], _T]") -> "Callable[Concatenate[Lanczos, _P], _T]":
    """Return a method during which other threads wait for the run."""

    @functools.wraps(method)
    def locked(self: "Lanczos", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked


class Lanczos:
    """A run of Lanczos iteration, whose Krylov space can be extended and used.

    Made by `H.lanczos` and `hvpd.krylov.lanczos`. A run is a context manager, and
    `close` frees its basis. Threads may share a run: their calls wait for each other.

    Attributes:
        n: Number of elements of a vector.
        dtype: dtype of the basis.
        block: Number of start vectors.
        reorthogonalize: "full" or "none": what was done to keep the basis orthogonal.
        reason: Why the run stopped, as a sentence.
        breakdown: Whether the space is invariant. More steps then change nothing.
        closed: Whether the basis was freed. The numbers of the run stay.
        origin: Seed, digest, program, precision and dtype.

    Example:
        >>> with H.lanczos(200, seed=1) as run:
        ...     top = run.ritz(5)
        ...     run.extend(100)
    """

    def __init__(self, space: Space, start: Array, *, origin: Origin | None = None) -> None:
        self.n = space.n
        self.dtype = space.dtype
        self.block = len(start)
        self.reorthogonalize = space.reorthogonalize
        self.reason = DONE
        self.breakdown = False
        self.closed = False
        self.origin = origin or Origin()
        self._space = space
        self._lock = threading.RLock()
        self._steps = 0
        self._size = 0.0
        """Largest number of the steps so far, about the norm of a product."""
        self._known: tuple[Array, Array, Array] | None = None
        """What `decomposed` returns, until T changes. A request to the space may
        replace the numbers of T, because the space may repeat its steps."""
        self._alphas: list[Array] = []
        self._betas: list[Array] = []
        self._kept = np.zeros(0)
        """Ritz values that a restart kept: T begins with them, as a diagonal."""
        self._coupling = np.zeros((0, 0))
        """Coupling of the block after the kept values, of shape (r, kept)."""
        try:
            rank = len(space.append(start))
        except NotFiniteError:
            raise InvalidArgumentError(
                "the start vectors hold NaN or infinity: pass finite ones", reason="NOT_FINITE"
            ) from None
        if rank < len(start):
            raise InvalidArgumentError(
                f"the {len(start)} start vectors span a space of dimension {rank}: pass independent vectors",
                reason="DEGENERATE",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @_alone
    def close(self) -> None:
        """Free the basis. The numbers of the run stay.

        `ritz(vectors=False)` still gives values. `extend`, `combine` and Ritz vectors
        need the basis, and raise an error with the reason `RUN_CLOSED`.

        Example:
            >>> run.close()
        """
        self.closed = True
        self._space.close()

    def _check_open(self, what: str) -> None:
        if self.closed:
            raise HvpdError(
                f"this run is closed, and its basis is gone: {what} before the end of its `with` or its close(), or start "
                "another run",
                reason="RUN_CLOSED",
            )

    @_alone
    def extend(self, steps: int, *, progress: Progress | None = None) -> Self:
        """Take more steps. The result equals one longer run.

        Each step multiplies one block. The run stops early if the space becomes
        invariant (`breakdown`), or if a product is not finite; `reason` says so.

        Args:
            steps: Number of steps, of `block` vectors each.
            progress: Called after each step with the number of all steps, and with the
                norm of beta.

        Raises:
            InvalidArgumentError: The space would have more than n dimensions.
            HvpdError: The run is closed (reason `RUN_CLOSED`), or the operator is too
                small or too large for its dtype (reason `SCALE`).

        Example:
            >>> run.extend(100).ritz(5).residuals
        """
        steps = integer(steps, "steps", 0)
        self._check_open("call extend()")
        if self.breakdown:
            return self
        width = len(self._betas[-1]) if self._betas else self.block
        if self.size + steps * width > self.n and self.reorthogonalize == "full":
            raise InvalidArgumentError(
                f"{steps} more steps of {width} vectors exceed the dimension: the run has {self.size} vectors of n = {self.n}; "
                f"take at most {max((self.n - self.size) // width, 0)} steps",
                reason="STEPS",
            )
        self.reason, self._known = DONE, None
        try:
            for step in self._space.extend(steps):
                self._size = max(self._size, *(float(abs(part).max(initial=0.0)) for part in step))
                check_scale(self._size, self.n, self.dtype)
                self._alphas.append(step.alpha)
                self._betas.append(step.beta)
                self._steps, self._known = self._steps + 1, None
                if not len(step.beta):
                    self.breakdown, self.reason = True, INVARIANT
                if progress is not None:
                    progress(self._steps, float(np.linalg.norm(step.beta)))
        except NotFiniteError:
            self.reason = NOT_FINITE
        return self

    @property
    def id(self) -> str:
        """Return the id of the run on the server; empty if the basis is here.

        Example:
            >>> run.id
        """
        return self._space.id if isinstance(self._space, Resident) else ""

    @_alone
    def pin(self, seconds: int) -> None:
        """Keep the run on the device for seconds after its last use.

        Without a pin, a run comes back by itself if the server needed its memory. A pin
        saves the time that this takes. A run whose basis is here needs no pin.

        Args:
            seconds: 0 removes the pin.

        Raises:
            OverloadedError: Too much is pinned already (reason `PINNED`).

        Example:
            >>> run.pin(600)
        """
        seconds = integer(seconds, "seconds", 0)
        self._check_open("call pin()")
        if isinstance(self._space, Resident):
            self._known = None
            self._space.pin(seconds)

    @property
    def steps(self) -> int:
        """Return the number of steps that were taken.

        Example:
            >>> run.steps
        """
        return self._steps

    @property
    def products(self) -> int:
        """Return the number of vectors that were multiplied.

        Example:
            >>> run.products
        """
        return self._space.products

    @property
    @_alone
    def size(self) -> int:
        """Return the dimension of the projected matrix.

        Example:
            >>> run.size
        """
        return len(self._kept) + sum(len(alpha) for alpha in self._alphas)

    @property
    @_alone
    def alphas(self) -> Array | tuple[Array, ...]:
        """Return the diagonal of T: float64, one for each step since the last restart.

        For `block` > 1, a tuple of arrays of shape (b, b).

        Example:
            >>> scipy.linalg.eigh_tridiagonal(run.alphas, run.betas)
        """
        return np.array([alpha[0, 0] for alpha in self._alphas]) if self.block == 1 else tuple(self._alphas)

    @property
    @_alone
    def betas(self) -> Array | tuple[Array, ...]:
        """Return the subdiagonal of T: float64, one less than `alphas`.

        `scipy.linalg.eigh_tridiagonal(run.alphas, run.betas)` gives the Ritz values.
        For `block` > 1, a tuple of arrays of shape (b', b).

        Example:
            >>> scipy.linalg.eigh_tridiagonal(run.alphas, run.betas)
        """
        between = self._betas[:-1]
        # After a breakdown, beta has the shape (0, 1).
        return np.array([beta.sum() for beta in between]) if self.block == 1 else tuple(between)

    @property
    @_alone
    def residual(self) -> Array:
        """Return the last beta, which couples the space to its next block.

        It is float64 of shape (r, b); r is 0 after a breakdown.

        Example:
            >>> run.residual
        """
        return self._betas[-1] if self._betas else np.zeros((0, 0))

    @property
    @_alone
    def projected(self) -> Array:
        """Return T = Q^T A Q, float64 of shape (size, size).

        Example:
            >>> values = np.linalg.eigvalsh(run.projected)
        """
        T = np.zeros((self.size, self.size))
        kept = at = len(self._kept)
        np.fill_diagonal(T[:kept, :kept], self._kept)
        for number, (alpha, beta) in enumerate(zip(self._alphas, self._betas, strict=True)):
            end = at + len(alpha)
            T[at:end, at:end] = alpha
            if not number and kept:
                T[at:end, :kept], T[:kept, at:end] = self._coupling, self._coupling.T
            if number + 1 < len(self._alphas):
                T[end : end + len(beta), at:end], T[at:end, end : end + len(beta)] = beta, beta.T
            at = end
        return T

    @_alone
    def decomposed(self) -> tuple[Array, Array, Array]:
        """Return all Ritz values (size,), their coordinates (size, size) in the basis,
        and the couplings (r, size) to the next block. Values ascend.

        Example:
            >>> values, Y, couplings = run.decomposed()
        """
        known = self._decomposed()
        return known[0].copy(), known[1].copy(), known[2].copy()

    def _decomposed(self) -> tuple[Array, Array, Array]:
        """Return what `decomposed` does, not to be changed."""
        if self._known is None:
            self._known = self._decompose()
        return self._known

    def _decompose(self) -> tuple[Array, Array, Array]:
        if not self._alphas:  # Nothing yet, or nothing since a restart.
            return self._kept, np.eye(len(self._kept)), self._coupling
        if self.block == 1 and not len(self._kept):
            values, Y = scipy.linalg.eigh_tridiagonal(self.alphas, self.betas)
        else:
            values, Y = np.linalg.eigh(self.projected)
        return values, Y, self.residual @ Y[len(Y) - self.residual.shape[1] :]

    @_alone
    def ritz(self, k: int | None = None, which: str = "LA", *, vectors: bool = True, tol: float = 0.0) -> Eigenpairs:
        """Return Ritz pairs: approximate eigenpairs of the operator.

        Args:
            k: Number of pairs; None for all.
            which: "LA", "SA", "LM" or "BE", as in SciPy's `eigsh`.
            vectors: Whether to make the vectors. They take one combination of the
                basis; a run that keeps no basis returns None.
            tol: A pair is converged if its residual is at most tol times |value|; 0
                for rounding.

        Raises:
            InvalidArgumentError: k exceeds the dimension of the space.
            HvpdError: The run is closed, and vectors were asked for (reason
                `RUN_CLOSED`).

        Example:
            >>> run.ritz(5, which="SA").values
        """
        check_choice(which, "which", WHICH)
        count = self.size if k is None else self._count(k)
        vectors = vectors and self.reorthogonalize == "full"
        if vectors:
            self._check_open("call ritz()")
        values, Y, couplings = self._decomposed()
        ghosts = self._ghosts(values)
        chosen = select(values, count, which)
        residuals = np.linalg.norm(couplings[:, chosen], axis=0)
        found = self.combine(Y[:, chosen]) if vectors else None
        return Eigenpairs(
            values[chosen],
            found,
            residuals,
            residuals <= tolerance(values[chosen], values, tol, self.dtype),
            ghosts[chosen],
            self.products,
            self.reason,
            origin=self.origin,
        )

    def _count(self, k: Any) -> int:
        """Return a number of Ritz pairs, if the run has as many."""
        if isinstance(k, (int, np.integer)) and k > self.size:
            more = "" if self.breakdown or self.closed else "; extend() takes more steps"
            if not self.size:
                raise InvalidArgumentError(
                    f"the run has taken no step, so that it has no Ritz pairs: {self.reason}{more}",
                    reason="TOO_FEW_PAIRS",
                )
            size = "1 dimension" if self.size == 1 else f"{self.size} dimensions"
            raise InvalidArgumentError(
                f"k must be an integer from 1 to {self.size}, got {k}: the run has {size}, and {self.reason}{more}",
                reason="TOO_FEW_PAIRS",
            )
        return integer(k, "k", 1, self.size)

    @_alone
    def combine(self, Y: Any) -> Array:
        """Return Q @ Y: combinations of the basis vectors.

        Args:
            Y: Array of shape (m,) or (m, k), for the first m basis vectors.

        Returns:
            Array of shape (n,) or (n, k), in the dtype of the basis.

        Raises:
            InvalidArgumentError: Y has another shape, or the run keeps no basis.
            HvpdError: The run is closed (reason `RUN_CLOSED`).

        Example:
            >>> first = run.combine(np.eye(run.size)[:, 0])
        """
        self._check_open("call combine()")
        found = _arrays.host(Y, "Y")
        if found.ndim not in (1, 2) or len(found) > self._space.rows or found.dtype.kind not in "fiub":
            raise InvalidArgumentError(
                f"Y must be real, of shape (m,) or (m, k) with m up to {self._space.rows}, got {found.dtype} {found.shape}",
                reason=_arrays.fault(found),
            )
        rows = found[:, None] if found.ndim == 1 else found
        self._known = None
        columns = self._space.combine(np.asarray(rows, np.float64)).T
        return columns[:, 0] if found.ndim == 1 else columns

    @_alone
    def restart(self, keep: Array, *, fresh: int | None = None) -> None:
        """Continue from a few Ritz vectors, those at the positions `keep`.

        This is the thick restart of Wu and Simon. The space then has len(keep) vectors
        and the block that waits for its product.

        Args:
            keep: Positions among the ascending Ritz values.
            fresh: Seed of a random vector that replaces the waiting block; None to
                keep that block.

        Example:
            >>> run.restart(np.arange(run.size - 5, run.size))
        """
        self._check_open("call restart()")
        values, Y, couplings = self._decomposed()
        keep = np.asarray(keep)
        if (
            keep.ndim != 1
            or keep.dtype.kind not in "iu"
            or not ((keep >= 0) & (keep < len(values))).all()
            or len(np.unique(keep)) < len(keep)
        ):
            raise InvalidArgumentError(
                f"keep must be different positions from 0 to {len(values) - 1} among the Ritz values, got {keep.tolist()}",
                reason="INVALID_OPTION",
            )
        self._space.restart(Y[:, keep], waiting=fresh is None)
        self._kept, self._coupling = values[keep], couplings[:, keep]
        self._alphas, self._betas, self._known = [], [], None
        if fresh is not None:
            self.enlarge(fresh)
            self._coupling = np.zeros((1, len(keep)))

    @_alone
    def enlarge(self, seed: int) -> None:
        """Go on after a breakdown, from a random vector outside of the space.

        Example:
            >>> run.enlarge(seed=1)
        """
        self._check_open("call enlarge()")
        self._known = None
        self._space.append(np.random.default_rng([self.n, seed]).standard_normal((1, self.n)).astype(self.dtype))
        self.breakdown = False

    def _ghosts(self, values: Array) -> Array:
        """Return which values repeat the one before them."""
        found = np.zeros(len(values), bool)
        if self.reorthogonalize == "none" and len(values):
            near = np.sqrt(np.finfo(self.dtype).eps) * abs(values).max()
            found[1:] = np.diff(values) <= near
        return found

    def __reduce__(self) -> NoReturn:
        raise HvpdError(
            "a run of lanczos cannot be pickled or copied, because its basis stays where it is: take run.ritz(k), which can be pickled, and "
            "which .save writes to a file",
            reason="NOT_PICKLABLE",
        )

    def __repr__(self) -> str:
        return f"<Lanczos {self.n}x{self.n} {self.dtype}: {self.steps} steps, {self.products} products; {self.reason}>"


def lanczos(runner: Runner, steps: int, v0: Any, seed: int, block: int, reorthogonalize: str) -> Lanczos:
    """Run Lanczos iteration; see `hvpd.krylov.lanczos`."""
    check_choice(reorthogonalize, "reorthogonalize", REORTHOGONALIZE)
    block = integer(block, "block", 1, runner.n)
    seed = integer(seed, "seed", 0)
    steps = integer(steps, "steps", 0)
    if reorthogonalize == "full" and steps * block > runner.n:
        raise InvalidArgumentError(
            f"steps * block must be at most n = {runner.n} with reorthogonalize='full', got {steps} * {block}: take at most "
            f"n // block = {runner.n // block} steps",
            reason="STEPS",
        )
    start = start_block(runner.n, runner.dtype, v0, seed, block)
    origin = runner.seeded(seed) if v0 is None else runner.origin
    with runner.running("lanczos", steps) as tick:
        run = Lanczos(runner.space(reorthogonalize), start, origin=origin)
        return run.extend(steps, progress=tick)
