"""Fuzzes hvpd's own reading of messages, guided by coverage. This needs atheris (Linux,
CPython):

    .venv/bin/pip install atheris
    .venv/bin/python -m tests.fuzz.guided -max_total_time=60

libFuzzer's other flags may be given, too. The run ends at the first input that is read
otherwise than protobuf reads it, and writes that input to a file.
"""

import sys

import atheris
from google.protobuf.message import DecodeError

with atheris.instrument_imports(include=["hvpd"], enable_loader_override=False):
    from hvpd._wire import frames as _frames
    from hvpd.v1 import blob_pb2, curvature_pb2

KINDS = [
    blob_pb2.UploadBlobRequest,
    curvature_pb2.CreatePointRequest,
    curvature_pb2.CreatePointResponse,
    curvature_pb2.StreamProductsRequest,
    curvature_pb2.StreamProductsResponse,
    curvature_pb2.ComputeFactorsResponse,
]


def frames(data):
    """Read bytes as each type: the message is protobuf's, or both refuse."""
    for kind in KINDS:
        try:
            expected = kind.FromString(data).SerializeToString(deterministic=True)
        except DecodeError:
            expected = None
        try:
            message, chunk = _frames.codec(kind).read(data)
        except DecodeError:
            found = None
        else:
            if chunk:
                message.chunk = bytes(chunk)
            found = message.SerializeToString(deterministic=True)
        if found != expected:
            raise AssertionError(f"{kind.__name__} of {data!r} is read as {found!r}, by protobuf as {expected!r}")


if __name__ == "__main__":
    atheris.Setup(sys.argv, frames)
    atheris.Fuzz()
