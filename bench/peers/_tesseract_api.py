"""The file that Tesseract's server loads: a gradient, and its derivative along v."""

import os
from typing import Any

from pydantic import BaseModel
from tesseract_core.runtime import Array, Differentiable, Float32

from bench.peers._kernel import Kernel
from bench.peers._spec import PART, SPECS

_SPEC = SPECS[os.environ[PART]]
_KERNEL = Kernel(_SPEC, most=1)


class InputSchema(BaseModel):  # type: ignore[misc]  # pydantic is not here
    """The point."""

    x: Differentiable[Array[(_SPEC.n,), Float32]]


class OutputSchema(BaseModel):  # type: ignore[misc]  # pydantic is not here
    """The gradient there."""

    gradient: Differentiable[Array[(_SPEC.n,), Float32]]


def apply(inputs: InputSchema) -> OutputSchema:
    """Return the gradient."""
    return OutputSchema(gradient=_KERNEL.gradient(inputs.x))


def jacobian_vector_product(
    inputs: InputSchema, jvp_inputs: set[str], jvp_outputs: set[str], tangent_vector: dict[str, Any]
) -> dict[str, Any]:
    """Return the gradient's derivative along a vector."""
    return {"gradient": _KERNEL.multiply(inputs.x, tangent_vector["x"])}
