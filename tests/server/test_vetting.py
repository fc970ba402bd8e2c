"""Programs are read by a process of their own before the server uses them: what jax writes passes, all else is refused with a reason.

Hostile programs are written by hand in StableHLO, and packed as jax.export packs its own.
"""

import contextlib
import dataclasses
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import jax
import jax.export
import jax.extend.mlir
import jax.interpreters.mlir
import jax.numpy as jnp
import jax.scipy.special
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from jax._src.export import _export as jax_export
from jax._src.export import serialization, serialization_generated
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import chlo, stablehlo

from hvpd.v1 import objective_pb2
from hvpd_server import _rules, _vetting
from hvpd_server._errors import Code, ServiceError
from hvpd_server._rules import Limits

CPU = ("cpu",)
BOTH = ("cpu", "cuda")


def exported(fun, *args, platforms=CPU):
    with jax.enable_x64(True):
        return jax.export.export(jax.jit(fun, keep_unused=True), platforms=platforms)(*args)


PLAIN = exported(lambda x: x + 1, np.zeros(3, np.float32))


def forged(text, like=PLAIN, **fields):
    """A serialized program whose module is this text; other fields are those of an honest one."""
    with jax.interpreters.mlir.make_ir_context() as context, ir.Location.unknown():
        context.allow_unregistered_dialects = True
        module = ir.Module.parse(text)
        artifact = jax.extend.mlir.serialize_portable_artifact(module, stablehlo.get_current_version())
    return bytes(dataclasses.replace(like, mlir_module_serialized=artifact, **fields).serialize())


def main(body, outside="", attributes="", argument=""):
    """A module whose main takes and returns float32[3], %x."""
    return f"""
    module @jit_f {attributes} {{
      func.func public @main(%x: tensor<3xf32> {argument}) -> tensor<3xf32> {{
        {body}
      }}
      {outside}
    }}
    """


def refused(vetter, blob, reason, *says):
    with pytest.raises(ServiceError) as error:
        vetter.vet({"hvp": blob})
    assert (error.value.code, error.value.reason) == (Code.INVALID_ARGUMENT, reason), error.value
    for text in says:
        assert text in str(error.value)
    assert str(error.value).isprintable()
    return str(error.value)


def operation_refused(vetter, text, *says):
    return refused(vetter, forged(text), _rules.OPERATION_REFUSED, "hvp ", *says)


# What passes

KEY = np.zeros(2, np.uint32)
A = np.eye(4) + 0.1 * np.arange(16.0).reshape(4, 4)
IMAGE = np.ones((1, 2, 8, 8), np.float32)
(K,) = jax.export.symbolic_shape("k")

