"""Abused connections: junk, silence, slowness, floods, bombs. The server serves others
meanwhile, and leaks nothing.
"""

import contextlib
import random
import socket
import struct
import threading
from pathlib import Path

import grpc
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hvpd
from hvpd.v1 import blob_pb2, blob_pb2_grpc, curvature_pb2, curvature_pb2_grpc, objective_pb2
from tests.support.waiting import until

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
X = np.arange(1.0, 31)


def frame(kind, flags, stream, payload=b"", length=None):
    """Return a frame (RFC 9113, section 4.1)."""
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name, value):
    """Return a literal header without Huffman codes (RFC 7541, section 6.2.2)."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def headers(path, *more):
    said = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x"), (b"te", b"trailers")]
    return b"".join(literal(*each) for each in [*said, (b"content-type", b"application/grpc"), *more])


SETTINGS = frame(4, 0, 0)
PRODUCTS = b"/hvpd.v1.CurvatureService/StreamProducts"


@pytest.fixture(scope="module")
def server(serve_module):
    """Start a server for this module alone, because its open descriptors are
    counted, and its memory is measured.
    """
    return serve_module(forked=False)


@pytest.fixture(scope="module")
def neighbour(server):
    """Run a neighbour that solves all the while, on x -> sum(x^4) / 12, whose Hessian
    is diag(x^2).
    """
    with hvpd.connect(server.address, timeout=60) as client:
        H = client.register(lambda x: jnp.sum(x**4) / 12, X).at(X).hessian()

        def check():
            assert np.array_equal(H @ np.ones(30), X**2)

        check()
        yield check


def descriptors(server):
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def memory(server):
    """Return the resident memory in MiB."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) >> 10


