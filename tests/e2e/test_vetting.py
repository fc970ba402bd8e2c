"""Bundles that somebody made by hand, sent over the wire: refused with a reason, and the server goes on for everybody else."""

import contextlib
import dataclasses
import hashlib
import os
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
from hvpd import _export
from hvpd.v1 import blob_pb2, blob_pb2_grpc, objective_pb2, objective_pb2_grpc

X = np.arange(3, dtype=np.float32)


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.address) as opened:
        yield opened


@pytest.fixture(scope="module")
def honest():
    """x -> sum(x^4) / 12, whose Hessian is diag(x^2)."""
    return _export.export(lambda x: jnp.sum(x**4) / 12, X, (), platforms=("cpu",), precision="highest")


@pytest.fixture(scope="module")
def program(honest):
    """Its value_and_grad, as jax.export has it."""
    blob = honest.blobs[honest.bundle.programs["value_and_grad"].digest]
    return jax.export.deserialize(bytearray(blob))


def forged(text, like):
    """A serialized program whose module is this text; all else is that of an honest one."""
    with jax.interpreters.mlir.make_ir_context(), ir.Location.unknown():
        artifact = jax.extend.mlir.serialize_portable_artifact(ir.Module.parse(text), stablehlo.get_current_version())
    return bytes(dataclasses.replace(like, mlir_module_serialized=artifact).serialize())


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


def register(channel, honest, blob, name="evil", size_bytes=None):
    """Sends the honest bundle with another value_and_grad."""
    bundle = objective_pb2.Bundle.FromString(honest.bundle.SerializeToString())
    for content in honest.blobs.values():
        send(channel, bytes(content))
    size = len(blob) if size_bytes is None else size_bytes
    bundle.programs["value_and_grad"].CopyFrom(objective_pb2.Program(digest=send(channel, blob), size_bytes=size))
    digest = send(channel, bundle.SerializeToString(deterministic=True))
    request = objective_pb2.CreateObjectiveRequest(digest=digest, name=name)
    return objective_pb2_grpc.ObjectiveServiceStub(channel).CreateObjective(request)


def refused(channel, honest, blob, **options):
    """Reason and message of the refusal."""
    with pytest.raises(grpc.RpcError) as error:
        register(channel, honest, blob, **options)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT, error.value
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in rpc_status.from_call(error.value).details)
    return info.reason, error.value.details()


@pytest.fixture(autouse=True)
def unharmed(server, channel, honest):
    """After each test the server is the same process, has not registered what it refused, and registers what is honest."""
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
def test_callbacks_as_jax_writes_them(channel, honest, program, fun):
    """jax refuses to export them; their modules are there all the same."""
    text = jax.jit(lambda x: (fun(x), x)).lower(X).as_text()
    assert "callback" in text
    reason, message = refused(channel, honest, forged(text, program))
    assert reason == "OPERATION_REFUSED"
    assert "value_and_grad" in message
    assert "callback" in message


