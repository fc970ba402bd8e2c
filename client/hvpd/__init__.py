"""Hessian-vector products as a service.

>>> import hvpd
>>> client = hvpd.connect("gpu-box:7070")              # doctest: +SKIP
>>> objective = client.objective("digits/mlp")         # doctest: +SKIP
>>> H = objective.at(params).hessian(shift=1e-3)       # doctest: +SKIP

The solver runs on this machine, and the Hessian stays on the server. The import is
quick, because heavy packages are imported at their first use. Only registration imports
jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hvpd._version import __version__

if TYPE_CHECKING:
    from hvpd import krylov as krylov
    from hvpd._check.certificate import Certificate
    from hvpd._check.verdicts import RegistrationCheck
    from hvpd._client import Client
    from hvpd._composite import Composite, composite
    from hvpd._connect import connect
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
    from hvpd._layout import Leaf
    from hvpd._listing import Listing
    from hvpd._local import local
    from hvpd._objective import Objective
    from hvpd._operators.curvature import CurvatureOperator, HessianOperator
    from hvpd._operators.diagonal import Diagonal
    from hvpd._operators.low_rank import LowRankOperator, NystromPreconditioner, nystrom
    from hvpd._plan import Choice, DerivativeRules, Plan
    from hvpd._point import Point
    from hvpd._progress import Progress
    from hvpd._transport.statistics import Statistics
    from hvpd._usage import Usage
    from hvpd._warnings import CurvatureWarning
    from hvpd._wire.protocol import (
        Distribution,
        Mode,
        OperatorName,
        Platform,
        Precision,
        ProductMode,
        ProductPrecision,
        Reduction,
    )

__all__ = [
    "AccessError",
    "Certificate",
    "Choice",
    "Client",
    "Composite",
    "CurvatureOperator",
    "CurvatureWarning",
    "DeadlineError",
    "DerivativeRules",
    "Diagonal",
    "Distribution",
    "HessianOperator",
    "HvpdError",
    "IncompatibleError",
    "InvalidArgumentError",
    "Leaf",
    "Listing",
    "LowRankOperator",
    "MissingExtraError",
    "Mode",
    "NotFoundError",
    "NystromPreconditioner",
    "Objective",
    "OperatorName",
    "OverloadedError",
    "Plan",
    "Platform",
    "Point",
    "Precision",
    "ProductMode",
    "ProductPrecision",
    "Progress",
    "Reduction",
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
    "_check.certificate": ("Certificate",),
    "_check.verdicts": ("RegistrationCheck",),
    "_composite": ("Composite", "composite"),
    "_client": ("Client",),
    "_connect": ("connect",),
    "_listing": ("Listing",),
    "_operators.diagonal": ("Diagonal",),
    "_errors": tuple(name for name in __all__ if name.endswith("Error")),
    "_local": ("local",),
    "_operators.low_rank": ("LowRankOperator", "NystromPreconditioner", "nystrom"),
    "_layout": ("Leaf",),
    "_objective": ("Objective",),
    "_plan": ("Choice", "DerivativeRules", "Plan"),
    "_point": ("Point",),
    "_progress": ("Progress",),
    "_operators.curvature": ("CurvatureOperator", "HessianOperator"),
    "_transport.statistics": ("Statistics",),
    "_usage": ("Usage",),
    "_warnings": ("CurvatureWarning",),
    "_wire.protocol": (
        "Distribution",
        "Mode",
        "OperatorName",
        "Platform",
        "Precision",
        "ProductMode",
        "ProductPrecision",
        "Reduction",
    ),
}


def __getattr__(name: str) -> Any:
    if name in ("aio", "jax", "krylov", "petsc", "torch"):
        return importlib.import_module(f"hvpd.{name}")
    for module, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(f"hvpd.{module}"), name)
            return value
    raise AttributeError(f"module 'hvpd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
