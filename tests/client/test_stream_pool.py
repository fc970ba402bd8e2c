"""Streams are reused between products, and only as long as they can be."""

from types import SimpleNamespace

import pytest

from hvpd._transport.stream_pool import StreamPool


class FakeCall:
    """A call that records its deadline and its end."""

    def __init__(self, timeout):
        self.timeout, self.cancelled = timeout, False

    def cancel(self):
        self.cancelled = True


@pytest.fixture
def calls():
    return []


@pytest.fixture
def kept():
    """Return the streams that the pool keeps."""
    return ["yes"]


@pytest.fixture
def pool(calls, kept):
    def stream_products(messages, *, metadata, timeout):
        calls.append(FakeCall(timeout))
        return calls[-1]

    channel = SimpleNamespace(stream_products=stream_products, new_call=lambda: ((), "id"))
    return StreamPool(channel, lambda: bool(kept))


def test_a_stream_serves_one_product_after_the_other(pool, calls):
    for _ in range(3):
        with pool.take(None):
            pass
    assert len(calls) == 1


def test_two_products_at_once_have_two_streams(pool, calls):
    with pool.take(None) as first, pool.take(None) as second:
        assert first is not second
    assert len(calls) == 2


def test_a_stream_with_a_deadline_is_used_once(pool, calls):
    with pool.take(None):
        pass
    with pool.take(5.0):
        pass
    assert [call.timeout for call in calls] == [None, 5.0]
    assert [call.cancelled for call in calls] == [False, True]


def test_a_broken_stream_is_not_reused(pool, calls):
    with pytest.raises(RuntimeError), pool.take(None):
        raise RuntimeError
    with pool.take(None):
        pass
    assert [call.cancelled for call in calls] == [True, False]


def test_an_interrupted_stream_is_neither_reused_nor_touched(pool, calls):
    with pytest.raises(KeyboardInterrupt), pool.take(None):
        raise KeyboardInterrupt
    assert pool.forget() == []
    assert not calls[0].cancelled


def test_idle_streams_end(pool, calls, kept):
    with pool.take(None):
        pass
    pool.end_idle()
    assert calls[0].cancelled
    kept.clear()
    with pool.take(None):
        pass
    assert calls[1].cancelled
