"""Every public name and every public method has a docstring with an example."""

import ast
import inspect
import textwrap
from typing import get_origin

import pytest

import hvpd


def documented():
    """Yield the public names that can have a docstring, and their public methods."""
    for name, value in [(name, getattr(place, name)) for place in (hvpd, hvpd.krylov) for name in place.__all__]:
        if isinstance(value, str) or get_origin(value) is not None:  # A version; a type of words.
            continue
        yield name, value
        for attribute, member in inspect.getmembers_static(value) if inspect.isclass(value) else ():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            home = inspect.getmodule(function)
            ours = home is not None and home.__name__.startswith("hvpd")
            if not attribute.startswith("_") and inspect.isfunction(function) and ours:
                yield f"{name}.{attribute}", member


NAMES = dict(documented())


def example(doc):
    """Return the code of a docstring's section `Example:`."""
    _, _, section = inspect.cleandoc(doc).partition("\nExample:\n")
    lines = textwrap.dedent(section).splitlines()
    return "\n".join(line[4:] for line in lines if line.startswith((">>> ", "... ", ">>>", "...")))


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_docstring_with_an_example_that_names_it(name):
    doc = NAMES[name].__doc__
    assert doc, name
    code = example(doc)
    assert code, name
    ast.parse(code)
    assert inspect.isclass(NAMES[name]) or name.rpartition(".")[2] in code


def test_the_test_sees_methods_properties_and_functions():
    assert {"Client.register", "Objective.leaves", "connect", "Statistics.mean_batch_width"} <= NAMES.keys()
    assert example("Do it.\n\nExample:\n    >>> with x:\n    ...     y\n") == "with x:\n    y"
    assert example("Do it.") == ""
