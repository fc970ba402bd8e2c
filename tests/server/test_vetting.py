"""The process that reads and differentiates programs: what it refuses, how it ends, what the store keeps of its answers.

The reader's own limits and refusals are tested in tests/importer/test_reader.py, without the process.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.export
import jax.extend.mlir
import jax.interpreters.mlir
import jax.numpy as jnp
import jax.scipy.linalg
import jax.scipy.special
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from jax._src.export import serialization, serialization_generated
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import chlo, stablehlo

import hvpd
from hvpd._registration import export as _export
from hvpd.v1 import objective_pb2
from hvpd_server import _rules, _vetting
from hvpd_server._errors import Code, ServiceError
from hvpd_server._rules import Limits
from hvpd_server.derivation import compiling
from hvpd_server.importer import families, reader, table

families.load()


def parts(made, **replaced):
    """What the process is sent: the bundle and its programs."""
    programs = {name: bytes(made.blobs[program.digest]) for name, program in made.bundle.programs.items()}
    return {"bundle": made.bundle.SerializeToString()} | programs | replaced


def made(fun, x, *data, **options):
    return _export.export(fun, x, data, platforms=("cpu",), precision="highest", **options)


PLAIN = made(lambda x: jnp.sum(x**4) / 12, np.zeros(3, np.float32))


def artifact(text):
    """The portable artifact of a text."""
    with jax.interpreters.mlir.make_ir_context() as context, ir.Location.unknown():
        context.allow_unregistered_dialects = True
        return bytes(
            jax.extend.mlir.serialize_portable_artifact(ir.Module.parse(text), stablehlo.get_current_version())
        )


def main(body, outside="", attributes="", argument=""):
    """A program that takes float32[3], %x, and returns its element of position 0 after `body`, which sets %y."""
    return f"""
    module @jit_f {attributes} {{
      func.func public @main(%x: tensor<3xf32> {argument}) -> tensor<f32> {{
        {body}
        %first = stablehlo.slice %y [0:1] : (tensor<3xf32>) -> tensor<1xf32>
        %value = stablehlo.reshape %first : (tensor<1xf32>) -> tensor<f32>
        return %value : tensor<f32>
      }}
      {outside}
    }}
    """


def refused(vetter, program, reason, *says):
    """Return the message that refuses PLAIN's bundle with another program, as bytes or as text."""
    blob = artifact(program) if isinstance(program, str) else program
    with pytest.raises(ServiceError) as error:
        vetter.vet(parts(PLAIN, objective=blob))
    assert (error.value.code, error.value.reason) == (Code.INVALID_ARGUMENT, reason), error.value
    for text in says:
        assert text in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 3000
    return str(error.value)


# What passes

A = np.eye(4) + 0.1 * np.arange(16.0).reshape(4, 4)
IMAGE = np.arange(1.0, 129.0).reshape(1, 2, 8, 8)

