"""In the fair queue tenants share the device by weight, priorities order one tenant's
jobs, and no job is lost.
"""

import collections
import itertools
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpd_server.scheduling.fair_queue import FairQueue
from hvpd_server.scheduling.job import Job


def job(tenant="", *, key=None, width=1, priority=0, deadline=float("inf")):
    """Return a product. Without a key it shares its launch with no other."""
    return Job(object() if key is None else key, np.zeros((width, 2)), tenant, deadline, priority)


def queue_of(*jobs, weights=None):
    queue = FairQueue(lambda tenant: (weights or {}).get(tenant, 1.0))
    for each in jobs:
        queue.add(each)
    return queue


def launches(queue, room=8, now=0.0):
    """Return all launches until nothing is queued."""
    while (head := queue.head()) is not None:
        launch, stale = queue.take(head, room, now)
        assert not stale
        yield launch


def columns(launch, tenant):
    return sum(len(each.block) for each in launch if each.tenant == tenant)


def tenants(taken):
    """Return the tenants of the launches, of one product each."""
    return [launch[0].tenant for launch in taken]


# Between tenants


def test_tenants_share_the_device_by_weight():
    backlog = [job(tenant) for tenant in ("heavy", "light") for _ in range(80)]
    found = tenants(itertools.islice(launches(queue_of(*backlog, weights={"heavy": 3.0})), 80))
    assert collections.Counter(found) == {"heavy": 60, "light": 20}
    for start in range(0, 80, 4):  # This holds all the time, not only at the end.
        assert 2 <= found[start : start + 4].count("heavy") <= 4


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_is_more_than_nothing(weight):
    with pytest.raises(ValueError, match="a tenant's weight is more than 0"):
        queue_of(job("a"), weights={"a": weight})


def test_tenants_share_vectors_and_not_launches():
    backlog = [job("wide", width=8) for _ in range(10)] + [job("narrow") for _ in range(80)]
    found = tenants(launches(queue_of(*backlog)))
    assert found.count("narrow") == 80
    for turn in range(1, 10):  # Eight narrow launches go with each wide one.
        assert abs(found[: 9 * turn].count("wide") - turn) <= 1


def test_others_with_the_same_key_ride_along_and_are_charged_for_it():
    first, rider, late = job("a", key="k"), job("b", key="k", width=3), job("b")
    others = [job("c") for _ in range(5)]
    taken = list(launches(queue_of(first, rider, late, *others)))
    assert taken[0] == [first, rider]
    assert [late] in taken[4:6]  # c has had its 3 by then.


def test_without_room_for_all_the_tenant_in_turn_goes_first_and_then_the_least_served():
    queue = queue_of(job("greedy", key="other", width=5), job("modest", key="another", width=2), job("first", key="k"))
    assert [len(launch) for launch in itertools.islice(launches(queue), 3)] == [1, 1, 1]
    jobs = [job(tenant, key="k", width=2) for tenant in ("greedy", "modest", "first", "greedy", "modest", "first")]
    for each in jobs:
        queue.add(each)
    assert next(launches(queue, room=6)) == [jobs[2], jobs[5], jobs[1]]


def test_an_idle_tenant_saves_no_share():
    queue = queue_of(*(job("busy") for _ in range(100)))
    list(itertools.islice(launches(queue), 50))
    for _ in range(50):
        queue.add(job("idle"))
    found = tenants(itertools.islice(launches(queue), 20))
    assert collections.Counter(found) == {"busy": 10, "idle": 10}


def test_a_debt_is_not_forgotten_by_coming_back():
    """A tenant that has had a wide launch waits until the other has had as much, even
    if it left the queue for a moment.
    """
    queue = queue_of(*(job("busy") for _ in range(30)), job("wide", width=8))
    taken = launches(queue)
    while next(taken)[0].tenant != "wide":
        pass
    before = queue.head()
    queue.add(job("wide"))
    assert before.tenant == "busy"
    assert 7 <= tenants(taken).index("wide") <= 9


