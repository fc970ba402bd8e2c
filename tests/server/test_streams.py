"""Streams end while they are idle, when there is no room for others."""

import contextlib

import pytest

from hvpd_server.errors import ServiceError
from hvpd_server.rpc.call_limits import Calls
from hvpd_server.rpc.streams import Streams


class Call:
    """A call that ends only when the test says so, as a thread may end late."""

    def __init__(self, owner=""):
        self.owner = owner
        self.cancelled = 0

    def cancel(self):
        self.cancelled += 1


@pytest.fixture
def opened():
    """Return a function that opens a stream, which has answered a product."""
    with contextlib.ExitStack() as stack:

        def opened(streams, owner=""):
            stream = stack.enter_context(streams.opened(Call(owner)))
            stream.begin()
            stream.end()
            return stream

        yield opened


def ended(streams):
    return [stream.call.cancelled for stream in streams]


def test_a_stream_that_ends_slowly_does_not_save_the_next_one(opened):
    streams = Streams(2)
    found = [opened(streams) for _ in range(5)]
    assert ended(found) == [1, 1, 1, 0, 0]


def test_streams_that_were_busy_when_too_many_came_end_when_they_rest(opened):
    streams = Streams(2)
    found = [opened(streams) for _ in range(2)]
    for stream in found:
        stream.begin()
    found.append(opened(streams))
    found[-1].begin()
    assert ended(found) == [0, 0, 0]
    for stream in (found[1], found[0], found[2]):
        stream.end()
    assert ended(found) == [0, 1, 0]


def test_the_newest_stream_may_ask_before_it_ends(opened):
    streams = Streams(1)
    busy = opened(streams)
    busy.begin()
    with streams.opened(Call()) as newest:
        assert newest.call.cancelled == 0
    busy.end()
    assert busy.call.cancelled == 0


@pytest.mark.parametrize("tenant", ["", "a"])
def test_a_refused_call_ends_the_stream_that_is_idle_for_longest(opened, tenant):
    """Also if fewer streams are open than may be: a tenant may have half of them."""
    streams = Streams(100)
    calls = Calls(4, streams.end_idle)
    found = [opened(streams, owner) for owner in ("b", "a", "a", "b")]
    for owner in ("a", "a") if tenant else ("", "", "", ""):
        calls.begin(owner)
    for _ in range(2):
        with pytest.raises(ServiceError, match="Too many calls"):
            calls.begin(tenant)
    assert ended(found) == ([0, 1, 1, 0] if tenant else [1, 1, 0, 0])


def test_a_busy_stream_never_ends_for_another_call(opened):
    streams = Streams(100)
    busy = opened(streams)
    busy.begin()
    streams.end_idle("")
    assert busy.call.cancelled == 0
