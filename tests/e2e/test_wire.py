"""The wire as a foreign client sees it: failing uploads, streams, versions, health,
reflection, details.
"""

import concurrent.futures
import contextlib
import hashlib
import queue

import grpc
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

import hvpd
from hvpd._transport.exchange import Asked
from hvpd.v1 import (
    blob_pb2,
    blob_pb2_grpc,
    curvature_pb2,
    curvature_pb2_grpc,
    objective_pb2,
    objective_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from tests.support.waiting import until

N = 300_000


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.address) as opened:
        yield opened


@pytest.fixture(scope="module")
def blobs(channel):
    return blob_pb2_grpc.BlobServiceStub(channel)


@pytest.fixture(scope="module")
def curvature(channel):
    return curvature_pb2_grpc.CurvatureServiceStub(channel)


@pytest.fixture(scope="module")
def point(client):
    """Yield a point of x -> sum(x^4) / 12 at x = 0, 1, ..., whose Hessian is
    diag(x^2).
    """
    x = np.arange(N, dtype=float) % 100
    return client.register(lambda x: jnp.sum(x**4) / 12, x, name="quartic").at(x)


def reason(error):
    """Return ErrorInfo.reason of a failed call."""
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error.value)
    assert any(detail.Unpack(info) for detail in status.details)
    assert info.domain == "hvpd"
    return info.reason


def upload(content, *, digest=None, size=None, offsets=None, cut=None, step=1000):
    """Return the messages of an upload, right or wrong."""
    digest = digest or hashlib.sha256(content).hexdigest()
    pieces = [content[start : start + step] for start in range(0, len(content), step)]
    offsets = offsets or [step * index for index in range(len(pieces))]
    for index, (offset, piece) in enumerate(list(zip(offsets, pieces, strict=True))[:cut]):
        first = index == 0
        yield blob_pb2.UploadBlobRequest(
            digest=digest if first else "",
            size_bytes=(len(content) if size is None else size) if first else 0,
            offset_bytes=offset,
            chunk=piece,
        )


def stored(server):
    """Return the store's files without compiled programs, which come whenever a compile
    ends.
    """
    cache = server.store / "cache"
    return sorted(path for path in server.store.rglob("*") if path.is_file() and cache not in path.parents)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"digest": hashlib.sha256(b"other").hexdigest()}, "DIGEST_MISMATCH"),
        ({"offsets": [0, 2000, 1000]}, "UPLOAD_OUT_OF_ORDER"),
        ({"cut": 2}, "UPLOAD_SIZE"),
        ({"size": 10}, "UPLOAD_SIZE"),
        ({"size": -1}, "INVALID_SIZE"),
        ({"digest": "../../../etc/passwd"}, "INVALID_DIGEST"),
        ({"digest": "A" * 64}, "INVALID_DIGEST"),
    ],
)
def test_a_bad_upload_is_refused_and_the_next_try_works(server, blobs, wrong, expected):
    content = np.random.default_rng(len(expected)).bytes(2500) + repr(wrong).encode()
    content = content[:3000]
    digest = hashlib.sha256(content).hexdigest()
    before = stored(server)
    with pytest.raises(grpc.RpcError) as error:
        blobs.UploadBlob(upload(content, **wrong))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason(error) == expected
    assert stored(server) == before
    missing = blob_pb2.FindMissingBlobsRequest(digests=[digest])
    assert list(blobs.FindMissingBlobs(missing).missing_digests) == [digest]
    assert blobs.UploadBlob(upload(content)).size_bytes == len(content)
    assert list(blobs.FindMissingBlobs(missing).missing_digests) == []


def test_an_upload_without_messages_and_one_announced_larger_than_the_disk(blobs):
    with pytest.raises(grpc.RpcError) as error:
        blobs.UploadBlob(iter(()))
    assert reason(error) == "UPLOAD_SIZE"
    with pytest.raises(grpc.RpcError) as error:
        blobs.UploadBlob(upload(b"small", size=1 << 60))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason(error) == "DISK_FULL"


