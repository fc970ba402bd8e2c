"""The hold-back, in a simulation of callers and a device."""

import heapq
import itertools
import math

import pytest

from hvpd_server.scheduling.holdback import Holdback, Timing

pytestmark = pytest.mark.slow

ROOM = 64


class Simulation:
    """Callers that ask again some time after each answer, one device, and a hold-back.

    Args:
        pauses: For each caller, the seconds from an answer to its next product, as a
            function of the number of the answer.
        cost: Seconds of a launch of a width, which is padded to a power of 2.
        holdback: The hold-back. None launches all waiting products at once.
    """

    def __init__(self, pauses, cost, holdback=None):
        self.pauses = pauses
        self.cost = lambda width: cost(1 << (width - 1).bit_length())
        self.holdback = holdback
        self.now = 0.0
        self.widths = []
        self.held = []
        self.answers = 0
        self._order = itertools.count()
        self._events = [(0.0, next(self._order), caller, 0) for caller in range(len(pauses))]
        self._waiting = []

    def run(self, seconds):
        """Return the vectors a second."""
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
        return self.holdback.due(len(self._waiting), ROOM, self.now) if self.holdback else self.now

    def _next(self):
        """Let the next caller ask."""
        time, _, caller, count = heapq.heappop(self._events)
        self.now = max(self.now, time)
        if self.holdback:
            self.holdback.arrived(1, time)
        self._waiting.append((caller, count))

    def _launch(self):
        width = self.holdback.width(len(self._waiting), ROOM) if self.holdback else len(self._waiting)
        batch, self._waiting = self._waiting[:width], self._waiting[width:]
        started, self.now = self.now, self.now + self.cost(width)
        while self._events and self._events[0][0] <= self.now:
            time, _, caller, count = heapq.heappop(self._events)
            if self.holdback:
                self.holdback.arrived(1, time)
            self._waiting.append((caller, count))
        if self.holdback:
            self.holdback.answered([1] * width, started, self.now)
        self.widths.append(width)
        for place, (caller, count) in enumerate(batch):
            self.answers += 1
            # Answers leave one after the other.
            pause = self.pauses[caller](count) * (1 + place / len(batch)) / 2
            if math.isfinite(pause):
                heapq.heappush(self._events, (self.now + pause, next(self._order), caller, count + 1))


def rates(pauses, cost, seconds=5.0):
    """Return the rate with a hold-back that has learned, over the rate without, and the
    simulation with it.
    """
    with_holdback = Simulation(pauses, cost, Holdback(Timing()))
    with_holdback.run(seconds / 2)
    with_holdback.widths.clear()
    with_holdback.held.clear()
    found = with_holdback.run(seconds)
    return found / Simulation(pauses, cost).run(seconds), with_holdback


def always(seconds, callers):
    return [lambda count: seconds] * callers


def memory_bound(width):
    return 5e-3 + 5e-5 * width


def compute_bound(width):
    return 4e-3 * width


@pytest.mark.parametrize("callers", [2, 4, 8, 16])
def test_groups_of_callers_become_one_if_wide_launches_are_cheap(callers):
    ratio, simulation = rates(always(3e-3, callers), memory_bound)
    assert min(simulation.widths[-20:]) == callers
    assert ratio > 1.15


@pytest.mark.parametrize("callers", [1, 2, 3, 5, 8, 16, 23])
@pytest.mark.parametrize("pause", [1e-4, 3e-3, 3e-2])
@pytest.mark.parametrize("cost", [memory_bound, compute_bound, lambda width: 1e-4], ids=["memory", "compute", "tiny"])
def test_a_holdback_never_serves_callers_worse(callers, pause, cost):
    ratio, _ = rates(always(pause, callers), cost)
    assert ratio > 0.95


@pytest.mark.parametrize("callers", [9, 11, 13, 23])
def test_launches_are_not_padded_where_that_costs(callers):
    """Wide launches would be half empty. Now and then the hold-back tries whether that
    still holds.
    """
    ratio, simulation = rates(always(1e-3, callers), compute_bound, seconds=20.0)
    padded = [width for width in simulation.widths if width & (width - 1)]
    assert len(padded) < 0.15 * len(simulation.widths)
    assert ratio > 0.98


def test_slow_callers_are_not_waited_for():
    _, simulation = rates(always(50e-3, 8), memory_bound)
    assert simulation.held == []


def test_callers_that_leave_cost_the_others_a_few_short_waits():
    """Eight of sixteen callers leave."""
    pauses = [*always(3e-3, 8), *[lambda count: 3e-3 if count < 200 else math.inf] * 8]
    simulation = Simulation(pauses, memory_bound, Holdback(Timing()))
    simulation.run(1.0)
    assert set(simulation.widths[-20:]) == {16}
    simulation.run(1.0)
    simulation.widths.clear()
    rate = simulation.run(1.0)
    assert simulation.widths.count(8) > 0.9 * len(simulation.widths)
    assert rate > 0.95 * 8 / (3e-3 + memory_bound(8))
    assert max(simulation.held) <= memory_bound(16)


