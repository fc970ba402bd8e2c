"""An objective as a model of UM-Bridge: one input for each leaf of x, one output."""

import dataclasses
from typing import Any

import numpy as np

from hvpd._errors import HvpdError
from hvpd._objective import Objective
from hvpd._point import Point
from hvpd._wire import codec


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request for one of the four operations, with sizes that fit the model."""

    x: codec.Array
    """The inputs joined, of shape (n,)."""
    first: int = 0
    """Input by which the result is differentiated: inWrt, or inWrt1."""
    second: int = 0
    """Input of `vec` in a Hessian: inWrt2."""
    sens: float = 1.0
    """Sensitivity of the output."""
    vec: codec.Array | None = None
    """Vector of the size of its input."""


class Model:
    """The operations of UM-Bridge on an objective.

    The output is the value, a vector of one element. x is split by leaves, so that an
    objective of k leaves has k inputs, in the order of `objective.leaves`.
    """

    def __init__(self, name: str, objective: Objective) -> None:
        self.name = name
        self.objective = objective
        self.spans = list(objective.slices().values())
        self.input_sizes = [span.stop - span.start for span in self.spans]
        self.output_sizes = [1]

    def evaluate(self, asked: Asked) -> list[codec.Array]:
        """Return [[f(x)]]."""
        return [self._finite(np.array([self._at(asked).value]), "the value")]

    def gradient(self, asked: Asked) -> codec.Array:
        """Return sens times the gradient by one input."""
        block = self._at(asked).gradient[self.spans[asked.first]]
        return self._finite(asked.sens * block.astype(np.float64), "the gradient")

    def apply_jacobian(self, asked: Asked) -> codec.Array:
        """Return [J vec], where J is the gradient by one input as a row."""
        assert asked.vec is not None
        block = self._at(asked).gradient[self.spans[asked.first]]
        return self._finite(np.array([block.astype(np.float64) @ asked.vec]), "the product with the Jacobian")

    def apply_hessian(self, asked: Asked) -> codec.Array:
        """Return sens times H[first, second] vec."""
        assert asked.vec is not None
        direction = np.zeros(self.objective.n, self.objective.dtype)
        direction[self.spans[asked.second]] = asked.vec
        product: Any = self._at(asked).hessian() @ direction
        return self._finite(
            asked.sens * product[self.spans[asked.first]].astype(np.float64), "the product with the Hessian"
        )

    def _at(self, asked: Asked) -> Point:
        return self.objective.at(asked.x)

    def _finite(self, result: codec.Array, what: str) -> codec.Array:
        """Return a result that JSON can state.

        Raises:
            HvpdError: It has NaN or infinity.
        """
        if not np.all(np.isfinite(result)):
            raise HvpdError(
                f"{what} of {self.objective.label} is not finite at this x, and JSON has no such numbers: choose another x",
                reason="NOT_FINITE",
            )
        return result
