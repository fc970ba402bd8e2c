"""How a group ends: at once and as a whole. The supervisor of each rank then starts
another process, and the group forms again.
"""

import logging
import os
from typing import Final, NoReturn

from hvpd_server.telemetry import logs

ENDED: Final = 72
"""Exit code of a process whose group has ended."""

BEAT_SECONDS: Final = 0.5
"""Seconds between two signs of life."""

SILENCE_SECONDS: Final = 5.0
"""Seconds without a sign of life after which a rank counts as stopped."""


def silence_seconds(launch_timeout: float) -> float:
    """Return the seconds without a sign of life after which a rank counts as stopped.

    They are less than the timeout of a launch. Otherwise the supervisor would blame the
    objective whose launch waits for the stopped rank.
    """
    return min(SILENCE_SECONDS, launch_timeout / 2) if launch_timeout else SILENCE_SECONDS


def end(reason: str, code: int = ENDED) -> NoReturn:
    """End this process at once, without waiting for work under way.

    Args:
        reason: Why the group ends, for the log.
        code: The exit code.
    """
    logs.say(f"the group ends: {reason}", logging.ERROR)
    logs.finish()
    os._exit(code)
