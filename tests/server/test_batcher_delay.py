"""The batcher delays blocks that are not full, if a queue delay is set."""

import pytest

from hvpd_server.errors import Code
from tests.support.batcher import WAIT, Alarm, Bench, refusal


@pytest.fixture
def patient(start):
    """Yield a bench on which blocks of fewer than 4 vectors wait for 5 seconds."""
    return Bench(start, limit=4, max_delay=5.0, condition=Alarm)


def test_a_block_that_is_not_full_is_delayed_until_its_oldest_product_is_due(patient):
    first, _, seconds = patient.lead(1)
    assert seconds == 5.0
    patient.clock.now += 2
    second, job = patient.queue(2)
    patient.clock.now += 2.5
    patient.alarm.ring()
    assert patient.alarm.await_wait() == 0.5
    assert patient.device.launches == []
    patient.clock.now += 0.5
    patient.alarm.ring()
    patient.device.let_go()
    first.result(WAIT)
    second.result(WAIT)
    assert patient.device.launches == [("k", [1, 2])]
    assert (job.queued, job.started, job.width) == (102.0, 105.0, 2)
    assert patient.batcher.pending == 0


@pytest.mark.parametrize("width", [4, 9])
def test_a_full_block_is_not_delayed(start, width):
    bench = Bench(start, limit=4, max_delay=5.0)
    bench.device.let_go()
    bench.run(bench.job(1, width=width))
    assert bench.device.launches == [("k", [1])]


def test_a_block_that_becomes_full_is_launched_at_once(patient):
    patient.device.let_go()
    first, *_ = patient.lead(1)
    second, _ = patient.queue(2, width=2)
    third = start_and_pass(patient, 3)
    for future in (first, second, third):
        future.result(WAIT)
    assert patient.device.launches == [("k", [1, 2, 3])]


def start_and_pass(bench, number, **settings):
    """Start a caller whose product stays in the queue too briefly to be awaited
    there.
    """
    return bench._run(bench.job(number, **settings))


def test_the_queue_delay_runs_while_the_device_works(patient):
    first, *_ = patient.lead(0, key="first")
    patient.clock.now += 5
    patient.alarm.ring()
    patient.device.await_launch()
    callers = [patient.queue(number, key=key) for number, key in [(1, "a"), (2, "b"), (3, "a")]]
    patient.clock.now += 5
    patient.device.let_go()
    for future in [first, *(future for future, _ in callers)]:
        future.result(WAIT)
    assert patient.device.launches[1:] == [("a", [1, 3]), ("b", [2])]
    assert patient.alarm.never_waited()


def test_a_full_block_does_not_wait_for_a_delayed_block_of_another_key(patient):
    delayed, _, _ = patient.lead(1, key="a")
    patient.clock.now += 1
    patient.device.let_go()
    start_and_pass(patient, 2, key="b", width=4).result(WAIT)
    assert patient.alarm.await_wait() == 4.0  # The rest of 5.
    assert patient.device.launches == [("b", [2])]
    patient.clock.now += 4
    patient.alarm.ring()
    delayed.result(WAIT)
    assert patient.device.launches == [("b", [2]), ("a", [1])]


def test_each_key_has_its_own_time(patient):
    first, _, _ = patient.lead(1, key="a")
    patient.clock.now += 3
    second, _ = patient.queue(2, key="b")
    patient.device.let_go()
    patient.clock.now += 2
    patient.alarm.ring()
    first.result(WAIT)
    assert patient.alarm.await_wait() == 3.0  # The current leader waits.
    patient.clock.now += 3
    patient.alarm.ring()
    second.result(WAIT)
    assert patient.device.launches == [("a", [1]), ("b", [2])]


def test_a_delayed_product_that_is_cancelled_leaves_at_once(patient):
    leader, job, _ = patient.lead(1)
    patient.clock.now += 1
    second, second_job = patient.queue(2)
    third, _ = patient.queue(3)
    patient.batcher.cancel(second_job)
    assert refusal(second) is Code.CANCELLED
    patient.batcher.cancel(job)
    assert refusal(leader) is Code.CANCELLED
    assert patient.alarm.await_wait() == 5.0  # Counted from the third, which leads.
    assert patient.batcher.pending == 1
    patient.device.let_go()
    patient.clock.now += 5
    patient.alarm.ring()
    third.result(WAIT)
    assert patient.device.launches == [("k", [3])]
    assert patient.batcher.pending == 0


