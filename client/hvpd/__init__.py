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
    from hvpd._check import Certificate, RegistrationCheck
    from hvpd._client import Client, Listing, connect
    from hvpd._composite import Composite, composite
    from hvpd._diagonal import Diagonal
    from hvpd._errors import (
        AccessError,
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
    from hvpd._lowrank import LowRankOperator, NystromPreconditioner, nystrom
    from hvpd._objective import Choice, DerivativeRules, Objective, Point
    from hvpd._operator import CurvatureOperator, HessianOperator
    from hvpd._transport import Statistics
    from hvpd._usage import Usage

__all__ = [
    "AccessError",
    "Certificate",
    "Choice",
    "Client",
    "Composite",
    "CurvatureOperator",
    "DeadlineError",
    "DerivativeRules",
    "Diagonal",
    "HessianOperator",
    "HvpdError",
    "IncompatibleError",
    "InvalidArgumentError",
    "Listing",
    "LowRankOperator",
    "MissingExtraError",
    "NotFoundError",
    "NystromPreconditioner",
    "Objective",
    "OverloadedError",
    "Point",
    "RegistrationCheck",
    "Statistics",
    "UnavailableError",
    "Usage",
    "__version__",
    "composite",
    "connect",
    "local",
    "nystrom",
]

_HOMES = {
    "_check": ("Certificate", "RegistrationCheck"),
    "_composite": ("Composite", "composite"),
    "_client": ("Client", "Listing", "connect"),
    "_diagonal": ("Diagonal",),
    "_errors": tuple(name for name in __all__ if name.endswith("Error")),
    "_local": ("local",),
    "_lowrank": ("LowRankOperator", "NystromPreconditioner", "nystrom"),
    "_objective": ("Choice", "DerivativeRules", "Objective", "Point"),
    "_operator": ("CurvatureOperator", "HessianOperator"),
    "_transport": ("Statistics",),
    "_usage": ("Usage",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(f"hvpd.{module}"), name)
            return value
    raise AttributeError(f"module 'hvpd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