HONEST = {
    "cholesky": (lambda a: jnp.linalg.cholesky(a @ a.T), A),
    "slogdet": (lambda a: jnp.linalg.slogdet(a)[1], A),
    "solve": (lambda a: jnp.linalg.solve(a, a[0]), A),
    "qr": (lambda a: jnp.linalg.qr(a)[0], A),
    "svd": (lambda a: jnp.linalg.svd(a, compute_uv=False), A),
    "eigh": (lambda a: jnp.linalg.eigh(a + a.T)[0], A),
    "triangular_solve": (lambda a: jax.scipy.linalg.solve_triangular(a, a[0]), A),
    "fft": (lambda a: jnp.real(jnp.fft.ifft2(jnp.fft.fft2(a) ** 2)), A),
    "sort": (lambda a: jnp.sort(a)[jnp.argsort(a[0])], A),
    "top_k": (lambda a: lax.top_k(a, 2)[0], A),
    "convolution": (lambda a: lax.conv(a, jnp.ones((3, 2, 3, 3)), (2, 2), "SAME"), IMAGE),
    "max_pool": (lambda a: lax.reduce_window(a, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID"), IMAGE),
    "cumulative": (lambda a: (jnp.cumsum(a), jnp.cumprod(a), lax.cumlogsumexp(a)), A),
    "scan": (lambda a: lax.scan(lambda c, x: (c + x, c * x), a[0], a), A),
    "cond": (lambda a: lax.cond(a[0, 0] > 0, jnp.sin, jnp.cos, a), A),
    "switch": (lambda a: lax.switch(jnp.int32(a[0, 0]), [jnp.sin, jnp.cos, jnp.tan], a), A),
    "random": (lambda a: a * jax.random.normal(jax.random.key(0), a.shape), A),
    "special": (lambda a: [f(a) for f in (lax.erf, lax.erfc, lax.lgamma, lax.digamma, jnp.sinc)], A),
    "gather": (lambda a: a.at[jnp.array([0, 2])].add(a[jnp.array([1, 1])]), A),
    "segments": (lambda a: jax.ops.segment_sum(a, jnp.array([0, 1, 1, 0]), 2), A),
    "mixed": (lambda a: (a.astype(jnp.bfloat16) @ a.astype(jnp.bfloat16)).astype(jnp.float32), A),
    "checkpoint": (lambda a: jax.checkpoint(lambda a: jnp.sin(a @ a))(a), A),
    "attention": (lambda a: jax.nn.dot_product_attention(*[a.reshape(1, 4, 2, 2)] * 3), A),
    "expm": (jax.scipy.linalg.expm, A),
}


@pytest.mark.parametrize("name", HONEST)
def test_what_the_client_writes_passes(vetter, name):
    fun, x = HONEST[name]
    honest = made(lambda x: sum(jnp.sum(leaf.astype(x.dtype) ** 2) for leaf in jax.tree.leaves(fun(x))), x)
    derived = vetter.vet(parts(honest))
    assert derived.mode == "forward_over_reverse"
    assert {"value_and_grad", "hvp", "prepare", "apply"} <= set(derived.programs)


def test_what_is_derived_comes_back_whole(vetter):
    """Residuals, dense layers, and the rules that were put back."""

    def model(x, a):
        return jax.nn.relu(a @ x["w"] + x["b"]) @ x["v"]

    x = {"b": np.ones(4), "v": np.ones((4, 2)), "w": np.ones((3, 4))}
    loss = lambda z: jnp.mean(jnp.sum(z**2, axis=1))  # noqa: E731
    derived = vetter.vet(parts(made(hvpd.composite(model, loss, distribution="normal"), x, np.ones((5, 3)))))
    assert derived.mode == "forward_over_reverse"
    assert set(derived.programs) == {
        *("value_and_grad", "hvp", "hvp_pairs", "prepare", "apply", "kfac", "sampled_kfac"),
        *("ggn", "fisher", "empirical_fisher", "sampled_fisher"),
    }
    assert [(layer.kernel, layer.HasField("bias")) for layer in derived.dense_layers] == [(1, False), (2, True)]
    assert derived.residuals
    assert all(residual.WhichOneof("source") for residual in derived.residuals)
    assert any("custom_jvp" in rule for rule in derived.recognised)


def test_a_mode_that_jax_forbids_is_replaced(vetter):
    @jax.custom_vjp
    def cube(x):
        return x**3

    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (square(x), x), lambda x, g: (2 * x * g,))
    cube.defvjp(lambda x: (cube(x), x), lambda x, g: (3 * square(x) * g,))
    derived = vetter.vet(parts(made(lambda x: jnp.sum(cube(x)), np.ones(3))))
    assert derived.mode == "reverse_over_reverse"
    assert not {"prepare", "apply"} & set(derived.programs)
    assert not derived.residuals


def test_rows_are_those_of_the_registered_data(vetter):
    rows = made(lambda x, a: jnp.mean((a @ x) ** 2), np.ones(3), np.ones((7, 3)), any_rows=True)
    assert list(rows.bundle.row_leaves) == [0]
    assert set(vetter.vet(parts(rows)).programs) == {"value_and_grad", "hvp", "hvp_pairs"}


def test_what_is_written_by_hand_passes_where_it_is_harmless(vetter):
    """So that the refusals below are for what they are about, and not for how it was packed."""
    text = main("%y = stablehlo.tanh %x : tensor<3xf32>")
    one, other = vetter.vet(parts(PLAIN, objective=artifact(text))), vetter.vet(parts(PLAIN, objective=text.encode()))
    assert one == other
    assert "hvp" in one.programs


# The table

LEFT_OUT = {
    "stablehlo": """
        after_all all_gather all_reduce all_to_all async_done async_start batch_norm_grad batch_norm_inference batch_norm_training
        collective_broadcast collective_permute create_token cross-replica-sum einsum get_tuple_element infeed outfeed partition_id
        recv reduce_scatter replica_id send set_dimension_size torch_index_select tuple unary_einsum uniform_dequantize
        uniform_quantize
    """,
    "chlo": "_asin_acos_kernel constant constant_like mulhi ragged_dot scan",
}


@pytest.mark.parametrize("dialect", [stablehlo, chlo])
def test_every_operation_of_the_dialects_is_either_served_or_left_out(dialect):
    """A new one in a new jax is for somebody to decide."""
    name = dialect.__name__.rsplit(".", 1)[1]
    known = {
        getattr(each, "OPERATION_NAME", "").removeprefix(f"{name}.")
        for each in vars(dialect).values()
        if getattr(each, "OPERATION_NAME", "").startswith(f"{name}.")
    }
    served = {each.removeprefix(f"{name}.") for each in table.TABLE if each.startswith(f"{name}.")}
    left_out = set(LEFT_OUT[name].split())
    known = {each for each in known if each != "return" and (name == "stablehlo" or not each.startswith("broadcast_"))}
    assert not served & left_out
    assert known == served | left_out


# What is refused, by program and operation

BODIES = {
    "a callback": (
        """
        %y = stablehlo.custom_call @xla_ffi_python_cpu_callback(%x) { api_version = 4 : i32, mhlo.backend_config = {} }
            : (tensor<3xf32>) -> tensor<3xf32>
        """,
        ["stablehlo.custom_call", "xla_ffi_python_cpu_callback"],
    ),
    "a kernel": (
        """
        %y = stablehlo.custom_call @__gpu$xla.gpu.triton(%x) { backend_config = "1" } : (tensor<3xf32>) -> tensor<3xf32>
        """,
        ["stablehlo.custom_call", "__gpu$xla.gpu.triton"],
    ),
    "a name that cannot be printed": (
        r"""%y = stablehlo.custom_call @"nobody\1B[31m"(%x) : (tensor<3xf32>) -> tensor<3xf32>""",
        ["stablehlo.custom_call", "nobody"],
    ),
    "infeed": (
        """
        %token = stablehlo.after_all : !stablehlo.token
        %z:2 = "stablehlo.infeed"(%token) : (!stablehlo.token) -> (tensor<3xf32>, !stablehlo.token)
        %y = stablehlo.tanh %z#0 : tensor<3xf32>
        """,
        ["stablehlo.after_all"],
    ),
    "all_reduce": (
        """
        %y = "stablehlo.all_reduce"(%x) ({
        ^bb0(%a: tensor<f32>, %b: tensor<f32>):
          %c = stablehlo.add %a, %b : tensor<f32>
          stablehlo.return %c : tensor<f32>
        }) {replica_groups = dense<0> : tensor<1x1xi64>} : (tensor<3xf32>) -> tensor<3xf32>
        """,
        ["stablehlo.all_reduce"],
    ),
    "an attribute": (
        """%y = "stablehlo.tanh"(%x) { _xla_stream_annotation = "1" } : (tensor<3xf32>) -> tensor<3xf32>""",
        ["stablehlo.tanh", "_xla_stream_annotation"],
    ),
    "a branch": (
        """
        %c = stablehlo.constant dense<true> : tensor<i1>
        %y = "stablehlo.if"(%c) ({
          %z = func.call @other(%x) : (tensor<3xf32>) -> tensor<3xf32>
          stablehlo.return %z : tensor<3xf32>
        }, {
          stablehlo.return %x : tensor<3xf32>
        }) : (tensor<i1>) -> tensor<3xf32>
        """,
        ["stablehlo.custom_call", "backdoor"],
    ),
}
BACKDOOR = """
    func.func private @other(%x: tensor<3xf32>) -> tensor<3xf32> {
      %y = stablehlo.custom_call @backdoor(%x) : (tensor<3xf32>) -> tensor<3xf32>
      return %y : tensor<3xf32>
    }
"""


@pytest.mark.parametrize("body", BODIES)
def test_a_refusal_names_program_and_operation(vetter, body):
    text, says = BODIES[body]
    message = refused(vetter, main(text, BACKDOOR if "@other" in text else ""), _rules.OPERATION_REFUSED, *says)
    assert message.startswith("the bundle is refused: objective has a ")


def test_a_refusal_of_a_composite_names_its_stage(vetter):
    def model(x, a):
        return a @ x

    composite = made(
        hvpd.composite(model, lambda z: jnp.mean(z**2)), np.ones(3, np.float32), np.ones((5, 3), np.float32)
    )
    backdoor = """
        module {{ func.func public @main(%z: tensor<{0}xf32>, %a: tensor<5x3xf32>) -> tensor<f32> {{
          %y = stablehlo.custom_call @backdoor(%z) : (tensor<{0}xf32>) -> tensor<f32>
          return %y : tensor<f32>
        }} }}
    """
    for name, size in [("loss", 5), ("model", 3)]:
        with pytest.raises(ServiceError, match=rf"refused: {name} has a stablehlo.custom_call .*backdoor") as error:
            vetter.vet(parts(composite, **{name: artifact(backdoor.format(size))}))
        assert error.value.reason == _rules.OPERATION_REFUSED


def test_an_objective_that_cannot_be_differentiated_twice_is_refused(vetter):
    loop = made(
        lambda x: jnp.sum(lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x * 2, x)), np.ones(3, np.float32)
    )
    with pytest.raises(ServiceError, match="cannot be differentiated twice") as error:
        vetter.vet(parts(loop))
    assert (error.value.code, error.value.reason) == (Code.INVALID_ARGUMENT, _rules.NOT_DIFFERENTIABLE)