def test_a_blob_that_is_no_bundle_is_no_objective(channel, blobs):
    content = b"\xff not a bundle"
    digest = hashlib.sha256(content).hexdigest()
    blobs.UploadBlob(upload(content))
    objectives = objective_pb2_grpc.ObjectiveServiceStub(channel)
    with pytest.raises(grpc.RpcError) as error:
        objectives.CreateObjective(objective_pb2.CreateObjectiveRequest(digest=digest, name="not-a-bundle"))
    assert reason(error) == "BUNDLE_INVALID"
    with pytest.raises(grpc.RpcError) as error:
        objectives.GetObjective(objective_pb2.GetObjectiveRequest(name="not-a-bundle"))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


class Stream:
    """A product stream that a test feeds by hand."""

    def __init__(self, curvature):
        self.outgoing = queue.SimpleQueue()
        self.incoming = curvature.StreamProducts(iter(self.outgoing.get, None), timeout=120)

    def send(self, tag, chunk, *, spec=None):
        self.outgoing.put(curvature_pb2.StreamProductsRequest(tag=tag, spec=spec, chunk=chunk))

    def answer(self, answers):
        """Collect answers until one is complete; return its tag."""
        message = next(self.incoming)
        if message.HasField("error"):
            answers[message.tag] = message.error
            return message.tag
        assert len(message.chunk) <= 1 << 20
        collected = answers.setdefault(message.tag, bytearray())
        assert message.HasField("info") == (not collected)
        collected += message.chunk
        return message.tag


@pytest.fixture
def stream(curvature):
    opened = Stream(curvature)
    yield opened
    opened.outgoing.put(None)
    opened.incoming.cancel()


def product_of(point, k=1, **changes):
    fields = {"point_id": point._id, "operator": curvature_pb2.OPERATOR_HESSIAN, "k": k} | changes
    return curvature_pb2.ProductSpec(**fields)


def test_products_are_pipelined_and_their_chunks_interleave(point, stream):
    """Two products of 2.3 MiB each arrive chunk by chunk in turn. Both are right."""
    V = np.random.default_rng(0).normal(size=(2, N))
    raw = [v.tobytes() for v in V]
    step = 1 << 20
    for start in range(0, N * 8, step):
        for tag in (0, 1):
            stream.send(tag + 10, raw[tag][start : start + step], spec=None if start else product_of(point))
    answers = {}
    while sum(map(len, answers.values())) < 2 * N * 8:
        stream.answer(answers)
    for tag, v in enumerate(V):
        assert np.allclose(np.frombuffer(answers[tag + 10]), point.x**2 * v, rtol=1e-12)


@pytest.mark.parametrize(
    ("spec", "chunk", "expected"),
    [
        ({"point_id": "0" * 64}, 8, "POINT_NOT_RESIDENT"),
        ({"operator": 0}, 8, "UNKNOWN_OPERATOR"),
        ({"operator": 99}, 8, "UNKNOWN_OPERATOR"),
        ({"k": 0}, 8, "BLOCK_WIDTH"),
        ({"k": 65}, 8, "BLOCK_WIDTH"),
        ({"k": -1}, 8, "BLOCK_WIDTH"),
        ({"priority": 101}, 8, "PRIORITY"),
        ({"priority": -101}, 8, "PRIORITY"),
        ({}, N * 8 + 8, "SIZE_MISMATCH"),
    ],
)
def test_a_bad_product_is_an_answer_and_the_stream_goes_on(point, stream, spec, chunk, expected):
    stream.send(1, b"\0" * chunk, spec=product_of(point, **spec))
    stream.send(1, b"late")  # This chunk was on its way when the product was refused.
    stream.send(2, np.ones(N).tobytes(), spec=product_of(point))
    answers = {}
    while not isinstance(answers.get(2), bytearray) or len(answers[2]) < N * 8:
        stream.answer(answers)
    info = error_details_pb2.ErrorInfo()
    answers[1].details[0].Unpack(info)
    assert info.reason == expected
    assert np.allclose(np.frombuffer(answers[2]), point.x**2)


def test_a_tag_cannot_be_used_twice_at_once(point, stream):
    stream.send(5, b"\0" * 8, spec=product_of(point))
    stream.send(5, b"\0" * 8, spec=product_of(point))
    answers = {}
    assert stream.answer(answers) == 5
    info = error_details_pb2.ErrorInfo()
    answers[5].details[0].Unpack(info)
    assert info.reason == "INVALID_TAG"


