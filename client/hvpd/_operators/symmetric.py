"""The common base of the operators: symmetric, and multiplying blocks as blocks."""

from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
import numpy.typing as npt
import scipy.sparse
from scipy.sparse.linalg import LinearOperator

from hvpd import _arrays, _jax
from hvpd._errors import InvalidArgumentError
from hvpd._krylov.results import Origin
from hvpd._krylov.runner import Runner
from hvpd._operators.krylov_methods import KrylovMethods
from hvpd._wire import codec

if TYPE_CHECKING:
    from hvpd._jax.functions import Linear, Structure


def not_an_operator(taker: str, found: object) -> InvalidArgumentError:
    """Return the error for an argument that is no blocking operator of hvpd.

    Args:
        taker: The function or class that takes an operator.
        found: The argument.
    """
    kind = type(found)
    got = f"got a {kind.__name__}"
    if kind.__module__ == "hvpd.aio":
        got += ", which is asynchronous: make the operator with the client of hvpd.connect(...)"
    return InvalidArgumentError(
        f"{taker} takes an operator of hvpd, such as objective.at(x).hessian(), {got}", reason="INVALID_OPTION"
    )


class SymmetricOperator(KrylovMethods, LinearOperator):
    """A real symmetric matrix of shape (n, n) as SciPy's LinearOperator.

    Subclasses define `_matmat`, for a block whose vectors are columns.
    """

    def __init__(self, dtype: "np.dtype[Any]", n: int) -> None:
        super().__init__(dtype, (n, n))  # type: ignore[call-arg]  # the stubs know only __new__

    def _matmat(self, X: Any) -> codec.Array:
        raise NotImplementedError

    def _matvec(self, x: Any) -> codec.Array:
        return self._matmat(np.asarray(x).reshape(-1, 1)).reshape(-1)

    def _krylov(self) -> Runner:
        """Return what runs Krylov iterations of this operator; see `hvpd._krylov`."""
        origin = Origin(program=type(self).__name__, dtype=self.dtype.name)
        return Runner(lambda rows: self._matmat(rows.T).T, self.shape[0], self.dtype, origin=origin)

    def matvec(self, x: Any) -> codec.Array:  # type: ignore[override]  # the stubs tell 1-D from 2-D
        """Multiply a vector of shape (n,) or (n, 1).

        A plain vector skips the checks of SciPy's own `matvec`. The result has the kind
        of the vector: an array of jax, a tensor of PyTorch, and so on.

        Raises:
            InvalidArgumentError: The vector has another shape.

        Example:
            >>> H.matvec(v)
        """
        if type(x) is np.ndarray and x.shape == self.shape[:1]:
            return self._matvec(x)
        array = self._host(x)
        return _arrays.back(super().matvec(array), x)  # type: ignore[no-any-return]

    def matmat(self, X: Any) -> codec.Array:
        """Multiply a block of shape (n, k). The result has the kind of the block.

        Raises:
            InvalidArgumentError: The block has another shape.

        Example:
            >>> H.matmat(np.eye(n)[:, :8])
        """
        array = self._host(X)
        return _arrays.back(super().matmat(array), X)  # type: ignore[no-any-return]

    # The operator is its own adjoint.

    def rmatvec(self, x: Any) -> codec.Array:  # type: ignore[override]  # as matvec
        """Multiply as `matvec`.

        Example:
            >>> H.rmatvec(v)
        """
        return self.matvec(x)

    def rmatmat(self, X: Any) -> codec.Array:
        """Multiply as `matmat`.

        Example:
            >>> H.rmatmat(V)
        """
        return self.matmat(X)

    def _host(self, operand: Any) -> codec.Array:
        """Return an operand of any kind as a NumPy array.

        Raises:
            InvalidArgumentError: It has another shape.
        """
        n = self.shape[0]
        if (
            isinstance(operand, (list, tuple))
            and len(operand) != n
            and any(getattr(part, "ndim", 0) for part in operand)
        ):
            raise InvalidArgumentError(
                f"an operator of shape ({n}, {n}) multiplies one vector of shape ({n},), or a block of shape ({n}, k), got a "
                f"{type(operand).__name__} of {len(operand)} arrays: join them, for instance by objective.ravel(...), or by "
                "torch.nn.utils.parameters_to_vector(...)",
                reason="SHAPE",
            )
        array = _arrays.vectors(operand, "the operand")
        if array.ndim not in (1, 2) or array.shape[0] != n:
            raise InvalidArgumentError(
                f"an operator of shape ({n}, {n}) multiplies vectors of shape ({n},) and blocks of shape ({n}, k), got "
                f"{array.shape}",
                reason="SHAPE",
            )
        return array

    @overload  # type: ignore[override]  # as matvec
    def __matmul__(self, other: "LinearOperator[Any]") -> "LinearOperator[Any]": ...
    @overload
    def __matmul__(self, other: npt.ArrayLike) -> codec.Array: ...
    def __matmul__(self, other: Any) -> Any:
        if type(other) is np.ndarray and other.shape == self.shape[:1]:
            return self._matvec(other)
        return super().__matmul__(other) if _is_operand(other) else self.dot(other)

    def dot(self, x: Any) -> Any:
        """Multiply a vector or a block, as `@` does, or compose with an operator or a
        number.

        Raises:
            InvalidArgumentError: An array has another shape.

        Example:
            >>> H.dot(v)
        """
        if _is_operand(x):
            return super().dot(x)
        array = self._host(x)  # SciPy's message would have the whole array.
        return _arrays.back(super().dot(array), x)

    def __rmatmul__(self, other: Any) -> Any:
        if _is_operand(other):
            return super().__rmatmul__(other)
        return _arrays.back(super().__rmatmul__(_arrays.host(other, "the operand")), other)

    def as_jax(self) -> "Linear":
        """Return v -> A v as a linear function of jax arrays.

        It works under `jit`, `vmap`, `jvp`, `vjp`, `scan` and `while_loop`, and in the
        solvers of jax, lineax, matfree and optimistix. A vmapped axis is multiplied as
        one block. The transpose is the operator itself. v is a flat vector of shape
        (n,). An operator at a point also takes the registered pytree, and returns such
        a pytree.

        Raises:
            MissingExtraError: jax is not installed here.
            InvalidArgumentError: Raised by the function, if v does not fit or is not
                real, or if the operator is float64 and jax computes with 32 bits.

        Example:
            >>> A = H.as_jax()
            >>> step, _ = jax.scipy.sparse.linalg.cg(A, -gradient)
        """
        linear: Linear = _jax.load("as_jax").Linear(self, self._structure())
        return linear

    def _structure(self) -> "Structure | None":
        """Return the structure of the pytrees that are multiplied; None for flat
        vectors only.
        """
        return None

    def _rmatvec(self, x: Any) -> codec.Array:
        return self._matvec(x)

    def _rmatmat(self, X: Any) -> codec.Array:
        return self._matmat(X)

    def _adjoint(self) -> Self:
        return self

    def _transpose(self) -> Self:
        return self


def _is_operand(other: Any) -> bool:
    """Return whether SciPy combines an object with an operator, because it is no dense
    array.
    """
    return isinstance(other, LinearOperator) or np.isscalar(other) or scipy.sparse.issparse(other)
