"""Reads the tensors of PyTorch modules by name. Does not import torch.

`hvpd.torch.register` names leaves of x after parameters, and the leaves of the first
data argument after buffers.
"""

from collections.abc import Iterable
from typing import Any, TypeGuard

from hvpd import _arrays, _text
from hvpd._errors import InvalidArgumentError

PARAMETERS = "Parameters"
"""Type name of the x of a registered module."""

BUFFERS = "Buffers"
"""Type name of the first data argument of a registered module."""

_INNER = ("module", "_orig_mod")
"""Attributes of PyTorch's wrappers that hold the wrapped module."""


def is_module(x: Any) -> TypeGuard[Any]:
    """Return whether x is a module of PyTorch."""
    return hasattr(x, "named_parameters") and hasattr(x, "named_buffers")


def tensors(module: Any, names: Iterable[str], label: str) -> dict[str, Any]:
    """Return parameters and buffers of a module, as arrays by name.

    Raises:
        InvalidArgumentError: The module lacks one of the names.
    """
    found = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    missing = [name for name in names if name not in found]
    if missing:
        inner = next((each for each in _INNER if is_module(getattr(module, each, None))), None)
        remedy = f"pass the inner module, its .{inner}" if inner else "pass a module of the registered class"
        raise InvalidArgumentError(
            f"{label} needs the tensors {_text.cut(', '.join(missing), 300)}, which the module "
            f"{type(module).__name__} does not have: {remedy}",
            reason="STRUCTURE",
        )
    return {name: _arrays.host(found[name].detach(), f"the tensor {name!r}") for name in names}
