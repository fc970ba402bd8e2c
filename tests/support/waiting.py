"""Waits for other threads and processes."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

_PAUSE = 0.01
"""Seconds between two looks. Without a pause, the test would take the CPU from the
processes that it waits for, above all from compiles, which run at a lower priority.
"""


def until(find: Callable[[], _T], seconds: float = 120.0) -> _T:
    """Look until a result is true, and return it. Fail after `seconds`."""
    ends, never = time.monotonic() + seconds, threading.Event()
    while not (found := find()):
        assert time.monotonic() < ends, "it never was so"
        never.wait(_PAUSE)
    return found
