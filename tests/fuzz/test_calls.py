"""Any bytes as the request of every method: the server answers with a status that
blames the caller, and serves the others.
"""

import grpc
import jax.numpy as jnp
import numpy as np
import pytest
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st

import hvpd
from hvpd.v1 import blob_pb2, curvature_pb2, curvature_pb2_grpc, objective_pb2, objective_pb2_grpc
from tests.fuzz import wire
from tests.support.objectives import quartic

CODE = grpc.StatusCode

BLAMES_THE_CALLER = {
    CODE.OK,
    CODE.INVALID_ARGUMENT,
    CODE.NOT_FOUND,
    CODE.FAILED_PRECONDITION,
    CODE.RESOURCE_EXHAUSTED,
    CODE.UNIMPLEMENTED,
}


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.address) as opened:
        yield opened


@pytest.fixture(scope="module")
def point(client):
    return client.register(quartic, np.arange(50.0), name="quartic").at(np.arange(50.0))


@pytest.fixture(scope="module")
def neighbour(client, point):
    """Run another client that solves all the while, and registers again if a caller
    deletes its objective.
    """

    def check():
        try:
            found = point.hessian() @ np.ones(50)
        except hvpd.NotFoundError:
            client.register(quartic, np.arange(50.0), name="quartic")
            found = point.hessian() @ np.ones(50)
        assert np.array_equal(found, np.arange(50.0) ** 2)

    return check


