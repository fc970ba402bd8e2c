"""Objectives of two stages, f(x, *data) = loss(model(x, ...), ...), kept apart so that curvature can use both. Needs no jax."""

import dataclasses
from collections.abc import Callable
from typing import Any

from hvpd._errors import InvalidArgumentError

DISTRIBUTIONS = ("categorical", "normal")
REDUCTIONS = ("mean", "sum")


@dataclasses.dataclass(frozen=True)
class Composite:
    """loss(model(x, *inputs), *targets), callable like any objective. Made by `hvpd.composite`."""

    model: Callable[..., Any]
    """model(x, *inputs) -> z."""
    loss: Callable[..., Any]
    """loss(z, *targets) -> scalar."""
    inputs: int
    """How many of the data arguments are the model's; the others are the loss's."""
    distribution: str | None
    """What the model's output parametrizes; None where it is no distribution."""
    reduction: str
    """Whether the loss is a mean or a sum over rows."""
    samples: int = 1
    """Draws for each row of the Monte-Carlo Fisher matrix."""

    def __call__(self, x: Any, *data: Any) -> Any:
        """The objective."""
        return self.loss(self.model(x, *data[: self.inputs]), *data[self.inputs :])

    @property
    def __name__(self) -> str:
        """For messages."""
        names = (getattr(function, "__name__", repr(function)) for function in (self.loss, self.model))
        return "composite of {} and {}".format(*names)

    def scale(self, rows: int) -> float:
        """What the loss multiplies each row's share by."""
        return 1.0 / rows if self.reduction == "mean" else 1.0


def composite(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    *,
    inputs: int = 1,
    distribution: str | None = None,
    reduction: str = "mean",
    samples: int = 1,
) -> Composite:
    """An objective loss(model(x, *inputs), *targets) whose Gauss-Newton and Fisher operators can be had.

    Registered as any function is: `client.register(hvpd.composite(model, loss), params, X, y)`. A point of it has `ggn()`; where
    the model's output is one array with a row for each example, `empirical_fisher()`; and with a distribution, `fisher()`.

    Args:
        model: model(x, *inputs) -> z, an array or a pytree of arrays.
        loss: loss(z, *targets) -> a real floating scalar, convex in z if the operators are to be positive semi-definite.
        inputs: How many of the data arguments the model takes; the loss takes the others.
        distribution: "categorical", where z[rows, classes] are logits, or "normal", where z[rows, ...] are means and the variance
            is 1. The Fisher matrix is that of the model's own distribution, exactly; for the cross-entropy of the one, and half
            a squared error summed over a row for the other, it is the Gauss-Newton matrix (Martens 2020, section 9).
        reduction: "mean" or "sum": how the loss goes over rows. The Fisher matrices are scaled alike.
        samples: How many targets `fisher(seed=...)` draws for each row.

    Raises:
        InvalidArgumentError: An option has no such value.
    """
    if distribution not in (None, *DISTRIBUTIONS):
        raise InvalidArgumentError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    if reduction not in REDUCTIONS:
        raise InvalidArgumentError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if type(inputs) is not int or inputs < 0:
        raise InvalidArgumentError(f"inputs must be a number of data arguments, got {inputs!r}")
    if type(samples) is not int or samples < 1:
        raise InvalidArgumentError(f"samples must be a whole number from 1, got {samples!r}")
    return Composite(model, loss, inputs, distribution, reduction, samples)
