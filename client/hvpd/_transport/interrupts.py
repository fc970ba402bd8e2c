"""Interrupts (Ctrl-C) in the middle of a call.

An interrupt can strike while gRPC holds its locks. A later use of that channel, to
cancel a call or to close it, may then wait for ever. So the client leaves the channel
as it is and opens another. An interrupt outside of gRPC costs no channel.
"""

import contextlib
import ctypes
import threading
from typing import Any


class OutsideGrpcError(BaseException):
    """An interrupt that struck outside of gRPC.

    Args:
        by: The interrupt.
    """

    def __init__(self, by: BaseException) -> None:
        super().__init__()
        self.by = by


def interrupt_behind(error: BaseException, before: BaseException | None) -> BaseException | None:
    """Return the interrupt that an error replaced; None if there is none.

    If an interrupt strikes in the middle of a `with`, Python's and gRPC's own
    conditions release a lock that is not held, and raise RuntimeError.

    Args:
        error: The error.
        before: The exception that was handled before; the search ends there.
    """
    found: BaseException | None = error
    while found is not None and found is not before:
        if not isinstance(found, Exception):
            return found
        found = found.__context__
    return None


def leave(call: Any) -> None:
    """Leave a call behind after an interrupt, and let the server end its work.

    A thread cancels the call, because gRPC's locks may be held. That thread then waits
    for ever, and no other thread does.
    """
    never_free(call)
    with contextlib.suppress(RuntimeError):  # The system has no further thread.
        threading.Thread(target=call.cancel, name="hvpd-cancel", daemon=True).start()


def never_free(thing: object) -> None:
    """Keep an object beyond the end of the interpreter.

    gRPC's destructors also take the locks that an interrupt left behind.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
