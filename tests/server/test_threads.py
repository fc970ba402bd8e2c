"""A pool goes on with the threads that it has, and gRPC's server by it."""

import threading

import grpc
import pytest

from hvpd_server.scheduling.threads import Threads
from tests.support.threads import no_threads

WAIT = 60


def test_a_pool_without_a_further_thread_uses_those_that_it_has():
    with Threads(4, "pool") as pool:
        running = threading.Event()
        with no_threads():
            blocked, waiting = pool.submit(running.wait, WAIT), pool.submit(int, "7")
            assert not waiting.done()
        running.set()
        assert (blocked.result(WAIT), waiting.result(WAIT)) == (True, 7)


def test_a_pool_without_any_thread_cannot_be_had():
    with no_threads(), pytest.raises(RuntimeError, match="start new thread"):
        Threads(4, "pool")


def test_a_server_answers_calls_although_no_thread_can_be_started():
    """gRPC's loop would end with the error of its pool."""
    running, begun = threading.Event(), threading.Event()

    def answer(request, context):
        begun.set()
        assert running.wait(WAIT)
        return request

    handler = grpc.method_handlers_generic_handler("s", {"M": grpc.unary_unary_rpc_method_handler(answer)})
    pool = Threads(4, "pool")
    server = grpc.server(pool, handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/s/M")
        first = call.future(b"first", timeout=WAIT)
        assert begun.wait(WAIT)
        with no_threads():
            second = call.future(b"second", timeout=WAIT)
            running.set()
            assert (first.result(), second.result()) == (b"first", b"second")
            assert call(b"third", timeout=WAIT) == b"third"
    server.stop(None).wait()
    pool.shutdown()