def test_a_tenant_that_joins_many_launches_owes_one_full_launch_at_most():
    queue = queue_of(*(job("other") for _ in range(200)))
    taken = launches(queue)
    for _ in range(20):
        queue.add(job("light", key="k"))
        queue.add(job("rider", key="k", width=7))
        while len(next(taken)) == 1:
            pass
    queue.add(job("rider"))
    assert tenants(taken).index("rider") <= 9


def test_a_product_that_went_past_the_queue_is_charged_and_an_idle_device_forgets():
    queue = queue_of()
    queue.charge("a", 3)
    for tenant in "aabbbb":
        queue.add(job(tenant))
    assert tenants(launches(queue)) in (list("bbbaab"), list("bbbaba"), list("bbbbaa"))
    for tenant in "abab":
        queue.add(job(tenant))
    assert tenants(launches(queue)) == list("abab")


@settings(deadline=None)
@given(
    weights=st.tuples(*[st.sampled_from([0.1, 1.0, 2.5, 7.0])] * 3),
    widths=st.lists(st.tuples(*[st.integers(1, 8)] * 3), min_size=10, max_size=60),
)
def test_no_two_tenants_that_wait_are_ever_further_apart_than_a_launch_each(weights, widths):
    """This is theorem 1 of Goyal, Vin and Cheng, "Start-time fair queueing" (SIGCOMM
    1996).
    """
    names = ("a", "b", "c")
    weight_of = dict(zip(names, weights, strict=True))
    queue = queue_of(
        *(job(name, width=width) for row in widths for name, width in zip(names, row, strict=True)), weights=weight_of
    )
    left = dict.fromkeys(names, len(widths))
    had = dict.fromkeys(names, 0.0)
    apart = collections.defaultdict(list)
    for launch in launches(queue):
        for one, other in itertools.combinations([name for name in names if left[name]], 2):
            apart[one, other].append(had[one] - had[other])
        (name,) = {each.tenant for each in launch}
        had[name] += columns(launch, name) / weight_of[name]
        left[name] -= 1
    for (one, other), differences in apart.items():
        most = 8 / weight_of[one] + 8 / weight_of[other]
        assert max(differences) - min(differences) <= most * (1 + 1e-9)


# Within a tenant


def test_higher_priorities_go_first_and_equals_in_the_order_of_their_arrival():
    priorities = [0, -100, 5, 0, 100, 5, -100, 0]
    jobs = [job(priority=priority) for priority in priorities]
    expected = sorted(jobs, key=lambda each: -each.priority)  # The sort is stable.
    assert [launch for (launch,) in launches(queue_of(*jobs))] == expected


def test_within_one_launch_too_higher_priorities_go_first():
    jobs = [job(key="k", width=2, priority=priority) for priority in (0, 1, 0, 2)]
    assert list(launches(queue_of(*jobs), room=4)) == [[jobs[3], jobs[1]], [jobs[0], jobs[2]]]


def test_a_priority_does_nothing_between_tenants():
    queue = queue_of(*(job("loud", priority=100) for _ in range(20)), *(job("quiet", priority=-100) for _ in range(20)))
    found = tenants(launches(queue))
    assert [found[i : i + 2].count("loud") for i in range(0, 40, 2)] == [1] * 20


# Launches


def test_jobs_that_do_not_fit_are_passed_over_and_too_wide_jobs_go_alone():
    jobs = [job(key="k", width=width) for width in (2, 1, 2, 1, 9, 1)]
    assert list(launches(queue_of(*jobs), room=4)) == [[jobs[0], jobs[1], jobs[3]], [jobs[2], jobs[5]], [jobs[4]]]


def test_cancelled_and_expired_jobs_leave_the_queue_without_a_launch():
    jobs = [job(key="k"), job(key="k", deadline=5.0), job(key="k"), job(key="k", deadline=5.1)]
    jobs[2].cancelled = True
    queue = queue_of(*jobs)
    assert queue.take(queue.head(), 8, 5.0) == ([jobs[0], jobs[3]], [jobs[1], jobs[2]])
    assert queue.head() is None
    assert queue.columns("k") == 0


@pytest.mark.parametrize("leave", ["taken", "removed"])
def test_a_job_that_left_is_not_held_in_memory(leave):
    """A key holds a point, and that memory on the device."""
    each, queue = job(), queue_of()
    each.key = type("Key", (), {})()
    held = weakref.ref(each.key)
    queue.add(each)
    if leave == "taken":
        queue.take(each, 8, 0.0)
    else:
        queue.remove(each)
    del each
    assert held() is None


_OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.sampled_from("abc"),
            st.integers(0, 2),
            st.integers(1, 5),
            st.integers(-1, 1),
            st.booleans(),
        ),
        st.tuples(st.just("remove"), st.integers(0, 99)),
        st.tuples(st.just("take"), st.integers(1, 8)),
    ),
    max_size=60,
)


def check_launch(launch, stale, head, waiting, room, now):
    """Assert that a launch has all valid jobs of its key, as far as there is room."""
    alike = [each for each in waiting if each.key == head.key]
    sound = {each for each in alike if each.deadline > now}
    assert launch[0] is head
    assert set(launch) <= sound
    assert set(stale) <= set(alike) - sound
    assert len(set(launch) | set(stale)) == len(launch) + len(stale)
    width = sum(len(each.block) for each in launch)
    assert len(launch) == 1 or width <= room
    assert width >= room or all(len(each.block) > room - width for each in sound - set(launch))


@settings(deadline=None)
@given(operations=_OPERATIONS)
def test_nothing_is_lost_and_nothing_goes_twice(operations):
    queue, waiting, now = queue_of(), [], 1.0

    def take(room):
        head = queue.head()
        rivals = [each for each in waiting if each.tenant == head.tenant]
        assert head is max(rivals, key=lambda each: each.priority)  # The head is the first job of the highest priority.
        if head.deadline <= now:
            queue.remove(head)
            waiting.remove(head)
            return
        launch, stale = queue.take(head, room, now)
        check_launch(launch, stale, head, waiting, room, now)
        for each in launch + stale:
            waiting.remove(each)

    for name, *arguments in operations:
        if name == "add":
            tenant, key, width, priority, expired = arguments
            waiting.append(job(tenant, key=key, width=width, priority=priority, deadline=now - expired + 0.5))
            queue.add(waiting[-1])
        elif name == "remove" and waiting:
            queue.remove(waiting.pop(arguments[0] % len(waiting)))
        elif name == "take" and waiting:
            take(*arguments)
        for key in range(3):
            alike = [each for each in waiting if each.key == key]
            assert set(queue.jobs(key)) == set(alike)
            assert queue.columns(key) == sum(len(each.block) for each in alike)
    while waiting:
        take(8)
    assert queue.head() is None


# Cost


class Counter:
    """Makes jobs, and counts how often their keys are hashed and compared, and their
    blocks are measured: once for each look at a job.
    """

    def __init__(self):
        self.looks = 0

    def key(self, number):
        return _Key(self, number)

    def job(self, number, tenant, width=1):
        made = job(tenant, key=self.key(number))
        made.block = _Block(self, width)
        return made


class _Key:
    def __init__(self, counter, number):
        self._counter, self._number = counter, number

    def __hash__(self):
        self._counter.looks += 1
        return hash(self._number)

    def __eq__(self, other):
        self._counter.looks += 1
        return self._number == other._number


class _Block:
    def __init__(self, counter, width):
        self._counter, self._width = counter, width

    def __len__(self):
        self._counter.looks += 1
        return self._width


@pytest.mark.parametrize("keys", [1, 50, 4000])
@pytest.mark.parametrize("room", [1, 64])
def test_the_work_for_a_job_does_not_grow_with_how_many_wait(keys, room):
    counter, queue, count = Counter(), queue_of(), 4000
    for number in range(count):
        queue.add(counter.job(number % keys, str(number % 7)))
    cancelled = [counter.job(number % keys, "cancelled") for number in range(count)]
    for each in cancelled:
        queue.add(each)
    for each in reversed(cancelled):
        queue.remove(each)
    assert sum(len(launch) for launch in launches(queue, room)) == count
    assert counter.looks <= 20 * 2 * count


def test_nor_does_it_where_most_do_not_fit():
    counter, queue, count = Counter(), queue_of(), 4000
    for number in range(count):
        queue.add(counter.job(0, str(number % 7), width=2))
    assert sum(len(launch) for launch in launches(queue, room=3)) == count
    assert counter.looks <= 100 * count
