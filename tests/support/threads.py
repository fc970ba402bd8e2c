"""A system without a further thread."""

import contextlib
import threading
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def no_threads() -> Iterator[None]:
    """Have each start of a thread fail as Python says it, in this `with`."""
    with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
        yield
