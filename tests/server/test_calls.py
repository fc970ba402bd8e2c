"""What calls take of the server while they last is bounded, for each tenant and for all."""

import contextlib

import pytest

from hvpd_server._calls import Arrivals, Calls, Stalls
from hvpd_server._errors import Code, ServiceError


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
        calls.begin("")  # Nobody is told apart.
    assert refused(calls.begin, "") == "TOO_MANY_CALLS"


def test_what_arrives_is_bounded_and_one_may_always():
    arrivals = Arrivals(100)
    arrivals.take("a", 1000)  # Nothing else of a is there.
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
    """Of which the next one comes while a test looks."""

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
    assert not call.cancelled  # It waits no more.

    def wait():
        now[0] += 11
        stalls.sweep()
        raise ZeroDivisionError

    with contextlib.suppress(ZeroDivisionError):
        next(stalls.watch(Messages(wait), call, lambda: awaited))
    assert call.cancelled == awaited
    assert not stalls._waiting