def test_branches_for_other_devices_only_are_refused(vetter):
    def branching(x):
        return lax.platform_dependent(x, cuda=lambda x: jnp.sum(x**2), tpu=lambda x: jnp.sum(x**3))

    other = _export.export(branching, np.ones(3), (), platforms=("cuda", "tpu"), precision="highest")
    with pytest.raises(ServiceError, match="has branches for cuda, tpu, and this server's device is cpu") as error:
        vetter.vet(parts(other), "cpu")
    assert (error.value.code, error.value.reason) == (Code.INVALID_ARGUMENT, _rules.BUNDLE_INCOMPATIBLE)
    assert "hvp" in vetter.vet(parts(other), "cuda").programs


# Limits


def deep(levels):
    """Conditionals inside each other, in MLIR's text."""
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
    refused(vetter, deep(100), _rules.PROGRAM_TOO_LARGE, "objective ", "64")


def test_calls_that_multiply_are_counted_as_they_would_be(vetter):
    """Forty functions that each call the next twice: a short module, and a program of a million million operations."""
    call = "%y = func.call @f{0}(%x) : (tensor<3xf32>) -> tensor<3xf32>\n%z = func.call @f{0}(%y) : (tensor<3xf32>) -> tensor<3xf32>\n"
    others = [
        f"func.func private @f{i}(%x: tensor<3xf32>) -> tensor<3xf32> {{ {call.format(i + 1)}return %z : tensor<3xf32> }}"
        for i in range(40)
    ]
    others.append("func.func private @f40(%x: tensor<3xf32>) -> tensor<3xf32> { return %x : tensor<3xf32> }")
    text = main(call.format(0), "\n".join(others))
    refused(vetter, text, _rules.PROGRAM_TOO_LARGE, "objective ", "1000000 operations")


