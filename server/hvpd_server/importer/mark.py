"""Reads a mark, the strict JSON of a composite; checks and takes each field once.

A program is hostile. No field of a mark is ignored, and the functions of a rule are
those that the composite's attribute "functions" lists, which the reader counts as
calls.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from hvpd import _text
from hvpd_server.importer import refusals
from hvpd_server.importer.graph import TensorType
from hvpd_server.importer.table import Call, Refused, Value

VERSION: Final = 1
"""Version of the marks that this file reads."""

_MARK_CHARACTERS: Final = 1 << 16
"""Longest JSON of a mark."""


@dataclasses.dataclass
class Mark:
    """The fields of a mark; each is taken once."""

    call: Call
    fields: dict[str, Any]
    functions: frozenset[str]

    def refuse(self, why: str) -> Refused:
        """Return the refusal of the mark; `why` completes "a stablehlo.composite
        hvpd.scan ...".
        """
        return self.call.refuse(f"{_text.cut(str(self.call.attributes['name']), 80)} {why}", refusals.BUNDLE_INVALID)

    def take(self, name: str) -> Any:
        """Return a field."""
        if name not in self.fields:
            raise self.refuse(f"without the field {name}")
        return self.fields.pop(name)

    def integer(self, name: str, low: int, high: int) -> int:
        """Return a field that is an integer from `low` to `high`."""
        return self.checked_integer(self.take(name), name, low, high)

    def checked_integer(self, value: Any, name: str, low: int, high: int) -> int:
        """Return a value that is an integer from `low` to `high`."""
        if type(value) is not int or not low <= value <= high:
            raise self.refuse(f"whose {name} is {_text.cut(str(value), 40)}: expected an integer from {low} to {high}")
        return value

    def boolean(self, name: str) -> bool:
        """Return a field that is true or false."""
        value = self.take(name)
        if type(value) is not bool:
            raise self.refuse(f"whose {name} is {_text.cut(str(value), 40)}: expected true or false")
        return value

    def items(self, name: str) -> list[Any]:
        """Return a field that is a list."""
        value = self.take(name)
        if type(value) is not list:
            raise self.refuse(f"whose {name} is {_text.cut(str(value), 40)}: expected a list")
        return value

    def booleans(self, value: Any, name: str, count: int) -> list[bool]:
        """Return a value that is a list of `count` booleans."""
        if type(value) is not list or len(value) != count or any(type(each) is not bool for each in value):
            raise self.refuse(f"whose {name} is {_text.cut(str(value), 40)}: expected {count} booleans")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """Return a field that is an object."""
        value = self.take(name)
        if type(value) is not dict:
            raise self.refuse(f"whose {name} is {_text.cut(str(value), 40)}: expected an object")
        return value

    def symbol(self, value: Any, name: str) -> str:
        """Return a value that names a function of the rule."""
        if type(value) is not str or value not in self.functions:
            raise self.refuse(
                f"whose {name} is {_text.cut(str(value), 40)}: expected a name in its attribute functions"
            )
        return value

    def done(self) -> None:
        """Check that every field was taken."""
        if self.fields:
            raise self.refuse(f"with the field {_text.cut(min(self.fields), 40)}, which is not known")

    def fit(self, symbol: str, name: str, arguments: Sequence[TensorType], results: Sequence[TensorType]) -> None:
        """Check the types of a function.

        Raises:
            Refused: The function takes or returns other arrays.
        """
        block = self.call.signature(symbol)
        for what, found, expected in (
            ("takes", block.types, arguments),
            ("returns", block.result_types, results),
        ):
            if len(found) != len(expected) or not all(map(TensorType.fits, found, expected)):
                raise self.refuse(
                    f"whose {name} {what} {_written(found)}: expected {_written(expected)}, as the operation's types say"
                )


def _written(types: Sequence[TensorType]) -> str:
    shown = [str(type_) for type_ in types[:6]]
    return f"({', '.join(shown)}{', ...' if len(types) > len(shown) else ''})"


def type_of(value: Value) -> TensorType:
    return TensorType(tuple(int(extent) for extent in np.shape(value)), np.dtype(value.dtype).name)


def is_float_type(type_: TensorType) -> bool:
    return bool(jnp.issubdtype(jnp.dtype(type_.dtype), np.inexact))


def arrays(values: Sequence[Value]) -> tuple[Value, ...]:
    """Return jax arrays, as functions with a rule must return them."""
    return tuple(jnp.asarray(each) for each in values)


def read(call: Call) -> Mark:
    """Return the mark of a composite.

    Raises:
        Refused: Another version, or not the JSON of an object.
    """
    name = _text.cut(str(call.attributes["name"]), 80)
    if call.attributes.get("version") != VERSION:
        raise call.refuse(
            f"{name} of version {_text.cut(str(call.attributes.get('version')), 20)}: expected version {VERSION}. Use the version of hvpd "
            "that the server has"
        )
    given = call.attributes.get("composite_attributes", {})
    text, functions = (given.get("mark"), given.get("functions")) if isinstance(given, Mapping) else (None, None)
    strings = isinstance(functions, list) and all(type(each) is str for each in functions)
    if functions is None or not strings or type(text) is not str or len(given) != 2 or len(text) > _MARK_CHARACTERS:
        raise call.refuse(f"{name} without the attributes mark and functions of a mark", refusals.BUNDLE_INVALID)
    try:
        fields = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise call.refuse(
            f"{name} whose mark is not JSON: {_text.cut(str(error), 100)}", refusals.BUNDLE_INVALID
        ) from None
    if type(fields) is not dict:
        raise call.refuse(f"{name} whose mark is not a JSON object", refusals.BUNDLE_INVALID)
    return Mark(call, fields, frozenset(functions))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
