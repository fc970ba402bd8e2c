"""Earlier wires against today's: older clients with newer servers, and newer clients
with older servers.

The files beside this one hold earlier wires. `protocol-1` is the first wire that had
all fields of a registration and of a product. The others are of releases (freeze.py).
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
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import hvpd
from hvpd._wire import protocol
from hvpd.v1 import objective_pb2

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
    """Return a line for each part of one FileDescriptorSet's hvpd.v1 that means
    something else in another, or is gone.

    The rules are those of `buf breaking` of the category WIRE, and equal names, because
    generated code has the names.
    """
    before, after = _parts(old), _parts(new)
    found = [f"{name} is gone" for name in before if name not in after and f"{name}/reserved" not in after]
    found += [f"{name} is {after[name]}, it was {was}" for name, was in before.items() if after.get(name, was) != was]
    return found


def _parts(files):
    """Return the meaning of each message, field, value and method by its full name. The
    key of a field or value has its number, and the meaning has its name.
    """
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
def test_a_breaking_change_is_found(change, says):
    changed = today()
    change(changed)
    found = broken(today(), changed)
    assert len(found) == len(says)
    for line, expected in zip(sorted(found), says, strict=True):
        assert line.startswith(expected)


# An older client, which has only the wire of its time


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
        """Call a method. `request` is a message, or an iterable if the method takes a
        stream.
        """
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
    """Upload, and return, a bundle of the first wire's fields, with programs of
    derivatives.
    """
    A, program = matrix().tobytes(), b"a program of jax.export"
    upload(old, A, program)
    made = old.Bundle(
        format=1,
        n=N,
        dtype="float64",
        x_tree={"kind": 1},
        x_leaves=[{"dtype": "float64", "shape": [N]}],
        data_tree={"kind": 5, "children": [{"kind": 1}]},
        data=[{"dtype": "float64", "shape": [N, N], "digest": digest(A)}],
        mode="forward_over_reverse",
        platforms=["cpu"],
        precision="highest",
        x64=True,
        jax_version=jax.__version__,
        calling_convention_version=10,
    )
    for name in ("value_and_grad", "hvp"):
        made.programs[name].digest, made.programs[name].size_bytes = digest(program), len(program)
    return made


def test_an_older_client_cannot_register_and_is_told_why(old, client):
    """Before the server differentiated, clients sent the derivatives."""
    content = bundle(old).SerializeToString(deterministic=True)
    upload(old, content)
    asked = old.CreateObjectiveRequest(digest=digest(content), name="compat/old")
    with pytest.raises(grpc.RpcError) as error:
        old.call("ObjectiveService", "CreateObjective", asked)
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in rpc_status.from_call(error.value).details)
    assert info.reason == "BUNDLE_INCOMPATIBLE"
    for says in ("has format 1", "this server reads format 2", "register the objective again with a newer client"):
        assert says in error.value.details()
    for name in ("compat/old", digest(content)):
        with pytest.raises(hvpd.NotFoundError):
            client.objective(name)


def test_a_bundle_of_today_is_one_of_another_format_for_an_older_server(old):
    """An older server refuses a format that it does not know, because the field has
    kept its number and its meaning.
    """
    new = objective_pb2.Bundle(format=2, n=N, dtype="float64", composite={"reduction": "mean", "samples": 1})
    new.programs["objective"].size_bytes = 1
    seen = old.Bundle.FromString(new.SerializeToString())
    assert (seen.format, seen.n, seen.dtype) == (2, N, "float64")
    assert not {"value_and_grad", "hvp"} & set(seen.programs)
    assert seen.SerializeToString(deterministic=True)


def test_an_older_client_gets_clear_errors(old):
    with pytest.raises(grpc.RpcError) as error:
        old.call("ObjectiveService", "GetObjective", old.GetObjectiveRequest(name="compat/nothing"))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    spec = old.ProductSpec(point_id="0" * 64, operator=1, k=1)
    with pytest.raises(grpc.RpcError) as error:
        old.call("CurvatureService", "ComputeProduct", old.ComputeProductRequest(spec=spec, vectors=b"\0" * 8 * N))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    (answer,) = old.call("CurvatureService", "StreamProducts", iter([old.StreamProductsRequest(tag=1, spec=spec)]))
    assert answer.error.code == grpc.StatusCode.NOT_FOUND.value[0]


def open_point(old, objective, x):
    """Return the point and its gradient."""
    spec = old.PointSpec(objective_digest=objective.digest, default_data=True, x_digest=digest(x.tobytes()))
    opening = iter([old.CreatePointRequest(spec=spec, inline_x=x.tobytes())])
    answers = list(old.call("CurvatureService", "CreatePoint", opening))
    point = next(answer.point for answer in answers if answer.HasField("point"))
    return point, np.frombuffer(b"".join(answer.chunk for answer in answers))


def test_an_older_client_uses_an_objective_that_todays_client_registered(old, client):
    A = matrix()
    registered = client.register(lambda x, A: x @ A @ x / 2, np.zeros(N), A, name="compat/new")
    server = old.call("ServerService", "GetServer", old.GetServerRequest())
    assert server.version == hvpd.__version__
    assert server.min_protocol <= 1 <= server.max_protocol
    found = old.call("ObjectiveService", "GetObjective", old.GetObjectiveRequest(name="compat/new")).objective
    assert (found.digest, found.bundle.n, found.bundle.dtype) == (registered.digest, N, "float64")
    assert (found.bundle.mode, found.bundle.precision) == ("forward_over_reverse", "highest")
    listed = old.call("ObjectiveService", "ListObjectives", old.ListObjectivesRequest()).objectives
    assert "compat/new" in [objective.name for objective in listed]

    x = np.arange(1.0, N + 1)
    point, gradient = open_point(old, found, x)
    assert point.value == pytest.approx(x @ A @ x / 2, rel=1e-12)
    np.testing.assert_allclose(gradient, A @ x, rtol=1e-12)

    V = np.random.default_rng(1).normal(size=(3, N))
    product = old.ProductSpec(point_id=point.id, operator=1, k=3)
    reply = old.call("CurvatureService", "ComputeProduct", old.ComputeProductRequest(spec=product, vectors=V.tobytes()))
    np.testing.assert_allclose(np.frombuffer(reply.vectors).reshape(3, N), V @ A, rtol=1e-12)
    assert reply.info.program == "hvp"

    messages = [old.StreamProductsRequest(tag=tag, spec=product, chunk=V.tobytes()) for tag in (1, 2)]
    chunks = {1: b"", 2: b""}
    for answer in old.call("CurvatureService", "StreamProducts", iter(messages)):
        assert not answer.HasField("error")
        chunks[answer.tag] += answer.chunk
    for chunk in chunks.values():
        np.testing.assert_allclose(np.frombuffer(chunk).reshape(3, N), V @ A, rtol=1e-12)


def test_an_older_client_uses_an_objective_with_all_newer_fields(old, client):
    """The client skips fields that it does not know. The block with its number is that
    of the registration.
    """
    A = matrix()
    objective = client.register(
        lambda params, A: (params["w"] @ A @ params["w"] + params["b"] ** 2) / 2,
        {"w": np.zeros(N), "b": np.zeros(())},
        A,
        name="compat/newer",
        blocks=["w"],
        fixed_bucket=4,
    )
    found = old.call("ObjectiveService", "GetObjective", old.GetObjectiveRequest(name="compat/newer")).objective
    assert (found.digest, found.bundle.n, found.bundle.dtype) == (objective.digest, N + 1, "float64")
    assert digest(found.bundle.SerializeToString(deterministic=True)) != ""
    x = np.ones(N + 1)
    point, _ = open_point(old, found, x)
    product = old.ProductSpec(point_id=point.id, operator=1, k=1)
    reply = old.call("CurvatureService", "ComputeProduct", old.ComputeProductRequest(spec=product, vectors=x.tobytes()))
    expected = np.block([[np.ones((1, 1)), np.zeros((1, N))], [np.zeros((N, 1)), A]]) @ x  # "b" before "w".
    np.testing.assert_allclose(np.frombuffer(reply.vectors), expected, rtol=1e-12)
    if "block" in old.ProductSpec.DESCRIPTOR.fields_by_name:
        product.block = 1
        asked = old.ComputeProductRequest(spec=product, vectors=x[1:].tobytes())
        reply = old.call("CurvatureService", "ComputeProduct", asked)
        np.testing.assert_allclose(np.frombuffer(reply.vectors), A @ x[1:], rtol=1e-12)


# Revisions


@contextlib.contextmanager
def speaking(oldest, newest):
    """Yield this client, changed to speak other revisions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "OLDEST", oldest)
        patch.setattr(protocol, "NEWEST", newest)
        yield


def test_a_newer_client_speaks_an_older_servers_revision(server):
    """The server runs in its own process, and knows this version's revisions."""
    newest = protocol.NEWEST
    with speaking(protocol.OLDEST, newest + 3), hvpd.connect(server.address) as client:
        assert client.server.max_protocol == newest
        objective = client.register(lambda x: jnp.sum(x**4) / 12, np.ones(N))
        np.testing.assert_allclose(objective.at(2 * np.ones(N)).hessian() @ np.ones(N), 4 * np.ones(N))


def test_a_client_that_is_too_new_says_so(server):
    newest = protocol.NEWEST
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
