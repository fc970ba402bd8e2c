"""The gRPC channel: the server accepts the pings that its options send."""

import queue

import grpc
import pytest

from hvpd.v1 import curvature_pb2_grpc


@pytest.mark.slow
def test_a_server_accepts_frequent_keepalive_pings(server):
    """gRPC's default for a server allows a ping each five minutes only."""
    options = [
        ("grpc.keepalive_time_ms", 5_100),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    with grpc.insecure_channel(server.address, options) as channel:
        stub = curvature_pb2_grpc.CurvatureServiceStub(channel)
        requests = queue.SimpleQueue()
        with pytest.raises(grpc.RpcError) as error:
            next(stub.StreamProducts(iter(requests.get, None), timeout=28))
        requests.put(None)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
