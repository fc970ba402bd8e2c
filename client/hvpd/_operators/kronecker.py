"""Kronecker-factored curvature (K-FAC) as an operator.

The server computes the factors; the client computes products and the inverse. Needs no
jax. Source: Martens and Grosse, Optimizing neural networks with Kronecker-factored
approximate curvature, ICML (2015).
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from hvpd._arguments import finite
from hvpd._errors import HvpdError, InvalidArgumentError
from hvpd._krylov.preconditioning import Described
from hvpd._operators.symmetric import SymmetricOperator
from hvpd._wire import codec
from hvpd.v1 import objective_pb2


@dataclasses.dataclass(frozen=True)
class DenseLayer:
    """A layer y = a W + b of a composite's model, found at its registration."""

    kernel: str
    """The leaf W, of shape [in, out] or [out, in]."""
    bias: str | None
    """The leaf b, of shape [out]; None for a layer without one."""
    elements: codec.Array
    """Position in the flat x of each pair (input, output): integers of shape (p, q).

    q is out. p is in, plus one for the bias, which is the last row."""


@dataclasses.dataclass(frozen=True)
class KroneckerBlock(DenseLayer):
    """The block A (x) G of a dense layer."""

    A: codec.Array
    """Mean of a'a over the rows, of shape (p, p).

    With a bias, the last element of a is 1."""
    G: codec.Array
    """Curvature in y, summed over the rows, of shape (q, q)."""


def dense_layers(
    bundle: objective_pb2.Bundle, layers: Sequence[objective_pb2.DenseLayer], slices: Mapping[str, slice]
) -> list[DenseLayer]:
    """Return the dense layers that the server found.

    Args:
        bundle: The objective.
        layers: The layers, by positions of leaves of x.
        slices: The slice of each leaf in the flat x.

    Raises:
        HvpdError: The leaves of a layer do not fit each other.
    """
    names, spans = list(slices), list(slices.values())
    found, before = [], set[int]()
    for layer in layers:
        used = [layer.kernel, *([layer.bias] if layer.HasField("bias") else [])]
        shapes = [tuple(bundle.x_leaves[leaf].shape) for leaf in used if 0 <= leaf < len(spans)]
        outputs = [shape[0 if layer.transposed else 1] for shape in shapes[:1] if len(shape) == 2]
        # Each leaf belongs to one layer, so that a server cannot fill the memory with
        # repeated layers.
        new = before.isdisjoint(used)
        before.update(used)
        if not new or len(shapes) != len(used) or not outputs or shapes[1:] not in ([], [(outputs[0],)]):
            raise HvpdError(
                f"the server answered with a dense layer of the leaves {used}, which do not make one: the versions of client "
                "and server may not fit",
                reason="BAD_ANSWER",
            )
        span = spans[layer.kernel]
        kernel = np.arange(span.start, span.stop).reshape(shapes[0])
        elements, bias = kernel.T if layer.transposed else kernel, None
        if layer.HasField("bias"):
            bias, span = names[layer.bias], spans[layer.bias]
            elements = np.vstack([elements, np.arange(span.start, span.stop)])
        found.append(DenseLayer(names[layer.kernel], bias, elements))
    return found


class KroneckerOperator(SymmetricOperator):
    """The operator A (x) G for each dense layer, plus shift times the identity.

    It is zero between layers and for all other leaves of x. Products take no round
    trip. Made by `Point.kfac`.

    Attributes:
        layers: The blocks, as `KroneckerBlock`s.
        shift: Added to the diagonal.
    """

    def __init__(self, layers: tuple[KroneckerBlock, ...], dtype: "np.dtype[Any]", n: int, shift: float) -> None:
        super().__init__(dtype, n)
        self.layers = layers
        self.shift = finite(shift, "shift")

    def _matmat(self, X: Any) -> codec.Array:
        X = _real(X, self.dtype)
        product: codec.Array = self.dtype.type(self.shift) * X
        for layer in self.layers:
            product[layer.elements] += _between(layer.A, X[layer.elements], layer.G)
        return product

    def shifted(self, shift: float) -> Self:
        """Return this plus `shift` times the identity, from the same factors."""
        changed = copy.copy(self)
        changed.shift = self.shift + finite(shift, "shift")
        return changed

    def inverse(self) -> "KroneckerInverse":
        """Return the exact inverse, from the eigenvalues of the factors.

        It is `M=` of SciPy's solvers.

        Raises:
            InvalidArgumentError: The operator is not positive definite; the message
                names a shift that makes it so. Or the factors hold NaN or infinity, as
                they do at points that are not finite.
        """
        return KroneckerInverse(self)

    def __repr__(self) -> str:
        shift = f", shift={self.shift:g}" if self.shift else ""
        return (
            f"<KroneckerOperator {self.shape[0]}x{self.shape[1]} {self.dtype}, {len(self.layers)} dense layers{shift}>"
        )


