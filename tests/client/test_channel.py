"""The gRPC channel: the server accepts the pings that its options send, a server that
ends while it answers is asked again, and a close waits for calls.
"""

import contextlib
import queue
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock, call

import grpc
import pytest

import hvpd
from hvpd._wire import protocol
from hvpd.v1 import curvature_pb2_grpc, server_pb2, server_pb2_grpc


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
            next(stub.StreamProducts(iter(requests.get, None), timeout=23))
        requests.put(None)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


class Ending(server_pb2_grpc.ServerServiceServicer):
    """A server that ends while it answers, so many times."""

    def __init__(self, times):
        self.times = times
        self.asked = 0

    def GetServer(self, request, context):
        self.asked += 1
        if self.asked <= self.times:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        return server_pb2.GetServerResponse(version="0", min_protocol=protocol.OLDEST, max_protocol=protocol.NEWEST)


@pytest.fixture
def ending():
    """Return a function that starts such a server, and returns it with its address."""
    with contextlib.ExitStack() as stack:

        def start(times):
            service, server = Ending(times), grpc.server(ThreadPoolExecutor(4))
            server_pb2_grpc.add_ServerServiceServicer_to_server(service, server)
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            stack.callback(lambda: server.stop(0).wait())
            return service, f"127.0.0.1:{port}"

        yield start


@pytest.mark.parametrize("timeout", [None, 60])
def test_a_server_that_ends_while_it_answers_is_asked_again(ending, timeout):
    service, address = ending(2)
    hvpd.connect(address, connect_timeout=timeout).close()
    assert service.asked == 3


def test_a_server_that_always_ends_is_asked_until_the_timeout(ending):
    service, address = ending(1 << 30)
    began = time.monotonic()
    with pytest.raises(hvpd.UnavailableError, match=r"waited 0.5 s"):
        hvpd.connect(address, connect_timeout=0.5)
    assert service.asked > 1
    assert time.monotonic() - began > 0.3


def test_a_close_waits_for_the_calls_that_no_caller_awaits(server):
    channel = hvpd.connect(server.address)._transport.channel
    channel.close()
    everything = channel._channel = Mock()
    everything.done.add_done_callback.side_effect = lambda discard: discard(everything.done)
    for future in (everything.done, everything.pending):
        channel.await_at_end(future)
    channel.close()
    assert everything.mock_calls[-2:] == [call.pending.exception(), call.close()]
    assert not everything.done.exception.called
