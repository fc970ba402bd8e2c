"""Frames are read and written as by protobuf, without its copies of the chunk."""

import os

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from hvpd._wire import frames
from hvpd.v1 import blob_pb2, curvature_pb2

WITH_CHUNK = [
    blob_pb2.UploadBlobRequest,
    curvature_pb2.CreatePointRequest,
    curvature_pb2.CreatePointResponse,
    curvature_pb2.StreamProductsRequest,
    curvature_pb2.StreamProductsResponse,
    curvature_pb2.ComputeFactorsResponse,
]

requests = st.builds(
    curvature_pb2.StreamProductsRequest,
    tag=st.integers(0, 2**64 - 1),
    spec=st.none()
    | st.builds(curvature_pb2.ProductSpec, point_id=st.text(max_size=200), k=st.integers(-(2**31), 2**31 - 1)),
)


@given(requests, st.binary(max_size=300))
def test_a_frame_is_the_message_with_its_chunk(message, chunk):
    whole = curvature_pb2.StreamProductsRequest(chunk=chunk)
    whole.MergeFrom(message)
    codec = frames.codec(curvature_pb2.StreamProductsRequest)
    assert codec.write(frames.Frame(message, memoryview(chunk))) == whole.SerializeToString()
    read = codec.read(whole.SerializeToString())
    assert read.message == message
    assert bytes(read.chunk) == chunk


@pytest.mark.parametrize("kind", WITH_CHUNK)
@pytest.mark.parametrize("size", [1, 127, 128, 16_384, 1 << 20])
def test_every_message_with_a_chunk_travels_as_a_frame(kind, size):
    chunk = os.urandom(size)
    codec = frames.codec(kind)
    data = codec.write(frames.Frame(kind(), chunk))
    assert data == kind(chunk=chunk).SerializeToString()
    assert codec.read(data).chunk == chunk


def test_a_read_chunk_is_a_view_of_the_received_bytes():
    data = curvature_pb2.StreamProductsRequest(tag=300, chunk=b"x" * 1000).SerializeToString()
    chunk = frames.codec(curvature_pb2.StreamProductsRequest).read(data).chunk
    assert np.shares_memory(np.frombuffer(chunk, np.uint8), np.frombuffer(data, np.uint8))


@given(st.binary(max_size=60))
def test_bytes_from_anywhere_are_read_as_protobuf_reads_them_or_refused(data):
    codec = frames.codec(curvature_pb2.StreamProductsResponse)
    try:
        expected = curvature_pb2.StreamProductsResponse.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            codec.read(data)
        return
    message, chunk = codec.read(data)
    assert bytes(chunk or message.chunk) == expected.chunk
    message.chunk = expected.chunk
    assert message == expected


def test_of_several_chunks_the_last_counts():
    data = b"".join(curvature_pb2.StreamProductsRequest(chunk=chunk).SerializeToString() for chunk in (b"a", b"bc"))
    assert bytes(frames.codec(curvature_pb2.StreamProductsRequest).read(data).chunk) == b"bc"


def test_unknown_fields_are_skipped():
    after = curvature_pb2.StreamProductsRequest(tag=1, chunk=b"abc").SerializeToString()
    for unknown in (b"\xa2\x06\x02hi", b"\x7d\x01\x02\x03\x04", b"\x79" + bytes(8)):
        for data in (unknown + after, after + unknown):
            message, chunk = frames.codec(curvature_pb2.StreamProductsRequest).read(data)
            assert (message.tag, bytes(chunk)) == (1, b"abc")


@pytest.mark.parametrize("data", [b"\x1a", b"\x1a\x05abc", b"\x1a" + b"\xff" * 11, b"\x08" + b"\x80" * 3])
def test_truncated_bytes_are_refused(data):
    with pytest.raises(DecodeError):
        frames.codec(curvature_pb2.StreamProductsRequest).read(data)


def test_messages_without_a_chunk_are_protobufs_own():
    codec = frames.codec(curvature_pb2.ComputeFactorsRequest)
    message = curvature_pb2.ComputeFactorsRequest(point_id="p", seed=7)
    assert codec.read(codec.write(message)) == message
