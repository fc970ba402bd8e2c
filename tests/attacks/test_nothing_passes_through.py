"""No call, attribute or region of a program reaches XLA: the importer rebuilds each
operation of its table through jax.

The test enumerates the table. Three facts prove it:

- MLIR ends in the reader, which gives plain Python.
- The importer refuses attributes and regions that an operation's row does not name.
- The rules build primitives of jax only, and none of these carries a foreign call.
"""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvpd_server import importer
from hvpd_server.importer import evaluate, families, reader
from hvpd_server.importer.graph import Block, Module, Operation, TensorType
from hvpd_server.importer.table import TABLE, Refused
from tests.importer.test_table import CASES, written

families.load()

FOLDER = Path(importer.__file__).parent
SCALAR = TensorType((), "float64")
EMPTY = Block((), (), (), (), ())
FOREIGN = re.compile(
    r"ffi|callback|custom_call|custom_partitioning|composite|infeed|outfeed|pallas|triton|mosaic|export|call_tf"
)
"""Names of primitives that carry code or a call which jax itself does not write."""


def run(**fields):
    """Evaluate a program of one operation without operands."""
    operation = Operation(**{"operands": (), "results": (0,), "types": (SCALAR,), "attributes": {}} | fields)
    return evaluate.function(Module({"main": Block((), (), (operation,), (0,), (SCALAR,))}))()


@pytest.mark.parametrize("name", sorted(TABLE))
def test_an_attribute_that_its_row_does_not_name_is_refused(name):
    assert "hvpd_unheard_of" not in TABLE[name].attributes
    with pytest.raises(Refused, match="with the attribute hvpd_unheard_of, which is not served"):
        run(name=name, attributes={"hvpd_unheard_of": 1}, regions=(EMPTY,) * max(TABLE[name].regions, 0))


@pytest.mark.parametrize("name", sorted(name for name, entry in TABLE.items() if entry.regions >= -1))
def test_a_region_that_its_row_does_not_have_is_refused(name):
    count = TABLE[name].regions
    with pytest.raises(Refused, match="regions"):
        run(name=name, regions=(EMPTY,) * (0 if count == -1 else count + 1))


def test_only_the_reader_sees_mlir():
    found = {}
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(re.search(r"mlir|jax\.export|ffi|jax\._src", name) for name in names):
                found.setdefault(path.name, set()).update(names)
    assert set(found) == {"reader.py", "parsing.py", "inert.py", "calls.py", "attributes.py"}


def test_a_module_that_was_read_is_plain_python():
    """A rule can hand on no object of MLIR, because there is none."""
    allowed = (str, int, float, bool, bytes, complex, type(None), np.ndarray, np.generic)

    def walk(value):
        if isinstance(value, dict):
            for key, each in value.items():
                walk(key)
                walk(each)
        elif isinstance(value, tuple | list | frozenset):
            for each in value:
                walk(each)
        elif isinstance(value, Block | Operation | TensorType | Module):
            walk([getattr(value, field) for field in value.__dataclass_fields__])
        elif hasattr(value, "items"):
            walk(dict(value))
        elif not isinstance(value, allowed):
            assert type(value).__module__.startswith(("hvpd_server.importer", "collections")), type(value)

    for each in CASES.values():
        walk(reader.read(written(each)))


def primitives(jaxpr):
    """Yield the name of each primitive of a jaxpr, and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


@pytest.mark.parametrize("name", sorted(CASES))
def test_an_imported_operation_uses_primitives_of_jax_only(name):
    each = CASES[name]
    with jax.enable_x64(True):
        run_ = evaluate.function(reader.read(written(each)))
        traced = [index for index in range(len(each.arguments)) if index not in each.sizes]

        def function(*values):
            given = dict(zip(traced, values, strict=True))
            return run_(*[given.get(index, argument) for index, argument in enumerate(each.arguments)])

        jaxpr = jax.make_jaxpr(function)(*[jnp.asarray(each.arguments[index]) for index in traced])
    assert not [found for found in primitives(jaxpr.jaxpr) if FOREIGN.search(found)]
