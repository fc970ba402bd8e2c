"""Which failures are repeated, and for how long: on a clock that the tests turn, and on a server that is really there."""

import queue

import grpc
import pytest

import hvpd
from hvpd import _transport
from hvpd._errors import Failure
from hvpd._stream import RpcFailure
from hvpd.v1 import curvature_pb2_grpc

AWAY = Failure(grpc.StatusCode.UNAVAILABLE, "the server is away")
FORGOTTEN = Failure(grpc.StatusCode.NOT_FOUND, "not here", reason="POINT_NOT_RESIDENT")
WRONG = Failure(grpc.StatusCode.INVALID_ARGUMENT, "wrong")


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when somebody sleeps, or a test says so."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    turned = Clock()
    monkeypatch.setattr(_transport, "time", turned)
    return turned


@pytest.fixture
def call(client, clock):
    """call(*attempts): runs what each try is to do, in turn: seconds that it takes, and a failure, or a result."""

    def call(*attempts, restore=None, progress=False):
        tries = iter(attempts)
        call.tries, call.progress = 0, progress

        def attempt(left):
            call.tries += 1
            seconds, outcome = next(tries)
            clock.now += seconds
            if isinstance(outcome, Failure):
                raise RpcFailure(outcome, progress=call.progress)
            return outcome

        return client._transport.call(attempt, restore=restore)

    return call


def test_a_call_is_repeated_while_the_server_is_away(call):
    assert call((1, AWAY), (1, AWAY), (1, "here")) == "here"


def test_a_server_that_goes_away_in_the_middle_of_a_long_product_is_waited_for_as_long_as_any(call):
    """The product may have been under way for an hour: what counts is for how long the server is away."""
    assert call((3600, AWAY), (0, AWAY), (3600, "here")) == "here"


def test_a_point_that_is_forgotten_after_a_long_wait_is_made_again(call):
    made = []
    assert call((3600, FORGOTTEN), (0, "here"), restore=lambda: made.append(1)) == "here"
    assert made == [1]


def test_a_point_that_is_forgotten_again_and_again_is_no_name_that_is_not_there(call, clock):
    """The server has too little memory; or the caller too little time."""
    began = clock.now
    with pytest.raises(
        hvpd.OverloadedError, match="forgot the point as often as it was made again, for retry_timeout=60 s"
    ) as error:
        call(*[(1, FORGOTTEN)] * 1000, restore=lambda: None)
    assert error.value.reason == "POINT_NOT_RESIDENT"
    assert 59 < clock.now - began < 70


def test_what_a_point_takes_to_be_made_again_counts(server, clock):
    with hvpd.connect(server.address, timeout=5) as client:
        lefts = []

        def product(left):
            lefts.append(left)
            clock.now += 2
            raise RpcFailure(FORGOTTEN)

        def creation(left):
            lefts.append(left)
            clock.now += 1

        with pytest.raises(hvpd.DeadlineError, match="did not answer within timeout=5 s"):
            client._transport.call(product, restore=lambda: client._transport.call(creation))
        assert lefts == [5, 3, 2]
        assert client._transport.call(lambda left: left) == 5


def test_an_interrupt_while_a_point_is_made_again_takes_no_time_from_later_calls(server, clock):
    def interrupted():
        raise KeyboardInterrupt

    def forgotten(left):
        raise RpcFailure(FORGOTTEN)

    with hvpd.connect(server.address, timeout=5) as client:
        with pytest.raises(KeyboardInterrupt):
            client._transport.call(forgotten, restore=interrupted)
        clock.now += 100
        assert client._transport.call(lambda left: left) == 5


def test_after_the_retry_timeout_it_is_an_error(call, clock):
    began = clock.now
    with pytest.raises(hvpd.UnavailableError, match="the server is away") as error:
        call(*[(1, AWAY)] * 1000)
    assert "in the middle" not in str(error.value)
    assert 50 < clock.now - began < 70
    with pytest.raises(hvpd.UnavailableError) as error:
        call((3600, AWAY), (3600, AWAY), (0, "too late"))
    assert "it went away 2 times in the middle of this call" in str(error.value)


def test_while_something_is_answered_each_time_there_is_no_timeout(call, clock):
    began = clock.now
    assert call(*[(20, AWAY)] * 50, (1, "all of it"), progress=True) == "all of it"
    assert clock.now - began > 1000


def test_who_is_told_when_to_come_back_does_not_come_sooner(call, clock):
    began = clock.now
    full = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after=0.5)
    assert call(*[(0, full)] * 10, (0, "here")) == "here"
    assert 5.0 <= clock.now - began < 7.0


def test_what_cannot_be_repeated_is_not(call):
    with pytest.raises(hvpd.InvalidArgumentError):
        call((0, WRONG), (0, "never"))
    assert call.tries == 1


@pytest.mark.slow
def test_a_client_that_asks_whether_the_server_is_there_is_not_sent_away(server):
    """While it waits for a product that takes a minute, a client pings; more often than every five minutes must be allowed."""
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