def test_the_last_that_is_cancelled_leaves_the_device_free(patient):
    leader, job, _ = patient.lead(1)
    patient.batcher.cancel(job)
    assert refusal(leader) is Code.CANCELLED
    assert patient.batcher.pending == 0
    patient.device.let_go()
    patient.run(patient.job(2, width=4))
    assert patient.device.launches == [("k", [2])]


def test_a_product_whose_deadline_comes_first_releases_its_block(patient):
    patient.device.let_go()
    leader, *_ = patient.lead(1)
    start_and_pass(patient, 2, deadline=patient.clock.now + 4).result(WAIT)
    leader.result(WAIT)
    assert patient.device.launches == [("k", [1, 2])]


def test_a_delayed_product_that_expires_is_not_executed(patient):
    leader, *_ = patient.lead(1, deadline=patient.clock.now + 6)
    other, _ = patient.queue(2)
    patient.device.let_go()
    patient.clock.now += 7
    patient.alarm.ring()
    assert refusal(leader) is Code.DEADLINE_EXCEEDED
    other.result(WAIT)
    assert patient.device.launches == [("k", [2])]


def test_an_expired_product_does_not_launch_others(patient):
    """Products with its key are launched in their own turn."""
    leader, *_ = patient.lead(1, key="a")
    expired, _ = patient.queue(2, key="b", priority=2, deadline=patient.clock.now + 6)
    callers = [patient.queue(3, key="b"), patient.queue(4, key="c", priority=1)]
    patient.device.let_go()
    patient.clock.now += 7
    patient.alarm.ring()
    assert refusal(expired) is Code.DEADLINE_EXCEEDED
    for future in [leader, *(future for future, _ in callers)]:
        future.result(WAIT)
    assert patient.device.launches == [("c", [4]), ("a", [1]), ("b", [3])]


def test_a_product_joins_a_block_that_only_waits_for_the_device(patient):
    first, *_ = patient.lead(0, key="first")
    patient.clock.now += 5
    patient.alarm.ring()
    patient.device.await_launch()
    callers = [patient.queue(number, width=width) for number, width in [(1, 3), (2, 4), (3, 1)]]
    patient.device.let_go()
    for future in [first, *(future for future, _ in callers)]:
        future.result(WAIT)
    assert patient.device.launches[1:] == [("k", [1, 3]), ("k", [2])]


def test_products_without_room_in_a_launch_are_delayed_again(patient):
    first, *_ = patient.lead(0, key="first")
    patient.clock.now += 5
    patient.alarm.ring()
    patient.device.await_launch()
    callers = []
    for number, width, tenant in [(1, 4, "a"), (2, 1, "b"), (3, 1, "a")]:
        callers.append(patient.queue(number, width=width, tenant=tenant))
        patient.clock.now += 1
    patient.device.let_go()
    assert patient.alarm.await_wait() == 3.0  # Since the second came, 2 seconds ago.
    assert patient.device.launches[1:] == [("k", [1])]
    assert patient.batcher.pending == 2
    patient.clock.now += 3
    patient.alarm.ring()
    for future in [first, *(future for future, _ in callers)]:
        future.result(WAIT)
    assert sorted(patient.device.launches[2][1]) == [2, 3]
    assert len(patient.device.launches) == 3


def test_products_that_are_due_are_not_delayed_again(patient):
    first, *_ = patient.lead(0, key="first")
    patient.clock.now += 5
    patient.alarm.ring()
    patient.device.await_launch()
    callers = []
    for number, width in [(1, 4), (2, 1), (3, 1)]:
        callers.append(patient.queue(number, width=width))
        patient.clock.now += 2
    patient.clock.now += 1
    patient.device.let_go()
    for future in [first, *(future for future, _ in callers)]:
        future.result(WAIT)
    assert patient.device.launches[1:] == [("k", [1]), ("k", [2, 3])]
