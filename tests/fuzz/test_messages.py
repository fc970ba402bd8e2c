"""hvpd's own reading of messages with chunks, against protobuf's: the same message and
chunk, or both refuse.
"""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hvpd
from hvpd._wire import frames
from hvpd.v1 import blob_pb2, curvature_pb2
from tests.fuzz import wire

KINDS = [
    blob_pb2.UploadBlobRequest,
    curvature_pb2.CreatePointRequest,
    curvature_pb2.CreatePointResponse,
    curvature_pb2.StreamProductsRequest,
    curvature_pb2.StreamProductsResponse,
    curvature_pb2.ComputeFactorsResponse,
]


def check(kind, data):
    """Read bytes both ways, and compare."""
    codec = frames.codec(kind)
    try:
        expected = kind.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            codec.read(data)
        with pytest.raises(hvpd.InvalidArgumentError, match="a message cannot be read"):
            _ = frames.codec(kind, lambda error: frames.Malformed(str(error))).read(data).message
        return
    read, chunk = codec.read(data)
    assert bytes(chunk) == expected.chunk
    whole = kind()
    whole.CopyFrom(read)
    if chunk:
        oneof = kind.DESCRIPTOR.fields_by_name["chunk"].containing_oneof
        assert oneof is None or read.WhichOneof(oneof.name) in (None, "chunk")
        whole.chunk = bytes(chunk)
    assert whole.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


@settings(settings.get_profile("fuzz"))
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_messages_are_read_as_protobuf_reads_them(kind, data, tried):
    tried("messages with chunks, read both ways")
    check(kind, data.draw(wire.looks_like(kind)))


CHUNK, SPEC = (
    curvature_pb2.CreatePointRequest(**part).SerializeToString() for part in ({"chunk": b"abc"}, {"spec": {}})
)


@pytest.mark.parametrize(
    "data",
    [
        CHUNK + SPEC,
        SPEC + CHUNK,
        CHUNK + CHUNK,
        CHUNK + b"\x1a\x00",
        b"\x1a\x00" + CHUNK,
        CHUNK + b"\x08\x01",
        b"\x1a\x04abc",
    ],
    ids=[
        "chunk, spec",
        "spec, chunk",
        "two chunks",
        "an empty one last",
        "an empty one first",
        "something after",
        "cut",
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_of_exclusive_fields_counts(kind, data):
    check(kind, data)


@settings(settings.get_profile("fuzz"))
@given(st.binary(max_size=40))
@example(b"\x1a" + b"\xff" * 9 + b"\x01")
@example(b"\x1a" + b"\x83" + b"\x80" * 8 + b"\x00abc")
def test_junk_is_read_or_refused(data):
    for kind in KINDS:
        check(kind, data)
