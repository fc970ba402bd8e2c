"""Shifted CG and MINRES from one Lanczos recurrence, which keeps no basis.

The Krylov spaces of A and of A + shift I from one vector are the same. So one
recurrence serves all shifts of a right-hand side, with one product for each step.
Several right-hand sides run side by side, and their products go as one block.

`recurrence` yields the Lanczos vectors. `ShiftedCG` and `ShiftedMinres` make solutions
from them, for m right-hand sides and s shifts of each.

Source: Paige and Saunders 1975 (https://doi.org/10.1137/0712047); Frommer and Maass
1999 (https://doi.org/10.1137/S1064827596313310) for the shifts.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from hvpd._errors import InvalidArgumentError
from hvpd._krylov import vectors
from hvpd._krylov.conjugate_gradients import IndefiniteError
from hvpd._krylov.space import Multiply, NotFiniteError


class Link(NamedTuple):
    """One step of m recurrences."""

    v: vectors.Array
    """Lanczos vectors, preconditioned, of shape (m, n)."""
    alpha: vectors.Array
    """v' A v, of shape (m,)."""
    beta: vectors.Array
    """Coupling to the next vector, of shape (m,); 0 if the space is invariant."""
    following: vectors.Array
    """The next vector, not preconditioned, of shape (m, n)."""


def recurrence(
    multiply: Multiply, precondition: Multiply | None, R: vectors.Array
) -> tuple[vectors.Array, Iterator[Link]]:
    """Return the norms of R[m, n], in the inner product of M, and the recurrence.

    Raises:
        NotFiniteError: A product holds NaN or infinity.
        InvalidArgumentError: M is not positive definite.
    """
    first, beta = _normalised(R, precondition)

    def steps() -> Iterator[Link]:
        u, v = first
        before, coupling = np.zeros_like(R), np.zeros(len(R))
        size = np.zeros(len(R))
        while True:
            w = np.array(multiply(v), R.dtype)
            if not np.isfinite(w).all():
                raise NotFiniteError
            w -= coupling[:, None].astype(R.dtype) * before
            alpha = vectors.dots(v, w)
            w -= alpha[:, None].astype(R.dtype) * u
            size = np.maximum(size, abs(alpha) + coupling)
            (following, z), beta = _normalised(w, precondition)
            ended = beta <= 10 * np.finfo(R.dtype).eps * size
            beta, following[ended], z[ended] = np.where(ended, 0.0, beta), 0.0, 0.0
            yield Link(v, alpha, beta, following)
            before, u, v, coupling = u, following, z, beta

    return beta, steps()


def _normalised(
    R: vectors.Array, precondition: Multiply | None
) -> tuple[tuple[vectors.Array, vectors.Array], vectors.Array]:
    """Return (R, M R) over the norms of R in the inner product of M; and the norms."""
    Z = R if precondition is None else precondition(R)
    squares = vectors.dots(R, Z)
    if not np.isfinite(squares).all():
        raise InvalidArgumentError("M is not finite: a product with it holds NaN or infinity", reason="NOT_FINITE")
    if precondition is not None and (squares < 0).any():
        raise InvalidArgumentError(
            f"M is not positive definite: r'Mr is {squares.min():.3g} for a residual r; pass a positive definite approximation of "
            "the inverse, or None",
            reason="NOT_POSITIVE_DEFINITE",
        )
    sizes = np.sqrt(squares)
    scale = (1.0 / np.where(sizes > 0, sizes, 1.0))[:, None].astype(R.dtype)
    following = R * scale
    return (following, following.copy() if precondition is None else Z * scale), sizes


class Shifted(Protocol):
    """Solutions of shifted systems, from a recurrence."""

    X: vectors.Array
    """Solutions, of shape (m, s, n)."""
    norms: vectors.Array
    """Norms of the residuals, float64 of shape (m, s)."""

    def step(self, link: Link) -> None:
        """Take one step for all systems that are not at rest."""
        ...