def test_a_stream_cut_in_the_middle_of_a_vector_harms_no_others(point, curvature):
    cut = Stream(curvature)
    cut.send(1, b"\0" * 1000, spec=product_of(point))
    cut.incoming.cancel()
    cut.outgoing.put(None)
    assert np.allclose(point.hessian() @ np.ones(N), point.x**2)


def why(answer):
    """Return ErrorInfo.reason of an answer that is an error."""
    info = error_details_pb2.ErrorInfo()
    assert answer.details[0].Unpack(info)
    return info.reason


@pytest.mark.parametrize("first", [{}, {"chunk": b"12345678"}], ids=["empty", "a chunk"])
def test_a_message_of_no_product_is_answered_and_the_stream_goes_on(point, stream, first):
    stream.send(3, **{"chunk": b"", **first})
    answers = {}
    assert stream.answer(answers) == 3
    assert why(answers[3]) == "INVALID_TAG"
    stream.send(4, np.ones(N).tobytes(), spec=product_of(point))
    while len(answers.get(4, b"")) < N * 8:
        stream.answer(answers)


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_stream_that_ends_in_the_middle_of_a_vector_says_so(point, stream, pipelined):
    if pipelined:
        stream.send(1, np.ones(N).tobytes(), spec=product_of(point, pipelined=True))
    stream.send(7, b"\0" * 80, spec=product_of(point))
    stream.outgoing.put(None)
    answers = {}
    while 7 not in answers or (pipelined and len(answers.get(1, b"")) < N * 8):
        stream.answer(answers)
    assert why(answers[7]) == "SIZE_MISMATCH"
    assert "ended early: got 80 bytes" in answers[7].message
    with pytest.raises(StopIteration):
        next(stream.incoming)


@pytest.mark.parametrize("timeout", [None, 0.02])
def test_a_caller_that_leaves_in_the_middle_of_a_vector_is_no_failure(serve, timeout):
    """The caller cancels, or its time is over."""
    server = serve("--metrics-port", "0")
    with hvpd.connect(server.address) as client, grpc.insecure_channel(server.address) as channel:
        point = client.register(lambda x: jnp.sum(x**4) / 12, np.zeros(N)).at(np.ones(N))
        first = curvature_pb2.StreamProductsRequest(tag=1, spec=product_of(point), chunk=b"\0" * 80)
        for _ in range(20):
            outgoing = queue.SimpleQueue()
            outgoing.put(first)
            products = curvature_pb2_grpc.CurvatureServiceStub(channel).StreamProducts(
                iter(outgoing.get, None), timeout=timeout
            )
            if timeout is None:
                until(lambda: server.metric("hvpd_open_streams"))
                products.cancel()
            with pytest.raises(grpc.RpcError):
                next(products)
            outgoing.put(None)
        until(lambda: not server.metric("hvpd_open_streams"))
        assert server.metric("hvpd_failures_total") == 0


@pytest.fixture(scope="module")
def small(client):
    x = np.arange(50.0)
    return client.register(lambda x: jnp.sum(x**4) / 12, x, name="quartic/small").at(x)


def test_products_that_are_sent_ahead_share_launches_and_go_by_priority(client, curvature, small, stream):
    """The products wait behind one that holds the device. Before, a stream had at most
    one product in the queue.
    """
    slow = client.register(
        lambda x: jnp.sum(x**2) * jax.lax.fori_loop(0, 40_000_000, lambda i, c: jnp.cos(c), 1.0),
        np.ones(3),
        mode="reverse_over_reverse",
    ).at(np.ones(3))
    small.hessian() @ np.ones((50, 16))
    V = np.random.default_rng(0).normal(size=(40, 50))
    holder = Stream(curvature)
    holder.send(1, np.ones(3).tobytes(), spec=product_of(slow))
    answers, infos = {}, []
    for tag, v in enumerate(V):
        stream.send(tag, v.tobytes(), spec=product_of(small, pipelined=True))
    while len(answers) < len(V):
        message = next(stream.incoming)
        answers[message.tag] = message.chunk
        infos.append(message.info)
    for tag, v in enumerate(V):
        np.testing.assert_allclose(np.frombuffer(answers[tag]), small.x**2 * v, rtol=1e-12)
    assert max(info.batch_width for info in infos) > 1
    holder.answer({})
    holder.outgoing.put(None)


