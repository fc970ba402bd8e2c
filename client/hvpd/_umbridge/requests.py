"""Reads requests of UM-Bridge, and checks each field against the model."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hvpd import _text
from hvpd._errors import HvpdError, InvalidArgumentError
from hvpd._umbridge import segments
from hvpd._umbridge.model import Asked, Model
from hvpd._wire import codec


class RefusedError(HvpdError):
    """A request that the protocol answers with an error.

    Attributes:
        kind: Type of the error in the protocol, such as "InvalidInput".
        status: HTTP status.
    """

    def __init__(self, kind: str, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status


def parsed(body: bytes) -> Mapping[str, Any]:
    """Return the JSON object of a request.

    Raises:
        RefusedError: The body is something else.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"the body must be JSON, and it is not ({error})") from None
    if not isinstance(found, dict):
        raise _invalid(f"the body must be a JSON object, got {_shown(found)}")
    return found


def model_of(request: Mapping[str, Any], models: Mapping[str, Model]) -> Model:
    """Return the model that a request names.

    Raises:
        RefusedError: There is none, or the request has options for it.
    """
    name = request.get("name")
    if not isinstance(name, str) or name not in models:
        raise RefusedError(
            "ModelNotFound", f"there is no model {_shown(name)} here, but {', '.join(map(repr, models))}"
        )
    if request.get("config"):
        raise _invalid(f"{name} takes no config, got {_shown(request['config'])}: leave it empty")
    return models[name]


def asked(request: Mapping[str, Any], model: Model, operation: str, *, shared: bool) -> Asked:
    """Return what a request asks for.

    Args:
        request: The request.
        model: The model that it names.
        operation: "Evaluate", "Gradient", "ApplyJacobian" or "ApplyHessian".
        shared: Whether the inputs are in shared memory.

    Raises:
        RefusedError: A field is missing, or does not fit the model.
    """
    inputs = segments.read(request, model.input_sizes) if shared else request.get("input")
    x = _inputs(inputs, model)
    if operation == "Evaluate":
        return Asked(x)
    _index(request, "outWrt", len(model.output_sizes), "outputs")
    inputs_of = {"ApplyHessian": ("inWrt1", "inWrt2")}.get(operation, ("inWrt",))
    wrt = [_index(request, field, len(model.input_sizes), "inputs") for field in inputs_of]
    sens, vec = 1.0, None
    if operation != "ApplyJacobian":
        sens = float(_vector(request.get("sens"), "sens", 1, "the output")[0])
    if operation != "Gradient":
        vec = _vector(request.get("vec"), "vec", model.input_sizes[wrt[-1]], f"input {wrt[-1]}")
    return Asked(x, wrt[0], wrt[-1], sens, vec)


def _inputs(inputs: Any, model: Model) -> codec.Array:
    """Return the inputs joined to a vector of shape (n,)."""
    sizes = model.input_sizes
    if not isinstance(inputs, Sequence) or isinstance(inputs, str) or len(inputs) != len(sizes):
        got = len(inputs) if isinstance(inputs, Sequence) and not isinstance(inputs, str) else _shown(inputs)
        raise _invalid(f"input must have {len(sizes)} vectors, of the sizes {_text.cut(str(sizes), 200)}, got {got}")
    parts = [_vector(part, f"input[{i}]", sizes[i], "the model") for i, part in enumerate(inputs)]
    return np.concatenate(parts)


def _vector(value: Any, field: str, size: int, of: str) -> codec.Array:
    """Return a vector of float64 with a given size."""
    if isinstance(value, np.ndarray):
        found = value
    else:
        if not isinstance(value, list) or any(type(each) not in (int, float) for each in value):
            raise _invalid(f"{field} must be a list of {size} numbers, got {_shown(value)}")
        try:
            found = np.array(value, np.float64)
        except OverflowError:
            raise _invalid(f"{field} has an integer that is too large for a floating number") from None
    if found.shape != (size,):
        raise _invalid(f"{field} must have {size} elements, as {of} has, got {len(found)}")
    if not np.all(np.isfinite(found)):
        raise _invalid(f"{field} must have finite elements")
    return found


def _index(request: Mapping[str, Any], field: str, count: int, what: str) -> int:
    value = request.get(field)
    if type(value) is not int or not 0 <= value < count:
        raise _invalid(f"{field} must be from 0 to {count - 1}, because there are {count} {what}; got {_shown(value)}")
    return value


def _invalid(message: str) -> RefusedError:
    return RefusedError("InvalidInput", message)


def _shown(value: Any) -> str:
    return "nothing" if value is None else _text.cut(repr(value), 100)


def refused(error: HvpdError) -> tuple[int, str]:
    """Return the HTTP status and the protocol's type of an error."""
    if isinstance(error, RefusedError):
        return error.status, error.kind
    if isinstance(error, (InvalidArgumentError, segments.SegmentError)):
        return 400, "InvalidInput"
    return 500, "InvalidOutput" if error.reason == "NOT_FINITE" else "ServerError"
