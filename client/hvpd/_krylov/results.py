"""Results of Krylov iterations: plain data that states its origin and can be saved."""

import dataclasses
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from hvpd import _arrays
from hvpd._errors import InvalidArgumentError
from hvpd._krylov.vectors import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What a result was computed from, so that it can be computed again.

    Example:
        >>> spectrum.origin.digest
    """

    seed: int | None = None
    """Seed of random vectors; None if there were none."""
    digest: str = ""
    """Digest of the objective; empty if the operator is no curvature of one."""
    program: str = ""
    """Curvature, such as "hessian" or "ggn"; for others, the operator's class."""
    precision: str = ""
    """Precision of matrix products; empty if unknown."""
    dtype: str = ""
    """dtype of the products."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Base of all results.

    Attributes:
        origin: Seed, digest, program, precision and dtype.

    Example:
        >>> result.save("result.npz")
    """

    origin: Origin = dataclasses.field(default_factory=Origin, kw_only=True)

    _kinds: ClassVar[dict[str, type["Result"]]] = {}

    def __init_subclass__(cls) -> None:
        cls._kinds[cls.__name__] = cls

    @property
    def seed(self) -> int | None:
        """Return the seed of random vectors; None if there were none.

        Example:
            >>> result.seed
        """
        return self.origin.seed

    @property
    def digest(self) -> str:
        """Return the digest of the objective; empty if there is none.

        Example:
            >>> result.digest
        """
        return self.origin.digest

    @property
    def program(self) -> str:
        """Return the curvature, such as "hessian"; for others, the operator's class.

        Example:
            >>> result.program
        """
        return self.origin.program

    @property
    def precision(self) -> str:
        """Return the precision of matrix products; empty if unknown.

        Example:
            >>> result.precision
        """
        return self.origin.precision

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to a file of NumPy's format `.npz`.

        `hvpd.krylov.load` reads it. So does `numpy.load`, one array for each field.

        Args:
            path: The file, which gets the suffix `.npz` if it has another or none. It
                is replaced if it exists.

        Example:
            >>> spectrum.save("spectrum.npz")
            >>> spectrum = hvpd.krylov.load("spectrum.npz")
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "origin"}
        fields |= {f"origin.{name}": value for name, value in dataclasses.asdict(self.origin).items()}
        arrays = {name: _arrays.host(value, name) for name, value in fields.items() if value is not None}
        arrays["none"] = np.array([name for name, value in fields.items() if value is None], dtype=str)
        # numpy adds the suffix.
        np.savez(path, kind=np.asarray(type(self).__name__), **arrays)  # type: ignore[arg-type]  # the stubs miss that names are free

    @classmethod
    def _read(cls, fields: dict[str, Any]) -> Self:
        origin = {name.removeprefix("origin."): fields.pop(name) for name in list(fields) if name.startswith("origin.")}
        return cls(**fields, origin=Origin(**origin))


_SUFFIX = ".npz"


def load(path: str | os.PathLike[str]) -> Result:
    """Read a result that its `save` wrote.

    Args:
        path: The file, with or without the suffix `.npz`.

    Returns:
        The result, of the class that was saved.

    Raises:
        InvalidArgumentError: There is no such file, or it holds no result of
            `hvpd.krylov`.

    Example:
        >>> spectrum = hvpd.krylov.load("spectrum.npz")
    """
    # No pickles: a file may come from anywhere.
    place = Path(path)
    if not place.exists() and place.suffix != _SUFFIX:  # As `save` names it.
        place = place.with_name(place.name + _SUFFIX)
    try:
        with place.open("rb") as file:
            fields = _arrays_of(file)
    except OSError as error:
        raise InvalidArgumentError(
            f"cannot read {os.fspath(path)!r}: {error.strerror or error}", reason="FILE_ACCESS"
        ) from error
    missing = fields.pop("none", np.array([], dtype=str))
    fields = {name: array if array.ndim else array.item() for name, array in fields.items()}
    kind = Result._kinds.get(fields.pop("kind", ""))  # noqa: SLF001 - its own base
    if kind is None:
        raise InvalidArgumentError(
            f"{os.fspath(path)!r} holds no result of hvpd.krylov: pass a file that save() wrote", reason="FILE_CONTENT"
        )
    try:
        return kind._read(fields | dict.fromkeys(map(str, missing)))  # noqa: SLF001 - its own base
    except TypeError as error:
        raise InvalidArgumentError(
            f"{os.fspath(path)!r} holds a result of another version of hvpd ({error}): compute it again",
            reason="FILE_CONTENT",
        ) from error


