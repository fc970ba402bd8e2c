"""Composites: puts back derivative rules that a jax client marked, and maps CHLO's
functions to jax's.

A composite named "hvpd.*" is a mark of `hvpd._registration.marks`. A mark is put back
exactly, or refused by its name. Any other composite stands for its decomposition, which
the report says.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from hvpd import _text
from hvpd_server.importer import chlo, mark, primitives, refusals, structural
from hvpd_server.importer.table import Call, Value, operation


@operation("stablehlo.composite", attributes=["name", "decomposition", "composite_attributes", "version"], regions=-2)
def _composite(call: Call) -> Sequence[Value]:
    name = call.attributes.get("name")
    if type(name) is not str:
        raise call.refuse("without a name", refusals.BUNDLE_INVALID)
    if name.startswith("chlo."):
        call.operands = [call.plain(each) for each in call.operands]
    if name == "chlo.scan" and (found := chlo.scan(call)) is not None:
        return found
    if name.startswith("hvpd."):
        if call.regions:
            raise call.refuse(f"{_text.cut(name, 80)} with regions: expected none in a mark", refusals.BUNDLE_INVALID)
        return _marked(call, name)
    if name.startswith("chlo."):
        return _chlo(call, name.removeprefix("chlo."))
    call.report.presumed[f"the composite {_text.cut(name, 80)} has the derivatives of its decomposition"] += 1
    return call.call(call.attributes["decomposition"], *call.operands)


def _marked(call: Call, name: str) -> Sequence[Value]:
    found = mark.read(call)
    call.report.recognised[f"the mark {_text.cut(name, 80)}"] += 1
    dimensions = found.integer("dimensions", 0, len(call.operands))
    sizes, args = call.operands[:dimensions], [call.plain(each) for each in call.operands[dimensions:]]
    if not all(isinstance(size, np.ndarray) and size.shape == () and size.dtype.kind in "iu" for size in sizes):
        raise found.refuse("whose dimensions depend on x or on data: sizes must follow from shapes")
    if name.startswith("hvpd.jax."):
        return primitives.rebuilt(found, name.removeprefix("hvpd.jax."), args)
    rule = structural.STRUCTURAL.get(name)
    if rule is None:
        raise found.refuse("which is not known: use the version of hvpd that the server has")
    return rule(found, sizes, args)


def _chlo(call: Call, name: str) -> Sequence[Value]:
    given = call.attributes.get("composite_attributes", {})
    if name == "top_k" and isinstance(given, Mapping) and given.keys() == {"k"}:
        return chlo.top_k(call, given["k"])
    if name in chlo.FUNCTIONS and not given:
        return [chlo.apply(call, name)]
    call.report.presumed[f"the composite chlo.{_text.cut(name, 80)} has the derivatives of its decomposition"] += 1
    return call.call(call.attributes["decomposition"], *call.operands)