HONEST = {
    "cholesky": (jnp.linalg.cholesky, A),
    "lu": (lambda a: jnp.linalg.slogdet(a)[1], A),
    "solve": (lambda a: jnp.linalg.solve(a, a), A),
    "qr": (lambda a: jnp.linalg.qr(a)[0], A),
    "qr/complete": (lambda a: jnp.linalg.qr(a, mode="complete")[0], A[:, :2]),
    "svd": (lambda a: jnp.linalg.svd(a, full_matrices=False)[0], A[:, :3]),
    "svd/wide": (lambda a: jnp.linalg.svd(a, full_matrices=True)[2], A[:2]),
    "svd/values": (lambda a: jnp.linalg.svd(a, compute_uv=False), A),
    "svd/large": (lambda a: jnp.linalg.svd(a, full_matrices=False)[0], np.ones((40, 1100))),
    "eigh": (lambda a: jnp.linalg.eigh(a)[1], A),
    "triangular_solve": (lambda a: lax.linalg.triangular_solve(a, a, left_side=False), A),
    "tridiagonal": (lambda a: lax.linalg.tridiagonal(a)[0], A),
    "tridiagonal_solve": (lambda b: lax.linalg.tridiagonal_solve(b[0], b[1], b[2], b.T), A),
    "fft": (lambda a: jnp.real(jnp.fft.ifft2(jnp.fft.fft2(a))), A),
    "sort": (lambda a: jnp.sort(a)[jnp.argsort(a[0])], A),
    "top_k": (lambda a: lax.top_k(a, 2), A),
    "approx_max_k": (lambda a: lax.approx_max_k(a, 2), A.astype(np.float32)),
    "argmax": (jnp.argmax, A),
    "convolution": (lambda a: lax.conv(a, jnp.ones((3, 2, 3, 3), jnp.float32), (2, 2), "SAME"), IMAGE),
    "max_pool": (
        lambda a: jax.grad(
            lambda a: lax.reduce_window(a, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID").sum()
        )(a),
        IMAGE,
    ),
    "cumulative": (
        lambda a: (jnp.cumsum(a), jnp.cumprod(a), lax.cumlogsumexp(a), lax.associative_scan(jnp.maximum, a)),
        A,
    ),
    "while": (lambda a: lax.while_loop(lambda a: jnp.sum(a) < 100, lambda a: a * 2, a), A),
    "scan": (lambda a: lax.scan(lambda c, x: (c + x, c * x), a[0], a), A),
    "cond": (lambda a: lax.cond(a[0, 0] > 0, jnp.sin, jnp.cos, a), A),
    "switch": (lambda a: lax.switch(jnp.int32(a[0, 0]), [jnp.sin, jnp.cos, jnp.tan], a), A),
    "random": (
        lambda key: jax.random.normal(key, (5,)) + jax.random.gamma(key, 2.0) + jax.random.permutation(key, 5),
        KEY,
    ),
    "random/rbg": (lambda key: jax.random.bits(jax.random.wrap_key_data(jnp.tile(key, 2), impl="rbg"), (3,)), KEY),
    "special": (
        lambda a: [
            f(a)
            for f in (lax.erf, lax.erf_inv, lax.erfc, lax.lgamma, lax.digamma, lax.bessel_i0e, lax.bessel_i1e, jnp.sinc)
        ],
        A,
    ),
    "special/2": (
        lambda a: (lax.igamma(a, a), lax.betainc(a, a, a), lax.polygamma(a, a), lax.zeta(a, a), lax.nextafter(a, a)),
        A,
    ),
    "elementary": (
        lambda a: [
            f(a)
            for f in (
                jnp.arctan,
                jnp.arcsin,
                jnp.arccosh,
                jnp.sinh,
                jnp.cosh,
                jnp.arctanh,
                jnp.tan,
                jnp.cbrt,
                jnp.exp2,
                jnp.log1p,
            )
        ],
        A,
    ),
    "integers": (lambda key: (lax.population_count(key), lax.clz(key), key >> 1, key % 7, ~key, key ^ 3), KEY),
    "gather": (lambda a: a.at[jnp.array([0, 2])].add(a[jnp.array([1, 1])]), A),
    "segments": (lambda a: jax.ops.segment_sum(a, jnp.array([0, 1, 1, 0]), 2), A),
    "dynamic": (
        lambda a: lax.dynamic_update_slice(a, lax.dynamic_slice(a, (1, a[0, 0].astype(int)), (2, 2)), (0, 0)),
        A,
    ),
    "mixed": (
        lambda a: (a.astype(jnp.bfloat16) @ a.astype(jnp.bfloat16)).astype(jnp.float8_e4m3fn).astype(jnp.float32),
        A,
    ),
    "checkpoint": (jax.grad(lambda a: jnp.sum(jax.checkpoint(lambda a: jnp.sin(a @ a))(a))), A),
    "custom_root": (lambda a: lax.custom_linear_solve(lambda v: a @ v, a[0], lambda f, b: jnp.linalg.solve(a, b)), A),
    "attention": (lambda a: jax.nn.dot_product_attention(*[a.reshape(1, 4, 2, 2)] * 3), A),
    "expm": (jax.scipy.linalg.expm, A),
    "symbolic": (
        lambda v: (jnp.cumsum(v, axis=1), v[::-1], v @ v.T, jnp.sort(v), lax.map(jnp.sum, v)),
        jax.ShapeDtypeStruct((K, 4), np.float64),
    ),
    "symbolic/solve": (
        lambda v: jax.vmap(lambda v: jnp.linalg.solve(A, v))(v),
        jax.ShapeDtypeStruct((K, 4), np.float64),
    ),
    "symbolic/linalg": (
        lambda v: (
            jnp.linalg.cholesky(v),
            *jnp.linalg.eigh(v),
            *jnp.linalg.qr(v),
            *jnp.linalg.svd(v),
            jnp.linalg.inv(v),
        ),
        jax.ShapeDtypeStruct((K, 4, 4), np.float64),
    ),
    "symbolic/random": (
        lambda v: jax.random.normal(jax.random.key(0), v.shape),
        jax.ShapeDtypeStruct((K, 4), np.float64),
    ),
}
ON_CPU = {
    "eig": (lambda a: jnp.linalg.eig(a)[1], A),
    "eig/complex": (lambda a: jnp.linalg.eig(a + 1j * a)[1], A),
    "schur": (lambda a: jax.scipy.linalg.schur(a)[0], A),
    "hessenberg": (lambda a: jax.scipy.linalg.hessenberg(a), A),
    "complex": (
        lambda a: [f(a * (1 + 1j))[0] for f in (jnp.linalg.qr, jnp.linalg.svd, jnp.linalg.eigh, jnp.linalg.inv)],
        A,
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_what_jax_writes_passes(vetter, name):
    fun, *args = HONEST[name]
    vetter.vet({name: exported(fun, *args, platforms=BOTH).serialize()})


@pytest.mark.parametrize("name", ON_CPU)
def test_what_jax_writes_for_cpus_only_passes(vetter, name):
    fun, *args = ON_CPU[name]
    vetter.vet({name: exported(fun, *args).serialize()})


def test_what_is_written_by_hand_passes_where_it_is_harmless(vetter):
    """So that the refusals below are for what they are about, and not for how it was packed."""
    vetter.vet({"hvp": forged(main("return %x : tensor<3xf32>"))})


# The lists


def test_targets_are_those_that_jax_guarantees_less_what_is_refused():
    stable = jax_export._CUSTOM_CALL_TARGETS_GUARANTEED_STABLE
    assert not _rules.TARGETS & _rules.REFUSED_TARGETS.keys()
    assert _rules.TARGETS | _rules.REFUSED_TARGETS.keys() == stable
    assert not [
        target for target in _rules.TARGETS if re.search("callback|host|feed|send|recv|python", target, re.IGNORECASE)
    ]


LEFT_OUT = {
    "stablehlo": """
        after_all all_gather all_reduce all_to_all async_done async_start batch_norm_grad batch_norm_inference batch_norm_training
        broadcast collective_broadcast collective_permute create_token cross-replica-sum dot einsum get_tuple_element infeed
        map outfeed partition_id recv reduce_scatter replica_id rng send set_dimension_size torch_index_select tuple unary_einsum
        uniform_dequantize uniform_quantize
    """,
    "chlo": "_asin_acos_kernel constant constant_like scan",
}


@pytest.mark.parametrize("dialect", [stablehlo, chlo])
def test_every_operation_of_the_dialects_is_either_listed_or_left_out(dialect):
    """A new one in a new jax is for somebody to decide."""
    name = dialect.__name__.rsplit(".", 1)[1]
    known = {
        each.OPERATION_NAME.removeprefix(f"{name}.")
        for _, each in inspect.getmembers(dialect, inspect.isclass)
        if getattr(each, "OPERATION_NAME", "").startswith(f"{name}.")
    }
    listed = {
        each.removeprefix(f"{name}.") for each in _rules.OPERATIONS | _rules.COMPOSITES if each.startswith(f"{name}.")
    }
    known = {each for each in known if name == "stablehlo" or not each.startswith("broadcast_")}
    left_out = set(LEFT_OUT[name].split())
    assert not listed & left_out
    assert known == listed | left_out


# What is refused

HOST = [
    "xla_python_cpu_callback",
    "xla_python_gpu_callback",
    "xla_ffi_python_cpu_callback",
    "xla_ffi_partitioned_python_cpu_callback",
    "xla_ffi_python_gpu_callback",
    "xla_ffi_partitioned_python_gpu_callback",
    "annotate_device_placement",
    "tpu_custom_call",
    "mosaic_gpu_v2",
    "__gpu$xla.gpu.triton",
    "tf.call_tf_function",
    "MoveToHost",
    "",
    "nobody\\1B[31m",
]


@pytest.mark.parametrize("target", HOST)
@pytest.mark.parametrize("version", [1, 2, 4])
def test_calls_of_the_hosts_code_are_refused(vetter, target, version):
    config = "backend_config = {}" if version == 4 else 'backend_config = "1"'
    body = f"""
        %y = stablehlo.custom_call @"{target}"(%x) {{ {config}, api_version = {version} : i32 }} : (tensor<3xf32>) -> tensor<3xf32>
        return %y : tensor<3xf32>
    """
    operation_refused(vetter, main(body), "stablehlo.custom_call", target.split("\\")[0])


BODIES = {
    "infeed": """
        %token = stablehlo.create_token : !stablehlo.token
        %y:2 = "stablehlo.infeed"(%token) : (!stablehlo.token) -> (tensor<3xf32>, !stablehlo.token)
        return %y#0 : tensor<3xf32>
    """,
    "outfeed": """
        %token = stablehlo.after_all : !stablehlo.token
        %y = "stablehlo.outfeed"(%x, %token) : (tensor<3xf32>, !stablehlo.token) -> !stablehlo.token
        return %x : tensor<3xf32>
    """,
    "send": """
        %token = stablehlo.after_all : !stablehlo.token
        %y = "stablehlo.send"(%x, %token) {channel_handle = #stablehlo.channel_handle<handle = 1, type = 2>, is_host_transfer = true}
            : (tensor<3xf32>, !stablehlo.token) -> !stablehlo.token
        return %x : tensor<3xf32>
    """,
    "recv": """
        %token = stablehlo.after_all : !stablehlo.token
        %y:2 = "stablehlo.recv"(%token) {channel_handle = #stablehlo.channel_handle<handle = 1, type = 3>, is_host_transfer = true}
            : (!stablehlo.token) -> (tensor<3xf32>, !stablehlo.token)
        return %y#0 : tensor<3xf32>
    """,
    "rng": """
        %a = stablehlo.constant dense<0.0> : tensor<f32>
        %n = stablehlo.constant dense<3> : tensor<1xi64>
        %y = stablehlo.rng %a, %a, %n, distribution = UNIFORM : (tensor<f32>, tensor<f32>, tensor<1xi64>) -> tensor<3xf32>
        return %y : tensor<3xf32>
    """,
    "all_reduce": """
        %y = "stablehlo.all_reduce"(%x) ({
        ^bb0(%a: tensor<f32>, %b: tensor<f32>):
          %c = stablehlo.add %a, %b : tensor<f32>
          stablehlo.return %c : tensor<f32>
        }) {replica_groups = dense<0> : tensor<1x1xi64>} : (tensor<3xf32>) -> tensor<3xf32>
        return %y : tensor<3xf32>
    """,
    "partition_id": """
        %p = stablehlo.partition_id : tensor<ui32>
        %f = stablehlo.convert %p : (tensor<ui32>) -> tensor<f32>
        %y = stablehlo.broadcast_in_dim %f, dims = [] : (tensor<f32>) -> tensor<3xf32>
        return %y : tensor<3xf32>
    """,
}


@pytest.mark.parametrize("operation", BODIES)
def test_operations_that_are_not_listed_are_refused(vetter, operation):
    says = operation_refused(vetter, main(BODIES[operation]))
    assert re.search(rf"stablehlo\.({operation}|create_token|after_all)\b", says)


INSIDE = """
    %c = stablehlo.constant dense<true> : tensor<i1>
    %y = "stablehlo.if"(%c) ({
      %z = func.call @other(%x) : (tensor<3xf32>) -> tensor<3xf32>
      stablehlo.return %z : tensor<3xf32>
    }, {
      stablehlo.return %x : tensor<3xf32>
    }) : (tensor<i1>) -> tensor<3xf32>
    return %y : tensor<3xf32>
"""


def test_what_is_deep_inside_is_found(vetter):
    """In a branch, in a function that is called, or in one that nobody calls."""
    hidden = "%y = stablehlo.custom_call @backdoor(%x) : (tensor<3xf32>) -> tensor<3xf32>\n return %y : tensor<3xf32>"
    other = f"func.func private @other(%x: tensor<3xf32>) -> tensor<3xf32> {{ {hidden} }}"
    operation_refused(vetter, main(INSIDE, other), "backdoor")
    operation_refused(vetter, main("return %x : tensor<3xf32>", other), "backdoor")


@pytest.mark.parametrize(
    "argument",
    [
        "{tf.aliasing_output = 0 : i32}",
        "{jax.buffer_donor = true}",
        '{mhlo.memory_kind = "pinned_host"}',
        "{mhlo.is_same_data_across_replicas = true}",
    ],
)
def test_aliases_donations_and_other_memory_are_refused(vetter, argument):
    name = re.search(r"[\w.]+", argument)[0]
    operation_refused(vetter, main("return %x : tensor<3xf32>", argument=argument), name)


@pytest.mark.parametrize(
    "attributes",
    [
        "attributes {mhlo.num_partitions = 2 : i32}",
        "attributes {mhlo.num_replicas = 8 : i32}",
        "attributes {mhlo.input_output_alias = []}",
        'attributes {mhlo.frontend_attributes = {a = "b"}}',
    ],
)
def test_attributes_of_the_module_that_are_not_listed_are_refused(vetter, attributes):
    operation_refused(
        vetter, main("return %x : tensor<3xf32>", attributes=attributes), "attribute mhlo.", "of its module"
    )


@pytest.mark.parametrize(
    "attribute",
    [
        'mhlo.frontend_attributes = {_xla_compute_type = "host"}',
        '_xla_stream_annotation = "1"',
        'xla_shape = "x"',
        "foo.bar = 1 : i32",
    ],
)
def test_attributes_that_choose_where_something_runs_are_refused(vetter, attribute):
    body = f'%y = "stablehlo.tanh"(%x) {{ {attribute} }} : (tensor<3xf32>) -> tensor<3xf32>\n return %y : tensor<3xf32>'
    operation_refused(vetter, main(body), "stablehlo.tanh with the attribute")


def routine(target, operand, results, config="", version=4):
    types = ", ".join(f"tensor<{result}>" for result in results)
    body = f"""
        %a = stablehlo.constant dense<1.0> : tensor<{operand}>
        %y:{len(results)} = stablehlo.custom_call @{target}(%a) {{ mhlo.backend_config = {{ {config} }}, api_version = {version} : i32 }}
            : (tensor<{operand}>) -> ({types})
        %r = stablehlo.slice %y#0 [0:1, 0:1] : (tensor<{results[0]}>) -> tensor<1x1xf32>
        %s = stablehlo.reshape %r : (tensor<1x1xf32>) -> tensor<1xf32>
        %z = stablehlo.broadcast_in_dim %s, dims = [0] : (tensor<1xf32>) -> tensor<3xf32>
        return %z : tensor<3xf32>
    """
    return main(body)


def test_routines_are_called_with_arrays_that_they_fit(vetter):
    """LAPACK writes as much as its operand has, wherever the result ends."""
    uplo = "uplo = 76 : ui8"
    vetter.vet({"hvp": forged(routine("lapack_spotrf_ffi", "9x9xf32", ["9x9xf32", "i32"], uplo))})
    says = "arrays that do not fit"
    operation_refused(
        vetter, routine("lapack_spotrf_ffi", "9x9xf32", ["1x1xf32", "i32"], uplo), "lapack_spotrf_ffi", says
    )
    operation_refused(vetter, routine("lapack_spotrf_ffi", "9x8xf32", ["9x8xf32", "i32"], uplo), says)
    operation_refused(vetter, routine("lapack_sgetrf_ffi", "9x8xf32", ["9x8xf32", "7xi32", "i32"]), says)
    operation_refused(vetter, routine("cusolver_getrf_ffi", "9x8xf32", ["9x8xf32", "7xi32", "i32"]), says)
    thin = ["9x8xf32", "8xf32", "9x8xf32", "8x8xf32", "i32"]
    vetter.vet({"hvp": forged(routine("lapack_sgesdd_ffi", "9x8xf32", thin, "mode = 83 : ui8"))})
    operation_refused(vetter, routine("lapack_sgesdd_ffi", "9x8xf32", thin, "mode = 65 : ui8"), says)
    operation_refused(
        vetter, routine("lapack_spotrf_ffi", "9x9xf32", ["9x9xf32", "i32"], uplo, version=2), "as jax calls it"
    )
    plain = routine("lapack_spotrf_ffi", "9x9xf32", ["9x9xf32", "i32"], version=1).replace(
        "mhlo.backend_config = {  },", ""
    )
    operation_refused(vetter, plain, "as jax calls it")


def symbolic(rows):
    """Cholesky of [k, 9, 9], of which k and the shape of the result are known when it is compiled."""
    text = f"""
    module {{ func.func public @main(%x: tensor<?x9x9xf32>) -> tensor<?xi32> {{
        %k = stablehlo.get_dimension_size %x, dim = 0 : (tensor<?x9x9xf32>) -> tensor<i32>
        %k1 = stablehlo.reshape %k : (tensor<i32>) -> tensor<1xi32>
        %n = stablehlo.constant dense<{rows}> : tensor<1xi32>
        %s = stablehlo.concatenate %k1, %n, %n, dim = 0 : (tensor<1xi32>, tensor<1xi32>, tensor<1xi32>) -> tensor<3xi32>
        %y:2 = stablehlo.custom_call @lapack_spotrf_ffi(%x, %s, %k1)
            {{indices_of_shape_operands = dense<[1, 2]> : tensor<2xi64>, mhlo.backend_config = {{uplo = 76 : ui8}}}}
            : (tensor<?x9x9xf32>, tensor<3xi32>, tensor<1xi32>) -> (tensor<?x?x?xf32>, tensor<?xi32>)
        return %y#1 : tensor<?xi32>
    }} }}
    """
    like = exported(lambda x: x[:, 0, 0].astype(jnp.int32), jax.ShapeDtypeStruct((K, 9, 9), np.float32))
    return forged(text, like)


def test_routines_of_symbolic_shapes_are_looked_at_when_they_are_compiled(vetter, device):
    spec = [device.spec((2, 9, 9), np.float32, data=False)]
    for rows in (9, 3):
        vetter.vet({"hvp": symbolic(rows)})
    honest, evil = (jax.export.deserialize(bytearray(symbolic(rows))) for rows in (9, 3))
    compiled = device.compile(honest.call, spec)
    assert np.array_equal(device.run(compiled, [np.stack([np.eye(9, dtype=np.float32)] * 2)]), [0, 0])
    with pytest.raises(
        ServiceError, match=r"lapack_spotrf_ffi.*do not fit each other: \[\[2, 9, 9\]\] to \[\[2, 3, 3\]"
    ) as error:
        device.compile(evil.call, spec)
    assert error.value.reason == _rules.OPERATION_REFUSED


def test_functions_that_call_themselves_are_refused(vetter):
    call = "%y = func.call @{}(%x) : (tensor<3xf32>) -> tensor<3xf32>\n return %y : tensor<3xf32>"
    functions = [("a", "b"), ("b", "c"), ("c", "a")]
    others = "\n".join(
        f"func.func private @{name}(%x: tensor<3xf32>) -> tensor<3xf32> {{ {call.format(to)} }}"
        for name, to in functions
    )
    operation_refused(vetter, main(call.format("a"), others), "call themselves")


def test_calls_that_multiply_are_counted_as_they_would_be(vetter):
    """Forty functions that each call the next twice: a short module, and a program of a million million operations."""
    call = "%y = func.call @f{0}(%x) : (tensor<3xf32>) -> tensor<3xf32>\n%z = func.call @f{0}(%y) : (tensor<3xf32>) -> tensor<3xf32>\n"
    end = "return %z : tensor<3xf32>"
    others = [
        f"func.func private @f{i}(%x: tensor<3xf32>) -> tensor<3xf32> {{ {call.format(i + 1)}{end} }}"
        for i in range(40)
    ]
    others.append("func.func private @f40(%x: tensor<3xf32>) -> tensor<3xf32> { return %x : tensor<3xf32> }")
    blob = forged(main(call.format(0) + end, "\n".join(others)))
    refused(vetter, blob, _rules.PROGRAM_TOO_LARGE, "more than 1000000 operations")


def test_constants_and_arrays_have_an_end(vetter):
    constant = """
        %c = stablehlo.constant dense<1.0> : tensor<{0}xf32>
        %y = stablehlo.slice %c [0:3] : (tensor<{0}xf32>) -> tensor<3xf32>
        return %y : tensor<3xf32>
    """
    vetter.vet({"hvp": forged(main(constant.format(1 << 20)))})
    refused(vetter, forged(main(constant.format(1 << 30))), _rules.PROGRAM_TOO_LARGE, "constants", "pass them as data")
    wide = """
        %c = stablehlo.broadcast_in_dim %x, dims = [0] : (tensor<3xf32>) -> tensor<3x9223372036854775807xf32>
        %y = stablehlo.slice %c [0:3, 0:1] : (tensor<3x9223372036854775807xf32>) -> tensor<3x1xf32>
        %z = stablehlo.reshape %y : (tensor<3x1xf32>) -> tensor<3xf32>
        return %z : tensor<3xf32>
    """
    refused(vetter, forged(main(wide)), _rules.PROGRAM_TOO_LARGE, "an array of more than 1024 TiB")


def test_a_program_is_of_the_type_that_it_says(vetter):
    text = main("return %x : tensor<3xf32>").replace("tensor<3xf32>", "tensor<4xf32>")
    refused(vetter, forged(text), _rules.BUNDLE_INVALID, "is of type", "says that it is")
    refused(vetter, forged("module { }"), _rules.BUNDLE_INVALID, "no function main")
    refused(vetter, forged(main("return %x : tensor<3xf32>"), module_kept_var_idx=(7,)), _rules.BUNDLE_INVALID, "keeps")


def test_a_program_takes_arrays_and_nothing_around_them(vetter):
    nested = 0.0
    for _ in range(100):
        nested = [nested]
    blob = exported(lambda tree: jax.tree.leaves(tree)[0], nested).serialize()
    refused(vetter, blob, _rules.BUNDLE_INVALID, "something else than arrays")
    blob = exported(lambda x: {"a": x}, 1.0).serialize()
    refused(vetter, blob, _rules.BUNDLE_INVALID, "something else than arrays")
    blob = exported(jnp.sin, 1.0).serialize(vjp_order=1)
    refused(vetter, blob, _rules.BUNDLE_INVALID, "derivatives")


def deep(levels):
    """Conditionals inside each other, in MLIR's text."""
    opening = '%y = "stablehlo.if"(%c) ({\n'
    closing = "stablehlo.return %y : tensor<3xf32> }, { stablehlo.return %x : tensor<3xf32> }) : (tensor<i1>) -> tensor<3xf32>\n"
    body = "%c = stablehlo.constant dense<true> : tensor<i1>\n" + "\n".join(
        opening.replace("%y", f"%y{level}") for level in range(levels)
    )
    body += "\n%t = stablehlo.tanh %x : tensor<3xf32>\n"
    for level in reversed(range(levels)):
        inner = "%t" if level == levels - 1 else f"%y{level + 1}"
        body += closing.replace("%y", inner)
    return main(body + "return %y0 : tensor<3xf32>")


def test_nesting_has_an_end(vetter):
    vetter.vet({"hvp": forged(deep(60))})
    refused(vetter, forged(deep(100)), _rules.PROGRAM_TOO_LARGE, "64 deep inside each other")


@pytest.fixture
def hasty():
    """One whose time is over soon."""
    with contextlib.closing(
        _vetting.Vetter(dataclasses.replace(Limits(), cpu_seconds=1, memory_bytes=128 << 20))
    ) as vetter:
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

    monkeypatch.setattr(serialization, "_serialize_pytreedef", bomb)
    blob = bytes(PLAIN.serialize())
    assert len(blob) < 10_000
    with pytest.raises(ServiceError) as error:
        hasty.vet({"hvp": blob})
    assert error.value.reason in (_rules.VETTING_TIMEOUT, _rules.VETTING_FAILED)


def test_a_parser_that_wants_too_much_memory_is_ended(hasty):
    """The text of a module of 100 MiB takes several times that to read."""
    values = np.random.default_rng(0).bytes(100 << 20)
    text = f"""
        %c = stablehlo.constant dense<"0x{values.hex()}"> : tensor<{len(values)}xui8>
        %y = stablehlo.slice %c [0:3] : (tensor<{len(values)}xui8>) -> tensor<3xui8>
        %z = stablehlo.convert %y : (tensor<3xui8>) -> tensor<3xf32>
        return %z : tensor<3xf32>
    """
    refused(hasty, forged(main(text)), _rules.VETTING_FAILED)


# What damages


def module_of(blob):
    """Where the module is in a serialized program, and its bytes."""
    module = jax.export.deserialize(bytearray(blob)).mlir_module_serialized
    return bytes(blob).index(module), module


DAMAGED = bytes(exported(lambda v: jnp.linalg.solve(A, jnp.sin(v)), np.ones(4)).serialize())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_programs_end_nothing(hasty, data):
    """Some are still programs; others crash the parser. The next one is read as if nothing had been."""
    blob = bytearray(DAMAGED)
    start, module = module_of(DAMAGED)
    whole = data.draw(st.booleans())
    places = st.integers(0, len(blob) - 1) if whole else st.integers(start, start + len(module) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=8)):
        blob[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), places))
    try:
        hasty.vet({"hvp": bytes(blob[:cut])})
    except ServiceError as error:
        assert error.code is Code.INVALID_ARGUMENT  # noqa: PT017 - some are still programs
        assert error.reason in _rules.REASONS  # noqa: PT017 - likewise
    hasty.vet({"hvp": DAMAGED})


