"""The batcher holds a launch back for callers that are about to ask again."""

import pytest

from hvpd_server.errors import Code
from tests.support.batcher import WAIT, Alarm, Bench, Expecting, refusal


@pytest.fixture
def calm(start):
    """Yield a bench with a free device, whose leaders may wait."""
    return Bench(start, condition=Alarm)


def test_a_launch_is_held_back_until_the_expected_callers_have_asked(calm):
    holdback = Expecting(3)
    leader, job, timeout = calm.lead(1, holdback=holdback)
    assert timeout == 5.0
    second, _ = calm.queue(2, holdback=holdback)
    assert calm.alarm.never_waited()
    calm.clock.now += 1
    third, _ = calm.queue(3, holdback=holdback)
    calm.device.let_go()
    for future in (leader, second, third):
        future.result(WAIT)
    assert calm.device.launches == [("k", [1, 2, 3])]
    assert (job.queued, job.started) == (100.0, 101.0)
    assert holdback.launched == [(3, 101.0, 101.0)]


def test_a_launch_goes_without_callers_that_do_not_return(calm):
    holdback = Expecting(3)
    leader, *_ = calm.lead(1, holdback=holdback)
    second, _ = calm.queue(2, holdback=holdback)
    holdback.until, calm.clock.now = 0.0, 106.0
    calm.device.let_go()
    calm.alarm.ring()
    for future in (leader, second):
        future.result(WAIT)
    assert calm.device.launches == [("k", [1, 2])]


def test_a_full_launch_is_not_held_back(start):
    bench = Bench(start, condition=Alarm, limit=2)
    holdback = Expecting(100)
    leader, *_ = bench.lead(1, holdback=holdback)
    second, _ = bench.queue(2, holdback=holdback)
    bench.device.let_go()
    for future in (leader, second):
        future.result(WAIT)
    assert bench.device.launches == [("k", [1, 2])]


def test_a_product_with_another_key_ends_a_holdback(calm):
    holdback = Expecting(3)
    leader, *_ = calm.lead(1, holdback=holdback)
    other, _ = calm.queue(2, key="other")
    calm.device.await_launch()
    calm.device.let_go()
    for future in (leader, other):
        future.result(WAIT)
    assert calm.device.launches == [("k", [1]), ("other", [2])]


def test_a_product_whose_deadline_is_too_early_is_not_held_back(start):
    bench = Bench(start)
    bench.device.let_go()
    bench.run(bench.job(1, deadline=104.0, holdback=Expecting(3)))
    assert bench.device.launches == [("k", [1])]


def test_a_held_back_product_that_is_cancelled_leaves_at_once(calm):
    holdback = Expecting(4)
    leader, job, _ = calm.lead(1, holdback=holdback)
    second, _ = calm.queue(2, holdback=holdback)
    calm.batcher.cancel(job)
    assert refusal(leader) is Code.CANCELLED
    assert calm.alarm.await_wait() == 5.0  # The second leads now.
    calm.device.let_go()
    calm.queue(3, holdback=holdback)
    last, _ = calm.queue(4, holdback=holdback)
    for future in (second, last):
        future.result(WAIT)
    assert calm.device.launches == [("k", [2, 3, 4])]


def test_the_holdback_limits_the_width_of_a_launch(start):
    bench = Bench(start).occupy()
    holdback = Expecting(0, width=2)
    callers = [bench.queue(number, holdback=holdback) for number in (1, 2, 3)]
    bench.finish()
    for future, _ in callers:
        future.result(WAIT)
    assert bench.launched() == [("k", [1, 2]), ("k", [3])]


def test_a_launch_that_fails_is_not_recorded_in_the_holdback(start):
    bench = Bench(start)
    holdback = Expecting(0)
    bench.device.let_go()
    with pytest.raises(ZeroDivisionError):
        bench.run(bench.job(1, key="broken", holdback=holdback))
    assert holdback.launched == []


def test_a_lone_launch_is_recorded_after_its_answer_and_is_not_in_flight_any_more(start):
    bench = Bench(start)
    holdback = Expecting(0)
    bench.device.let_go()
    for number in range(1, 4):
        bench.run(bench.job(number, holdback=holdback))
        assert bench.batcher.in_flight.columns == len(bench.batcher.in_flight.keys) == 0
        assert len(holdback.launched) == number - 1
        bench.batcher.record_deferred()
        assert len(holdback.launched) == number


def test_the_next_product_finds_a_lone_launch_recorded(start):
    bench = Bench(start)
    holdback = Expecting(0)
    bench.device.let_go()
    for number in range(3):
        bench.run(bench.job(number, holdback=holdback))
        assert len(holdback.launched) == number
    assert bench.batcher.in_flight.begun == 3
