"""Load every family of operations into the table."""

import importlib
from typing import Final

FAMILIES: Final = (
    "elementwise",
    "shapes",
    "dynamic_shapes",
    "reductions",
    "sorting",
    "linear_algebra",
    "convolution",
    "gather_scatter",
    "control_flow",
    "inlined",
    "normalization",
    "random_bits",
    "fourier",
    "chlo",
    "composites",
    "custom_calls",
)
"""Modules beside this one, each with the rules of one family."""


def load() -> None:
    """Import all families. Each registers its rules."""
    for family in FAMILIES:
        importlib.import_module(f"hvpd_server.importer.{family}")
