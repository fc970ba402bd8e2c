"""Hessian-vector products as a service.

>>> import hvpd
>>> client = hvpd.connect("gpu-box:7070")              # doctest: +SKIP
>>> objective = client.objective("digits/mlp")         # doctest: +SKIP
>>> H = objective.at(params).hessian(shift=1e-3)       # doctest: +SKIP

The solver runs here, the Hessian stays there. Importing this is quick: what is heavy is imported when it is used, jax only to
register.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hvpd._version import __version__

if TYPE_CHECKING:
    from hvpd._client import Client, Listing, connect
    from hvpd._errors import (
        DeadlineError,
        HvpdError,
        IncompatibleError,
        InvalidArgumentError,
        MissingExtraError,
        NotFoundError,
        OverloadedError,
        UnavailableError,
    )
    from hvpd._local import local
    from hvpd._objective import Objective, Point
    from hvpd._operator import HessianOperator
    from hvpd._transport import Statistics

__all__ = [
    "Client",
    "DeadlineError",
    "HessianOperator",
    "HvpdError",
    "IncompatibleError",
    "InvalidArgumentError",
    "Listing",
    "MissingExtraError",
    "NotFoundError",
    "Objective",
    "OverloadedError",
    "Point",
    "Statistics",
    "UnavailableError",
    "__version__",
    "connect",
    "local",
]

_HOMES = {
    "_client": ("Client", "Listing", "connect"),
    "_errors": tuple(name for name in __all__ if name.endswith("Error")),
    "_local": ("local",),
    "_objective": ("Objective", "Point"),
    "_operator": ("HessianOperator",),
    "_transport": ("Statistics",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(f"hvpd.{module}"), name)
            return value
    raise AttributeError(f"module 'hvpd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
