"""A call in one thread that another thread cancels."""

import threading
import time

import grpc
import pytest

import hvpd
from hvpd._transport import cancellation
from hvpd._transport.calls import answer_of
from hvpd._transport.cancellation import Cancellation
from tests.support.waiting import until


def test_calls_outside_of_a_cancellation_cannot_be_cancelled():
    ended = []
    with cancellation.ending(lambda: ended.append(1)):
        assert not cancellation.possible()
    cancellation.check()
    cancellation.sleep(0.0)
    assert ended == []


def test_a_cancelled_wait_is_ended_and_the_call_fails(beside):
    one, waiting, ended = Cancellation(), threading.Event(), threading.Event()
    failures = []

    def call():
        with cancellation.ending(ended.set):
            waiting.set()
            assert ended.wait(30)

    def run():
        with pytest.raises(hvpd.HvpdError, match="the call was cancelled") as caught:
            one.run(call)
        failures.append(caught.value.reason)

    beside(run)
    assert waiting.wait(30)
    one.cancel()
    until(lambda: failures == ["CANCELLED"])
    assert not cancellation.possible()


def test_a_call_that_was_cancelled_before_does_not_begin():
    one, called = Cancellation(), []
    one.cancel()
    with pytest.raises(hvpd.HvpdError, match="cancelled"):
        one.run(lambda: called.append(1))
    assert called == []


def test_a_wait_that_is_over_is_not_ended():
    """Its connection may serve another call by then."""
    one, ended = Cancellation(), []

    def call():
        with cancellation.ending(lambda: ended.append(1)):
            pass
        one.cancel()
        with pytest.raises(hvpd.HvpdError), cancellation.ending(lambda: ended.append(2)):
            pytest.fail("it began")
        return "done"

    assert one.run(call) == "done"
    assert ended == []


def test_the_error_of_a_wait_is_not_replaced():
    def call():
        with cancellation.ending(lambda: None):
            raise KeyError("x")

    one = Cancellation()
    with pytest.raises(KeyError):
        one.run(call)


def test_a_sleep_ends_early(beside):
    one, over = Cancellation(), threading.Event()

    def call():
        cancellation.sleep(600)
        over.set()

    beside(one.run, call)
    one.cancel()
    assert over.wait(30)


def test_a_sleep_without_a_cancellation_is_times(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    cancellation.sleep(1.5)
    assert slept == [1.5]


class Method:
    """A method that answers once, and its call."""

    def __init__(self):
        self.asked = threading.Event()
        self.cancelled = threading.Event()

    def __call__(self, message, *, metadata, timeout):
        return ("blocking", message, metadata, timeout)

    def future(self, message, *, metadata, timeout):
        self.asked.set()
        self.request = (message, metadata, timeout)
        return self

    def cancel(self):
        self.cancelled.set()

    def result(self):
        assert self.cancelled.wait(30)
        raise grpc.FutureCancelledError


def test_a_method_that_answers_once_is_cancelled_at_the_server(beside):
    assert answer_of(Method(), 1, (), 2.0) == ("blocking", 1, (), 2.0)
    method, one, failures = Method(), Cancellation(), []

    def run():
        with pytest.raises(hvpd.HvpdError) as caught:
            one.run(lambda: answer_of(method, 1, (), 2.0))
        failures.append(caught.value.reason)

    beside(run)
    assert method.asked.wait(30)
    assert method.request == (1, (), 2.0)
    one.cancel()
    until(lambda: failures == ["CANCELLED"])
