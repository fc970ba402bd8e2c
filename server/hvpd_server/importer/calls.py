"""Which functions of a module call which, and how many operations that makes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlib.mlir import ir

from hvpd_server.importer import attributes, refusals
from hvpd_server.importer.attributes import short
from hvpd_server.importer.refusals import Limits
from hvpd_server.importer.table import Refused


@dataclasses.dataclass
class Size:
    """The size of a function, without the functions that it calls."""

    operations: int = 0
    calls: list[str] = dataclasses.field(default_factory=list)
    """Functions that it calls, one entry for each call."""
    named: list[str] = dataclasses.field(default_factory=list)
    """Strings that may name more functions."""


def reached(entry: str, functions: Mapping[str, Size], limits: Limits) -> frozenset[str]:
    """Return the functions that the entry calls, itself included.

    Raises:
        Refused: A function calls itself, or the program is too large once calls are
            replaced by the functions that they call.
    """
    sizes: dict[str, int] = {}
    depths: dict[str, int] = {}
    pending = [entry]
    under_way: set[str] = set()
    while pending:
        name = pending[-1]
        if name in sizes:
            pending.pop()
            continue
        if name not in functions:
            raise Refused(refusals.BUNDLE_INVALID, f"calls the function {short(name)}, which is not there")
        calls = functions[name].calls
        missing = [called for called in dict.fromkeys(calls) if called not in sizes]
        if missing:
            if name in under_way:
                raise Refused(
                    refusals.OPERATION_REFUSED,
                    f"has functions that call themselves, such as {short(name)}: expected loops by stablehlo.while",
                )
            under_way.add(name)
            pending += missing
            continue
        sizes[name] = functions[name].operations + sum(sizes[called] for called in calls)
        depths[name] = 1 + max((depths[called] for called in calls), default=0)
        if sizes[name] > limits.operations:
            raise too_many(limits)
        if depths[name] > limits.calls:
            raise Refused(
                refusals.PROGRAM_TOO_LARGE,
                f"has more than {limits.calls} functions that call each other in a chain: inline some of them",
            )
        pending.pop()
    return frozenset(sizes)


def too_many(limits: Limits) -> Refused:
    """Return the refusal of a program of too many operations."""
    return Refused(
        refusals.PROGRAM_TOO_LARGE,
        f"has more than {limits.operations} operations, where each call of a function counts its operations again. "
        "Nest loops and conditions less deeply, because each level can count its body twice, or put repeated code into one loop",
    )


def add_symbols(attribute: Any, found: list[str], *, strings: bool) -> None:
    """Add the functions that an attribute names, by symbols or, if `strings`, by
    strings.
    """
    if isinstance(attribute, ir.FlatSymbolRefAttr) or (strings and isinstance(attribute, ir.StringAttr)):
        found.append(attribute.value)
    elif isinstance(attribute, ir.ArrayAttr):
        for each in attribute:
            add_symbols(each, found, strings=strings)
    elif isinstance(attribute, ir.DictAttr):
        for _, each in attributes.items(attribute):
            add_symbols(each, found, strings=strings)


def marked(found: Mapping[str, Any]) -> list[str]:
    """Return the functions that a mark of hvpd names.

    A portable artifact keeps them as text.
    """
    given = found.get("composite_attributes")
    if not str(found.get("name", "")).startswith("hvpd.") or not isinstance(given, dict):
        return []
    functions = given.get("functions")
    return [each for each in functions if isinstance(each, str)] if isinstance(functions, list) else []
