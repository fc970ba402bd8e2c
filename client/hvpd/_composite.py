"""Objectives of two stages, f(x, *data) = loss(model(x, ...), ...). Needs no jax.

The stages stay separate, so that curvature can use both.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from hvpd import _text
from hvpd._arguments import check_choice
from hvpd._errors import InvalidArgumentError
from hvpd._wire.protocol import DISTRIBUTIONS, REDUCTIONS, Distribution, Reduction


@dataclasses.dataclass(frozen=True)
class Composite:
    """The objective loss(model(x, *inputs), *targets). Made by `hvpd.composite`.

    It can be called like any objective.

    Example:
        >>> composite = hvpd.composite(model, loss)
        >>> composite(params, X, y)
    """

    model: Callable[..., Any]
    """The model: model(x, *inputs) -> z."""
    loss: Callable[..., Any]
    """The loss: loss(z, *targets) -> scalar."""
    inputs: int
    """Number of data arguments of the model; the loss takes the others."""
    distribution: Distribution | None
    """Distribution that the model's output parametrizes; None for none."""
    reduction: Reduction
    """"mean" or "sum": how the loss reduces rows."""
    samples: int = 1
    """Number of draws for each row of the Monte-Carlo Fisher matrix."""

    def __call__(self, x: Any, *data: Any) -> Any:
        """Return the objective's value."""
        return self.loss(self.model(x, *data[: self.inputs]), *data[self.inputs :])

    @property
    def __name__(self) -> str:
        """Return a name for messages."""
        names = (getattr(function, "__name__", repr(function)) for function in (self.loss, self.model))
        return "composite of {} and {}".format(*names)


def composite(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    *,
    inputs: int = 1,
    distribution: Distribution | None = None,
    reduction: Reduction = "mean",
    samples: int = 1,
) -> Composite:
    """Make an objective loss(model(x, *inputs), *targets) with further operators.

    A point of it has `ggn()`. If the model's output is one array with a row for each
    example, it has `empirical_fisher()`. With a distribution it has `fisher()`.

    Args:
        model: model(x, *inputs) -> z, which is an array or a pytree of arrays.
        loss: loss(z, *targets) -> a real floating scalar. If it is convex in z, the
            operators are positive semi-definite.
        inputs: Number of data arguments of the model; the loss takes the others.
        distribution: "categorical", with logits z[rows, classes], or "normal", with
            means z[rows, ...] and variance 1. The Fisher matrix is exactly that of the
            model's own distribution. It equals the Gauss-Newton matrix for a
            cross-entropy ("categorical"), and for half a squared error summed over a
            row ("normal"); see Martens 2020, section 9.
        reduction: "mean" or "sum": how the loss reduces rows. The Fisher matrices are
            scaled in the same way.
        samples: Number of targets that `fisher(seed=...)` draws for each row.

    Raises:
        InvalidArgumentError: An option has no such value.

    Example:
        >>> composite = hvpd.composite(model, loss, distribution="categorical")
        >>> objective = client.register(composite, params, X, y)
        >>> G = objective.at(params).ggn(shift=1e-3)
    """
    if distribution is not None:
        check_choice(distribution, "distribution", DISTRIBUTIONS)
    check_choice(reduction, "reduction", REDUCTIONS)
    parts: dict[str, Any] = {"model": model, "loss": loss}
    for what, part in parts.items():
        if not callable(part):
            raise InvalidArgumentError(
                f"{what} must be a function, got {_text.described(part)}: composite(model, loss)",
                reason="INVALID_OPTION",
            )
    if type(inputs) is not int or inputs < 0:
        raise InvalidArgumentError(
            f"inputs must be a number of data arguments, got {_text.described(inputs)}", reason="INVALID_OPTION"
        )
    if type(samples) is not int or samples < 1:
        raise InvalidArgumentError(
            f"samples must be a whole number from 1, got {_text.described(samples)}", reason="INVALID_OPTION"
        )
    return Composite(model, loss, inputs, distribution, reduction, samples)
