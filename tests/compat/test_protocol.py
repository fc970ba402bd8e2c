"""The wire of before against today's: what older clients and newer servers, and the other way round, see of each other.

The files beside this one are the wire as it once was: `protocol-1`, the first that had all that a registration and a product take, and
those of releases (see freeze.py).
"""

import contextlib
import hashlib
import importlib.util
from pathlib import Path

import grpc
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

import hvpd
from hvpd import _protocol

HERE = Path(__file__).parent
FROZEN = sorted(path.stem for path in HERE.glob("*.binpb"))
N = 6


def frozen(name):
    return descriptor_pb2.FileDescriptorSet.FromString((HERE / f"{name}.binpb").read_bytes())


def today():
    spec = importlib.util.spec_from_file_location("freeze", HERE / "freeze.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.today()


# Whether something was broken


def broken(old, new):
    """What of one FileDescriptorSet's hvpd.v1 means something else in another, or is gone: a line each.

    The rules are those of `buf breaking` of the category WIRE, and the names, which are those of the generated code.
    """
    before, after = _parts(old), _parts(new)
    found = [f"{name} is gone" for name in before if name not in after and f"{name}/reserved" not in after]
    found += [f"{name} is {after[name]}, it was {was}" for name, was in before.items() if after.get(name, was) != was]
    return found


def _parts(files):
    """What each message, field, value and method is, by its full name; fields and values by their numbers, with their names."""
    return {
        name: what
        for file in files.file
        if file.package == "hvpd.v1"
        for part in (
            *(_message(file.package, declared) for declared in file.message_type),
            *(_enum(file.package, declared) for declared in file.enum_type),
            *(_service(file.package, declared) for declared in file.service),
        )
        for name, what in part
    }


def _message(prefix, declared):
    name = f"{prefix}.{declared.name}"
    yield name, "a message"
    for field in declared.field:
        oneof = declared.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
        repeated = field.label == field.LABEL_REPEATED
        yield f"{name}/{field.number}", (field.name, field.type, field.type_name, repeated, oneof)
    for reserved in declared.reserved_range:
        yield from ((f"{name}/{number}/reserved", True) for number in range(reserved.start, reserved.end))
    for enum in declared.enum_type:
        yield from _enum(name, enum)
    for nested in declared.nested_type:
        yield from _message(name, nested)


def _enum(prefix, declared):
    name = f"{prefix}.{declared.name}"
    yield name, "an enum"
    yield from ((f"{name}/{value.number}", value.name) for value in declared.value)
    for reserved in declared.reserved_range:
        yield from ((f"{name}/{number}/reserved", True) for number in range(reserved.start, reserved.end + 1))


def _service(prefix, declared):
    name = f"{prefix}.{declared.name}"
    yield name, "a service"
    for method in declared.method:
        streams = method.client_streaming, method.server_streaming
        yield f"{name}.{method.name}", (method.input_type, method.output_type, *streams)


@pytest.mark.parametrize("name", FROZEN)
def test_nothing_of_before_means_something_else_today(name):
    assert broken(frozen(name), today()) == []


def test_there_is_something_to_hold_it_against():
    assert {"protocol-1", "0.1.0"} <= set(FROZEN)
    assert len(_parts(frozen("protocol-1"))) > 100
    assert "hvpd.v1.CurvatureService.StreamProducts" in _parts(frozen("protocol-1"))


def test_a_version_that_was_released_is_frozen():
    assert hvpd.__version__ in FROZEN, "python tests/compat/freeze.py VERSION, and commit what it writes"


def part_of(files, name):
    return next(found for file in files.file for found in file.message_type if found.name == name)


def renumber(files):
    part_of(files, "Point").field[0].number = 77


def retype(files):
    part_of(files, "Point").field[2].type = descriptor_pb2.FieldDescriptorProto.TYPE_UINT64


def rename(files):
    part_of(files, "Point").field[1].name = "cost"


def repeat(files):
    part_of(files, "Point").field[1].label = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED


def leave_out(files):
    del part_of(files, "Point").field[1]


def reserve(files):
    leave_out(files)
    part_of(files, "Point").reserved_range.add(start=2, end=3)


def reuse(files):
    leave_out(files)
    part_of(files, "Point").field.add(
        name="cost", number=2, type=descriptor_pb2.FieldDescriptorProto.TYPE_STRING, label=1
    )


def leave_the_oneof(files):
    part_of(files, "CreatePointRequest").field[0].ClearField("oneof_index")


def leave_a_message_out(files):
    for file in files.file:
        for index, found in enumerate(file.message_type):
            if found.name == "Move":
                del file.message_type[index]
                return


def another_value(files):
    enum = next(found for file in files.file for found in file.enum_type if found.name == "Operator")
    enum.value[1].name = "OPERATOR_JACOBIAN"


def one_answer(files):
    service = next(found for file in files.file for found in file.service if found.name == "CurvatureService")
    service.method[0].server_streaming = False


def add_a_field(files):
    part_of(files, "Point").field.add(
        name="cost", number=78, type=descriptor_pb2.FieldDescriptorProto.TYPE_STRING, label=1
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (renumber, ["hvpd.v1.Point/1 is gone"]),
        (retype, ["hvpd.v1.Point/3 is "]),
        (rename, ["hvpd.v1.Point/2 is "]),
        (repeat, ["hvpd.v1.Point/2 is "]),
        (leave_out, ["hvpd.v1.Point/2 is gone"]),
        (reserve, []),
        (reuse, ["hvpd.v1.Point/2 is "]),
        (leave_the_oneof, ["hvpd.v1.CreatePointRequest/1 is "]),
        (
            leave_a_message_out,
            ["hvpd.v1.Move is gone", "hvpd.v1.Move/1 is gone", "hvpd.v1.Move/2 is gone", "hvpd.v1.Move/3 is gone"],
        ),
        (another_value, ["hvpd.v1.Operator/1 is "]),
        (one_answer, ["hvpd.v1.CurvatureService.CreatePoint is "]),
        (add_a_field, []),
    ],
)
def test_what_breaks_is_found(change, says):
    changed = today()
    change(changed)
    found = broken(today(), changed)
    assert len(found) == len(says)
    for line, expected in zip(sorted(found), says, strict=True):
        assert line.startswith(expected)