def test_programs_that_are_too_large_together_are_not_sent(vetter):
    with contextlib.closing(_vetting.Vetter(dataclasses.replace(Limits(), bundle_bytes=1 << 20))) as small:
        with pytest.raises(ServiceError, match="its programs have 2 MiB, 1 MiB are taken") as error:
            small.vet({"bundle": b"", "objective": bytes(2 << 20)})
        assert (error.value.code, error.value.reason) == (Code.INVALID_ARGUMENT, _rules.PROGRAM_TOO_LARGE)
        assert small._process is None


@pytest.fixture
def hasty():
    """One whose time is over soon."""
    limits = dataclasses.replace(Limits(), cpu_seconds=2, memory_bytes=256 << 20)
    with contextlib.closing(_vetting.Vetter(limits)) as vetter:
        yield vetter


def test_structures_that_unfold_for_ever_are_ended(hasty, monkeypatch):
    """A few thousand bytes: thirty tuples, each of ten times the next one."""

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
    assert error.value.reason in (_rules.VETTING_TIMEOUT, _rules.VETTING_FAILED)


def test_a_parser_that_wants_too_much_memory_is_ended(hasty):
    """The text of a module of 100 MiB takes several times that to read."""
    values = np.random.default_rng(0).bytes(100 << 20)
    text = f"""
        %c = stablehlo.constant dense<"0x{values.hex()}"> : tensor<{len(values)}xui8>
        %z = stablehlo.slice %c [0:3] : (tensor<{len(values)}xui8>) -> tensor<3xui8>
        %y = stablehlo.convert %z : (tensor<3xui8>) -> tensor<3xf32>
    """
    refused(hasty, main(text).encode(), _rules.VETTING_FAILED)
    hasty.vet(parts(PLAIN))


# What damages