def test_a_module_that_is_none_is_refused(vetter):
    """The header is one of jax's."""
    _, module = module_of(DAMAGED)
    blob = DAMAGED.replace(module, module[:40] + bytes(len(module) - 40))
    refused(vetter, blob, _rules.BUNDLE_INCOMPATIBLE, "hvp is no program that this server (jax")


@pytest.mark.parametrize("blob", [b"", b"\0", b"\xff" * 1000, b"ML\xefR" * 100, os.urandom(100_000)])
def test_what_is_no_program_is_refused(vetter, blob):
    refused(vetter, blob, _rules.BUNDLE_INCOMPATIBLE, "hvp is no program that this server (jax")


# The process


@pytest.fixture
def told(monkeypatch):
    """Starts vetters whose forks run code in place of reading: told(code, **limits)."""
    opened = []

    def told(code, **limits):
        program = (
            "import os, signal, sys, time, ctypes\n"
            "from hvpd_server import _vetter\n"
            "def vet(programs, limits, context):\n"
            f"{textwrap.indent(textwrap.dedent(code), '    ')}\n"
            "_vetter.vet = vet\n"
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
            "import jax.extend.mlir\nwith context: jax.extend.mlir.deserialize_portable_artifact(b'module {' * 100_000 + b'}' * 100_000)",
            _rules.VETTING_FAILED,
            "SIGSEGV",
        ),
        ("os._exit(3)", _rules.VETTING_FAILED, "code 3"),
        ("os._exit(0)", _rules.VETTING_FAILED, "said nothing"),
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
        f"if programs['hvp'] == b'bad':\n{textwrap.indent(code, '    ')}", memory_bytes=64 << 20, cpu_seconds=1
    )
    for _ in range(2):
        refused(vetter, b"bad", reason, says)
        vetter.vet({"hvp": b"good"})


