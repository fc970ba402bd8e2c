"""curvlinops, a library of curvature operators for PyTorch, in the caller's own
process. Many callers are one block.
"""

import contextlib
import itertools
from contextlib import AbstractContextManager

import numpy as np

from bench.peers._peer import About
from bench.peers._spec import Given, Multiply, Spec, Vector

ABOUT = About("curvlinops in process", "peer", "in process", batches=True, installed=True)


def serving(spec: Spec) -> AbstractContextManager[str]:
    """Serve nothing."""
    return contextlib.nullcontext("")


def connect(address: str, given: Given) -> Multiply:
    """Return the products of a Hessian with the same weights and data."""
    import torch
    from curvlinops import HessianLinearOperator

    class Dense(torch.nn.Module):
        """A dense layer whose parameters have the order of x."""

        def __init__(self, W: Vector, b: Vector) -> None:
            super().__init__()
            self.W, self.b = (torch.nn.Parameter(torch.from_numpy(array.copy())) for array in (W, b))

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows @ self.W + self.b

    layers: list[torch.nn.Module] = []
    rest = given.x
    for inputs, outputs in itertools.pairwise(given.spec.sizes):
        W, b, rest = np.split(rest, [inputs * outputs, (inputs + 1) * outputs])
        layers += [Dense(W.reshape(inputs, outputs), b), torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers[:-1])
    batch = (torch.from_numpy(given.X), torch.from_numpy(given.labels.astype(np.int64)))
    H = HessianLinearOperator(
        model, torch.nn.CrossEntropyLoss(), list(model.parameters()), [batch], check_deterministic=False
    )

    def multiply(V: Vector) -> Vector:
        products: Vector = (H @ torch.from_numpy(np.ascontiguousarray(V.T))).numpy()
        return products.T

    return multiply