# A client of before, which has the wire of its time and no more


class Old:
    """The messages of a frozen wire, and its methods on a channel."""

    def __init__(self, name, channel=None):
        files = frozen(name)
        pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            pool.Add(file)
        self._pool = pool
        self._channel = channel

    def __getattr__(self, name):
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(f"hvpd.v1.{name}"))

    def call(self, service, method, request):
        """A method's answer or answers; `request` is a message, or an iterable where it takes a stream."""
        found = self._pool.FindServiceByName(f"hvpd.v1.{service}").methods_by_name[method]
        kind = f"{'stream' if found.client_streaming else 'unary'}_{'stream' if found.server_streaming else 'unary'}"
        return getattr(self._channel, kind)(
            f"/hvpd.v1.{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(found.output_type).FromString,
        )(request, metadata=(("hvpd-protocol", "1"), ("hvpd-version", "0.0.1")), timeout=60)


@pytest.fixture(params=FROZEN)
def old(request, server):
    with grpc.insecure_channel(server.address) as channel:
        yield Old(request.param, channel)


def digest(content):
    return hashlib.sha256(content).hexdigest()


def matrix():
    A = np.random.default_rng(0).normal(size=(N, N))
    return A + A.T


def programs():
    """value_and_grad and hvp of x'Ax/2 as a client exports them, by name."""
    x, A = jax.ShapeDtypeStruct((N,), jnp.float64), jax.ShapeDtypeStruct((N, N), jnp.float64)
    (k,) = jax.export.symbolic_shape("k")
    V = jax.ShapeDtypeStruct((k, N), jnp.float64)

    def value_and_grad(x, A):
        return jax.value_and_grad(lambda x: x @ A @ x / 2)(x)

    def hvp(x, V, A):
        return jax.vmap(lambda v: jax.jvp(jax.grad(lambda x: x @ A @ x / 2), (x,), (v,))[1])(V)

    with jax.enable_x64(True):
        found = {
            "value_and_grad": jax.export.export(jax.jit(value_and_grad, keep_unused=True), platforms=["cpu"])(x, A),
            "hvp": jax.export.export(jax.jit(hvp, keep_unused=True), platforms=["cpu"])(x, V, A),
        }
    version = found["hvp"].calling_convention_version
    return {name: bytes(exported.serialize()) for name, exported in found.items()}, version


