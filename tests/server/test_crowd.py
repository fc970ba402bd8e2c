"""Who is worth waiting for: callers in a simulation, whose time is the test's own."""

import heapq
import itertools
import math

import pytest

from hvpd_server._crowd import Crowd, Habits

ROOM = 64


class Simulation:
    """Callers that each ask again some time after they were answered, one device, and a crowd that says when it launches.

    Args:
        pauses: Of each caller, seconds from an answer to the next question; a function of the number of the answer.
        cost: Seconds of a launch of a width, which is padded to a power of 2.
        crowd: Who decides; without one, what waits is launched at once and whole.
    """

    def __init__(self, pauses, cost, crowd=None):
        self.pauses = pauses
        self.cost = lambda width: cost(1 << (width - 1).bit_length())
        self.crowd = crowd
        self.now = 0.0
        self.widths = []
        self.held = []
        self.answers = 0
        self._order = itertools.count()
        self._events = [(0.0, next(self._order), caller, 0) for caller in range(len(pauses))]
        self._waiting = []

    def run(self, seconds):
        """Vectors a second."""
        ends, before, began = self.now + seconds, self.answers, self.now
        while self.now < ends:
            if not self._waiting:
                self._next()
                continue
            due = self._due()
            if due > self.now:
                since = self.now
                if self._events and self._events[0][0] <= due:
                    self._next()
                else:
                    self.now = due
                self.held.append(self.now - since)
            else:
                self._launch()
        return (self.answers - before) / (self.now - began)

    def _due(self):
        return self.crowd.due(len(self._waiting), ROOM, self.now) if self.crowd else self.now

    def _next(self):
        """The next caller asks."""
        time, _, caller, count = heapq.heappop(self._events)
        self.now = max(self.now, time)
        if self.crowd:
            self.crowd.arrived(1, time)
        self._waiting.append((caller, count))

    def _launch(self):
        width = self.crowd.width(len(self._waiting), ROOM) if self.crowd else len(self._waiting)
        batch, self._waiting = self._waiting[:width], self._waiting[width:]
        started, self.now = self.now, self.now + self.cost(width)
        while self._events and self._events[0][0] <= self.now:
            time, _, caller, count = heapq.heappop(self._events)
            if self.crowd:
                self.crowd.arrived(1, time)
            self._waiting.append((caller, count))
        if self.crowd:
            self.crowd.answered([1] * width, started, self.now)
        self.widths.append(width)
        for place, (caller, count) in enumerate(batch):
            self.answers += 1
            # Answers leave one after the other.
            pause = self.pauses[caller](count) * (1 + place / len(batch)) / 2
            if math.isfinite(pause):
                heapq.heappush(self._events, (self.now + pause, next(self._order), caller, count + 1))


def rates(pauses, cost, seconds=5.0):
    """With a crowd, after it has learned, over without; and the simulation with it."""
    with_crowd = Simulation(pauses, cost, Crowd(Habits()))
    with_crowd.run(seconds / 2)
    with_crowd.widths.clear()
    with_crowd.held.clear()
    found = with_crowd.run(seconds)
    return found / Simulation(pauses, cost).run(seconds), with_crowd


def always(seconds, callers):
    return [lambda count: seconds] * callers


def memory_bound(width):
    return 5e-3 + 5e-5 * width


def compute_bound(width):
    return 4e-3 * width


@pytest.mark.parametrize("callers", [2, 4, 8, 16])
def test_where_wide_launches_cost_as_much_as_narrow_ones_groups_become_one(callers):
    ratio, simulation = rates(always(3e-3, callers), memory_bound)
    assert min(simulation.widths[-20:]) == callers
    assert ratio > 1.15


@pytest.mark.parametrize("callers", [1, 2, 3, 5, 8, 16, 23])
@pytest.mark.parametrize("pause", [1e-4, 3e-3, 3e-2])
@pytest.mark.parametrize("cost", [memory_bound, compute_bound, lambda width: 1e-4], ids=["memory", "compute", "tiny"])
def test_nobody_is_served_worse_for_it(callers, pause, cost):
    ratio, _ = rates(always(pause, callers), cost)
    assert ratio > 0.95


@pytest.mark.parametrize("callers", [9, 11, 13, 23])
def test_launches_are_not_padded_where_that_costs(callers):
    """They would be half empty. Now and then it is tried whether that still is so."""
    ratio, simulation = rates(always(1e-3, callers), compute_bound, seconds=20.0)
    padded = [width for width in simulation.widths if width & (width - 1)]
    assert len(padded) < 0.15 * len(simulation.widths)
    assert ratio > 0.98


def test_who_is_slow_to_ask_is_not_waited_for():
    _, simulation = rates(always(50e-3, 8), memory_bound)
    assert simulation.held == []


def test_who_does_not_come_back_costs_the_others_a_few_short_waits():
    """Eight of sixteen end at some time."""
    pauses = [*always(3e-3, 8), *[lambda count: 3e-3 if count < 200 else math.inf] * 8]
    simulation = Simulation(pauses, memory_bound, Crowd(Habits()))
    simulation.run(1.0)
    assert set(simulation.widths[-20:]) == {16}
    simulation.run(1.0)
    simulation.widths.clear()
    rate = simulation.run(1.0)
    assert simulation.widths.count(8) > 0.9 * len(simulation.widths)
    assert rate > 0.95 * 8 / (3e-3 + memory_bound(8))
    assert max(simulation.held) <= memory_bound(16)


