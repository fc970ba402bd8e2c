"""Blocks that gather: until the oldest product has waited for so long, or the block is full, and never beyond a deadline."""

import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpd_server._gathering import Gathering
from hvpd_server._queue import Job

FULL, SECONDS = 4, 5.0


class Key:
    """That can be referred to weakly."""


@pytest.fixture
def gathering():
    return Gathering(SECONDS)


def job(queued, *, key="k", width=1, deadline=float("inf")):
    return Job(key, np.zeros((width, 2)), deadline=deadline, queued=queued)


def add(gathering, *jobs):
    """Adds jobs as they arrive; returns what may be launched by the last."""
    for each in jobs:
        ripe = gathering.add(each, FULL, each.queued)
    return ripe


def test_a_block_gathers_until_its_oldest_has_waited_for_so_long(gathering):
    jobs = [job(10.0), job(12.0), job(14.0)]
    assert add(gathering, *jobs) == []
    assert gathering.due() == 15.0
    assert gathering.first() is jobs[0]
    assert gathering.ripe(14.9) == []
    assert gathering.ripe(15.0) == jobs
    assert (gathering.due(), gathering.first()) == (float("inf"), None)


@pytest.mark.parametrize("widths", [[4], [1, 3], [2, 1, 2], [9]])
def test_a_full_block_waits_for_nothing(gathering, widths):
    jobs = [job(10.0 + index, width=width) for index, width in enumerate(widths)]
    assert add(gathering, *jobs) == jobs
    assert gathering.ripe(1e9) == []


def test_each_key_has_its_own_time(gathering):
    first, second = job(10.0, key="a"), job(11.0, key="b")
    add(gathering, first, second)
    assert gathering.ripe(15.5) == [first]
    assert gathering.due() == 16.0
    assert gathering.ripe(16.0) == [second]


def test_when_the_oldest_leaves_the_time_counts_from_the_next(gathering):
    oldest, next_oldest, other = job(10.0), job(12.0), job(11.0, key="other")
    add(gathering, oldest, next_oldest, other)
    assert gathering.remove(oldest)
    assert not gathering.remove(oldest)
    assert gathering.due() == 16.0
    assert gathering.ripe(16.9) == [other]
    assert gathering.ripe(17.0) == [next_oldest]


def test_what_left_does_not_fill_a_block(gathering):
    left, stays = job(10.0, width=2), job(10.0)
    add(gathering, left, stays)
    gathering.remove(left)
    assert add(gathering, job(11.0, width=2)) == []
    last = job(12.0)
    assert last in add(gathering, last)


def test_a_block_that_everybody_left_is_not_due(gathering):
    alone = job(10.0)
    add(gathering, alone)
    gathering.remove(alone)
    assert gathering.due() == float("inf")
    again = job(12.0)
    add(gathering, again)
    assert gathering.ripe(15.0) == []
    assert gathering.ripe(17.0) == [again]


@pytest.mark.parametrize("leave", ["full", "removed", "ripe"])
def test_what_has_left_is_not_held(gathering, leave):
    """A key holds a point, and that memory on the device."""
    key = Key()
    held = weakref.ref(key)
    each = job(10.0, key=key, width=FULL if leave == "full" else 1)
    add(gathering, each)
    if leave == "removed":
        gathering.remove(each)
    if leave == "ripe":
        gathering.ripe(20.0)
    del key, each
    assert held() is None


def test_a_job_that_could_not_wait_for_so_long_does_not_nor_do_those_that_can_go_with_it(gathering):
    patient, hurried = job(10.0), job(11.0, deadline=16.0)
    assert add(gathering, patient) == []
    assert add(gathering, hurried) == [patient, hurried]
    assert add(gathering, job(20.0, deadline=25.1)) == []


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
def test_it_does_what_a_list_would(operations):
    """The model keeps a list for each key and looks through all of them."""
    gathering, model, now = Gathering(SECONDS), {}, 0.0

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
            assert gathering.add(each, FULL, now) == (model.pop(key) if full or hurried else [])
        elif name == "remove" and waiting:
            each = waiting[arguments[0] % len(waiting)]
            assert gathering.remove(each)
            model[each.key].remove(each)
            if not model[each.key]:
                del model[each.key]
        elif name == "pass":
            now += arguments[0]
            due = [key for key in model if oldest(key) + SECONDS <= now]
            expected = {each for key in due for each in model.pop(key)}
            ripe = gathering.ripe(now)
            assert len(ripe) == len(expected)
            assert set(ripe) == expected
        assert gathering.due() == min((oldest(key) + SECONDS for key in model), default=float("inf"))
        assert (gathering.first() is None) == (not model)
