"""Checks of arguments that several calls have in common."""

import math
import numbers
from collections.abc import Collection
from typing import Any

import numpy as np

from hvpd import _text
from hvpd._errors import InvalidArgumentError


def integer(number: Any, name: str, least: int, most: int | None = None) -> int:
    """Return an integer in [least, most].

    Raises:
        InvalidArgumentError: The argument is no such integer.
    """
    if not isinstance(number, (int, np.integer)) or number < least or (most is not None and number > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InvalidArgumentError(
            f"{name} must be an integer {limits}, got {_text.described(number)}", reason="INVALID_OPTION"
        )
    return int(number)


def finite(number: Any, name: str) -> float:
    """Return a finite float.

    Raises:
        InvalidArgumentError: The argument is no finite real number.
    """
    if not isinstance(number, numbers.Real) or not math.isfinite(number):
        raise InvalidArgumentError(
            f"{name} must be a finite real number, got {_text.described(number)}", reason="INVALID_OPTION"
        )
    return float(number)


def name_or_digest(name: object) -> str:
    """Return the name or digest of an objective.

    Raises:
        InvalidArgumentError: It is no string, or empty.
    """
    if not isinstance(name, str):
        raise InvalidArgumentError(
            f"a name or digest must be a string, got {_text.described(name)}", reason="INVALID_NAME"
        )
    if not name:
        raise InvalidArgumentError("the name is empty", reason="INVALID_NAME")
    return name


def check_choice(choice: object, name: str, choices: Collection[str]) -> None:
    """Check that a word is one of several.

    Raises:
        InvalidArgumentError: It is none of them.
    """
    if choice not in choices:
        words = ", ".join(filter(None, choices))
        raise InvalidArgumentError(
            f"{name} must be one of {words}, got {_text.described(choice)}", reason="INVALID_OPTION"
        )