@pytest.mark.parametrize("code", ["signal.pause()", "os.closerange(3, 100); signal.pause()"])
def test_one_that_waits_for_ever_is_ended(told, code):
    """Also where it has closed the pipe for its verdict."""
    vetter = told(code, seconds=0.2)
    refused(vetter, b"", _rules.VETTING_TIMEOUT, "0.2 s")


def test_one_that_says_too_much_is_ended(told):
    vetter = told("raise _vetter.Refused('OPERATION_REFUSED', 'x' * 10_000_000)")
    assert len(refused(vetter, b"", _rules.OPERATION_REFUSED)) < 3000


def test_a_fork_has_neither_the_servers_streams_nor_its_environment(told, monkeypatch, capfd):
    monkeypatch.setenv("HVPD_SECRET", "secret")
    vetter = told(
        """
        os.write(1, b"out"); os.write(2, b"err")
        open_ones = {os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}
        raise _vetter.Refused("OPERATION_REFUSED", f"{sorted(os.environ)} {sorted(open_ones)}")
        """
    )
    says = refused(vetter, b"", _rules.OPERATION_REFUSED)
    assert "HVPD_SECRET" not in says
    assert "JAX_PLATFORMS" in says
    assert "socket" not in says
    assert capfd.readouterr() == ("", "")