DAMAGED = made(lambda x: jnp.sum(jnp.sin(jnp.linalg.solve(jnp.asarray(A), x))), np.ones(4))
PROGRAM = parts(DAMAGED)["objective"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_programs_end_nothing(vetter, data):
    """Some are still programs; others crash the parser. The next one is read as if nothing had been."""
    blob = bytearray(PROGRAM)
    places = st.integers(0, len(blob) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=8)):
        blob[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), places))
    try:
        vetter.vet(parts(DAMAGED, objective=bytes(blob[:cut])))
    except ServiceError as error:
        assert error.code is Code.INVALID_ARGUMENT  # noqa: PT017 - some are still programs
        assert error.reason in _rules.REASONS  # noqa: PT017 - likewise
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
def test_what_is_no_program_is_refused(vetter, blob):
    refused(vetter, blob, _rules.BUNDLE_INCOMPATIBLE, "the bundle is refused: objective ")


# The process


@pytest.fixture
def told(monkeypatch):
    """Starts vetters whose forks run code in place of reading: told(code, **limits)."""
    opened = []

    def told(code, **limits):
        program = (
            "import os, signal, sys, time, ctypes\n"
            "from hvpd.v1 import objective_pb2\n"
            "from hvpd_server import _vetter\n"
            "def derive(programs, platform, limits, derivation):\n"
            f"{textwrap.indent(textwrap.dedent(code), '    ')}\n"
            "    return objective_pb2.Derivation(mode=f'told of {platform}')\n"
            "_vetter.derive = derive\n"
            "_vetter.main()\n"
        )
        monkeypatch.setattr(_vetting, "_COMMAND", ["-c", program])
        opened.append(_vetting.Vetter(dataclasses.replace(Limits(), **limits)))
        return opened[-1]

    yield told
    for vetter in opened:
        vetter.close()


@pytest.mark.parametrize(
    ("code", "reason", "says"),
    [
        ("ctypes.string_at(0)", _rules.VETTING_FAILED, "SIGSEGV"),
        ("os.abort()", _rules.VETTING_FAILED, "SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGKILL)", _rules.VETTING_FAILED, "SIGKILL"),
        (
            "from jaxlib.mlir import ir\nir.Module.parse('module {' * 100_000 + '}' * 100_000, ir.Context())",
            _rules.VETTING_FAILED,
            "SIGSEGV",
        ),
        ("os._exit(3)", _rules.VETTING_FAILED, "code 3"),
        ("os._exit(0)", _rules.VETTING_FAILED, "said nothing"),
        ("return 3", _rules.VETTING_FAILED, "AttributeError"),
        ("bytearray(1 << 31)", _rules.VETTING_FAILED, "64 MiB of memory"),
        ("while True: pass", _rules.VETTING_TIMEOUT, "1 s of computing"),
        ("recursive = lambda: recursive()\nrecursive()", _rules.VETTING_FAILED, "RecursionError"),
        (
            "os.write(os.open(os.environ['HOME'] + '/.hvpd-test', os.O_CREAT | os.O_WRONLY), b'x')",
            _rules.VETTING_FAILED,
            "OSError",
        ),
    ],
)
def test_whatever_reading_does_is_a_refusal_and_the_next_one_is_read(told, tmp_path, monkeypatch, code, reason, says):
    monkeypatch.setenv("HOME", str(tmp_path))
    vetter = told(
        f"if programs['objective'] == b'bad':\n{textwrap.indent(code, '    ')}", memory_bytes=64 << 20, cpu_seconds=1
    )
    for _ in range(2):
        refused(vetter, b"bad", reason, says)
        assert vetter.vet(parts(PLAIN, objective=b"good"), "tpu").mode == "told of tpu"


@pytest.mark.parametrize("code", ["signal.pause()", "os.closerange(3, 100); signal.pause()"])
def test_one_that_waits_for_ever_is_ended(told, code):
    """Also where it has closed the pipe for its verdict."""
    vetter = told(code, seconds=0.2)
    refused(vetter, b"", _rules.VETTING_TIMEOUT, "0.2 s")


def test_one_that_says_too_much_is_ended(told):
    vetter = told("raise _vetter.Refused('OPERATION_REFUSED', 'x' * 10_000_000)")
    refused(vetter, b"", _rules.OPERATION_REFUSED)


def test_a_derivation_that_is_too_long_is_a_refusal(told):
    vetter = told("if programs['objective'] == b'bad': return objective_pb2.Derivation(programs=['x' * 10_000_000])")
    refused(vetter, b"bad", _rules.VETTING_FAILED)
    vetter.vet(parts(PLAIN))


