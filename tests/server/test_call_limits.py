"""Calls have limits while they last, for each tenant and for all tenants."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from hvpd_server.errors import Code, ServiceError
from hvpd_server.rpc.call_context import GrpcCall
from hvpd_server.rpc.call_limits import Arrivals, Calls, Stalls

WAIT = 60


def refused(call, *arguments):
    with pytest.raises(ServiceError) as error:
        call(*arguments)
    assert error.value.code == Code.RESOURCE_EXHAUSTED
    assert error.value.retry_after > 0
    return error.value.reason


def test_a_tenant_has_half_of_the_calls_and_all_together_have_all():
    calls = Calls(4)
    for _ in range(2):
        calls.begin("a")
    assert refused(calls.begin, "a") == "TOO_MANY_CALLS"
    calls.begin("b")
    calls.begin("b")
    assert refused(calls.begin, "c") == "TOO_MANY_CALLS"
    calls.end("a")
    calls.begin("c")
    for tenant in "abbc":
        calls.end(tenant)
    for _ in range(4):
        calls.begin("")  # Without tokens there are no tenants.
    assert refused(calls.begin, "") == "TOO_MANY_CALLS"


def test_a_tenants_own_limit_holds_beside_that_of_all():
    arrivals = Arrivals(100, {"a": 10, "b": None, "c": 1000}.get)
    arrivals.take("a", 8)
    assert refused(arrivals.take, "a", 3) == "TENANT_TRANSIT"
    arrivals.take("a", 2)
    for tenant in "bc":
        arrivals.take(tenant, 40)
        assert refused(arrivals.take, tenant, 11) == "ARRIVALS_FULL"
    assert arrivals.held() == {"a": 10, "b": 40, "c": 40}
    with arrivals.holding("b", 5):
        assert arrivals.held()["b"] == 45
    assert arrivals.held()["b"] == 40


def test_bytes_in_transit_are_bounded_but_one_message_always_passes():
    arrivals = Arrivals(100)
    arrivals.take("a", 1000)  # Tenant a has nothing else under way.
    assert refused(arrivals.take, "a", 1) == "ARRIVALS_FULL"
    arrivals.take("b", 1)
    assert refused(arrivals.take, "b", 1) == "ARRIVALS_FULL"
    arrivals.give_back("a", 1000)
    arrivals.take("b", 49)
    assert refused(arrivals.take, "b", 1) == "ARRIVALS_FULL"
    arrivals.give_back("b", 1)
    arrivals.take("b", 1)


class Call:
    cancelled = False

    def cancel(self):
        self.cancelled = True


class Messages:
    """Messages that call a test's function before each of them comes."""

    def __init__(self, look):
        self._look = look
        self._left = 2

    def __iter__(self):
        return self

    def __next__(self):
        self._look()
        if not self._left:
            raise StopIteration
        self._left -= 1
        return self._left


@pytest.mark.parametrize("awaited", [True, False])
def test_a_call_that_waits_for_too_long_is_cancelled_where_something_must_come(awaited):
    now, call = [0.0], Call()
    stalls = Stalls(10, clock=lambda: now[0])

    def look():
        now[0] += 9
        stalls.sweep()
        assert not call.cancelled

    assert list(stalls.watch(Messages(look), call, lambda: awaited)) == [1, 0]
    now[0] += 100
    stalls.sweep()
    assert not call.cancelled  # The wait is over.

    def wait():
        now[0] += 11
        stalls.sweep()
        raise ZeroDivisionError

    with contextlib.suppress(ZeroDivisionError):
        next(stalls.watch(Messages(wait), call, lambda: awaited))
    assert call.cancelled == awaited
    assert not stalls._waiting


def test_a_call_whose_answers_are_not_read_ends_with_a_clear_error():
    now, closed = [0.0], threading.Event()
    stalls = Stalls(10, clock=lambda: now[0])

    def answers():
        try:
            while True:
                yield bytes(1 << 20)
        finally:
            closed.set()

    handler = grpc.unary_stream_rpc_method_handler(
        lambda request, context: stalls.answers(answers(), GrpcCall(context))
    )
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Flood": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_stream("/test/Flood")(b"", timeout=WAIT)
            assert len(next(call)) == 1 << 20
            stalls.sweep()
            assert len(next(call)) == 1 << 20  # Nothing is late yet.
            ended = time.monotonic() + WAIT
            while not closed.is_set():  # The loop ends when no window is open and the time has passed.
                assert time.monotonic() < ended
                now[0] += 1
                stalls.sweep()
            with pytest.raises(grpc.RpcError) as error:
                for _ in call:
                    pass
    finally:
        server.stop(None).wait(WAIT)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert error.value.details() == "the client did not read its answers for 10 s, and the server has dropped them"
    assert not stalls._waiting
