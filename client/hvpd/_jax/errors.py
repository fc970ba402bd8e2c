"""Errors of hvpd that cross a program which jax compiled.

XLA reduces an exception of a callback to text. jax raises an error of its own with that
text: `JaxRuntimeError`, or `ValueError` from the short way that repeated calls take. So
a callback keeps its error, and raises one whose text has a mark. `own_errors` gives the
kept error back for both.

`install` does the same for every `JaxRuntimeError` without a `with`. It gives that
class a constructor, because jax has no other place that sees these errors. A text
without a mark is left alone. Python's own `ValueError` cannot have such a constructor.
"""

import collections
import contextlib
import functools
import itertools
import re
import threading
from collections.abc import Iterator
from typing import Any

import jax

_MARK = re.compile(r"\[hvpd callback (\d+)\]")

_KEPT = 64
"""Errors that are kept, because jax raises the error of an array at each use."""


class CallbackError(Exception):
    """The exception that a callback raises, with a mark in place of the error."""


class _Kept:
    """The latest errors of callbacks, by the number in their mark."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._errors: collections.OrderedDict[int, BaseException] = collections.OrderedDict()

    def add(self, error: BaseException) -> int:
        with self._lock:
            number = next(self._numbers)
            self._errors[number] = error
            while len(self._errors) > _KEPT:
                self._errors.popitem(last=False)
        return number

    def get(self, number: int) -> BaseException | None:
        with self._lock:
            return self._errors.get(number)


_kept = _Kept()


def marked(error: BaseException) -> CallbackError:
    """Return the exception that a callback raises in place of an error.

    Args:
        error: An error of hvpd, or an interrupt.
    """
    return CallbackError(f"{type(error).__name__}: {error} [hvpd callback {_kept.add(error)}]")


def _behind(text: str) -> BaseException | None:
    """Return the error that a text stands for; None for a text of others."""
    found = _MARK.search(text)
    return _kept.get(int(found[1])) if found else None


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raise the errors of callbacks as hvpd's own.

    A compiled program that fails raises an error of jax, whose text has hvpd's. Inside
    this `with`, hvpd's error is raised instead, with its class, reason and request id.
    Ctrl-C stays a KeyboardInterrupt. Read the results inside, because jax can report
    the error when a result is first used. Outside of compiled programs, hvpd's errors
    need no `with`.

    Example:
        >>> step = jax.jit(lambda x: x - rate * jax.grad(f)(x))
        >>> with hvpd.jax.errors():
        ...     x = jax.block_until_ready(step(x))
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        own = error.__cause__ if issubclass(type(error), _Joined) else _behind(str(error))
        if own is None:
            raise
        raise own from None


class _Joined:
    """Marks the classes of `_joined`."""


@functools.cache
def _joined(kind: type[BaseException]) -> type[BaseException]:
    """Return a class of errors that are of a kind and a JaxRuntimeError."""

    def init(self: BaseException, *_: object) -> None:
        """Do nothing, because `_again` sets the attributes."""

    names = {
        "__init__": init,
        "__str__": BaseException.__str__,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    return type(kind.__name__, (kind, jax.errors.JaxRuntimeError, _Joined), names)


def _again(error: BaseException, text: str) -> BaseException:
    """Return a JaxRuntimeError with a text, which is also the error."""
    kind = _joined(type(error))  # type: ignore[arg-type]  # a class is hashable
    again = kind.__new__(kind, str(error))
    jax.errors.JaxRuntimeError.__init__(again, text)  # Its own attributes, such as error_code.
    again.args = error.args
    again.__dict__.update(error.__dict__)
    again.__cause__ = error
    return again


def install() -> None:
    """Give JaxRuntimeError its constructor, once in a process."""
    kind: Any = jax.errors.JaxRuntimeError
    if getattr(vars(kind).get("__new__"), "__module__", "") == __name__:
        return

    def new(cls: type[BaseException], *args: Any) -> BaseException:
        if cls is kind and args and (error := _behind(str(args[0]))) is not None:
            return _again(error, str(args[0]))
        return RuntimeError.__new__(cls, *args)

    new.__module__ = __name__
    kind.__new__ = new