def upload(old, *contents):
    digests = [digest(content) for content in contents]
    asked = old.FindMissingBlobsRequest(digests=digests)
    missing = old.call("BlobService", "FindMissingBlobs", asked).missing_digests
    for content in contents:
        if digest(content) in missing:
            message = old.UploadBlobRequest(digest=digest(content), size_bytes=len(content), chunk=content)
            assert old.call("BlobService", "UploadBlob", iter([message])).size_bytes == len(content)
    assert not old.call("BlobService", "FindMissingBlobs", asked).missing_digests


def bundle(old):
    """A bundle of the fields that there were at first, its programs uploaded."""
    blobs, version = programs()
    A = matrix().tobytes()
    upload(old, A, *blobs.values())
    leaf = {"dtype": "float64", "shape": [N]}
    made = old.Bundle(
        format=1,
        n=N,
        dtype="float64",
        x_tree={"kind": 1},
        x_leaves=[leaf],
        data_tree={"kind": 5, "children": [{"kind": 1}]},
        data=[{"dtype": "float64", "shape": [N, N], "digest": digest(A)}],
        mode="forward_over_reverse",
        platforms=["cpu"],
        precision="highest",
        x64=True,
        jax_version=jax.__version__,
        calling_convention_version=version,
    )
    for name, content in blobs.items():
        made.programs[name].digest, made.programs[name].size_bytes = digest(content), len(content)
    return made


def test_an_older_client_registers_and_multiplies(old):
    server = old.call("ServerService", "GetServer", old.GetServerRequest())
    assert server.version == hvpd.__version__
    assert server.min_protocol <= 1 <= server.max_protocol

    made = bundle(old)
    content = made.SerializeToString(deterministic=True)
    upload(old, content)
    asked = old.CreateObjectiveRequest(digest=digest(content), name="compat/old")
    created = old.call("ObjectiveService", "CreateObjective", asked).objective
    assert created.digest == digest(content)
    assert created.bundle == made
    found = old.call("ObjectiveService", "GetObjective", old.GetObjectiveRequest(name="compat/old")).objective
    assert found.bundle == made
    listed = old.call("ObjectiveService", "ListObjectives", old.ListObjectivesRequest()).objectives
    assert "compat/old" in [objective.name for objective in listed]

    x = np.arange(1.0, N + 1)
    spec = old.PointSpec(objective_digest=created.digest, default_data=True, x_digest=digest(x.tobytes()))
    answers = list(
        old.call("CurvatureService", "CreatePoint", iter([old.CreatePointRequest(spec=spec, inline_x=x.tobytes())]))
    )
    point = next(answer.point for answer in answers if answer.HasField("point"))
    gradient = np.frombuffer(b"".join(answer.chunk for answer in answers))
    assert point.value == pytest.approx(x @ matrix() @ x / 2, rel=1e-12)
    np.testing.assert_allclose(gradient, matrix() @ x, rtol=1e-12)

    V = np.random.default_rng(1).normal(size=(3, N))
    product = old.ProductSpec(point_id=point.id, operator=1, k=3)
    reply = old.call("CurvatureService", "ComputeProduct", old.ComputeProductRequest(spec=product, vectors=V.tobytes()))
    np.testing.assert_allclose(np.frombuffer(reply.vectors).reshape(3, N), V @ matrix(), rtol=1e-12)
    assert reply.info.program == "hvp"

    messages = [old.StreamProductsRequest(tag=tag, spec=product, chunk=V.tobytes()) for tag in (1, 2)]
    chunks = {1: b"", 2: b""}
    for answer in old.call("CurvatureService", "StreamProducts", iter(messages)):
        assert not answer.HasField("error")
        chunks[answer.tag] += answer.chunk
    for chunk in chunks.values():
        np.testing.assert_allclose(np.frombuffer(chunk).reshape(3, N), V @ matrix(), rtol=1e-12)