def test_a_process_that_dies_is_started_again(vetter):
    good = {"hvp": bytes(PLAIN.serialize())}
    vetter.vet(good)
    before = vetter._process
    before.kill()
    before.wait()
    vetter.vet(good)
    assert vetter._process is not before


@pytest.mark.parametrize(
    "command", [["-c", "raise SystemExit(1)"], ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]]
)
def test_one_that_cannot_be_had_is_not_the_bundles_fault(monkeypatch, command):
    monkeypatch.setattr(_vetting, "_COMMAND", command)
    with contextlib.closing(_vetting.Vetter()) as broken, pytest.raises(ServiceError) as error:
        broken.vet({"hvp": b""})
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
def vet(programs, limits, context):
    os.write(alive, b"reading")
    signal.pause()
_vetter.vet = vet
_vetter.main()
"""
    owning = f"""
from hvpd_server import _vetting
_vetting._COMMAND = ["-c", {reading!r}]
_vetting.Vetter().vet({{"hvp": b""}})
"""
    with subprocess.Popen([sys.executable, "-c", owning]) as owner, pipe.open("rb", buffering=0) as alive:
        assert alive.read(100) == b"reading"
        owner.send_signal(signal.SIGKILL)
        assert alive.read(100) == b""


# What is remembered


@pytest.fixture
def counted(vetter, monkeypatch):
    """What was vetted, by its programs' names."""
    calls = []
    vet = vetter.vet
    monkeypatch.setattr(vetter, "vet", lambda programs: (calls.append(sorted(programs)), vet(programs))[1])
    return calls


