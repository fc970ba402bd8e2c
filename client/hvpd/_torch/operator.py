"""Operators of a server as curvlinops takes them. Needs curvlinops."""

from typing import Any

import torch
from curvlinops._torch_base import PyTorchLinearOperator

from hvpd._operators.symmetric import SymmetricOperator, not_an_operator


class LinearOperator(PyTorchLinearOperator):  # type: ignore[misc]  # curvlinops has no types
    """An operator of a server as a linear operator of curvlinops.

    It multiplies a tensor of shape (n,) or (n, k), or a list with one tensor for each
    parameter, in the module's order, as curvlinops' own operators do. Results have the
    operator's dtype and device. A block of k columns takes one round trip.

    Attributes:
        operator: The operator of the server.
        dtype: The torch dtype of operator and results: float32 or float64.
        device: The device of results.

    Example:
        >>> H = hvpd.torch.LinearOperator(objective.at(module).hessian())
        >>> trace = curvlinops.hutchinson_trace(H, num_matvecs=100)
    """

    SELF_ADJOINT = True

    def __init__(self, operator: SymmetricOperator, device: Any = "cpu") -> None:
        """Wrap an operator.

        Args:
            operator: An operator at a point, such as `point.hessian()` or
                `point.ggn()`, a principal block of one, or any other operator of hvpd.
            device: Device of the results.

        Raises:
            InvalidArgumentError: It is no operator of hvpd.
        """
        if not isinstance(operator, SymmetricOperator):
            raise not_an_operator("LinearOperator", operator)
        point = getattr(operator, "point", None)
        names = getattr(operator, "leaves", ())
        leaves = () if point is None else point.objective.leaves
        shapes = [leaf.shape for leaf in leaves if not names or leaf.name in names]
        shapes = shapes or [(operator.shape[0],)]
        super().__init__(shapes, shapes)
        self.operator = operator
        self._device = torch.device(device)
        self._dtype = getattr(torch, operator.dtype.name)

    @property
    def device(self) -> torch.device:
        """Return the device of results."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of results."""
        return self._dtype  # type: ignore[no-any-return]

    def _matmat(self, X: list[torch.Tensor]) -> list[torch.Tensor]:
        columns = X[0].shape[-1]
        V = torch.cat([each.reshape(-1, columns) for each in X])
        multiplied: Any = self.operator @ V.detach()
        product = multiplied.to(self._device)
        parts = product.split([shape.numel() for shape in self._out_shape])
        return [part.reshape(*shape, columns) for part, shape in zip(parts, self._out_shape, strict=True)]