def test_an_older_client_is_told_what_is_wrong(old):
    with pytest.raises(grpc.RpcError) as error:
        old.call("ObjectiveService", "GetObjective", old.GetObjectiveRequest(name="compat/nothing"))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    spec = old.ProductSpec(point_id="0" * 64, operator=1, k=1)
    with pytest.raises(grpc.RpcError) as error:
        old.call("CurvatureService", "ComputeProduct", old.ComputeProductRequest(spec=spec, vectors=b"\0" * 8 * N))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    (answer,) = old.call("CurvatureService", "StreamProducts", iter([old.StreamProductsRequest(tag=1, spec=spec)]))
    assert answer.error.code == grpc.StatusCode.NOT_FOUND.value[0]


def test_todays_client_multiplies_at_what_an_older_one_registered(old, client):
    content = bundle(old).SerializeToString(deterministic=True)
    upload(old, content)
    old.call("ObjectiveService", "CreateObjective", old.CreateObjectiveRequest(digest=digest(content)))
    objective = client.objective(digest(content))
    point = objective.at(np.ones(N))
    np.testing.assert_allclose(point.gradient, matrix() @ np.ones(N), rtol=1e-12)
    np.testing.assert_allclose(point.hessian(shift=0.5) @ np.eye(N), matrix() + 0.5 * np.eye(N), rtol=1e-12)


def test_an_older_client_multiplies_at_what_todays_registered(old, client):
    """With all that came since: what it does not know it skips."""
    A = matrix()
    objective = client.register(
        lambda params, A: (params["w"] @ A @ params["w"] + params["b"] ** 2) / 2,
        {"w": np.zeros(N), "b": np.zeros(())},
        A,
        name="compat/new",
        blocks=["w"],
        fixed_bucket=4,
    )
    found = old.call("ObjectiveService", "GetObjective", old.GetObjectiveRequest(name="compat/new")).objective
    assert (found.digest, found.bundle.n, found.bundle.dtype) == (objective.digest, N + 1, "float64")
    assert {"value_and_grad", "hvp"} <= set(found.bundle.programs)
    assert digest(found.bundle.SerializeToString(deterministic=True)) != ""
    x = np.ones(N + 1)
    spec = old.PointSpec(objective_digest=found.digest, default_data=True, x_digest=digest(x.tobytes()))
    opening = iter([old.CreatePointRequest(spec=spec, inline_x=x.tobytes())])
    point = next(a.point for a in old.call("CurvatureService", "CreatePoint", opening) if a.HasField("point"))
    product = old.ProductSpec(point_id=point.id, operator=1, k=1)
    reply = old.call("CurvatureService", "ComputeProduct", old.ComputeProductRequest(spec=product, vectors=x.tobytes()))
    expected = np.block([[np.ones((1, 1)), np.zeros((1, N))], [np.zeros((N, 1)), A]]) @ x  # "b" before "w".
    np.testing.assert_allclose(np.frombuffer(reply.vectors), expected, rtol=1e-12)


# Revisions


@contextlib.contextmanager
def speaking(oldest, newest):
    """This client as one that speaks other revisions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_protocol, "OLDEST", oldest)
        patch.setattr(_protocol, "NEWEST", newest)
        yield


def test_a_newer_client_speaks_an_older_servers_revision(server):
    """The server runs in a process of its own, and knows what this version knows."""
    newest = _protocol.NEWEST
    with speaking(_protocol.OLDEST, newest + 3), hvpd.connect(server.address) as client:
        assert client.server.max_protocol == newest
        objective = client.register(lambda x: jnp.sum(x**4) / 12, np.ones(N))
        np.testing.assert_allclose(objective.at(2 * np.ones(N)).hessian() @ np.ones(N), 4 * np.ones(N))


def test_a_client_that_is_too_new_says_so(server):
    newest = _protocol.NEWEST
    with speaking(newest + 1, newest + 1):
        with pytest.raises(
            hvpd.IncompatibleError, match=rf"speaks protocol 1 to {newest}, this client .* {newest + 1}"
        ):
            hvpd.connect(server.address)


def test_a_client_that_is_too_old_says_so(server):
    with speaking(0, 0):
        with pytest.raises(
            hvpd.IncompatibleError, match=r"speaks protocol 1 to .*, this client .* 0 to 0: install the same"
        ):
            hvpd.connect(server.address)
