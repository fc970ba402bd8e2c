"""Bundles that were made by hand and sent over the wire are refused with a reason. The
server serves other callers.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import select
import sys
from pathlib import Path

import grpc
import jax
import jax.experimental
import jax.export
import jax.extend.mlir
import jax.interpreters.mlir
import jax.numpy as jnp
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

import hvpd
from hvpd._registration import export as _export
from hvpd.v1 import blob_pb2, blob_pb2_grpc, objective_pb2, objective_pb2_grpc

X = np.arange(3, dtype=np.float32)


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.address) as opened:
        yield opened


@pytest.fixture(scope="module")
def honest():
    """Return a bundle of x -> sum(x^4) / 12, whose Hessian is diag(x^2)."""
    return _export.export(lambda x: jnp.sum(x**4) / 12, X, (), platforms=("cpu",), precision="highest")


@pytest.fixture(scope="module")
def program(honest):
    """Return its objective, a portable artifact."""
    return bytes(honest.blobs[honest.bundle.programs["objective"].digest])


def forged(text):
    """Return the portable artifact of a text."""
    with jax.interpreters.mlir.make_ir_context(), ir.Location.unknown():
        return bytes(
            jax.extend.mlir.serialize_portable_artifact(ir.Module.parse(text), stablehlo.get_current_version())
        )


def send(channel, content):
    digest = hashlib.sha256(content).hexdigest()
    pieces = [content[start : start + (1 << 20)] for start in range(0, len(content), 1 << 20)] or [b""]
    messages = [
        blob_pb2.UploadBlobRequest(
            digest=digest if index == 0 else "",
            size_bytes=len(content) if index == 0 else 0,
            offset_bytes=index << 20,
            chunk=piece,
        )
        for index, piece in enumerate(pieces)
    ]
    blob_pb2_grpc.BlobServiceStub(channel).UploadBlob(iter(messages))
    return digest


def register(channel, honest, blob, name="evil", size_bytes=None, **fields):
    """Send the honest bundle with another objective, or with other fields."""
    bundle = objective_pb2.Bundle.FromString(honest.bundle.SerializeToString())
    for content in honest.blobs.values():
        send(channel, bytes(content))
    size = len(blob) if size_bytes is None else size_bytes
    bundle.programs["objective"].CopyFrom(objective_pb2.Program(digest=send(channel, blob), size_bytes=size))
    bundle.MergeFrom(objective_pb2.Bundle(**fields))
    digest = send(channel, bundle.SerializeToString(deterministic=True))
    request = objective_pb2.CreateObjectiveRequest(digest=digest, name=name)
    return objective_pb2_grpc.ObjectiveServiceStub(channel).CreateObjective(request)


def refused(channel, honest, blob, code=grpc.StatusCode.INVALID_ARGUMENT, **options):
    """Return the reason and the message of the refusal."""
    with pytest.raises(grpc.RpcError) as error:
        register(channel, honest, blob, **options)
    assert error.value.code() is code, error.value
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in rpc_status.from_call(error.value).details)
    return info.reason, error.value.details()


@pytest.fixture(autouse=True)
def unharmed(server, channel, honest):
    """Check after each test: the server is the same process, has not registered the
    refused bundle, and registers an honest one.
    """
    process = server.process.pid
    yield
    assert server.process.pid == process
    assert server.process.poll() is None
    listed = objective_pb2_grpc.ObjectiveServiceStub(channel).ListObjectives(objective_pb2.ListObjectivesRequest())
    assert "evil" not in [objective.name for objective in listed.objectives]
    with hvpd.connect(server.address) as client:
        objective = client.register(lambda x: jnp.sum(x**4) / 12, X, platforms=("cpu",))
        assert np.allclose(objective.hessp(X, np.ones(3)), X**2)


def pure(x):
    return jax.pure_callback(lambda x: np.asarray(x), jax.ShapeDtypeStruct((), np.float32), jnp.sum(x))


def with_effects(x):
    return jax.experimental.io_callback(lambda x: np.asarray(x), jax.ShapeDtypeStruct((), np.float32), jnp.sum(x))


def printing(x):
    jax.debug.print("{x}", x=x)
    return jnp.sum(x)


@pytest.mark.parametrize("fun", [pure, with_effects, printing])
def test_callbacks_as_jax_writes_them(channel, honest, fun):
    """jax refuses to export callbacks, but their modules can be made."""
    text = jax.jit(fun).lower(X).as_text()
    assert "callback" in text
    # Shardings of one device would be refused first.
    text = re.sub(r"sdy\.mesh .*|, sdy\.sharding = #sdy\.sharding_per_value<\[<@\w+, \[\]>\]>", "", text)
    assert "sdy" not in text
    reason, message = refused(channel, honest, forged(text))
    assert reason == "OPERATION_REFUSED"
    assert "objective has a stablehlo.custom_call" in message
    assert "callback" in message


MAIN = "func.func public @main(%x: tensor<3xf32>) -> tensor<f32>"
INFEED = f"""module {{ {MAIN} {{
    %token = stablehlo.after_all : !stablehlo.token
    %y:2 = "stablehlo.infeed"(%token) : (!stablehlo.token) -> (tensor<f32>, !stablehlo.token)
    return %y#0 : tensor<f32>
}} }}"""
BACKDOOR = f"""module {{ {MAIN} {{
    %y = stablehlo.custom_call @backdoor(%x) : (tensor<3xf32>) -> tensor<f32>
    return %y : tensor<f32>
}} }}"""
OVERFLOW = f"""module {{ {MAIN} {{
    %a = stablehlo.constant dense<1.0> : tensor<99x99xf32>
    %y:2 = stablehlo.custom_call @lapack_spotrf_ffi(%a) {{ mhlo.backend_config = {{uplo = 76 : ui8}}, api_version = 4 : i32,
        operand_layouts = [dense<[0, 1]> : tensor<2xindex>],
        result_layouts = [dense<[0, 1]> : tensor<2xindex>, dense<> : tensor<0xindex>] }}
        : (tensor<99x99xf32>) -> (tensor<1x1xf32>, tensor<i32>)
    %z = stablehlo.reshape %y#0 : (tensor<1x1xf32>) -> tensor<f32>
    return %z : tensor<f32>
}} }}"""


@pytest.mark.parametrize(
    ("text", "reason", "says"),
    [
        (INFEED, "OPERATION_REFUSED", r"stablehlo\.after_all"),
        (BACKDOOR, "OPERATION_REFUSED", r"stablehlo\.custom_call at line \d+ of backdoor"),
        (OVERFLOW, "BUNDLE_INVALID", r"stablehlo\.custom_call at line \d+ .*float32\[99,99\].*float32\[1,1\]"),
    ],
)
def test_a_harmful_program_written_by_hand_is_refused(channel, honest, text, reason, says):
    found, message = refused(channel, honest, forged(text))
    assert found == reason
    assert re.search(f"objective has a {says}", message), message


def test_the_client_raises_the_servers_refusal(server, honest, monkeypatch):
    blob = forged(BACKDOOR)
    digest = hashlib.sha256(blob).hexdigest()
    bundle = objective_pb2.Bundle.FromString(honest.bundle.SerializeToString())
    bundle.programs["objective"].CopyFrom(objective_pb2.Program(digest=digest, size_bytes=len(blob)))
    whole = bundle.SerializeToString(deterministic=True)
    evil = hashlib.sha256(whole).hexdigest()
    blobs = {**honest.blobs, digest: blob, evil: whole}
    forgery = dataclasses.replace(honest, bundle=bundle, blobs=blobs, digest=evil)
    monkeypatch.setattr(_export, "export", lambda *args, **options: forgery)
    says = r"objective has a stablehlo.custom_call at line \d+ of backdoor"
    with hvpd.connect(server.address) as client:
        with pytest.raises(hvpd.InvalidArgumentError, match=says) as error:
            client.register(jnp.sum, X, name="evil")
        assert error.value.reason == "OPERATION_REFUSED"
        with pytest.raises(hvpd.NotFoundError):
            client.objective("evil")


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_programs(channel, honest, program, data):
    """Bytes are changed or cut off. The result is a program, or is refused with a
    reason.
    """
    blob = bytearray(program)
    places = st.integers(0, len(blob) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        blob[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(blob) - 1)))
    try:
        register(channel, honest, bytes(blob[:cut]), name="")
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error  # noqa: PT017 - some are still programs
        assert len(error.details()) < 4000  # noqa: PT017 - as above


def nested(levels):
    """Return conditionals inside each other."""
    text = f"module {{ {MAIN} {{ %c = stablehlo.constant dense<true> : tensor<i1>\n %y = stablehlo.constant dense<1.0> : tensor<f32>\n"
    text += "".join(f'%y{level} = "stablehlo.if"(%c) ({{\n' for level in range(levels))
    text += "%t = stablehlo.tanh %y : tensor<f32>\n"
    for level in reversed(range(levels)):
        inner = "%t" if level == levels - 1 else f"%y{level + 1}"
        text += f"stablehlo.return {inner} : tensor<f32> }}, {{ stablehlo.return %y : tensor<f32> }}) : (tensor<i1>) -> tensor<f32>\n"
    return text + "return %y0 : tensor<f32> } }"


def test_a_thousand_conditionals_inside_each_other(channel, honest):
    reason, message = refused(channel, honest, forged(nested(1000)))
    assert reason == "PROGRAM_TOO_LARGE"
    assert "64" in message


def test_a_hundred_thousand_modules_inside_each_other(channel, honest):
    """The modules are text, because no writer of bytecode gets so far: MLIR's parser
    has no stack left.
    """
    reason, message = refused(channel, honest, b"module {" * 100_000 + b"}" * 100_000)
    assert reason == "VETTING_FAILED"
    assert "SIGSEGV" in message


def test_an_objective_without_second_derivatives(channel, honest):
    """An endless loop is not run. Its number of rounds depends on x, so it has no
    reverse.
    """
    text = f"""module {{ {MAIN} {{
        %z = stablehlo.constant dense<0.0> : tensor<f32>
        %s = stablehlo.reduce(%x init: %z) applies stablehlo.add across dimensions = [0] : (tensor<3xf32>, tensor<f32>) -> tensor<f32>
        %y = stablehlo.while(%i = %s) : tensor<f32>
        cond {{
          %c = stablehlo.compare EQ, %i, %i : (tensor<f32>, tensor<f32>) -> tensor<i1>
          stablehlo.return %c : tensor<i1>
        }} do {{
          %j = stablehlo.add %i, %i : tensor<f32>
          stablehlo.return %j : tensor<f32>
        }}
        return %y : tensor<f32>
    }} }}"""
    reason, message = refused(channel, honest, forged(text))
    assert reason == "NOT_DIFFERENTIABLE"
    assert "cannot differentiate it even once" in message


@pytest.mark.parametrize(
    ("fields", "code", "reason", "says"),
    [
        (
            {"format": 1},
            "FAILED_PRECONDITION",
            "BUNDLE_INCOMPATIBLE",
            "register the objective again with a newer client",
        ),
        ({"format": 3}, "FAILED_PRECONDITION", "BUNDLE_INCOMPATIBLE", "upgrade the server"),
        ({"platforms": ["cuda", "tpu"]}, "INVALID_ARGUMENT", "BUNDLE_INCOMPATIBLE", "branches for cuda, tpu"),
        ({"platforms": ["abacus"]}, "INVALID_ARGUMENT", "BUNDLE_INVALID", "platforms must be of"),
        ({"composite": {"reduction": "mean", "samples": 1}}, "INVALID_ARGUMENT", "BUNDLE_INVALID", "a composite has"),
        ({"programs": {"hvp": objective_pb2.Program()}}, "INVALID_ARGUMENT", "BUNDLE_INVALID", "got hvp, objective"),
        ({"blocks": [{"leaves": [1]}]}, "INVALID_ARGUMENT", "UNKNOWN_BLOCK", "ascending positions of leaves of x"),
        ({"stablehlo_version": "1" * 10_000}, "INVALID_ARGUMENT", "BUNDLE_INVALID", "has 10000 characters"),
        ({"n": 4}, "INVALID_ARGUMENT", "BUNDLE_INVALID", "n = 4 elements"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_fields_that_do_not_fit(channel, honest, program, fields, code, reason, says):
    found, message = refused(channel, honest, program, getattr(grpc.StatusCode, code), **fields)
    assert found == reason
    assert says in message


@pytest.mark.parametrize("claim", [0, 1 << 30, 1 << 62])
def test_a_program_that_claims_another_size(channel, honest, program, claim):
    reason, message = refused(channel, honest, program, size_bytes=claim)
    assert reason == "BUNDLE_INVALID"
    assert str(claim) in message


def test_an_admitted_objective_is_served_after_a_restart_without_a_second_reading(serve, honest):
    """The record is in the store. If it is removed, the server reads the program again,
    and serves it nevertheless.
    """
    server = serve()
    with hvpd.connect(server.address) as client:
        objective = client.register(lambda x: jnp.sum(x**4) / 12, X, name="quartic", platforms=("cpu",))
        record = server.store / "derived" / objective.digest
        before = record.read_bytes()
        server.kill()
        record.unlink()
        server.start()
        assert record.read_bytes() == before
        changed = record.stat().st_mtime_ns
        server.kill()
        server.start()
        assert record.stat().st_mtime_ns == changed
        assert np.allclose(client.objective("quartic").hessp(X, np.ones(3)), X**2)


def vetters(server):
    """Return the processes that read programs for a server. They are its descendants in
    /proc.
    """
    parents, found = {}, []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rsplit(")", 1)[1].split()[1])
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != server.process.pid:
            ancestor = parents[ancestor]
        with contextlib.suppress(OSError):
            if (
                ancestor == server.process.pid
                and b"admission.vetting_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ):
                found.append(pid)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_a_server_that_ends_leaves_no_process_behind(serve, end):
    server = serve(forked=False)  # So that the vetter is a child of the server.
    with hvpd.connect(server.address) as client:
        client.register(lambda x: jnp.sum(x**4) / 12, X, platforms=("cpu",))
    watched = [os.pidfd_open(pid) for pid in vetters(server)]
    assert watched
    getattr(server, end)()
    for pid in watched:
        assert select.select([pid], [], [], 60)[0]
        os.close(pid)