def test_a_launch_is_held_back_no_longer_than_a_launch_takes():
    """Callers return regularly, until all but one leave."""
    pauses = [lambda count, first=index == 0: 3e-3 if first or count < 200 else math.inf for index in range(16)]
    simulation = Simulation(pauses, memory_bound, Holdback(Timing()))
    simulation.run(10.0)
    assert simulation.widths[-1] == 1
    assert 0 < max(simulation.held) <= memory_bound(16)
    assert simulation.held[-50:] == [] or simulation.run(1.0) > 0.9 / (3e-3 + memory_bound(1))


def test_a_slow_launch_is_forgotten():
    """The first wide launches take long, for instance because they were compiled."""
    slow = iter([1.0] * 3)
    simulation = Simulation(
        always(3e-3, 16), lambda width: next(slow, memory_bound(width)) if width == 16 else 5e-3, Holdback(Timing())
    )
    simulation.run(20.0)
    assert simulation.widths[-10:] == [16] * 10


@pytest.mark.parametrize(("pause", "held"), [(9e-3, True), (12e-3, False)])
def test_a_narrow_launch_does_not_fill_the_time_until_the_others_return(pause, held):
    """The narrow launch would end before they return and, on a CPU, would delay them.
    The wait is at most as long as their launch.
    """
    timing = Timing()
    for width, seconds in ((1, 4.6e-3), (16, 8e-3)):
        timing.launched(width, seconds)
    for _ in range(20):
        timing.returned(pause)
    holdback = Holdback(timing)
    holdback.answered([1] * 16, 1.0 - 8e-3, 1.0)
    holdback.arrived(1, 1.002)
    assert (holdback.due(1, ROOM, 1.002) > 1.002) is held
    assert holdback.due(1, ROOM, 1.002) <= 1.002 + 8e-3


def test_callers_that_left_are_expected_for_a_while_only():
    timing = Timing()
    for _ in range(20):
        timing.returned(3e-3)
    holdback = Holdback(timing)
    assert holdback.expected_until(1.0) == 1.0
    holdback.answered([1] * 2, 0.99, 1.0)
    assert 1.003 < holdback.expected_until(1.0) < 1.01
    assert holdback.expected_until(1.0) == holdback.expected_until(1.002)
    assert holdback.expected_until(1.01) == 1.01
    assert holdback.expected == 0


def test_unknown_or_unreliable_callers_are_not_expected():
    timing = Timing()
    holdback = Holdback(timing)
    holdback.answered([1] * 2, 0.99, 1.0)
    assert holdback.expected_until(1.0) == 1.0
    timing.returned(3e-3)
    assert holdback.expected_until(1.0) > 1.0
    for _ in range(20):
        timing.missed()
    assert holdback.expected_until(1.0) == 1.0


def test_a_new_holdback_holds_nothing_back():
    holdback = Holdback(Timing())
    assert holdback.expected == 0
    assert holdback.due(1, ROOM, 5.0) == 5.0
    assert [holdback.width(columns, ROOM) for columns in (1, 3, 9, 100)] == [1, 3, 9, 64]
    holdback.answered([1] * 4, 5.0, 6.0)
    assert holdback.expected == 4
    assert holdback.due(1, ROOM, 6.0) == 6.0


def test_more_may_come_than_were_answered():
    holdback = Holdback(Timing())
    holdback.answered([1, 1], 0.0, 1.0)
    for expected in (1, 0, 0):
        holdback.arrived(1, 1.5)
        assert holdback.expected == expected


def test_a_caller_may_ask_for_another_number_of_vectors():
    holdback = Holdback(Timing())
    holdback.answered([16, 1], 0.0, 1.0)
    holdback.answered([4], 1.0, 2.0)
    assert holdback.expected == 21
    for columns, expected in ((4, 17), (1, 16), (2, 0), (8, 0)):
        holdback.arrived(columns, 2.5)
        assert holdback.expected == expected


@pytest.mark.parametrize("widths", [(1,), (8, 1), (16, 1), (64, 1), (32, 8, 1), (2, 3)])
def test_a_lone_caller_is_never_held_back(widths):
    holdback, now = Holdback(Timing()), 0.0
    for columns in itertools.islice(itertools.cycle(widths), 300):
        holdback.arrived(columns, now)
        assert holdback.expected == 0
        assert holdback.due(columns, ROOM, now) == now
        holdback.answered([columns], now, now + memory_bound(columns))
        now += memory_bound(columns) + 1e-4


def test_only_so_many_launches_are_followed():
    holdback = Holdback(Timing())
    for launch in range(1000):
        holdback.answered([1] * 3, launch, launch + 0.5)
    assert holdback.expected == 3 * 8


def test_the_confidence_in_an_old_time_falls_and_is_never_zero():
    """After 150,000 launches of another width it once was exactly 0. A division by it
    ended the caller, and the queue.
    """
    timing = Timing()
    timing.launched(8, 1e-3)
    for _ in range(200_000):
        timing.launched(1, 0.0)
    assert 0 < timing.seconds(8) < 1e-3
    assert timing.seconds(1) > 0
    holdback = Holdback(timing)
    assert 1 <= holdback.width(9, 64) <= 9
    holdback.answered([1] * 8, 0.0, 1e-3)
    holdback.arrived(8, 2e-3)
    holdback.answered([1] * 8, 3e-3, 4e-3)
    assert holdback.due(1, 64, 4e-3) >= 4e-3