@contextlib.contextmanager
def raw(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as opened:
        yield opened


def drain(opened, seconds=0.05):
    """Return all bytes until the other side is silent or gone."""
    opened.settimeout(seconds)
    got = b""
    with contextlib.suppress(OSError):
        while piece := opened.recv(1 << 16):
            got += piece
    return got


FRAMES = st.builds(
    frame,
    st.integers(0, 12),
    st.integers(0, 255),
    st.sampled_from([0, 1, 1, 3, 2, (1 << 31) - 1, 1 << 31]),
    st.one_of(
        st.binary(max_size=40), st.just(headers(PRODUCTS)), st.just(b"\0\0\0\0\7junk..."), st.just(b"\1" + b"\xff" * 4)
    ),
    st.sampled_from([None, None, None, None, 0, 5, 1 << 14, (1 << 24) - 1]),
)
SAID = st.one_of(
    st.binary(max_size=200),
    st.lists(FRAMES, max_size=8).map(lambda frames: PREFACE + SETTINGS + b"".join(frames)),
    st.binary(max_size=60).map(lambda junk: PREFACE + junk),
    st.sampled_from([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", PREFACE[:10], PREFACE * 3]),
)


@settings(settings.get_profile("fuzz-calls"))
@given(said=SAID, half_closes=st.booleans())
@example(
    said=PREFACE + SETTINGS + frame(1, 4, 1, headers(PRODUCTS)) + frame(0, 0, 1, b"\0\xff\xff\xff\xff"),
    half_closes=False,
)
@example(said=PREFACE + SETTINGS + frame(1, 4, 1, headers(b"/")) + frame(9, 0, 1, b"x") * 3, half_closes=True)
def test_bytes_of_any_kind_on_a_socket(server, neighbour, tried, said, half_closes):
    tried("connections of any bytes")
    before = descriptors(server)
    with raw(server) as opened, contextlib.suppress(OSError):
        opened.sendall(said)
        if half_closes:
            opened.shutdown(socket.SHUT_WR)
        drain(opened, 0.01)
    neighbour()
    assert descriptors(server) < before + 100
    assert server.process.poll() is None


def test_a_connection_closed_by_junk_leaves_nothing(server, neighbour, tried):
    neighbour()
    before = descriptors(server)
    for index in range(300):
        with raw(server) as opened:
            opened.sendall(PREFACE + random.Random(index).randbytes(index))
    tried("connections of any bytes", 300)
    until(lambda: descriptors(server) <= before)
    neighbour()


def test_a_thousand_connections_that_say_nothing(server, neighbour, tried):
    """Half of them do not even say that they speak HTTP/2."""
    before, held = descriptors(server), memory(server)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(raw(server)) for _ in range(1000)]
        for each in opened[::2]:
            each.sendall(PREFACE + SETTINGS)
        tried("connections that say nothing", len(opened))
        until(lambda: descriptors(server) > 1000)  # Some of the earlier connections may still be closing.
        for _ in range(20):
            neighbour()
        with hvpd.connect(server.address) as newcomer:
            newcomer.objectives()
        assert memory(server) - held < 200
    until(lambda: descriptors(server) <= before)
    neighbour()


def test_a_thousand_streams_of_one_connection_that_say_nothing(server, neighbour, tried):
    """A stream without a message takes a thread. Beyond --max-calls others wait, and
    are served when these are gone.
    """
    with raw(server) as opened:
        opened.sendall(PREFACE + SETTINGS)
        for index in range(1000):
            opened.sendall(frame(1, 4, 2 * index + 1, headers(PRODUCTS)))
        tried("streams that say nothing", 1000)
        for _ in range(20):
            neighbour()
        assert server.process.poll() is None
    until(lambda: server.metric("hvpd_open_calls") <= 4)
    neighbour()


def test_callers_that_write_a_byte_at_a_time_delay_no_others(server, neighbour, tried):
    """A hundred connections are each in the middle of a message, of an upload, or of
    the preface.
    """
    body = blob_pb2.UploadBlobRequest(digest="0" * 64, size_bytes=1000, chunk=bytes(1000)).SerializeToString()
    said = (
        PREFACE
        + SETTINGS
        + frame(1, 4, 1, headers(b"/hvpd.v1.BlobService/UploadBlob"))
        + frame(0, 0, 1, b"\0" + len(body).to_bytes(4, "big") + body)
    )
    before = descriptors(server)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(raw(server)) for _ in range(100)]
        tried("connections that write byte by byte", len(opened))
        for index, each in enumerate(opened):
            each.sendall(said[: len(said) * index // 100])
        for position in range(30):
            for index, each in enumerate(opened):
                at = len(said) * index // 100 + position
                each.sendall(said[at : at + 1])
            neighbour()
    until(lambda: descriptors(server) <= before)
    until(lambda: not list((server.store / "incoming").iterdir()))


def test_a_caller_that_never_reads_holds_up_only_itself(server, neighbour, tried):
    """Eight callers each send 160 MiB of products ahead, and read nothing. The server
    takes only the bytes that a stream may have under way from each: 64 MiB of vectors,
    and as much of answers. When they are gone there is room for the next eight.
    """
    held = memory(server)
    for _ in range(2):
        read_nothing(server, neighbour, tried, held)


def read_nothing(server, neighbour, tried, held):
    n, count = 100_000, 8
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(hvpd.connect(server.address))
        point = client.register(lambda x: jnp.sum(x**4) / 12, np.ones(n)).at(np.ones(n))
        point.hessian() @ np.ones((n, 1))
        before = descriptors(server)
        stack.callback(stop.set)
        spec = curvature_pb2.ProductSpec(
            point_id=point._id, operator=curvature_pb2.OPERATOR_HESSIAN, k=1, pipelined=True
        )
        sent = [0] * count

        def requests(index):
            for tag in range(200):
                sent[index] += 1
                yield curvature_pb2.StreamProductsRequest(tag=tag, spec=spec, chunk=np.ones(n).tobytes())
            stop.wait(120)

        calls = []
        for index in range(count):
            channel = stack.enter_context(
                grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
            )
            calls.append(curvature_pb2_grpc.CurvatureServiceStub(channel).StreamProducts(requests(index)))
        tried("streams whose answers are not read", len(calls))
        computed = -1.0
        while server.metric("hvpd_products_total") != computed:
            computed = server.metric("hvpd_products_total")
            for _ in range(50):
                neighbour()
            computed += 50
        assert max(sent) < 200
        assert memory(server) - held < 192 * count
        stop.set()
        for call in calls:
            call.cancel()
    until(lambda: descriptors(server) <= before)
    until(lambda: server.metric("hvpd_open_calls") <= 4 and not server.metric("hvpd_pending_vectors"))
    neighbour()


def varint(number):
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*digits, number])


@pytest.mark.parametrize("compression", list(grpc.Compression), ids=lambda compression: compression.name)
@pytest.mark.parametrize("size", [(4 << 20) - 100, (4 << 20) + 1, 100 << 20])
def test_the_limit_is_on_a_messages_unpacked_size(server, neighbour, tried, compression, size):
    """An unknown field is full of zeros: 100 MiB of them are 100 KiB on the wire."""
    tried("messages around 4 MiB and far beyond, packed and not")
    held = memory(server)
    options = [("grpc.max_send_message_length", -1)]
    request = (
        objective_pb2.GetObjectiveRequest(name="nobody").SerializeToString() + b"\x7a" + varint(size) + bytes(size)
    )
    with grpc.insecure_channel(server.address, options, compression=compression) as channel:
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary("/hvpd.v1.ObjectiveService/GetObjective")(request, timeout=60)
    fits = size < 4 << 20
    assert error.value.code() is (grpc.StatusCode.NOT_FOUND if fits else grpc.StatusCode.RESOURCE_EXHAUSTED)
    # An old grpcio unpacks a message before it checks the size.
    assert memory(server) - held < 32 or tuple(map(int, grpc.__version__.split(".")[:2])) < (1, 85)
    neighbour()


def test_messages_that_say_to_be_packed_and_are_not(server, neighbour, tried):
    for encoding in (b"gzip", b"deflate", b"identity", b"br", b"x" * 100):
        with raw(server) as opened:
            body = b"\1" + (100).to_bytes(4, "big") + random.Random(encoding).randbytes(100)
            opened.sendall(
                PREFACE
                + SETTINGS
                + frame(1, 4, 1, headers(b"/hvpd.v1.ObjectiveService/GetObjective", (b"grpc-encoding", encoding)))
                + frame(0, 1, 1, body)
            )
            got = b""
            while b"grpc-status" not in got:
                piece = opened.recv(1 << 16)
                assert piece, got
                got += piece
        tried("messages packed wrongly")
    neighbour()


def test_pings_settings_and_resets_without_end(server, neighbour, tried):
    """Streams that are reset as soon as they are opened (CVE-2023-44487), pings,
    settings: the server may close the connection.
    """
    with raw(server) as opened, contextlib.suppress(OSError):
        opened.sendall(PREFACE + SETTINGS)
        for index in range(2000):
            opened.sendall(
                frame(1, 4, 2 * index + 1, headers(PRODUCTS))
                + frame(3, 0, 2 * index + 1, struct.pack(">I", 8))
                + frame(6, 0, 0, bytes(8))
                + frame(4, 0, 0)
            )
        drain(opened)
    tried("streams that are reset at once", 2000)
    until(lambda: server.metric("hvpd_open_calls") <= 4)
    neighbour()


def test_uploads_that_go_nowhere_leave_nothing(server, neighbour, tried):
    before = descriptors(server)
    with grpc.insecure_channel(server.address) as channel:
        blobs = blob_pb2_grpc.BlobServiceStub(channel)
        stop = threading.Event()

        def begun(index):
            yield blob_pb2.UploadBlobRequest(digest=f"{index:064x}", size_bytes=1 << 20, chunk=bytes(1000))
            stop.wait(120)

        calls = [blobs.UploadBlob.future(begun(index)) for index in range(100)]
        tried("uploads that are broken off", len(calls))
        until(lambda: len(list((server.store / "incoming").iterdir())) == 100)
        neighbour()
        stop.set()
        for call in calls:
            call.cancel()
        until(lambda: not list((server.store / "incoming").iterdir()))
    until(lambda: descriptors(server) <= before)