def test_a_long_derivation_comes_back_whole(told):
    vetter = told("return objective_pb2.Derivation(programs=[str(number) for number in range(200_000)])")
    assert vetter.vet(parts(PLAIN)).programs == [str(number) for number in range(200_000)]


def test_words_of_a_program_do_not_reach_a_terminal_as_they_are(told):
    text = "\\x1b[31mred\\r\\n\\tover\\u202ethere \\U0001f600"
    says = refused(told(f"raise _vetter.Refused('OPERATION_REFUSED', '{text}')"), b"", _rules.OPERATION_REFUSED)
    assert says == "the bundle is refused: ?[31mred over?there \U0001f600"


def test_a_reason_that_is_unknown_is_none(told):
    refused(told("raise _vetter.Refused('BECAUSE', 'no')"), b"", _rules.VETTING_FAILED, "the bundle is refused: no")


def test_a_fork_has_neither_the_servers_streams_nor_its_environment(told, monkeypatch, capfd):
    monkeypatch.setenv("HVPD_SECRET", "secret")
    vetter = told(
        """
        os.write(1, b"out"); os.write(2, b"err")
        open_ones = [os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
        raise _vetter.Refused("OPERATION_REFUSED", f"{sorted(os.environ)} {sorted(open_ones)}")
        """
    )
    says = refused(vetter, b"", _rules.OPERATION_REFUSED)
    assert "HVPD_SECRET" not in says
    assert "JAX_PLATFORMS" in says
    assert says.count("socket") == 1  # On which it answers.
    assert capfd.readouterr() == ("", "")


def test_a_process_that_dies_is_started_again(vetter):
    good = parts(PLAIN)
    vetter.vet(good)
    before = vetter._process
    before.kill()
    before.wait()
    vetter.vet(good)
    assert vetter._process is not before


def order(name, width=0, rows=0):
    return {"rows": rows, "name": name, "width": width, "devices": [0], "data": 0, "deterministic": False}


def compiled(vetter, name, width=0, parts_=None):
    given = parts_ or parts(PLAIN)
    key = hashlib.sha256(given["bundle"]).hexdigest()
    return vetter.compile(key, lambda: given, vetter.vet(given), "cpu", order(name, width))


def test_compiles_go_on_when_the_process_is_killed(vetter, start):
    """Several at a time: each starts again, and none ends what another has started."""
    given = parts(PLAIN)
    key, derived = hashlib.sha256(given["bundle"]).hexdigest(), vetter.vet(given)
    futures = [start(vetter.compile, key, lambda: given, derived, "cpu", order("hvp", width)) for width in (1, 2, 3, 4)]
    vetter._process.kill()
    for future in futures:
        compiling.load(future.result(120), jax.devices()[:1])


@pytest.mark.parametrize(
    ("work", "reason", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", _rules.COMPILE_FAILED, "SIGSEGV"),
        ("os._exit(0)", _rules.COMPILE_FAILED, "said nothing"),
        ("signal.pause()", _rules.COMPILE_FAILED, "more than 0.5 s"),
        ("raise RuntimeError('RESOURCE_EXHAUSTED: no memory')", _rules.DEVICE_MEMORY, "no memory"),
        ("raise RuntimeError('XLA does not know this')", _rules.COMPILE_FAILED, "XLA does not know this"),
    ],
)
def test_a_compile_that_ends_badly_is_an_answer_and_the_next_one_is_compiled(monkeypatch, work, reason, says):
    program = (
        "import os, signal\n"
        "from hvpd_server import _vetter\n"
        "from hvpd_server.derivation import compiling\n"
        "compile_program = compiling.compile_program\n"
        "def bad(sized, name, *args, **settings):\n"
        f"    if name == 'hvp': {work}\n"
        "    return compile_program(sized, name, *args, **settings)\n"
        "compiling.compile_program = bad\n"
        "_vetter.main()\n"
    )
    monkeypatch.setattr(_vetting, "_COMMAND", ["-c", program])
    seconds = 0.5 if "pause" in work else 60
    with contextlib.closing(_vetting.Vetter(dataclasses.replace(Limits(), compile_seconds=seconds))) as vetter:
        for _ in range(2):
            with pytest.raises(ServiceError, match=r"the server cannot compile hvp \(width 1\): ") as error:
                compiled(vetter, "hvp", 1)
            assert error.value.reason == reason
            assert says in str(error.value)
            if "pause" not in work:
                compiling.load(compiled(vetter, "value_and_grad"), jax.devices()[:1])


