"""Shifted CG and MINRES from one Lanczos recurrence, which keeps no basis.

The Krylov spaces of A and of A + shift I from one vector are the same. So one
recurrence serves all shifts of a right-hand side, with one product for each step.
Several right-hand sides run side by side, and their products go as one block.

`linked` takes a step of the recurrences. `advanced_cg` and `advanced_minres` take the
same step of the solutions, for m right-hand sides and s shifts of each. These three
change nothing in place, and compute with NumPy or with jax: a server compiles them into
programs of several steps. `ShortRecurrence` is the iteration in NumPy.

Source: Paige and Saunders 1975 (https://doi.org/10.1137/0712047); Frommer and Maass
1999 (https://doi.org/10.1137/S1064827596313310) for the shifts.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from hvpd._errors import InvalidArgumentError
from hvpd._krylov import vectors
from hvpd._krylov.conjugate_gradients import IndefiniteError
from hvpd._krylov.space import Multiply, NotFiniteError

Array = Any
"""An array of NumPy or of jax."""


class Arithmetic(NamedTuple):
    """What a step computes with."""

    np: Any
    """numpy, or jax.numpy."""
    dots: Callable[[Any, Any], Any]
    """Returns the inner product of each pair of rows, in float64."""
    check: Callable[[Any], None]
    """Receives r' M r for the rows r of a block. With NumPy, it raises an error if M is
    not positive definite. With jax, it does nothing, and the step then holds NaN.
    """


class Links(NamedTuple):
    """The state of m recurrences between two steps."""

    before: Array
    """The vectors before the last ones, of shape (m, n)."""
    u: Array
    """The last vectors, not preconditioned, of shape (m, n)."""
    v: Array
    """The last vectors, preconditioned, of shape (m, n): they wait for a product."""
    coupling: Array
    """Coupling of the last two vectors, float64 of shape (m,); 0 before all steps."""
    size: Array
    """Lower bounds of the norms of the preconditioned operators, of shape (m,)."""


class Link(NamedTuple):
    """One step of m recurrences."""

    v: Array
    """Lanczos vectors, preconditioned, of shape (m, n)."""
    coupling: Array
    """Coupling to the vector before, of shape (m,)."""
    alpha: Array
    """v' A v, of shape (m,)."""
    beta: Array
    """Coupling to the next vector, of shape (m,); 0 if the space is invariant."""
    following: Array
    """The next vector, not preconditioned, of shape (m, n)."""


def linked(links: Links, product: Array, precondition: Multiply | None, arithmetic: Arithmetic) -> tuple[Link, Links]:
    """Return the next step of m recurrences, and the state after it.

    Args:
        links: The state.
        product: A v.
        precondition: Multiplies by M; None for the identity.
        arithmetic: NumPy or jax.
    """
    xp, dtype = arithmetic.np, product.dtype
    w = product - links.coupling[:, None].astype(dtype) * links.before
    alpha = arithmetic.dots(links.v, w)
    w = w - alpha[:, None].astype(dtype) * links.u
    size = xp.maximum(links.size, abs(alpha) + links.coupling)
    following, z, beta = _normalised(w, precondition, arithmetic)
    ended = beta <= 10 * float(np.finfo(dtype).eps) * size
    beta = xp.where(ended, 0.0, beta)
    following, z = (xp.where(ended[:, None], dtype.type(0), rows) for rows in (following, z))
    return Link(links.v, links.coupling, alpha, beta, following), Links(links.u, following, z, beta, size)


def _normalised(R: Array, precondition: Multiply | None, arithmetic: Arithmetic) -> tuple[Array, Array, Array]:
    """Return R and M R over the norms of R in the inner product of M; and the norms."""
    xp = arithmetic.np
    Z = R if precondition is None else precondition(R)
    squares = arithmetic.dots(R, Z)
    if precondition is not None:
        arithmetic.check(squares)
    sizes = xp.sqrt(squares)
    scale = (1.0 / xp.where(sizes > 0, sizes, 1.0))[:, None].astype(R.dtype)
    following = R * scale
    return following, following if precondition is None else Z * scale, sizes


class CG(NamedTuple):
    """The state of CG for A + shift I."""

    X: Array
    """Solutions, of shape (m, s, n)."""
    P: Array
    """Directions, of shape (m, s, n)."""
    norms: Array
    """Norms of the residuals, float64 of shape (m, s)."""
    zeta: Array
    """Lengths of the last steps over the curvature, of shape (m, s)."""
    d: Array
    """Pivots of L D L', of shape (m, s): curvatures along the directions."""


