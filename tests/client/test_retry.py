"""Failed calls are repeated for some time, on a clock that the tests move."""

import dataclasses
import logging
import re

import grpc
import pytest

import hvpd
from hvpd import _progress
from hvpd._errors import Failure
from hvpd._transport import cancellation, retry
from hvpd._transport.stream import RpcFailure

AWAY = Failure(grpc.StatusCode.UNAVAILABLE, "the server is away")
FORGOTTEN = Failure(grpc.StatusCode.NOT_FOUND, "not here", reason="POINT_NOT_RESIDENT")
WRONG = Failure(grpc.StatusCode.INVALID_ARGUMENT, "wrong")


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only in a sleep, or by a test."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    turned = Clock()
    for module in (retry, cancellation, _progress):
        monkeypatch.setattr(module, "time", turned)
    return turned


class Told(list):
    """The reports of a `Retry`: ("retry" or "failure", the failure's code)."""

    def retry(self, timeout=None):
        report = lambda kind: lambda failure: self.append((kind, failure.code))  # noqa: E731
        return retry.Retry("gpu-box:7070", 60.0, timeout, report("retry"), report("failure"))


@pytest.fixture
def call(clock):
    """call(*attempts): run tries, each with its seconds and its failure or result."""

    def call(*attempts, restore=None, progress=False):
        tries = iter(attempts)
        call.tries = 0

        def attempt(left):
            call.tries += 1
            seconds, outcome = next(tries)
            clock.now += seconds
            if isinstance(outcome, Failure):
                raise RpcFailure(outcome, progress=progress)
            return outcome

        return call.told.retry().call(attempt, restore)

    call.told = Told()
    return call


def test_a_call_is_repeated_while_the_server_is_away(call):
    assert call((1, AWAY), (1, AWAY), (1, "here")) == "here"


@pytest.mark.parametrize(
    ("attempts", "warnings"),
    [
        ([(1, AWAY), (0.5, AWAY)], 0),
        ([(1, AWAY), (3, AWAY), (3, AWAY)], 1),
        ([(1, AWAY), (3, AWAY), (0, FORGOTTEN)], 1),
    ],
)
def test_a_long_absence_is_a_single_warning_in_the_log(call, caplog, attempts, warnings):
    with caplog.at_level(logging.WARNING, "hvpd"):
        assert call(*attempts, (0, "here"), restore=lambda: None) == "here"
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warnings


def test_the_retry_timeout_starts_after_a_long_product(call):
    """Only the time counts in which the server is away."""
    assert call((3600, AWAY), (0, AWAY), (3600, "here")) == "here"


def test_a_point_that_is_forgotten_after_a_long_wait_is_made_again(call):
    made = []
    assert call((3600, FORGOTTEN), (0, "here"), restore=lambda: made.append(1)) == "here"
    assert made == [1]


def test_a_point_that_is_forgotten_again_and_again_is_an_overload(call, clock):
    """The server has too little memory, or the caller too little time."""
    began = clock.now
    with pytest.raises(
        hvpd.OverloadedError, match="forgot the point as often as it was made again, for retry_timeout=60 s"
    ) as error:
        call(*[(1, FORGOTTEN)] * 1000, restore=lambda: None)
    assert error.value.reason == "POINT_NOT_RESIDENT"
    assert 59 < clock.now - began < 70


def test_the_time_to_restore_a_point_counts(clock):
    limited, lefts = Told().retry(timeout=5), []

    def product(left):
        lefts.append(left)
        clock.now += 2
        raise RpcFailure(FORGOTTEN)

    def creation(left):
        lefts.append(left)
        clock.now += 1

    with pytest.raises(hvpd.DeadlineError, match="did not answer within timeout=5 s"):
        limited.call(product, lambda: limited.call(creation))
    assert lefts == [5, 3, 2]
    assert limited.call(lambda left: left) == 5


def test_an_interrupt_of_a_restore_takes_no_time_from_later_calls(clock):
    def interrupted():
        raise KeyboardInterrupt

    def forgotten(left):
        raise RpcFailure(FORGOTTEN)

    limited = Told().retry(timeout=5)
    with pytest.raises(KeyboardInterrupt):
        limited.call(forgotten, interrupted)
    clock.now += 100
    assert limited.call(lambda left: left) == 5


def test_a_call_fails_after_the_retry_timeout(call, clock):
    began = clock.now
    with pytest.raises(hvpd.UnavailableError, match="the server is away") as error:
        call(*[(1, AWAY)] * 1000)
    assert "in the middle" not in str(error.value)
    assert 50 < clock.now - began < 70
    waited = r"no answer from the hvpd server at gpu-box:7070: the server is away \(the client tried again for [56]\d\.\d s, of "
    assert re.match(
        rf"{waited}retry_timeout=60 s\)\. To .* run `hvpd doctor --address gpu-box:7070`$", str(error.value)
    )
    with pytest.raises(hvpd.UnavailableError) as error:
        call((3600, AWAY), (3600, AWAY), (0, "too late"))
    assert "it went away 2 times in the middle of this call" in str(error.value)


def test_a_server_that_states_a_cause_needs_no_search_for_it(call):
    with pytest.raises(hvpd.UnavailableError, match=r"restarting \(the client tried again for [\d.]+ s") as error:
        call(*[(1, dataclasses.replace(AWAY, message="restarting", reason="SHUTTING_DOWN"))] * 1000)
    assert "doctor" not in str(error.value)


def test_progress_restarts_the_retry_timeout(call, clock):
    began = clock.now
    assert call(*[(20, AWAY)] * 50, (1, "all of it"), progress=True) == "all of it"
    assert clock.now - began > 1000


def test_a_retry_waits_for_the_time_that_the_server_states(call, clock):
    began = clock.now
    full = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after=0.5)
    assert call(*[(0, full)] * 10, (0, "here")) == "here"
    assert 5.0 <= clock.now - began < 7.0


def test_a_permanent_failure_is_not_repeated(call):
    with pytest.raises(hvpd.InvalidArgumentError):
        call((0, WRONG), (0, "never"))
    assert call.tries == 1
    assert call.told == [("failure", WRONG.code)]


def test_each_repetition_is_reported(call):
    assert call((0, AWAY), (0, FORGOTTEN), (0, "here"), restore=lambda: None) == "here"
    assert call.told == [("retry", AWAY.code), ("retry", FORGOTTEN.code)]


@pytest.mark.parametrize(
    ("failure", "transient"),
    [
        (AWAY, True),
        (WRONG, False),
        (Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after=0.5), True),
        (Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded"), True),
        (Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "the disk is full"), False),
        (Failure(grpc.StatusCode.CANCELLED, "drained"), True),
        (Failure(grpc.StatusCode.CANCELLED, "token revoked", reason="REVOKED"), False),
        (Failure(grpc.StatusCode.INTERNAL, "RST_STREAM: the stream was reset"), True),
        (Failure(grpc.StatusCode.INTERNAL, "a defect", reason="INTERNAL"), False),
    ],
)
def test_only_failures_that_can_pass_are_transient(failure, transient):
    assert retry.is_transient(failure) is transient