def _arrays_of(file: Any) -> dict[str, Any]:
    """Return the arrays of a file of numpy.savez; none if it is another or damaged."""
    try:
        found = np.load(file, allow_pickle=False)
        return {name: found[name] for name in found.files} if isinstance(found, np.lib.npyio.NpzFile) else {}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error):
        return {}


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Eigenpairs(Result):
    """Approximate eigenpairs of a symmetric operator.

    It unpacks as `values, vectors`, as the result of SciPy's `eigsh` does.

    Example:
        >>> values, vectors = H.eigsh(5)
        >>> pairs = run.ritz(5)
        >>> pairs.values[pairs.converged]
    """

    values: Array
    """Eigenvalues, float64 of shape (k,), ascending."""
    vectors: Array | None
    """Unit eigenvectors as columns (n, k), in the operator's dtype, or None."""
    residuals: Array
    """|A v - value v| of each pair, float64 of shape (k,), from the iteration.

    A has an eigenvalue within this distance of the value."""
    converged: Array
    """Whether each residual is within the tolerance, of shape (k,)."""
    ghosts: Array
    """Whether each value repeats its neighbour because orthogonality was lost, (k,).

    Always False for a run with full reorthogonalization."""
    products: int = 0
    """Vectors that were multiplied."""
    reason: str = ""
    """Why the iteration ended, as a sentence."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.values, self.vectors))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> Any:
        return (self.values, self.vectors)[index]

    def __repr__(self) -> str:
        largest = f", {self.values[0]:.6g} to {self.values[-1]:.6g}" if len(self.values) else ""
        return (
            f"<Eigenpairs: {len(self.values)} values{largest}, {int(self.converged.sum())} converged, "
            f"{self.products} products>"
        )


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Solution(Result):
    """Solutions of linear systems, and how the iteration ended.

    Example:
        >>> solution = H.solve(-gradient, tol=1e-8)
        >>> if not solution.converged:
        ...     print(solution.reason)
    """

    x: Array
    """Solutions: (n,) or (n, k), as the right-hand side; with shifts, (s, n) or
    (s, n, k).

    They have the kind of the right-hand side: an array of jax, a tensor of PyTorch."""
    converged: bool
    """Whether the true residual of each system is at most tol |b|."""
    residual_norms: Array
    """|b - A x| before and after each step, float64 of shape (steps + 1,).

    For several systems there are more axes: (steps + 1, k), (steps + 1, s) or
    (steps + 1, s, k). The first and the last are computed from b - A x; the others come
    from the recurrence."""
    products: int
    """Vectors that were multiplied, with those that check the residual."""
    reason: str
    """Why the iteration ended, as a sentence."""
    direction: Array | None = None
    """Unit vector d of shape (n,) with d'Ad <= 0, if CG met one; otherwise None.

    With shifts, A is the shifted operator."""
    curvature: float | None = None
    """d'Ad of this direction."""

    def __repr__(self) -> str:
        return (
            f"<Solution {self.x.shape}: {self.reason}; residual {float(np.max(self.residual_norms[-1])):.2e}, "
            f"{self.products} products>"
        )


@dataclasses.dataclass(frozen=True)
class Estimate(Result):
    """An estimated number. `float(estimate)` is its value.

    Example:
        >>> found = H.trace(products=60)
        >>> float(found), found.standard_error
    """

    value: float
    """The estimate."""
    standard_error: float
    """Standard error of the value, with that of rounding.

    It is an upper bound at 95 % confidence, because the deviation of few samples is
    itself an estimate."""
    products: int
    """Vectors that were multiplied."""
    method: str
    """How the value was made; "exact" if all n products were made."""

    def __float__(self) -> float:
        return float(self.value)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class DiagonalEstimate(Result):
    """An estimated diagonal. It unpacks as `values, standard_error, products`.

    Example:
        >>> values, standard_error, products = H.diagonal(method="xdiag")
    """

    values: Array
    """The estimates, of shape (n,)."""
    standard_error: Array
    """Standard error of each value, of shape (n,); 0 for an exact diagonal.

    It is an upper bound at 95 % confidence, as for an `Estimate`."""
    products: int
    """Vectors that were multiplied."""
    method: str
    """How the values were made; "exact" if all n products were made."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.values, self.standard_error, self.products))

    def __repr__(self) -> str:
        return f"<DiagonalEstimate of {len(self.values)} values by {self.method}, {self.products} products>"