def advanced_cg(state: CG, link: Link, shifts: Array, arithmetic: Arithmetic) -> CG:
    """Return CG after one more step, by the factors L D L' of the tridiagonal matrix.

    If a pivot `d` of the result is not positive, its shifted operator has no positive
    curvature along the direction `P`, and the step must not be used.

    Args:
        state: The state.
        link: The step of the recurrences.
        shifts: Shifts of each right-hand side, of shape (m, s).
        arithmetic: NumPy or jax.
    """
    xp, dtype, coupling = arithmetic.np, state.X.dtype, link.coupling[:, None]
    active = state.norms > 0
    ratio = xp.where(active, coupling / state.d, 0.0)  # A system that has ended stays as it is.
    P = link.v[:, None, :] - ratio[..., None].astype(dtype) * state.P
    d = xp.where(active, link.alpha[:, None] + shifts - coupling * ratio, 1.0)
    divisor = xp.where(d > 0, d, 1.0)
    zeta = xp.where(coupling.any(), -ratio * state.zeta, state.zeta)
    X = state.X + xp.where(active, zeta / divisor, 0.0)[..., None].astype(dtype) * P
    return CG(X, P, link.beta[:, None] * abs(zeta) / divisor, zeta, d)


class Minres(NamedTuple):
    """The state of MINRES for A + shift I."""

    X: Array
    """Solutions, of shape (m, s, n)."""
    W: Array
    """The last directions, of shape (m, s, n)."""
    before: Array
    """The directions before them."""
    R: Array
    """Residuals, of shape (m, s, n); (m, s, 0) if `phi` has their norms."""
    norms: Array
    """Norms of the residuals, float64 of shape (m, s)."""
    phi: Array
    cosine: Array
    sine: Array
    delta_bar: Array
    epsilon: Array
    sizes: Array
    """Lower bounds of the norms of the preconditioned operators, of shape (m, s)."""
    least_squares: Array
    """Whether a residual cannot fall further, because A + shift I has no inverse: (m,
    s).
    """


def advanced_minres(state: Minres, link: Link, shifts: Array, arithmetic: Arithmetic) -> Minres:
    """Return MINRES after one more step, by a Givens rotation of the tridiagonal
    matrix; the arguments are those of `advanced_cg`.
    """
    xp, dtype, eps = arithmetic.np, state.X.dtype, float(np.finfo(state.X.dtype).eps)
    beta, alpha = link.beta[:, None], link.alpha[:, None] + shifts
    delta = state.cosine * state.delta_bar + state.sine * alpha
    gamma_bar = state.sine * state.delta_bar - state.cosine * alpha
    delta_bar = -state.cosine * beta
    sizes = xp.maximum(state.sizes, abs(alpha) + beta)
    gamma = xp.hypot(gamma_bar, beta)
    root = xp.hypot(gamma_bar, delta_bar)
    active = (state.norms > 0) & ~state.least_squares
    # root is |A r| / |r| before this step. Rounding does not let it fall far below the
    # square root of eps. After that, X would grow without bound along the kernel.
    least_squares = state.least_squares | (active & (root <= eps**0.5 * sizes))
    active = active & ~least_squares & (gamma > eps * sizes)
    gamma = xp.where(active, gamma, 1.0)
    cosine, sine = xp.where(active, gamma_bar / gamma, -1.0), xp.where(active, beta / gamma, 0.0)
    step = xp.where(active, cosine * state.phi, 0.0)
    phi = xp.where(active, sine * state.phi, state.phi)
    W = (
        link.v[:, None]
        - state.epsilon[..., None].astype(dtype) * state.before
        - delta[..., None].astype(dtype) * state.W
    ) / gamma[..., None].astype(dtype)
    R, norms = state.R, abs(phi)
    if R.shape[-1]:
        moved = (sine**2)[..., None].astype(dtype) * R - (phi * cosine)[..., None].astype(dtype) * link.following[
            :, None
        ]
        R = xp.where(active[..., None], moved, R)
        rows = R.reshape(-1, R.shape[-1])
        norms = xp.sqrt(arithmetic.dots(rows, rows)).reshape(norms.shape)
    return Minres(
        state.X + step[..., None].astype(dtype) * W,
        W,
        state.W,
        R,
        xp.where(active, norms, state.norms),
        phi,
        cosine,
        sine,
        delta_bar,
        state.sine * beta,
        sizes,
        least_squares,
    )