def test_a_tag_is_used_again_when_its_product_is_answered_and_not_before(client, curvature, small, stream):
    slow = client.register(
        lambda x: jnp.sum(x**2) * jax.lax.fori_loop(0, 3_000_000, lambda i, c: jnp.cos(c), 1.0),
        np.ones(4),
        mode="reverse_over_reverse",
    ).at(np.ones(4))
    v = np.ones(4).tobytes()
    for _ in range(2):
        stream.send(1, v, spec=product_of(slow, pipelined=True))
    refusal = next(stream.incoming)
    assert (refusal.tag, why(refusal.error)) == (1, "INVALID_TAG")
    for _ in range(2):
        answer = next(stream.incoming)
        assert (answer.tag, len(answer.chunk)) == (1, len(v))
        stream.send(1, v, spec=product_of(slow, pipelined=True))


def test_a_bad_product_among_those_that_are_sent_ahead_is_an_answer(small, stream):
    good = np.ones(50).tobytes()
    stream.send(1, good, spec=product_of(small, pipelined=True))
    stream.send(2, good[:-8] + b"\0" * 16, spec=product_of(small, pipelined=True))
    stream.send(2, b"late")
    stream.send(3, good, spec=product_of(small, k=0, pipelined=True))
    stream.send(4, good[:16], spec=product_of(small, pipelined=True))
    stream.send(5, good, spec=product_of(small, pipelined=True))
    stream.send(4, good[16:])
    answers = {}
    while len(answers) < 5:
        stream.answer(answers)
    assert (why(answers[2]), why(answers[3])) == ("SIZE_MISMATCH", "BLOCK_WIDTH")
    for tag in (1, 4, 5):
        np.testing.assert_allclose(np.frombuffer(answers[tag]), small.x**2, rtol=1e-12)


def test_a_caller_that_sends_ahead_without_reading_delays_only_itself(server, client, point, curvature):
    """The caller sends 400 MiB of products, and reads none at first."""
    greedy = Stream(curvature)
    raw = np.ones(N).tobytes()
    for tag in range(180):
        for start in range(0, len(raw), 1 << 20):
            spec = None if start else product_of(point, pipelined=True)
            greedy.send(tag, raw[start : start + (1 << 20)], spec=spec)
    greedy.outgoing.put(None)
    assert np.allclose(point.hessian() @ np.ones(N), point.x**2)
    answers = {}
    while len(answers) < 180 or min(map(len, answers.values())) < len(raw):
        greedy.answer(answers)
    assert all(np.array_equal(np.frombuffer(answer), point.x**2) for answer in answers.values())


def test_a_client_that_leaves_with_products_sent_ahead_leaves_nothing(server, client, small, curvature):
    before = server.metric("hvpd_open_calls")
    leaving = Stream(curvature)
    for tag in range(200):
        leaving.send(tag, np.ones(50).tobytes(), spec=product_of(small, pipelined=True))
    next(leaving.incoming)
    leaving.incoming.cancel()
    leaving.outgoing.put(None)
    until(lambda: server.metric("hvpd_open_calls") <= before and not server.metric("hvpd_pending_vectors"))
    assert np.allclose(small.hessian() @ np.ones(50), small.x**2)


def test_a_block_wider_than_the_servers_limit_is_products_that_are_sent_ahead(small):
    V = np.random.default_rng(0).normal(size=(50, 150))
    np.testing.assert_allclose(small.hessian() @ V, (small.x**2)[:, None] * V, rtol=1e-12)


def test_wide_blocks_of_several_callers_get_through_a_narrow_queue_and_nothing_is_computed_twice(serve):
    """Each caller sends more products ahead than the queue has room for."""
    server, x = serve("--max-pending", "8", "--max-block-width", "8"), np.arange(1.0, 51.0)
    V = np.random.default_rng(0).normal(size=(50, 200))
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(3) as pool:
        clients = [stack.enter_context(hvpd.connect(server.address)) for _ in range(3)]
        clients[0].register(lambda x: jnp.sum(x**4) / 12, x, name="quartic")

        def multiply(client):
            H = client.objective("quartic").at(x).hessian()
            before = client.statistics()
            found = H @ V
            return found, client.statistics() - before

        for found, statistics in pool.map(multiply, clients):
            np.testing.assert_allclose(found, (x**2)[:, None] * V, rtol=1e-12)
            assert (statistics.products, statistics.vectors) == (25, 200)


