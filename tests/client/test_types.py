"""The types of the public interface, as mypy and help() show them."""

import os
import pydoc
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import hvpd
from hvpd._operators.curvature import CurvatureOperator
from hvpd._wire import protocol

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_mypy_accepts_right_words_and_refuses_wrong_ones():
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "tests/client/typed.py"],
        check=False,
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": ""},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("call", "choices"),
    [
        (hvpd.Client.register, (*protocol.MODES, *protocol.PRODUCT_PRECISIONS, *protocol.REDUCTIONS)),
        (hvpd.Client.register_stablehlo, (*protocol.MODES, *protocol.PRECISIONS)),
        (hvpd.Objective.check, protocol.OPERATORS),
        (hvpd.Point.hessian, (*protocol.PRODUCT_MODES, *protocol.PRODUCT_PRECISIONS)),
        (hvpd.composite, (*protocol.DISTRIBUTIONS, *protocol.REDUCTIONS)),
    ],
)
def test_help_shows_the_choices(call, choices):
    signature = pydoc.plain(pydoc.render_doc(call)).splitlines()[2]
    for choice in choices:
        assert repr(choice) in signature


def test_the_words_are_those_of_the_types():
    assert get_args(hvpd.Mode) == protocol.MODES
    assert get_args(hvpd.Precision) == (*get_args(hvpd.ProductPrecision), protocol.EXPORTED)


class Point:
    n = 3
    dtype = "float32"


@pytest.mark.parametrize(
    ("name", "word", "choices"),
    [
        ("mode", "auto", protocol.PRODUCT_MODES),
        ("mode", None, protocol.PRODUCT_MODES),
        ("precision", "exported", protocol.PRODUCT_PRECISIONS),
    ],
)
def test_an_operator_refuses_other_words_when_it_is_made(name, word, choices):
    with pytest.raises(hvpd.InvalidArgumentError) as refused:
        CurvatureOperator(Point(), **{name: word})
    assert name in str(refused.value)
    assert repr(word) in str(refused.value)
    for choice in choices:
        assert choice in str(refused.value)