def raw(channel, method, requests, timeout=60):
    """Send bytes to a method; return the status, and the answers' bytes."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    kind = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[method.client_streaming, method.server_streaming]
    try:
        answer = kind(path)(iter(requests) if method.client_streaming else requests[0], timeout=timeout)
        return CODE.OK, [answer] if isinstance(answer, bytes) else list(answer)
    except grpc.RpcError as error:
        return error.code(), error.details()


@pytest.fixture(scope="module")
def facts(point):
    """Return facts that a caller can know. Junk with real ids and digests gets
    further.
    """
    return [
        point._id,
        point.objective.digest,
        point._spec.x_digest,
        *(p.digest for p in point.objective._bundle.programs.values()),
    ]


def fill(made, facts, draw):
    """Put real digests in place of strings."""
    for field in made.DESCRIPTOR.fields:
        if field.message_type is not None:
            if made.HasField(field.name) if not hasattr(getattr(made, field.name), "extend") else False:
                fill(getattr(made, field.name), facts, draw)
        elif field.type == field.TYPE_STRING and draw(st.booleans()):
            if hasattr(getattr(made, field.name), "extend"):
                getattr(made, field.name).append(draw(st.sampled_from(facts)))
            else:
                setattr(made, field.name, draw(st.sampled_from(facts)))


@pytest.mark.parametrize("method", wire.METHODS, ids=lambda method: method.name)
@settings(settings.get_profile("fuzz-calls"))
@given(data=st.data())
def test_a_request_of_any_bytes_is_answered_and_the_neighbour_is_served(
    server, channel, neighbour, facts, method, data, tried
):
    kind = GetMessageClass(method.input_type)

    def one():
        if data.draw(st.booleans()):
            return data.draw(wire.looks_like(kind))
        made = data.draw(wire.message(kind))
        fill(made, facts, data.draw)
        return made.SerializeToString()

    requests = [one() for _ in range(data.draw(st.integers(0, 4)) if method.client_streaming else 1)]
    code, answer = raw(channel, method, requests)
    tried("requests of any bytes", len(requests))
    assert code in BLAMES_THE_CALLER, (code, answer, requests)
    neighbour()
    assert server.process.poll() is None


@pytest.mark.parametrize("method", wire.METHODS, ids=lambda method: method.name)
def test_bytes_that_are_no_message_are_invalid_arguments(server, channel, method):
    code, answer = raw(channel, method, [b"\xff" * 7])
    if method.input_type.fields:
        assert code is CODE.INVALID_ARGUMENT
        assert "a message cannot be read" in answer
    else:  # The message has no field to fill.
        assert code is CODE.OK
    assert not [line for line in server.lines if "Exception deserializing" in line]


def test_a_stream_ends_at_an_unreadable_message_after_answering_the_earlier_ones(channel, point):
    spec = curvature_pb2.ProductSpec(point_id=point._id, operator=curvature_pb2.OPERATOR_HESSIAN, k=1)
    for pipelined in (False, True):
        spec.pipelined = pipelined
        good = curvature_pb2.StreamProductsRequest(tag=3, spec=spec, chunk=np.ones(50).tobytes()).SerializeToString()
        answers = channel.stream_stream("/hvpd.v1.CurvatureService/StreamProducts")(iter([good, b"\xff"]), timeout=60)
        answer = curvature_pb2.StreamProductsResponse.FromString(next(answers))
        assert np.array_equal(np.frombuffer(answer.chunk), np.arange(50.0) ** 2)
        with pytest.raises(grpc.RpcError) as error:
            next(answers)
        assert error.value.code() is CODE.INVALID_ARGUMENT


@pytest.mark.parametrize("announced", [1 << 40, (1 << 63) - 1, -1, -(1 << 63)])
def test_an_announced_blob_takes_no_memory_before_it_comes(server, channel, announced):
    """The upload of a blob of a tebibyte is announced, and nothing comes."""
    before = server.metric("process_resident_memory_bytes")
    first = blob_pb2.UploadBlobRequest(digest="0" * 64, size_bytes=announced, chunk=b"x").SerializeToString()
    method = next(method for method in wire.METHODS if method.name == "UploadBlob")
    for _ in range(20):
        code, _ = raw(channel, method, [first])
        assert code in (CODE.INVALID_ARGUMENT, CODE.RESOURCE_EXHAUSTED)
    assert server.metric("process_resident_memory_bytes") - before < 32 << 20
    assert list((server.store / "incoming").iterdir()) == []


def test_a_thousand_digests_that_are_none(channel):
    request = blob_pb2.FindMissingBlobsRequest(digests=["../" * index for index in range(1000)])
    method = next(method for method in wire.METHODS if method.name == "FindMissingBlobs")
    code, (answer,) = raw(channel, method, [request.SerializeToString()])
    assert code is CODE.OK
    assert list(blob_pb2.FindMissingBlobsResponse.FromString(answer).missing_digests) == list(request.digests)


@pytest.mark.parametrize("name", ["a" * 3_000_000, "\u4e00" * 100_000, "../" * 10_000, "0" * 65_000])
@pytest.mark.parametrize("method", ["GetObjective", "GetPlan", "FindMissingBlobs", "UploadBlob"])
def test_a_name_of_any_length_is_refused_in_few_words(channel, method, name):
    """The answer has to fit into HTTP/2's limit. Otherwise the caller gets an error
    about the limit instead.
    """
    method = next(each for each in wire.METHODS if each.name == method)
    kind = GetMessageClass(method.input_type)
    field = kind.DESCRIPTOR.fields[0].name
    request = kind(**{field: [name] if field == "digests" else name})
    code, answer = raw(channel, method, [request.SerializeToString()])
    assert code in (CODE.OK, CODE.NOT_FOUND, CODE.INVALID_ARGUMENT)
    assert code is CODE.OK or len(answer) < 1000


@pytest.mark.parametrize("page_token", ["-1", "1.5", "١٢", "²", "9" * 4000, "\0"])
def test_pages_that_are_none(channel, page_token):
    method = next(method for method in wire.METHODS if method.name == "ListObjectives")
    request = objective_pb2.ListObjectivesRequest(page_token=page_token)
    code, _ = raw(channel, method, [request.SerializeToString()])
    assert code in (CODE.OK, CODE.INVALID_ARGUMENT)


# Inputs that were found this way


def refused(call, *arguments, **settings):
    with pytest.raises(grpc.RpcError) as error:
        call(*arguments, **settings)
    return error.value.code()


def test_numbers_of_5000_digits_are_none(channel):
    objectives = objective_pb2_grpc.ObjectiveServiceStub(channel)
    many = "9" * 5000
    page = objective_pb2.ListObjectivesRequest(page_token=many)
    assert refused(objectives.ListObjectives, page) == CODE.INVALID_ARGUMENT
    metadata = [("hvpd-protocol", many)]
    everything = objective_pb2.ListObjectivesRequest()
    assert refused(objectives.ListObjectives, everything, metadata=metadata) == CODE.FAILED_PRECONDITION


def test_a_refusal_whose_words_are_the_callers_reaches_it(channel, client):
    objective = client.register(lambda x, d: jnp.sum(x * d), np.ones(3), np.ones(3))
    data = [{"dtype": "x" * 100_000, "shape": [1] * 50_000}]
    spec = curvature_pb2.PointSpec(objective_digest=objective.digest, data=data)
    points = curvature_pb2_grpc.CurvatureServiceStub(channel).CreatePoint
    request = curvature_pb2.CreatePointRequest(spec=spec)
    assert refused(lambda: list(points(iter([request])))) == CODE.INVALID_ARGUMENT