class ShiftedCG:
    """CG for A + shift I, by the factors L D L^T of the tridiagonal matrix.

    Args:
        R: Right-hand sides, of shape (m, n).
        beta: Their norms, of shape (m,).
        shifts: Shifts of each right-hand side, of shape (m, s).
    """

    def __init__(self, R: vectors.Array, beta: vectors.Array, shifts: vectors.Array) -> None:
        self.X = np.zeros((*shifts.shape, R.shape[1]), R.dtype)
        self.norms = np.broadcast_to(beta[:, None], shifts.shape).copy()
        self._shifts = shifts
        self._P = np.zeros_like(self.X)
        self._zeta = self.norms.copy()
        self._d = np.ones(shifts.shape)
        self._beta = np.zeros((len(R), 1))

    def step(self, link: Link) -> None:
        """See `Shifted.step`.

        Raises:
            IndefiniteError: A shifted operator has no positive curvature along a
                direction.
        """
        ratio = self._beta / self._d
        d = link.alpha[:, None] + self._shifts - self._beta * ratio
        self._P = link.v[:, None, :] - ratio[..., None].astype(self.X.dtype) * self._P
        active = self.norms > 0
        if (d[active] <= 0).any():
            row, shift = np.argwhere((d <= 0) & active)[0]
            raise IndefiniteError(self._P[row, shift], float(d[row, shift]))
        d = np.where(active, d, 1.0)
        if self._beta.any():
            self._zeta = -ratio * self._zeta
        self.X += np.where(active, self._zeta / d, 0.0)[..., None].astype(self.X.dtype) * self._P
        self.norms = link.beta[:, None] * abs(self._zeta) / d
        self._d, self._beta = d, link.beta[:, None]


class ShiftedMinres:
    """MINRES for A + shift I, by Givens rotations of the tridiagonal matrix.

    Args:
        R: Right-hand sides, of shape (m, n).
        beta: Their norms, in the inner product of M, of shape (m,).
        shifts: Shifts of each right-hand side, of shape (m, s).
        track: Whether to update the residuals themselves, because `beta` is a norm in
            another inner product.
    """

    def __init__(self, R: vectors.Array, beta: vectors.Array, shifts: vectors.Array, *, track: bool) -> None:
        self.X = np.zeros((*shifts.shape, R.shape[1]), R.dtype)
        self.norms = np.broadcast_to(vectors.norms(R)[:, None], shifts.shape).copy()
        self.least_squares = np.zeros(shifts.shape, bool)
        """Whether a residual cannot fall further, because A has no inverse."""
        self._shifts = shifts
        self._W = np.zeros((2, *self.X.shape), R.dtype)
        self._phi = np.broadcast_to(beta[:, None], shifts.shape).copy()
        self._cosine, self._sine = -np.ones(shifts.shape), np.zeros(shifts.shape)
        self._delta_bar, self._epsilon = np.zeros(shifts.shape), np.zeros(shifts.shape)
        self.sizes = np.zeros(shifts.shape)
        """Lower bounds of the norms of the preconditioned operators, (m, s)."""
        self._R = np.repeat(R[:, None], shifts.shape[1], axis=1) if track else None

    def step(self, link: Link) -> None:
        """See `Shifted.step`."""
        beta, alpha = link.beta[:, None], link.alpha[:, None] + self._shifts
        delta = self._cosine * self._delta_bar + self._sine * alpha
        gamma_bar = self._sine * self._delta_bar - self._cosine * alpha
        epsilon, self._epsilon = self._epsilon, self._sine * beta
        self._delta_bar = -self._cosine * beta
        self.sizes = np.maximum(self.sizes, abs(alpha) + beta)
        gamma = np.hypot(gamma_bar, beta)
        root = np.hypot(gamma_bar, self._delta_bar)
        active = (self.norms > 0) & ~self.least_squares
        # root is |A r| / |r| before this step. Rounding keeps it above about the square
        # root of eps. From there on, X would grow without bound along the kernel.
        self.least_squares |= active & (root <= np.finfo(self.X.dtype).eps ** 0.5 * self.sizes)
        active &= ~self.least_squares & (gamma > np.finfo(self.X.dtype).eps * self.sizes)
        gamma = np.where(active, gamma, 1.0)
        self._cosine, self._sine = np.where(active, gamma_bar / gamma, -1.0), np.where(active, beta / gamma, 0.0)
        phi = np.where(active, self._cosine * self._phi, 0.0)
        self._phi = np.where(active, self._sine * self._phi, self._phi)
        dtype = self.X.dtype
        W = (
            link.v[:, None]
            - epsilon[..., None].astype(dtype) * self._W[0]
            - delta[..., None].astype(dtype) * self._W[1]
        )
        W /= gamma[..., None].astype(dtype)
        self._W[0], self._W[1] = self._W[1], W
        self.X += phi[..., None].astype(dtype) * W
        if self._R is None:
            self.norms = np.where(active, abs(self._phi), self.norms)
        else:
            square, part = (self._sine**2)[..., None].astype(dtype), (self._phi * self._cosine)[..., None].astype(dtype)
            self._R = np.where(active[..., None], square * self._R - part * link.following[:, None], self._R)
            self.norms = vectors.norms(self._R.reshape(-1, self._R.shape[-1])).reshape(self.norms.shape)
