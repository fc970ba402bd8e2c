"""Warnings, shown at the user's line."""

import contextlib
import sys
import warnings
from pathlib import Path

_SOLVERS = ("scipy",)
"""Packages that call operators. Their lines are not the user's."""


class CurvatureWarning(UserWarning):
    """The products of an objective may be wrong, or could not be checked.

    Each client warns once for an objective, if the server's check at its registration
    failed or is undecided. See `Objective.registration_check`.

    Example:
        >>> warnings.simplefilter("error", hvpd.CurvatureWarning)
    """


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Show a warning at the line outside of hvpd and of solvers that led to it."""
    warnings.warn(message, category, stacklevel=_users_level() + 1)


def _users_level() -> int:
    """Return how many frames above the caller the user's line is."""
    own = str(Path(__file__).parent)
    level, frame = 0, sys._getframe(1)  # noqa: SLF001 - Python's own way to walk the stack
    while frame.f_back is not None:
        module = str(frame.f_globals.get("__name__", ""))
        file = frame.f_code.co_filename
        if not (file.startswith(own) or file == contextlib.__file__ or module.partition(".")[0] in _SOLVERS):
            break
        level, frame = level + 1, frame.f_back
    return level