def test_a_backend_that_cannot_serialize_is_told_apart(monkeypatch):
    program = (
        "from hvpd_server import _vetter\n"
        "from hvpd_server.derivation import compiling\n"
        "compiling.dump = lambda compiled: 1 / 0\n"
        "_vetter.main()\n"
    )
    monkeypatch.setattr(_vetting, "_COMMAND", ["-c", program])
    with (
        contextlib.closing(_vetting.Vetter()) as vetter,
        pytest.raises(_vetting.UnsupportedError, match="ZeroDivision"),
    ):
        compiled(vetter, "hvp", 1)


def test_sessions_that_compile_nothing_end(vetter):
    compiled(vetter, "hvp", 1)
    assert vetter._sessions
    vetter.sweep(-1.0)
    assert not vetter._sessions
    compiled(vetter, "hvp", 1)


@pytest.mark.parametrize(
    "command", [["-c", "raise SystemExit(1)"], ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]]
)
def test_one_that_cannot_be_had_is_not_the_bundles_fault(monkeypatch, command):
    monkeypatch.setattr(_vetting, "_COMMAND", command)
    with contextlib.closing(_vetting.Vetter()) as broken, pytest.raises(ServiceError) as error:
        broken.vet({"objective": b""})
    assert (error.value.code, error.value.reason) == (Code.UNAVAILABLE, "VETTING_UNAVAILABLE")
    assert error.value.retry_after == 1


def test_a_vetter_that_is_closed_says_so():
    vetter = _vetting.Vetter()
    vetter.close()
    with pytest.raises(ServiceError) as error:
        vetter.vet({})
    assert (error.value.code, error.value.reason) == (Code.UNAVAILABLE, "SHUTTING_DOWN")


def test_kill_9_of_the_server_leaves_nobody_behind(tmp_path):
    """Neither the process that waits for work, nor the one that reads: both hold a pipe open for as long as they live."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = f"""
import os, signal
from hvpd_server import _vetter
alive = os.open({str(pipe)!r}, os.O_WRONLY)
def derive(programs, platform, limits, derivation):
    os.write(alive, b"reading")
    signal.pause()
_vetter.derive = derive
_vetter.main()
"""
    owning = f"""
from hvpd_server import _vetting
_vetting._COMMAND = ["-c", {reading!r}]
_vetting.Vetter().vet({{"bundle": b""}})
"""
    with subprocess.Popen([sys.executable, "-c", owning]) as owner, pipe.open("rb", buffering=0) as alive:
        assert alive.read(100) == b"reading"
        owner.send_signal(signal.SIGKILL)
        assert alive.read(100) == b""


# What is remembered


@pytest.fixture
def counted(vetter, monkeypatch):
    """What was vetted, by its programs' names, and for which platform."""
    calls = []
    vet = vetter.vet
    monkeypatch.setattr(
        vetter,
        "vet",
        lambda programs, platform: (calls.append((sorted(programs), platform)), vet(programs, platform))[1],
    )
    return calls


def version():
    return f"{_rules.version()} cpu"


def test_what_was_derived_is_not_derived_again_unless_the_version_changes(serve, rosen, counted, monkeypatch):
    digest = rosen.export.digest
    engine = serve(rosen)
    assert counted == [(["bundle", "objective"], "cpu")]
    kept = engine.store.derivation(digest, version())
    assert kept == engine.objective(digest).described == engine.derivation(digest)
    assert kept.mode == "forward_over_reverse"
    engine.register(digest, "again")
    engine = serve()
    engine.warm_all()
    assert len(counted) == 1
    assert engine.derivation(digest) == kept
    monkeypatch.setattr(_rules, "version", lambda: "other code")
    engine = serve()
    assert engine.derivation(digest) is None
    engine.warm_all()
    assert len(counted) == 2
    assert engine.store.derivation(digest, "other code cpu") == kept


def test_what_was_derived_for_another_platform_is_derived_again(serve, rosen, counted):
    engine = serve(rosen)
    derived = engine.derivation(rosen.export.digest)
    engine.store.add_derivation(rosen.export.digest, f"{_rules.version()} cuda", derived)
    engine = serve()
    engine.warm_all()
    assert len(counted) == 2
    assert engine.store.derivation(rosen.export.digest, version()) == derived


def test_the_version_is_that_of_the_code_and_of_jax():
    assert f"jax {jax.__version__}" in _rules.version()
    assert "jaxlib " in _rules.version()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 3}', b'{"version": "older", "derivation": {}}'])
