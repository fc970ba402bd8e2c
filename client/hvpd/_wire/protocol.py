"""Revisions of the protocol, and words and limits that client and server share."""

from typing import Literal, get_args

OLDEST = 1
"""Oldest revision that is understood."""

NEWEST = 1
"""Newest revision, which the client states.

Each change that an older peer would misunderstand raises it."""

REVISION_KEY = "hvpd-protocol"
"""Metadata key of the client's revision."""

MAX_PRIORITY = 100
"""Largest priority of a product; the smallest is its negative."""

MAX_PIN_SECONDS = 7 * 24 * 3600
"""Longest time, in seconds, for which a pinned point stays after its last use."""

VERSION_KEY = "hvpd-version"
"""Metadata key of the client's version of hvpd, for messages."""

ProductMode = Literal[
    "forward_over_reverse",
    "reverse_over_forward",
    "reverse_over_reverse",
    "linearized",
    "finite_difference",
]
"""Mode of a product of the Hessian."""

Mode = Literal[ProductMode, "auto"]
"""Mode of an objective."""

ProductPrecision = Literal["highest", "high", "default"]
"""Precision of the matrix products in a product of the Hessian."""

Precision = Literal[ProductPrecision, "exported"]
"""Precision of an objective. "exported": matrix products keep their own precision."""

Platform = Literal["cpu", "cuda", "rocm", "tpu"]
"""Platform that a program may have branches for."""

Reduction = Literal["mean", "sum"]
"""How a function reduces the rows of its data."""

Distribution = Literal["categorical", "normal"]
"""Distribution that the output of a composite's model parametrizes."""

OperatorName = Literal["hessian", "ggn", "fisher", "empirical_fisher"]
"""Operator that can be checked: a name of a method of `Point`."""

PRODUCT_MODES: tuple[ProductMode, ...] = get_args(ProductMode)
MODES: tuple[Mode, ...] = get_args(Mode)
PRODUCT_PRECISIONS: tuple[ProductPrecision, ...] = get_args(ProductPrecision)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PLATFORMS: tuple[Platform, ...] = get_args(Platform)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)
OPERATORS: tuple[OperatorName, ...] = get_args(OperatorName)

RESIDUAL_MODES = ("linearized", "auto")
"""Modes of an objective that keep residuals."""

EXPORTED: Literal["exported"] = "exported"
"""Precision of an objective whose matrix products keep their own precision."""

MAX_FIXED_BUCKET = 1024
"""Largest block width that an objective can fix, in vectors."""