MAIN = "func.func public @main(%x: tensor<3xf32>) -> (tensor<f32>, tensor<3xf32>)"
INFEED = f"""module {{ {MAIN} {{
    %token = stablehlo.after_all : !stablehlo.token
    %y:2 = "stablehlo.infeed"(%token) : (!stablehlo.token) -> (tensor<f32>, !stablehlo.token)
    return %y#0, %x : tensor<f32>, tensor<3xf32>
}} }}"""
BACKDOOR = f"""module {{ {MAIN} {{
    %y = stablehlo.custom_call @backdoor(%x) : (tensor<3xf32>) -> tensor<f32>
    return %y, %x : tensor<f32>, tensor<3xf32>
}} }}"""
OVERFLOW = f"""module {{ {MAIN} {{
    %a = stablehlo.constant dense<1.0> : tensor<99x99xf32>
    %y:2 = stablehlo.custom_call @lapack_spotrf_ffi(%a) {{ mhlo.backend_config = {{uplo = 76 : ui8}}, api_version = 4 : i32 }}
        : (tensor<99x99xf32>) -> (tensor<1x1xf32>, tensor<i32>)
    %z = stablehlo.reshape %y#0 : (tensor<1x1xf32>) -> tensor<f32>
    return %z, %x : tensor<f32>, tensor<3xf32>
}} }}"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (INFEED, "stablehlo.after_all"),
        (BACKDOOR, "stablehlo.custom_call of backdoor"),
        (OVERFLOW, "do not fit each other"),
    ],
)
def test_what_is_written_by_hand(channel, honest, program, text, says):
    reason, message = refused(channel, honest, forged(text, program))
    assert reason == "OPERATION_REFUSED"
    assert f"value_and_grad has a {says}" in message or says in message


def test_the_client_raises_what_the_server_says(server, honest, program, monkeypatch):
    blob = forged(BACKDOOR, program)
    digest = hashlib.sha256(blob).hexdigest()
    bundle = objective_pb2.Bundle.FromString(honest.bundle.SerializeToString())
    bundle.programs["value_and_grad"].CopyFrom(objective_pb2.Program(digest=digest, size_bytes=len(blob)))
    whole = bundle.SerializeToString(deterministic=True)
    evil = hashlib.sha256(whole).hexdigest()
    blobs = {**honest.blobs, digest: blob, evil: whole}
    forgery = dataclasses.replace(honest, bundle=bundle, blobs=blobs, digest=evil)
    monkeypatch.setattr(_export, "export", lambda *args, **options: forgery)
    says = "value_and_grad has a stablehlo.custom_call of backdoor"
    with hvpd.connect(server.address) as client:
        with pytest.raises(hvpd.InvalidArgumentError, match=says) as error:
            client.register(jnp.sum, X, name="evil")
        assert error.value.reason == "OPERATION_REFUSED"
        with pytest.raises(hvpd.NotFoundError):
            client.objective("evil")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_programs(channel, honest, program, data):
    """Bytes changed, or cut off: still a program, or a clear refusal."""
    blob = bytearray(honest.blobs[honest.bundle.programs["value_and_grad"].digest])
    module = bytes(program.mlir_module_serialized)
    start = bytes(blob).index(module)
    places = st.integers(start, start + len(module) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        blob[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(blob) - 1)))
    try:
        register(channel, honest, bytes(blob[:cut]), name="")
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error  # noqa: PT017 - some are still programs
        assert len(error.details()) < 4000  # noqa: PT017 - likewise


def nested(levels):
    """Conditionals inside each other."""
    text = f"module {{ {MAIN} {{ %c = stablehlo.constant dense<true> : tensor<i1>\n %y = stablehlo.constant dense<1.0> : tensor<f32>\n"
    text += "".join(f'%y{level} = "stablehlo.if"(%c) ({{\n' for level in range(levels))
    text += "%t = stablehlo.tanh %y : tensor<f32>\n"
    for level in reversed(range(levels)):
        inner = "%t" if level == levels - 1 else f"%y{level + 1}"
        text += f"stablehlo.return {inner} : tensor<f32> }}, {{ stablehlo.return %y : tensor<f32> }}) : (tensor<i1>) -> tensor<f32>\n"
    return text + "return %y0, %x : tensor<f32>, tensor<3xf32> } }"


def test_a_thousand_conditionals_inside_each_other(channel, honest, program):
    reason, message = refused(channel, honest, forged(nested(1000), program))
    assert reason == "PROGRAM_TOO_LARGE"
    assert "64 deep inside each other" in message


def test_a_hundred_thousand_modules_inside_each_other(channel, honest, program):
    """As text, for no writer of bytecode gets so far."""
    text = b"module {" * 100_000 + b"}" * 100_000
    reason, message = refused(
        channel, honest, bytes(dataclasses.replace(program, mlir_module_serialized=text).serialize())
    )
    assert reason == "BUNDLE_INCOMPATIBLE"
    assert "bytecode" in message


@pytest.mark.parametrize("claim", [0, 1 << 30, 1 << 62])
def test_a_program_that_claims_another_size(channel, honest, program, claim):
    reason, message = refused(channel, honest, bytes(program.serialize()), size_bytes=claim)
    assert reason == "BUNDLE_INVALID"
    assert str(claim) in message


def test_what_was_admitted_is_served_after_a_restart_without_being_read_again(serve, honest):
    """The record is in the store; who removes it has it read again, and served all the same."""
    server = serve()
    with hvpd.connect(server.address) as client:
        objective = client.register(lambda x: jnp.sum(x**4) / 12, X, name="quartic", platforms=("cpu",))
        record = server.store / "vetted" / objective.digest
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
    """The processes that read programs for a server: descendants of it, found in /proc."""
    parents, found = {}, []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rsplit(")", 1)[1].split()[1])
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != server.process.pid:
            ancestor = parents[ancestor]
        with contextlib.suppress(OSError):
            if ancestor == server.process.pid and b"_vetter" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_a_server_that_ends_leaves_no_process_behind(serve, end):
    server = serve()
    with hvpd.connect(server.address) as client:
        client.register(lambda x: jnp.sum(x**4) / 12, X, platforms=("cpu",))
    watched = [os.pidfd_open(pid) for pid in vetters(server)]
    assert watched
    getattr(server, end)()
    for pid in watched:
        assert select.select([pid], [], [], 60)[0]
        os.close(pid)
