"""A warning is shown at the user's line, and not at a line of hvpd or of a solver."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse.linalg

import hvpd
from hvpd import _warnings


def as_hvpd(source):
    """Return the function `f` of a source, as if a file of hvpd had it."""
    found = {"warn": _warnings.warn, "np": np}
    exec(compile(source, str(Path(hvpd.__file__).parent / "_made.py"), "exec"), found)
    return found["f"]


def line_of(call):
    """Return the file and line of the one warning of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    (only,) = caught
    return only.filename, only.lineno


def test_a_warning_is_at_the_line_that_called_hvpd():
    inner = as_hvpd("def f():\n    g()\n\ndef g():\n    warn('careful')\n")
    assert line_of(lambda: inner()) == (
        __file__,
        test_a_warning_is_at_the_line_that_called_hvpd.__code__.co_firstlineno + 2,
    )


def test_a_warning_in_a_context_manager_is_at_the_line_that_called_hvpd():
    source = "import contextlib\n@contextlib.contextmanager\ndef watched():\n    yield\n    warn('careful')\n"
    inner = as_hvpd(f"{source}\n@watched()\ndef f():\n    with watched():\n        pass\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inner()
    assert [each.filename for each in caught] == [__file__, __file__]


def test_a_warning_under_a_solver_is_at_the_line_that_called_the_solver():
    multiply = as_hvpd("def f(v):\n    if not v.any():\n        warn('careful')\n    return v\n")
    A = scipy.sparse.linalg.LinearOperator((3, 3), multiply, dtype=np.float64)
    first = test_a_warning_under_a_solver_is_at_the_line_that_called_the_solver.__code__.co_firstlineno
    assert line_of(lambda: A.matvec(np.zeros(3))) == (__file__, first + 4)


def test_a_category_can_be_chosen():
    with pytest.warns(hvpd.CurvatureWarning, match="careful"):
        _warnings.warn("careful", hvpd.CurvatureWarning)