def test_the_unary_product(client, curvature):
    x = np.arange(4.0)
    point = client.register(lambda x: jnp.sum(x**4) / 12, x).at(x)
    reply = curvature.ComputeProduct(
        curvature_pb2.ComputeProductRequest(spec=product_of(point, k=2), vectors=np.ones((2, 4)).tobytes())
    )
    assert np.array_equal(np.frombuffer(reply.vectors).reshape(2, 4), [x**2, x**2])
    assert reply.info.batch_width >= 2
    assert reply.info.compute_duration_ns > 0
    for wrong in (b"", b"\0" * 7, b"\0" * 72):
        with pytest.raises(grpc.RpcError) as error:
            curvature.ComputeProduct(curvature_pb2.ComputeProductRequest(spec=product_of(point, k=2), vectors=wrong))
        assert reason(error) == "SIZE_MISMATCH"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "SPEC_MISSING"),
        ([{"chunk": b"\0" * 8}], "SPEC_MISSING"),
        ([{"inline_x": b"\0" * 7}], "SIZE_MISMATCH"),
        ([{"inline_x": b"\0" * 32}], "DIGEST_MISMATCH"),
        ([{}, {"chunk": b"\0" * 33}], "SIZE_MISMATCH"),
        ([{}, {"chunk": b"\0" * 31}], "SIZE_MISMATCH"),
        ([{"spec": {"objective_digest": "0" * 64}}], "OBJECTIVE_NOT_FOUND"),
        ([{"spec": {"objective_digest": "../x"}}], "OBJECTIVE_NOT_FOUND"),
        ([{"spec": {"default_data": False, "data": [{"dtype": "float64", "digest": "0" * 64}]}}], "DATA_MISMATCH"),
    ],
)
def test_a_bad_point_is_refused(client, curvature, messages, expected):
    x = np.arange(4.0)
    objective = client.register(lambda x: jnp.sum(x**4) / 12, x)
    good = {"objective_digest": objective.digest, "default_data": True, "x_digest": "0" * 64}
    requests = []
    for message in messages:
        spec = {} if "chunk" in message else {"spec": good | message.get("spec", {})}
        requests.append(curvature_pb2.CreatePointRequest(**(message | spec)))
    with pytest.raises(grpc.RpcError) as error:
        list(curvature.CreatePoint(iter(requests), timeout=60))
    assert reason(error) == expected


def test_a_message_larger_than_the_limit_is_refused_by_the_transport(blobs):
    with pytest.raises(grpc.RpcError) as error:
        blobs.UploadBlob(upload(b"\0" * (5 << 20), step=5 << 20))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("said", ["0", "999", "x"])
def test_a_client_of_another_protocol_is_told_both_versions(channel, said):
    metadata = (("hvpd-protocol", said), ("hvpd-version", "9.9.9"))
    objectives = objective_pb2_grpc.ObjectiveServiceStub(channel)
    with pytest.raises(grpc.RpcError) as error:
        objectives.ListObjectives(objective_pb2.ListObjectivesRequest(), metadata=metadata)
    assert reason(error) == "PROTOCOL_MISMATCH"
    assert "hvpd 9.9.9" in error.value.details()
    assert hvpd.__version__ in error.value.details()
    server = server_pb2_grpc.ServerServiceStub(channel).GetServer(server_pb2.GetServerRequest(), metadata=metadata)
    assert server.version == hvpd.__version__


@contextlib.contextmanager
def serving(*services):
    """Run a gRPC server that is not hvpd, or is another version of it."""
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(2))
    for add, servicer in services:
        add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("oldest", [0, 7])
def test_a_server_of_another_protocol_is_refused_by_the_client(oldest):
    class Other(server_pb2_grpc.ServerServiceServicer):
        def GetServer(self, request, context):
            return server_pb2.GetServerResponse(version="0.0.7", min_protocol=oldest, max_protocol=oldest)

    with serving((server_pb2_grpc.add_ServerServiceServicer_to_server, Other())) as address:
        with pytest.raises(hvpd.IncompatibleError, match=rf"{address}.*hvpd 0\.0\.7.*install the same version"):
            hvpd.connect(address)


