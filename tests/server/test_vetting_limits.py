"""Programs that are too large, nested too deeply or damaged are refused, and end
nothing.
"""

import contextlib
import dataclasses
import os

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from jax._src.export import serialization, serialization_generated

from hvpd_server.admission import vetting
from hvpd_server.errors import Code, ServiceError
from hvpd_server.importer import refusals
from hvpd_server.importer.refusals import Limits
from tests.support.vetting import PLAIN, A, made, main, parts, refused

pytestmark = pytest.mark.slow  # Real programs, compiled and run.


def deep(levels):
    """Return conditionals inside each other, in MLIR's text."""
    opening = '%y = "stablehlo.if"(%c) ({\n'
    closing = "stablehlo.return %y : tensor<3xf32> }, { stablehlo.return %x : tensor<3xf32> }) : (tensor<i1>) -> tensor<3xf32>\n"
    body = "%c = stablehlo.constant dense<true> : tensor<i1>\n" + "\n".join(
        opening.replace("%y", "%y" if level == 0 else f"%y{level}") for level in range(levels)
    )
    body += "\n%t = stablehlo.tanh %x : tensor<3xf32>\n"
    for level in reversed(range(levels)):
        inner = "%t" if level == levels - 1 else f"%y{level + 1}"
        body += closing.replace("%y", inner)
    return main(body)


def test_nesting_has_an_end(vetter):
    refused(vetter, deep(100), refusals.PROGRAM_TOO_LARGE, "objective ", "64")


def test_calls_that_multiply_are_counted_as_they_would_be(vetter):
    """Forty functions each call the next twice: a short module, and a program of a
    million million operations.
    """
    call = "%y = func.call @f{0}(%x) : (tensor<3xf32>) -> tensor<3xf32>\n%z = func.call @f{0}(%y) : (tensor<3xf32>) -> tensor<3xf32>\n"
    others = [
        f"func.func private @f{i}(%x: tensor<3xf32>) -> tensor<3xf32> {{ {call.format(i + 1)}return %z : tensor<3xf32> }}"
        for i in range(40)
    ]
    others.append("func.func private @f40(%x: tensor<3xf32>) -> tensor<3xf32> { return %x : tensor<3xf32> }")
    text = main(call.format(0), "\n".join(others))
    refused(vetter, text, refusals.PROGRAM_TOO_LARGE, "objective ", "1000000 operations")


def test_loops_that_are_nested_too_deeply_are_refused_with_the_limit_and_a_remedy(vetter):
    def nest(level, x):
        return jnp.sin(x) if level == 0 else lax.fori_loop(0, 2, lambda _, y: nest(level - 1, y), x)

    deep_loops = made(lambda x: jnp.sum(nest(20, x)), np.zeros(3, np.float32))
    with pytest.raises(ServiceError, match=r"more than 1000000 operations, .* Nest loops .* less deeply") as error:
        vetter.vet(parts(deep_loops))
    assert error.value.reason == refusals.PROGRAM_TOO_LARGE


def test_programs_that_are_too_large_together_are_not_sent(vetter):
    with contextlib.closing(vetting.Vetter(dataclasses.replace(Limits(), bundle_bytes=1 << 20))) as small:
        with pytest.raises(ServiceError, match="its programs have 2 MiB, at most 1 MiB are allowed") as error:
            small.vet({"bundle": b"", "objective": bytes(2 << 20)})
        assert (error.value.code, error.value.reason) == (Code.INVALID_ARGUMENT, refusals.PROGRAM_TOO_LARGE)
        assert small._process is None


@pytest.fixture
def hasty():
    """Return a vetter whose time is over soon."""
    limits = dataclasses.replace(Limits(), cpu_seconds=2, memory_bytes=256 << 20)
    with contextlib.closing(vetting.Vetter(limits)) as vetter:
        yield vetter


def test_structures_that_unfold_for_ever_are_ended(hasty, monkeypatch):
    """The module has a few thousand bytes: thirty tuples, each of ten times the next
    one.
    """

    def bomb(builder, tree):
        serialization_generated.PyTreeDefStart(builder)
        serialization_generated.PyTreeDefAddKind(builder, serialization_generated.PyTreeDefKind.none)
        node = serialization_generated.PyTreeDefEnd(builder)
        for _ in range(30):
            serialization_generated.PyTreeDefStartChildrenVector(builder, 10)
            for _ in range(10):
                builder.PrependUOffsetTRelative(node)
            children = builder.EndVector()
            serialization_generated.PyTreeDefStart(builder)
            serialization_generated.PyTreeDefAddKind(builder, serialization_generated.PyTreeDefKind.tuple)
            serialization_generated.PyTreeDefAddChildren(builder, children)
            node = serialization_generated.PyTreeDefEnd(builder)
        return node

    exported = jax.export.export(jax.jit(jnp.sum), platforms=("cpu",))(np.zeros(3, np.float32))
    assert hasty.vet(parts(PLAIN, objective=bytes(exported.serialize()))).programs
    monkeypatch.setattr(serialization, "_serialize_pytreedef", bomb)
    blob = bytes(exported.serialize())
    assert len(blob) < 10_000
    with pytest.raises(ServiceError) as error:
        hasty.vet(parts(PLAIN, objective=blob))
    assert error.value.reason in (refusals.VETTING_TIMEOUT, refusals.VETTING_FAILED)


def test_a_parser_that_wants_too_much_memory_is_ended(hasty):
    """Reading the text of a module of 100 MiB takes several times that memory."""
    values = np.random.default_rng(0).bytes(100 << 20)
    text = f"""
        %c = stablehlo.constant dense<"0x{values.hex()}"> : tensor<{len(values)}xui8>
        %z = stablehlo.slice %c [0:3] : (tensor<{len(values)}xui8>) -> tensor<3xui8>
        %y = stablehlo.convert %z : (tensor<3xui8>) -> tensor<3xf32>
    """
    refused(hasty, main(text).encode(), refusals.VETTING_FAILED)
    hasty.vet(parts(PLAIN))


# Damage

DAMAGED = made(lambda x: jnp.sum(jnp.sin(jnp.linalg.solve(jnp.asarray(A), x))), np.ones(4))
PROGRAM = parts(DAMAGED)["objective"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_programs_end_nothing(vetter, data):
    """Some are still programs, and others crash the parser. The next program is read as
    usual.
    """
    blob = bytearray(PROGRAM)
    places = st.integers(0, len(blob) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=8)):
        blob[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), places))
    try:
        vetter.vet(parts(DAMAGED, objective=bytes(blob[:cut])))
    except ServiceError as error:
        assert error.code is Code.INVALID_ARGUMENT  # noqa: PT017 - some are still programs
        assert error.reason in refusals.REASONS  # noqa: PT017 - as above
    vetter.vet(parts(PLAIN))


@pytest.mark.parametrize(
    "blob",
    [
        b"\0",
        b"\xff" * 1000,
        b"ML\xefR" * 100,
        os.urandom(100_000),
        PROGRAM[:40] + bytes(len(PROGRAM) - 40),
        b"{" * 1000,
    ],
    ids=["zero", "ones", "headers", "random", "headed", "braces"],
)
def test_bytes_that_are_no_program_are_refused(vetter, blob):
    refused(vetter, blob, refusals.BUNDLE_INCOMPATIBLE, "the registration is refused: objective ")