def _check(squares: vectors.Array) -> None:
    if not np.isfinite(squares).all():
        raise InvalidArgumentError("M is not finite: a product with it holds NaN or infinity", reason="NOT_FINITE")
    if (squares < 0).any():
        raise InvalidArgumentError(
            f"M is not positive definite: r'Mr is {squares.min():.3g} for a residual r; pass a positive definite approximation of "
            "the inverse, or None",
            reason="NOT_POSITIVE_DEFINITE",
        )


_HERE = Arithmetic(np, vectors.dots, _check)


class ShortRecurrence:
    """CG or MINRES for (A + shift I) x = r, from x = 0, for m right-hand sides.

    Args:
        multiply: Multiplies a block by A.
        precondition: Multiplies a block by M; None for the identity. CG takes none.
        R: Right-hand sides, of shape (m, n).
        shifts: Shifts of each right-hand side, of shape (m, s).
        method: "cg" or "minres".

    Attributes:
        links: The state of the recurrences.
        solved: The state of the solutions.
        shifts: As above.
        finished: Whether no step can follow.
        failed: Whether the shifted operator has no positive curvature along a
            direction, of shape (m, s). Such a system keeps its solution.
        indefinite: The first such direction; None if there is none.

    Raises:
        InvalidArgumentError: M is not positive definite.
    """

    def __init__(
        self, multiply: Multiply, precondition: Multiply | None, R: vectors.Array, shifts: vectors.Array, method: str
    ) -> None:
        self._multiply = multiply
        self._precondition = precondition
        self.shifts = shifts
        self.finished = False
        self.failed = np.zeros(shifts.shape, bool)
        self.indefinite: IndefiniteError | None = None
        u, v, beta = _normalised(R, precondition, _HERE)
        self.links = Links(np.zeros_like(R), u, v, np.zeros(len(R)), np.zeros(len(R)))
        X, zeros = np.zeros((*shifts.shape, R.shape[1]), R.dtype), np.zeros(shifts.shape)
        sizes = zeros + beta[:, None]
        self.solved: CG | Minres = CG(X, X, sizes, sizes, np.ones(shifts.shape))
        if method == "minres":
            tracked = np.repeat(R[:, None], shifts.shape[1], axis=1)
            if precondition is None:
                tracked = tracked[..., :0]
            norms, no = zeros + vectors.norms(R)[:, None], np.zeros(shifts.shape, bool)
            self.solved = Minres(X, X, X, tracked, norms, sizes, zeros - 1, zeros, zeros, zeros, zeros, no)

    def advance(self, targets: vectors.Array, most: int) -> Iterator[vectors.Array]:
        """Take one step; see `BlockCG.advance`. Element i + m j is the norm for
        right-hand side i of m, and shift j.
        """
        self.step()
        yield self.solved.norms.T.reshape(-1)

    def step(self) -> None:
        """Take one step, with one product of a block.

        Raises:
            IndefiniteError: The last shifted operator without such a direction has
                one, too. The solutions are as before.
            NotFiniteError: A product holds NaN or infinity. The solutions are as
                before.
            InvalidArgumentError: M is not positive definite.
        """
        product = np.asarray(self._multiply(self.links.v), self.links.v.dtype)
        if not np.isfinite(product).all():
            raise NotFiniteError
        link, links = linked(self.links, product, self._precondition, _HERE)
        if not np.isfinite(link.beta).all():
            raise NotFiniteError
        if isinstance(self.solved, CG):
            found = advanced_cg(self.solved, link, self.shifts, _HERE)
            if (failing := found.d <= 0).any():
                found = self._without(failing, found, self.solved)
            self.solved = found
        else:
            self.solved = advanced_minres(self.solved, link, self.shifts, _HERE)
            self.finished = bool((self.solved.least_squares | (self.solved.norms == 0)).all())
        self.links = links

    def _without(self, failing: vectors.Array, found: CG, before: CG) -> CG:
        """Return CG after a step that some systems cannot take."""
        if self.indefinite is None:
            row, shift = np.argwhere(failing)[0]
            self.indefinite = IndefiniteError(found.P[row, shift], float(found.d[row, shift]))
        self.failed = self.failed | failing
        if (self.failed | (found.norms == 0)).all():
            raise self.indefinite
        X = np.where(failing[..., None], before.X, found.X)
        return found._replace(X=X, norms=np.where(failing, 0.0, found.norms), d=np.where(failing, 1.0, found.d))

    def solutions(self) -> vectors.Array:
        """Return the solutions so far, of shape (m s, n)."""
        X: vectors.Array = self.solved.X
        return X.transpose(1, 0, 2).reshape(-1, X.shape[-1])
