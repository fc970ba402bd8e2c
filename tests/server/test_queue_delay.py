"""With a queue delay, a block waits until it is full or its oldest product is due, and
never beyond a deadline.
"""

import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpd_server.scheduling.job import Job
from hvpd_server.scheduling.queue_delay import QueueDelay

FULL, SECONDS = 4, 5.0


class Key:
    """A key that allows weak references."""


@pytest.fixture
def delay():
    return QueueDelay(SECONDS)


def job(queued, *, key="k", width=1, deadline=float("inf")):
    return Job(key, np.zeros((width, 2)), deadline=deadline, queued=queued)


def add(delay, *jobs):
    """Add jobs as they arrive; return the products that may be launched after the
    last.
    """
    for each in jobs:
        released = delay.add(each, FULL, each.queued)
    return released


def test_a_block_waits_until_its_oldest_job_is_due(delay):
    jobs = [job(10.0), job(12.0), job(14.0)]
    assert add(delay, *jobs) == []
    assert delay.due() == 15.0
    assert delay.first() is jobs[0]
    assert delay.release(14.9) == []
    assert delay.release(15.0) == jobs
    assert (delay.due(), delay.first()) == (float("inf"), None)


@pytest.mark.parametrize("widths", [[4], [1, 3], [2, 1, 2], [9]])
def test_a_full_block_waits_for_nothing(delay, widths):
    jobs = [job(10.0 + index, width=width) for index, width in enumerate(widths)]
    assert add(delay, *jobs) == jobs
    assert delay.release(1e9) == []


def test_each_key_has_its_own_time(delay):
    first, second = job(10.0, key="a"), job(11.0, key="b")
    add(delay, first, second)
    assert delay.release(15.5) == [first]
    assert delay.due() == 16.0
    assert delay.release(16.0) == [second]


def test_the_delay_counts_from_the_next_job_if_the_oldest_leaves(delay):
    oldest, next_oldest, other = job(10.0), job(12.0), job(11.0, key="other")
    add(delay, oldest, next_oldest, other)
    assert delay.remove(oldest)
    assert not delay.remove(oldest)
    assert delay.due() == 16.0
    assert delay.release(16.9) == [other]
    assert delay.release(17.0) == [next_oldest]


def test_a_job_that_left_does_not_fill_a_block(delay):
    left, stays = job(10.0, width=2), job(10.0)
    add(delay, left, stays)
    delay.remove(left)
    assert add(delay, job(11.0, width=2)) == []
    last = job(12.0)
    assert last in add(delay, last)


def test_an_empty_block_is_not_due(delay):
    alone = job(10.0)
    add(delay, alone)
    delay.remove(alone)
    assert delay.due() == float("inf")
    again = job(12.0)
    add(delay, again)
    assert delay.release(15.0) == []
    assert delay.release(17.0) == [again]


@pytest.mark.parametrize("leave", ["full", "removed", "released"])
def test_a_job_that_left_is_not_held_in_memory(delay, leave):
    """A key holds a point, and that memory on the device."""
    key = Key()
    held = weakref.ref(key)
    each = job(10.0, key=key, width=FULL if leave == "full" else 1)
    add(delay, each)
    if leave == "removed":
        delay.remove(each)
    if leave == "released":
        delay.release(20.0)
    del key, each
    assert held() is None


def test_a_job_with_an_early_deadline_and_its_companions_do_not_wait(delay):
    patient, hurried = job(10.0), job(11.0, deadline=16.0)
    assert add(delay, patient) == []
    assert add(delay, hurried) == [patient, hurried]
    assert add(delay, job(20.0, deadline=25.1)) == []


@settings(deadline=None)
@given(
    operations=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 2), st.integers(1, 3), st.booleans()),
            st.tuples(st.just("remove"), st.integers(0, 99)),
            st.tuples(st.just("pass"), st.integers(0, 4)),
        ),
        max_size=60,
    )
)
def test_the_delay_agrees_with_a_model_made_of_lists(operations):
    """The model keeps a list for each key and looks through all of them."""
    delay, model, now = QueueDelay(SECONDS), {}, 0.0

    def oldest(key):
        return model[key][0].queued

    for name, *arguments in operations:
        waiting = [each for block in model.values() for each in block]
        if name == "add":
            key, width, hurried = arguments
            each = job(now, key=key, width=width, deadline=now + (1.0 if hurried else 100.0))
            block = model.setdefault(key, [])
            block.append(each)
            full = sum(len(other.block) for other in block) >= FULL
            assert delay.add(each, FULL, now) == (model.pop(key) if full or hurried else [])
        elif name == "remove" and waiting:
            each = waiting[arguments[0] % len(waiting)]
            assert delay.remove(each)
            model[each.key].remove(each)
            if not model[each.key]:
                del model[each.key]
        elif name == "pass":
            now += arguments[0]
            due = [key for key in model if oldest(key) + SECONDS <= now]
            expected = {each for key in due for each in model.pop(key)}
            released = delay.release(now)
            assert len(released) == len(expected)
            assert set(released) == expected
        assert delay.due() == min((oldest(key) + SECONDS for key in model), default=float("inf"))
        assert (delay.first() is None) == (not model)
