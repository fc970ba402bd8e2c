"""Tables for notebooks: their facts, and text from elsewhere that must stay text."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

import hvpd
from hvpd import _html
from hvpd._check.certificate import Certificate
from hvpd._check.verdicts import Item, RegistrationCheck
from hvpd._objective import Objective
from hvpd._operators.curvature import CurvatureOperator
from hvpd._plan import Choice, Plan
from hvpd._point import Point
from hvpd._wire import pytree
from hvpd.v1 import curvature_pb2, objective_pb2, server_pb2, tensor_pb2

HOSTILE = '</td></table><img src=x onerror="hit()"><script>hit()</script>&lt;\x1b[2J\u202e'
"""Text that would be code, or move a terminal's cursor, or change its own direction."""

SHOWN = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")


class Reader(HTMLParser):
    """Reads a table as a notebook does: its elements, attributes and texts."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = set(), set(), [], []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= set(attributes)
        self.open.append(tag)
        self.texts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts[-1] += data


def refuses(*args, **settings):
    raise AssertionError("a table must not ask the server")


class Transport:
    """A transport that refuses all calls."""

    address = HOSTILE
    server = server_pb2.GetServerResponse(version=HOSTILE, platform=HOSTILE, device_kind=HOSTILE)
    reporter = None
    unary = ask_once = multiply = refuses

    def create_point(self, spec, x, **settings):
        return SimpleNamespace(id="1", value=2.5, nonfinite_x=0, nonfinite_value=0, nonfinite_gradient=0), 3.0 * x


def objective_of(name, leaves):
    tree, _ = pytree.flatten(dict.fromkeys(leaves, 1.0))
    bundle = objective_pb2.Bundle(
        n=2 * len(leaves),
        dtype="float64",
        precision=name,
        mode=name,
        x_tree=tree,
        data_tree=pytree.flatten(())[0],
        x_leaves=[tensor_pb2.ArraySpec(dtype="float64", shape=[2])] * len(leaves),
    )
    message = objective_pb2.Objective(digest="0" * 64, name=name, bundle=bundle)
    return Objective(Transport(), message)


def shown(name, leaves=("w", "b")):
    """Return all objects that have tables, with a name from elsewhere."""
    objective = objective_of(name, leaves)
    point = Point(objective, objective._transport, curvature_pb2.PointSpec(default_data=True), np.ones(objective.n))
    items = (Item(name, 0.5, 1.0, True, name), Item("taylor", float("nan"), float("nan"), None, ""))
    return {
        "client": hvpd.Client(objective._transport),
        "objective": objective,
        "point": point,
        "operator": CurvatureOperator(point, shift=0.5).block(leaves[0]),
        "certificate": Certificate(name, "0" * 64, name, 4, "float64", name, 0, items, 12, 3, 0.25),
        "registration check": RegistrationCheck("failed", items, name),
        "plan": Plan([Choice(8, name, 0.001, None, name)]),
    }


KINDS = ["client", "objective", "point", "operator", "certificate", "registration check", "plan"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_from_elsewhere_stays_text(kind):
    content = shown(HOSTILE, (HOSTILE, "b"))[kind]._repr_html_()
    read = Reader(content)
    assert read.tags <= {"div", "table", "caption", "tr", "th", "td", "p"}
    assert {name for name, _ in read.attributes} <= {"class", "style"}
    assert any(SHOWN in text for text in read.texts)
    assert content.isprintable()


@pytest.mark.parametrize("kind", KINDS)
def test_no_colour_is_fixed_and_no_text_is_read_as_tex(kind):
    content = shown("a")[kind]._repr_html_()
    assert not re.search(r"color|background|#[0-9a-f]{3}|rgb|font", content)
    assert content.startswith('<div class="tex2jax_ignore mathjax_ignore">')


def test_the_tables_have_the_facts():
    found = {kind: Reader(value._repr_html_()).texts for kind, value in shown("demo/logistic").items()}
    assert "Objective demo/logistic" in found["objective"]
    assert {"n", "4", "b [2], w [2]", "float64"} <= set(found["objective"])
    assert {"value", "2.5", "norm of the gradient", "6", "as registered"} <= set(found["point"])
    assert {"hessian", "2 x 2", "w", "0.5"} <= set(found["operator"])
    assert {"taylor", "undecided", "passed, 1 undecided: 12 products, 3 points, 0.25 s"} <= set(found["certificate"])
    assert {"8", "demo/logistic", "0.001"} <= set(found["plan"])


def test_long_texts_and_many_leaves_are_cut():
    many = objective_of("a", [f"leaf{number:03}" for number in range(500)])._repr_html_()
    assert "leaf000 [2]" in many
    assert "leaf499" not in many
    assert "and 492 more" in many
    assert len(_html.facts("a" * 10_000, {"b": "c" * 10_000})) < 1000


def test_a_plan_is_a_list():
    choice = Choice(8, "hvp", None, None, "")
    assert Plan([choice]) == [choice]
