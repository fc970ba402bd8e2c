"""A block of several products is sent again in part: only its refused products."""

import collections

import grpc
import numpy as np
import pytest
from google.rpc import status_pb2

from hvpd._errors import Failure
from hvpd._transport.exchange import Asked, Exchange
from hvpd._transport.stream import RpcFailure
from hvpd._wire import vector_protocol
from hvpd._wire.frames import Frame
from hvpd.v1 import curvature_pb2

N = 3


class Server:
    """A stream that doubles vectors, and refuses some products once."""

    request_id = "id"

    def __init__(self, *refused, breaks_after=None):
        self.refused = list(refused)
        self.breaks_after = breaks_after
        self.seen = []
        self.most = 0
        self._tags = 1
        self._arriving = {}
        self._answers = collections.deque()

    def reserve_tags(self, count):
        first, self._tags = self._tags, self._tags + count
        return first

    def send(self, messages):
        for message, chunk in messages:
            if message.HasField("spec"):
                self._arriving[message.tag] = message.spec, bytearray()
            self._arriving[message.tag][1].extend(chunk)
        spec, data = self._arriving.pop(message.tag)
        block = np.frombuffer(data).reshape(spec.k, N)
        self.seen.append(block[0, 0])
        answer = curvature_pb2.StreamProductsResponse(tag=message.tag)
        if block[0, 0] in self.refused:
            self.refused.remove(block[0, 0])
            answer.error.CopyFrom(status_pb2.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="full"))
            self._answers.append(Frame(answer))
        else:
            answer.info.batch_width = spec.k
            self._answers.append(Frame(answer, memoryview((2 * block).tobytes())))
        self.most = max(self.most, len(self._answers))

    def receive(self):
        if self.breaks_after == 0:
            raise RpcFailure(Failure(grpc.StatusCode.UNAVAILABLE, "gone"))
        if self.breaks_after is not None:
            self.breaks_after -= 1
        return self._answers.popleft()


def exchange(rows, limit=2):
    block = np.arange(rows, dtype=np.float64)[:, None] * np.ones(N)
    return block, Exchange(Asked("p"), block, limit=limit, priority=0)


def attempt(exchange, server):
    infos = []
    refused = exchange.attempt(server, infos.append)
    if refused is not None:
        raise refused
    return infos


def test_a_block_is_several_products_with_few_under_way_at_once():
    server, (block, whole) = Server(), exchange(41)
    infos = attempt(whole, server)
    np.testing.assert_array_equal(whole.result, 2 * block)
    assert server.seen == list(range(0, 41, 2))
    assert [info.batch_width for info in infos] == [2] * 20 + [1]
    assert server.most == 8


def test_only_refused_products_are_sent_again():
    server, (block, whole) = Server(2, 6), exchange(8)
    with pytest.raises(RpcFailure, match="full") as refused:
        attempt(whole, server)
    assert refused.value.progress
    server.seen.clear()
    assert len(attempt(whole, server)) == 2
    assert server.seen == [2, 6]
    np.testing.assert_array_equal(whole.result, 2 * block)


def test_after_a_refusal_nothing_more_is_sent_until_the_next_attempt():
    server, (block, whole) = Server(0), exchange(40)
    with pytest.raises(RpcFailure):
        attempt(whole, server)
    assert len(server.seen) == 8
    attempt(whole, server)
    np.testing.assert_array_equal(whole.result, 2 * block)
    assert sorted(server.seen) == sorted([0, *range(0, 40, 2)])


def test_a_fully_refused_attempt_reports_no_progress():
    server, (_, whole) = Server(0, 2), exchange(4)
    with pytest.raises(RpcFailure, match="full") as refused:
        attempt(whole, server)
    assert not refused.value.progress


def test_answers_before_a_broken_stream_are_kept():
    server, (block, whole) = Server(breaks_after=3), exchange(10)
    with pytest.raises(RpcFailure, match="gone") as broke:
        attempt(whole, server)
    assert broke.value.progress
    other = Server()
    attempt(whole, other)
    assert other.seen == [6, 8]
    np.testing.assert_array_equal(whole.result, 2 * block)


@pytest.mark.parametrize("count", [0, 1, 3, 4096])
def test_the_spec_of_a_product_past_grpc_is_not_too_large(count):
    """The numbers of leaves are the largest that a bundle can have."""
    asked = Asked("p" * 64, 5, True, 2**64 - 1, tuple(range(65_536 - count, 65_536)), "linearized", "highest")
    assert Exchange(asked, np.ones((1, N)), limit=1, priority=-100).fits_vector_port
    spec = curvature_pb2.ProductSpec(**asked._asdict(), priority=-100, k=1, traceparent="0" * 55)
    assert spec.ByteSize() <= vector_protocol.SPEC_BYTES


def test_a_product_with_more_leaves_or_more_vectors_goes_over_grpc():
    block = np.ones((2, N))
    assert not Exchange(Asked("p", leaves=tuple(range(4097))), block, limit=2, priority=0).fits_vector_port
    assert not Exchange(Asked("p"), block, limit=1, priority=0).fits_vector_port
