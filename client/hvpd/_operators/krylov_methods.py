"""The functions of `hvpd.krylov` as methods of every symmetric operator."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from hvpd import krylov
from hvpd._wire import codec


class KrylovMethods:
    """Krylov iterations of a symmetric operator. See `hvpd.krylov` for all arguments.

    Each runs here, with one round trip for a product of a block, unless the operator's
    `_krylov()` gives a runner that has a better way.
    """

    def lanczos(
        self,
        steps: int,
        v0: Any = None,
        seed: int = 0,
        block: int = 1,
        reorthogonalize: Literal["full", "none"] = "full",
    ) -> krylov.Lanczos:
        """Run Lanczos iteration; see `hvpd.krylov.lanczos`.

        Example:
            >>> run = H.lanczos(100)
            >>> run.ritz(5).values
        """
        return krylov.lanczos(self, steps, v0, seed, block, reorthogonalize)

    def eigsh(
        self,
        k: int | None = None,
        which: Literal["LA", "SA", "LM", "BE"] = "LM",
        v0: Any = None,
        ncv: int | None = None,
        maxiter: int | None = None,
        tol: float = 0.0,
        return_eigenvectors: bool = True,
        seed: int = 0,
    ) -> Any:
        """Return k eigenvalues and eigenvectors; see `hvpd.krylov.eigsh`.

        Example:
            >>> values, vectors = H.eigsh(5, which="LA")
        """
        return krylov.eigsh(self, k, which, v0, ncv, maxiter, tol, return_eigenvectors, seed)

    def solve(
        self,
        b: Any,
        *,
        tol: float = 1e-5,
        maxiter: int | None = None,
        x0: Any = None,
        M: Any = None,
        shifts: Sequence[float] | codec.Array | None = None,
        method: Literal["cg", "minres"] = "cg",
    ) -> krylov.Solution:
        """Solve A x = b, also for several b or several shifts; see `hvpd.krylov.solve`.

        Example:
            >>> step = H.solve(-gradient, tol=1e-8).x
        """
        return krylov.solve(self, b, tol=tol, maxiter=maxiter, x0=x0, M=M, shifts=shifts, method=method)

    def spectrum(
        self,
        probes: int = 10,
        steps: int = 100,
        seed: int = 0,
        reorthogonalize: Literal["full", "none"] | None = None,
    ) -> krylov.Spectrum:
        """Return the distribution of eigenvalues; see `hvpd.krylov.spectrum`.

        Example:
            >>> spectrum = H.spectrum(probes=20)
            >>> spectrum.plot()
        """
        return krylov.spectrum(self, probes, steps, seed, reorthogonalize)

    def trace(
        self,
        method: Literal["xtrace", "hutch++", "hutchinson"] = "xtrace",
        products: int | None = None,
        seed: int = 0,
    ) -> krylov.Estimate:
        """Estimate the trace; see `hvpd.krylov.trace`.

        Example:
            >>> found = H.trace(products=60)
            >>> found.value, found.standard_error
        """
        return krylov.trace(self, method, products, seed)

    def logdet(self, probes: int = 30, steps: int = 100, seed: int = 0) -> krylov.Estimate:
        """Estimate the logarithm of the determinant; see `hvpd.krylov.logdet`.

        Example:
            >>> float(H.shifted(1e-3).logdet())
        """
        return krylov.logdet(self, probes, steps, seed)

    def trace_of(
        self, function: Callable[[codec.Array], Any], probes: int = 30, steps: int = 100, seed: int = 0
    ) -> krylov.Estimate:
        """Estimate the trace of a function of the operator; see `hvpd.krylov.trace_of`.

        Example:
            >>> freedom = H.trace_of(lambda values: values / (values + 1e-3))
        """
        return krylov.trace_of(self, function, probes, steps, seed)

    def diagonal(
        self, method: Literal["xdiag", "hutchinson"] = "xdiag", products: int | None = None, seed: int = 0
    ) -> krylov.DiagonalEstimate:
        """Estimate the diagonal; see `hvpd.krylov.diagonal`.

        Example:
            >>> values, standard_error, products = A.diagonal()
        """
        return krylov.diagonal(self, method, products, seed)