def test_nobody_is_held_longer_than_a_launch_takes():
    """Callers that come back regularly, until they all take for ever."""
    pauses = [lambda count, first=index == 0: 3e-3 if first or count < 200 else math.inf for index in range(16)]
    simulation = Simulation(pauses, memory_bound, Crowd(Habits()))
    simulation.run(10.0)
    assert simulation.widths[-1] == 1
    assert 0 < max(simulation.held) <= memory_bound(16)
    assert simulation.held[-50:] == [] or simulation.run(1.0) > 0.9 / (3e-3 + memory_bound(1))


def test_a_slow_launch_is_forgotten():
    """The first wide launches take long: they were compiled, or something else had the machine."""
    slow = iter([1.0] * 3)
    simulation = Simulation(
        always(3e-3, 16), lambda width: next(slow, memory_bound(width)) if width == 16 else 5e-3, Crowd(Habits())
    )
    simulation.run(20.0)
    assert simulation.widths[-10:] == [16] * 10


@pytest.mark.parametrize(("pause", "held"), [(9e-3, True), (12e-3, False)])
def test_a_narrow_launch_does_not_fill_the_time_until_the_others_come(pause, held):
    """It would end before they come, and on a CPU they come the later for it. They are waited for as long as their launch takes, at most."""
    habits = Habits()
    for width, seconds in ((1, 4.6e-3), (16, 8e-3)):
        habits.launched(width, seconds)
    for _ in range(20):
        habits.returned(pause)
    crowd = Crowd(habits)
    crowd.answered([1] * 16, 1.0 - 8e-3, 1.0)
    crowd.arrived(1, 1.002)
    assert (crowd.due(1, ROOM, 1.002) > 1.002) is held
    assert crowd.due(1, ROOM, 1.002) <= 1.002 + 8e-3


def test_who_has_left_is_awaited_for_a_while_and_not_for_ever():
    habits = Habits()
    for _ in range(20):
        habits.returned(3e-3)
    crowd = Crowd(habits)
    assert crowd.awaited(1.0) == 1.0
    crowd.answered([1] * 2, 0.99, 1.0)
    assert 1.003 < crowd.awaited(1.0) < 1.01
    assert crowd.awaited(1.0) == crowd.awaited(1.002)
    assert crowd.awaited(1.01) == 1.01
    assert crowd.expected == 0


def test_nobody_is_awaited_of_whom_nothing_is_known_or_who_does_not_come_back():
    habits = Habits()
    crowd = Crowd(habits)
    crowd.answered([1] * 2, 0.99, 1.0)
    assert crowd.awaited(1.0) == 1.0
    habits.returned(3e-3)
    assert crowd.awaited(1.0) > 1.0
    for _ in range(20):
        habits.failed()
    assert crowd.awaited(1.0) == 1.0


def test_nothing_is_known_at_first():
    crowd = Crowd(Habits())
    assert crowd.expected == 0
    assert crowd.due(1, ROOM, 5.0) == 5.0
    assert [crowd.width(columns, ROOM) for columns in (1, 3, 9, 100)] == [1, 3, 9, 64]
    crowd.answered([1] * 4, 5.0, 6.0)
    assert crowd.expected == 4
    assert crowd.due(1, ROOM, 6.0) == 6.0


def test_more_may_come_than_were_answered():
    crowd = Crowd(Habits())
    crowd.answered([1, 1], 0.0, 1.0)
    for expected in (1, 0, 0):
        crowd.arrived(1, 1.5)
        assert crowd.expected == expected


def test_who_asks_for_more_or_fewer_vectors_than_before_is_one_caller_all_the_same():
    crowd = Crowd(Habits())
    crowd.answered([16, 1], 0.0, 1.0)
    crowd.answered([4], 1.0, 2.0)
    assert crowd.expected == 21
    for columns, expected in ((4, 17), (1, 16), (2, 0), (8, 0)):
        crowd.arrived(columns, 2.5)
        assert crowd.expected == expected


@pytest.mark.parametrize("widths", [(1,), (8, 1), (16, 1), (64, 1), (32, 8, 1), (2, 3)])
def test_a_lone_caller_is_never_held_back_whatever_it_asks_for(widths):
    crowd, now = Crowd(Habits()), 0.0
    for columns in itertools.islice(itertools.cycle(widths), 300):
        crowd.arrived(columns, now)
        assert crowd.expected == 0
        assert crowd.due(columns, ROOM, now) == now
        crowd.answered([columns], now, now + memory_bound(columns))
        now += memory_bound(columns) + 1e-4


def test_only_so_many_launches_are_followed():
    crowd = Crowd(Habits())
    for launch in range(1000):
        crowd.answered([1] * 3, launch, launch + 0.5)
    assert crowd.expected == 3 * 8


def test_what_was_measured_long_ago_is_doubted_and_never_nothing():
    """After 150,000 launches of another width belief was exactly 0, and what was divided by it ended its caller, and the queue."""
    habits = Habits()
    habits.launched(8, 1e-3)
    for _ in range(200_000):
        habits.launched(1, 0.0)
    assert 0 < habits.seconds(8) < 1e-3
    assert habits.seconds(1) > 0
    crowd = Crowd(habits)
    assert 1 <= crowd.width(9, 64) <= 9
    crowd.answered([1] * 8, 0.0, 1e-3)
    crowd.arrived(8, 2e-3)
    crowd.answered([1] * 8, 3e-3, 4e-3)
    assert crowd.due(1, 64, 4e-3) >= 4e-3