def test_a_record_that_is_damaged_or_old_is_no_record(serve, rosen, counted, content):
    engine = serve(rosen)
    record = engine.store.root / "derived" / rosen.export.digest
    before = json.loads(record.read_bytes())
    assert before["version"] == version()
    record.write_bytes(content)
    engine = serve()
    engine.warm_all()
    assert len(counted) == 2
    assert json.loads(record.read_bytes()) == before


def changed(rosen, upload, store, program, **fields):
    """Upload the example with another program; return the digest of its bundle."""
    bundle = objective_pb2.Bundle.FromString(rosen.bundle.SerializeToString())
    described = {"digest": upload(store, program), "size_bytes": len(program)} | fields
    bundle.programs["objective"].CopyFrom(objective_pb2.Program(**described))
    for content in rosen.export.blobs.values():
        upload(store, content)
    return upload(store, bundle.SerializeToString(deterministic=True))


EVIL = """
    module { func.func public @main(%x: tensor<7xf64>) -> tensor<f64> {
      %y = stablehlo.custom_call @backdoor(%x) : (tensor<7xf64>) -> tensor<f64>
      return %y : tensor<f64>
    } }
"""


def test_what_is_refused_is_neither_registered_nor_remembered_nor_read_by_the_server(serve, rosen, upload, monkeypatch):
    engine = serve()
    digest = changed(rosen, upload, engine.store, artifact(EVIL))
    monkeypatch.setattr(reader, "read", None)
    for _ in range(2):
        with pytest.raises(ServiceError, match=r"the bundle is refused: objective has .*backdoor") as error:
            engine.register(digest, "evil")
        assert error.value.reason == _rules.OPERATION_REFUSED
    assert engine.store.objectives() == []
    assert not list((engine.store.root / "derived").iterdir())
    assert engine.derivation(digest) is None


def test_a_refusal_changes_nothing_for_neighbours(serve, rosen, logistic, upload, assert_product):
    engine = serve(logistic)
    before = (engine.store.root / "derived" / logistic.export.digest).read_bytes()
    digest = changed(rosen, upload, engine.store, artifact(EVIL))
    with pytest.raises(ServiceError):
        engine.register(digest, "evil")
    engine.register(logistic.export.digest, "")
    assert (engine.store.root / "derived" / logistic.export.digest).read_bytes() == before
    assert digest not in [known for _, known, _ in engine.store.objectives()]
    V = np.ones((2, 6))
    kernels = engine.objective(logistic.export.digest).kernels
    assert_product(np.asarray(kernels.call("hvp", 2, logistic.x, V, *logistic.data)), logistic.hessian, V)


def test_one_that_a_newer_version_refuses_is_not_served_and_its_neighbours_are(serve, rosen, logistic, monkeypatch):
    serve(rosen, logistic)
    monkeypatch.setattr(_rules, "version", lambda: "newer")
    engine = serve()
    vet = engine._vetting._vetter.vet
    evil = rosen.bundle.SerializeToString()

    def refuse(programs, platform):
        if programs["bundle"] == evil:
            raise ServiceError(Code.INVALID_ARGUMENT, _rules.OPERATION_REFUSED, "no more")
        return vet(programs, platform)

    monkeypatch.setattr(engine._vetting._vetter, "vet", refuse)
    engine.warm_all()
    with pytest.raises(ServiceError, match="no more"):
        engine.objective(rosen.export.digest)
    assert engine.derivation(rosen.export.digest) is None
    assert engine.objective(logistic.export.digest).kernels.ready("hvp", 1)


@pytest.mark.parametrize("claim", [0, 1 << 30, -1])
def test_programs_have_the_sizes_that_the_bundle_says(serve, rosen, upload, claim):
    engine = serve()
    program = rosen.read(rosen.bundle.programs["objective"].digest)
    digest = changed(rosen, upload, engine.store, program, size_bytes=claim)
    with pytest.raises(ServiceError, match=rf"objective has {len(program)} bytes, the bundle says {claim}") as error:
        engine.register(digest, "")
    assert error.value.reason == _rules.BUNDLE_INVALID
    assert engine.store.objectives() == []


def test_programs_that_are_too_large_are_not_even_read(serve, rosen, upload):
    engine = serve()
    for content in rosen.export.blobs.values():
        upload(engine.store, content)
    program = rosen.bundle.programs["objective"].digest
    with (engine.store.root / "blobs" / program[:2] / program).open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(ServiceError, match="its programs have 1024 MiB, 512 MiB are taken") as error:
        engine.register(rosen.export.digest, "")
    assert error.value.reason == _rules.PROGRAM_TOO_LARGE