class KroneckerInverse(SymmetricOperator):
    """The positive definite inverse of a `KroneckerOperator`. Made by its `inverse()`.

    Attributes:
        shift: Shift of the inverted operator.
    """

    def __init__(self, operator: KroneckerOperator) -> None:
        n = operator.shape[0]
        super().__init__(operator.dtype, n)
        self.shift = operator.shift
        found = [_Eigen(layer) for layer in operator.layers]
        outside = n - sum(layer.elements.size for layer in operator.layers)
        needed, why = max((layer.needed, layer.why) for layer in found)
        if outside and needed <= 0.0:
            needed, why = 0.0, f"{outside} elements of x are in no dense layer, and have zeros here"
        if not self.shift > needed:
            more = f"of {1.1 * needed:.2g}" if needed else "that is positive"
            raise InvalidArgumentError(
                f"with a shift of {self.shift:g} this is not positive definite: {why}; use a shift {more}",
                reason="NOT_POSITIVE_DEFINITE",
            )
        self._layers = [(layer, layer.weights(self.shift)) for layer in found]

    def _described(self) -> Described:
        """Return the arrays that describe this operator as a preconditioner."""
        arrays: dict[str, codec.Array] = {}
        for number, (layer, weights) in enumerate(self._layers):
            parts = {"elements": layer.elements, "a": layer.a, "g": layer.g, "weights": weights[:, :, 0]}
            arrays |= {f"M_{part}_{number}": array for part, array in parts.items()}
        return Described("kronecker", arrays, 1.0 / self.shift if self.shift else 0.0)

    def _matmat(self, X: Any) -> codec.Array:
        X = _real(X, self.dtype)
        product: codec.Array = X / self.dtype.type(self.shift) if self.shift else np.zeros_like(X)
        for layer, weights in self._layers:
            product[layer.elements] = layer.scaled(weights, X[layer.elements])
        return product

    def __repr__(self) -> str:
        n = self.shape[0]
        return f"<KroneckerInverse {n}x{n} {self.dtype}, {len(self._layers)} dense layers, shift={self.shift:g}>"


class _Eigen:
    """The eigenvectors of a block in the operator's dtype, decomposed in float64.

    Attributes:
        elements: Positions in the flat x; see `DenseLayer`.
        a: Eigenvectors of A as columns, of shape (p, p).
        g: Eigenvectors of G as columns, of shape (q, q).
        needed: The shift must be larger, otherwise rounding alone could make the block
            definite.
        why: The reason, in words.
    """

    def __init__(self, layer: KroneckerBlock) -> None:
        if not (np.isfinite(layer.A).all() and np.isfinite(layer.G).all()):
            raise InvalidArgumentError(
                f"the Kronecker factors of {layer.kernel!r} hold NaN or infinity, and have no inverse: the model, its derivative or "
                "the loss's is not finite at this point",
                reason="NOT_FINITE",
            )
        self._dtype = layer.A.dtype
        values_a, vectors_a = np.linalg.eigh(layer.A.astype(np.float64))
        values_g, vectors_g = np.linalg.eigh(layer.G.astype(np.float64))
        self._values = np.multiply.outer(values_a, values_g)
        self.a, self.g = vectors_a.astype(self._dtype), vectors_g.astype(self._dtype)
        self.elements = layer.elements
        least = float(self._values.min())
        noise = float(np.finfo(self._dtype).eps) * max(layer.elements.shape) * float(np.abs(self._values).max())
        self.needed = noise - least
        self.why = f"the block of {layer.kernel!r} has an eigenvalue of {least:.3g}, rounding being up to {noise:.1g}"

    def weights(self, shift: float) -> codec.Array:
        """Return the eigenvalues of (A (x) G + shift I)^-1, of shape (p, q, 1)."""
        found: codec.Array = 1.0 / (self._values + shift)
        return found.astype(self._dtype)[:, :, None]

    def scaled(self, weights: codec.Array, X: codec.Array) -> codec.Array:
        """Multiply the matrix of these eigenvalues with X[p,q,k]."""
        return _between(self.a, weights * _between(self.a.T, X, self.g), self.g.T)


def _between(A: codec.Array, X: codec.Array, G: codec.Array) -> codec.Array:
    """Return A X G for each of the k columns of X[p,q,k]."""
    product: codec.Array = np.tensordot(A, np.matmul(G.T, X), (1, 0))
    return product


def _real(X: Any, dtype: "np.dtype[Any]") -> codec.Array:
    found = np.asarray(X)
    if found.dtype.kind == "c":
        raise InvalidArgumentError(
            f"a Kronecker operator multiplies real vectors, got dtype {found.dtype}: multiply the real and the imaginary part",
            reason="DTYPE",
        )
    return found.astype(dtype, copy=False)