def test_what_was_admitted_is_not_vetted_again_unless_the_rules_change(serve, rosen, counted, monkeypatch):
    digest = rosen.export.digest
    engine = serve(rosen)
    assert counted == [sorted(rosen.bundle.programs)]
    engine.register(digest, "again")
    engine = serve()
    engine.warm_all()
    assert len(counted) == 1
    monkeypatch.setattr(_rules, "version", lambda: "other rules")
    engine = serve()
    engine.warm_all()
    assert len(counted) == 2
    assert engine.store.vetted(digest) == "other rules"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 3}', b'{"version": "older"}'])
def test_a_record_that_is_damaged_or_old_is_no_record(serve, rosen, counted, content):
    engine = serve(rosen)
    (engine.store.root / "vetted" / rosen.export.digest).write_bytes(content)
    engine = serve()
    engine.warm_all()
    assert len(counted) == 2
    assert json.loads((engine.store.root / "vetted" / rosen.export.digest).read_bytes()) == {
        "version": _rules.version()
    }


def test_what_is_refused_is_neither_registered_nor_remembered_nor_read_by_the_server(serve, rosen, upload, monkeypatch):
    engine = serve()
    body = "%y = stablehlo.custom_call @backdoor(%x) : (tensor<3xf32>) -> tensor<3xf32>\n return %y : tensor<3xf32>"
    evil = forged(main(body))
    bundle = objective_pb2.Bundle.FromString(rosen.bundle.SerializeToString())
    bundle.programs["hvp"].CopyFrom(objective_pb2.Program(digest=upload(engine.store, evil), size_bytes=len(evil)))
    for content in rosen.export.blobs.values():
        upload(engine.store, content)
    digest = upload(engine.store, bundle.SerializeToString(deterministic=True))
    monkeypatch.setattr(jax.export, "deserialize", None)
    for _ in range(2):
        with pytest.raises(ServiceError, match=r"the bundle is refused: hvp has .*backdoor") as error:
            engine.register(digest, "evil")
        assert error.value.reason == _rules.OPERATION_REFUSED
    assert engine.store.objectives() == []
    assert engine.store.vetted(digest) == ""


