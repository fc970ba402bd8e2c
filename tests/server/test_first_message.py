"""Calls of one message begin before it arrives: they stall, and strangers' are few."""

import concurrent.futures
import contextlib
import queue

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from hvpd_server.rpc.call_limits import Stalls
from hvpd_server.rpc.first_message import MOST_OPEN, FirstMessages
from tests.support.waiting import until

WAIT = 60

NOW = [0.0]


@pytest.fixture
def stalls():
    return Stalls(10.0, clock=lambda: NOW[0])


def handlers(messages):
    codec = StringValue.FromString, StringValue.SerializeToString
    unary = grpc.unary_unary_rpc_method_handler(lambda request, call: request, *codec)
    twice = grpc.unary_stream_rpc_method_handler(lambda request, call: iter([request, request]), *codec)
    return {
        "Open": messages.early(unary, is_open=True),
        "Unary": messages.early(unary),
        "Twice": messages.early(twice),
    }


@pytest.fixture
def call(stalls):
    """Yield a function that begins a call of a method: it returns the queue for the
    messages, which None ends, and the call.
    """
    with concurrent.futures.ThreadPoolExecutor(3 * MOST_OPEN) as pool, contextlib.ExitStack() as stack:
        server = grpc.server(pool)
        generic = grpc.method_handlers_generic_handler("s", handlers(FirstMessages(stalls)))
        server.add_generic_rpc_handlers((generic,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        stack.callback(lambda: server.stop(None).wait())
        channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}"))

        def call(method):
            given = queue.SimpleQueue()
            stack.callback(given.put, None)
            return given, channel.stream_stream(f"/s/{method}")(iter(given.get, None), timeout=WAIT)

        yield call


def said(text):
    return StringValue(value=text).SerializeToString()


@pytest.mark.parametrize(("method", "times"), [("Open", 1), ("Unary", 1), ("Twice", 2)])
def test_a_message_is_answered_before_the_client_ends_its_side(call, method, times):
    given, answers = call(method)
    given.put(said("a"))
    assert list(answers) == [said("a")] * times


@pytest.mark.parametrize(("message", "why"), [(None, "the call has none"), (b"\xff", "cannot be read")])
def test_a_call_without_a_message_that_can_be_read_is_refused(call, message, why):
    given, answers = call("Unary")
    given.put(message)
    with pytest.raises(grpc.RpcError, match=why) as error:
        next(answers)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_call_whose_message_does_not_come_is_ended(call, stalls):
    _, answers = call("Unary")
    until(lambda: stalls._waiting)
    stalls.sweep()
    assert not answers.done()
    NOW[0] += 11.0
    stalls.sweep()
    with pytest.raises(grpc.RpcError):
        next(answers)


def test_open_calls_that_wait_are_few_and_the_oldest_ends_first(call, stalls):
    begun = []

    def ended():
        return sum(answers.done() for _, answers in begun)

    for _ in range(MOST_OPEN + 2):
        begun.append(call("Open"))
        until(lambda: len(stalls._waiting) + ended() == len(begun) and len(stalls._waiting) <= MOST_OPEN)
    assert [answers.done() for _, answers in begun] == [True] * 2 + [False] * MOST_OPEN
    assert {answers.code() for _, answers in begun[:2]} == {grpc.StatusCode.UNAVAILABLE}
    given, answers = begun[-1]
    given.put(said("a"))
    assert next(answers) == said("a")
    given, answers = call("Open")
    given.put(said("b"))
    assert next(answers) == said("b")
