"""The distribution of eigenvalues as a result: density, moments, picture."""

import dataclasses
from typing import Any

import numpy as np

from hvpd._arguments import finite, integer
from hvpd._errors import InvalidArgumentError, MissingExtraError
from hvpd._krylov.results import Result
from hvpd._krylov.vectors import Array


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Spectrum(Result):
    """The distribution of an operator's eigenvalues, from random vectors.

    Example:
        >>> spectrum = H.spectrum(probes=20)
        >>> density = spectrum.density(np.linspace(-1, 5, 500), sigma=0.05)
    """

    nodes: Array
    """Approximate eigenvalues, float64 of shape (probes, steps), ascending."""
    weights: Array
    """Their weights, of shape (probes, steps); each row adds up to 1."""
    sizes: Array
    """Nodes of each probe that count, integers of shape (probes,)."""
    standard_error: float
    """Standard error of the share of eigenvalues below a threshold, at the threshold
    where it is largest.

    It is an upper bound at 95 % confidence, as for an `Estimate`. It counts the probes,
    not the steps."""
    n: int
    """Number of eigenvalues."""
    products: int
    """Vectors that were multiplied."""
    reorthogonalize: str
    """"full", or "none" if the bases did not fit the memory."""
    reason: str
    """Why the iteration ended, as a sentence."""

    def _width(self, sigma: float | None) -> float:
        low, high = float(self.nodes.min()), float(self.nodes.max())
        if sigma is None:
            return max((high - low) / 100, 1e-6 * max(abs(low), abs(high))) or 1.0
        width = finite(sigma, "sigma")
        if width <= 0:
            raise InvalidArgumentError(f"sigma must be positive, got {sigma}", reason="INVALID_OPTION")
        return width

    def grid(self, points: int = 500, sigma: float | None = None) -> Array:
        """Return points that cover the spectrum with a margin of 5 sigma.

        Args:
            points: Number of points.
            sigma: Standard deviation of the Gaussian, as for `density`. Pass the same
                sigma to both, because a wider density reaches further.

        Returns:
            Evenly spaced points, float64 of shape (points,).

        Raises:
            InvalidArgumentError: points is no positive integer, or sigma is not
                positive.

        Example:
            >>> grid = spectrum.grid(sigma=0.5)
            >>> density = spectrum.density(grid, sigma=0.5)
        """
        points = integer(points, "points", 1)
        margin = 5 * self._width(sigma)
        found: Array = np.linspace(self.nodes.min() - margin, self.nodes.max() + margin, points)
        return found

    def density(self, grid: Any = None, sigma: float | None = None) -> Array:
        """Return the density of eigenvalues, smoothed by a Gaussian.

        Args:
            grid: Points, of any shape; None for those of `spectrum.grid(sigma=sigma)`.
            sigma: Standard deviation of the Gaussian, in units of eigenvalues; None for
                a hundredth of the range.

        Returns:
            Density per unit of eigenvalue, of the grid's shape. Its integral over all
            numbers is 1, and so is that over `spectrum.grid(sigma=sigma)`.

        Example:
            >>> grid = spectrum.grid()
            >>> plt.semilogy(grid, spectrum.density(grid))
        """
        width = self._width(sigma)
        points = self.grid(sigma=sigma) if grid is None else np.asarray(grid, np.float64)
        nodes, weights = self.nodes.reshape(-1), self.weights.reshape(-1) / len(self.nodes)
        flat = points.reshape(-1)
        found = np.zeros(flat.size)
        for start in range(0, flat.size, 64):
            away = (flat[start : start + 64, None] - nodes) / width
            found[start : start + 64] = np.exp(-0.5 * np.minimum(abs(away), 40.0) ** 2) @ weights
        density: Array = (found / (width * np.sqrt(2 * np.pi))).reshape(points.shape)
        return density

    def moments(self, m: int) -> Array:
        """Return the first m moments, trace(A^j) / n for j = 1, ..., m, of shape (m,).

        Example:
            >>> mean, mean_square = spectrum.moments(2)
        """
        powers = self.nodes[None] ** np.arange(1, integer(m, "m", 1) + 1)[:, None, None]
        found: Array = (powers * self.weights).sum(axis=2).mean(axis=1)
        return found

    def plot(self, ax: Any = None, *, sigma: float | None = None) -> Any:
        """Draw the density with a logarithmic scale, by matplotlib.

        Args:
            ax: Axes of matplotlib; None for new ones.
            sigma: As for `density`.

        Returns:
            The axes.

        Raises:
            MissingExtraError: matplotlib is not installed.

        Example:
            >>> spectrum.plot().figure.savefig("spectrum.png")
        """
        if ax is None:
            try:
                from matplotlib.figure import Figure
            except ImportError as error:
                raise MissingExtraError("plot() needs matplotlib: pip install matplotlib") from error
            ax = Figure(figsize=(6, 4), layout="constrained").subplots()
        if not hasattr(ax, "semilogy"):
            raise InvalidArgumentError(
                f"ax must be axes of matplotlib, or None for new ones, got {ax!r}", reason="INVALID_OPTION"
            )
        grid = self.grid(sigma=sigma)
        density = self.density(grid, sigma)
        ax.semilogy(grid, np.maximum(density, density.max() * 1e-8))
        ax.set_xlabel("eigenvalue")
        ax.set_ylabel("density")
        return ax

    def __repr__(self) -> str:
        low, high = float(self.nodes.min()), float(self.nodes.max())
        return (
            f"<Spectrum of {self.n} eigenvalues from {low:.4g} to {high:.4g}: {len(self.nodes)} probes, "
            f"{self.nodes.shape[1]} steps, {self.products} products>"
        )