def test_all_products_of_a_client_have_its_priority():
    asked = []

    class Echo(curvature_pb2_grpc.CurvatureServiceServicer):
        def StreamProducts(self, requests, context):
            for message in requests:
                asked.append((message.spec.k, message.spec.priority))
                yield curvature_pb2.StreamProductsResponse(
                    tag=message.tag, info=curvature_pb2.ProductInfo(), chunk=message.chunk
                )

    class Facts(server_pb2_grpc.ServerServiceServicer):
        def GetServer(self, request, context):
            return server_pb2.GetServerResponse(min_protocol=1, max_protocol=1, max_block_width=2)

    services = [
        (curvature_pb2_grpc.add_CurvatureServiceServicer_to_server, Echo()),
        (server_pb2_grpc.add_ServerServiceServicer_to_server, Facts()),
    ]
    V = np.arange(6.0).reshape(3, 2)
    with serving(*services) as address, hvpd.connect(address, priority=-7) as client:
        products = client._transport.multiply(Asked("p"), V, restore=lambda: None)
    np.testing.assert_array_equal(products, V)
    assert asked == [(2, -7), (1, -7)]


def test_a_grpc_server_that_is_not_hvpd():
    with serving() as address, pytest.raises(hvpd.IncompatibleError, match="no hvpd server, or older"):
        hvpd.connect(address)


def test_health_and_reflection(channel):
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "hvpd.v1.CurvatureService"):
        reply = health.Check(health_pb2.HealthCheckRequest(service=name))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {f"hvpd.v1.{name}Service" for name in ("Blob", "Objective", "Curvature", "Server")} <= set(services)


def test_listing_in_pages(client, channel):
    for index in range(3):
        client.register(lambda x, i=index: jnp.sum(x) * i, np.ones(2), name=f"page/{index}")
    objectives = objective_pb2_grpc.ObjectiveServiceStub(channel)
    names, token = [], ""
    while True:
        page = objectives.ListObjectives(objective_pb2.ListObjectivesRequest(page_size=1, page_token=token))
        names += [objective.name for objective in page.objectives]
        token = page.next_page_token
        if not token:
            break
    assert names == [listing.name for listing in client.objectives()]
    assert [name for name in names if name.startswith("page/")] == ["page/0", "page/1", "page/2"]
    for request, says in [
        ({"page_token": "x"}, "page_token must be .* got 'x'"),
        ({"page_token": "1" * 50}, r"page_token must be .* got '1{40}'\.\.\. \(50 characters\)"),
        ({"page_size": -1}, "page_size must be from 0 to 100, .* got -1"),
    ]:
        with pytest.raises(grpc.RpcError, match=says) as error:
            objectives.ListObjectives(objective_pb2.ListObjectivesRequest(**request))
        assert reason(error) == "INVALID_PAGE"


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({"pin_seconds": -5}, "PIN_SECONDS", "pin_seconds must be from 0 to 604800, got -5"),
        ({"pin_seconds": 604_801}, "PIN_SECONDS", "pin_seconds must be from 0 to 604800, got 604801"),
        *(
            ({"move": curvature_pb2.Move(alpha=float(alpha))}, "MOVE", f"alpha must be a finite number, got {alpha}")
            for alpha in ("nan", "inf", "-inf")
        ),
    ],
)
def test_a_number_of_a_point_that_is_out_of_range_is_refused(curvature, point, fields, code, says):
    request = curvature_pb2.CreatePointRequest(spec=point._spec, **fields)
    with pytest.raises(grpc.RpcError, match=says) as error:
        list(curvature.CreatePoint(iter([request])))
    assert reason(error) == code


@pytest.mark.parametrize(
    ("operator", "says"),
    [(0, "operator is not set: set ProductSpec.operator"), (77, "has the operators 1 to 5, got 77: upgrade")],
)
def test_an_operator_that_is_unset_or_unknown_is_refused(curvature, point, operator, says):
    spec = curvature_pb2.ProductSpec(point_id=point._id, operator=operator, k=1)
    with pytest.raises(grpc.RpcError, match=says) as error:
        curvature.ComputeProduct(curvature_pb2.ComputeProductRequest(spec=spec))
    assert reason(error) == "UNKNOWN_OPERATOR"