def test_one_that_was_registered_before_there_were_such_rules_is_vetted_before_it_is_served(serve, rosen, monkeypatch):
    """And where it is refused, nobody else's objective is kept from being served."""
    engine = serve(rosen)
    monkeypatch.setattr(_rules, "version", lambda: "newer")
    monkeypatch.setattr(_rules, "OPERATIONS", _rules.OPERATIONS)
    engine = serve()

    def refuse(programs):
        raise ServiceError(Code.INVALID_ARGUMENT, _rules.OPERATION_REFUSED, "no more")

    monkeypatch.setattr(engine._vetting._vetter, "vet", refuse)
    engine.warm_all()
    with pytest.raises(ServiceError, match="no more"):
        engine.objective(rosen.export.digest)


@pytest.mark.parametrize("claim", [0, 1 << 30, -1])
def test_programs_have_the_sizes_that_the_bundle_says(serve, rosen, upload, claim):
    engine = serve()
    bundle = objective_pb2.Bundle.FromString(rosen.bundle.SerializeToString())
    bundle.programs["hvp"].size_bytes = claim
    for content in rosen.export.blobs.values():
        upload(engine.store, content)
    digest = upload(engine.store, bundle.SerializeToString(deterministic=True))
    with pytest.raises(ServiceError, match=rf"hvp has \d+ bytes, the bundle says {claim}"):
        engine.register(digest, "")


def test_programs_that_are_too_large_are_not_even_read(serve, rosen, upload):
    engine = serve()
    for content in rosen.export.blobs.values():
        upload(engine.store, content)
    hvp = rosen.bundle.programs["hvp"].digest
    with (engine.store.root / "blobs" / hvp[:2] / hvp).open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(ServiceError, match="its programs have 1024 MiB, 512 MiB are taken") as error:
        engine.register(rosen.export.digest, "")
    assert error.value.reason == _rules.PROGRAM_TOO_LARGE
