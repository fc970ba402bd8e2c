"""The liveness shows a server's work to its supervisor, also after the server's end."""

import os
import queue
import threading
import time

import pytest

from hvpd_server.liveness import Liveness
from hvpd_server.scheduling.probation import Probation

DIGESTS = [digit * 64 for digit in "abc"]


@pytest.fixture
def both():
    """Yield the same memory, for the server and for its supervisor."""
    descriptor = Liveness.share()
    yield Liveness(descriptor), Liveness(descriptor)
    os.close(descriptor)


def test_a_beat(both):
    server, supervisor = both
    assert supervisor.last_beat() == (0.0, 0, 0)
    before = time.monotonic()
    server.beat(7070, 9090)
    beat, port, metrics_port = supervisor.last_beat()
    assert before <= beat <= time.monotonic()
    assert (port, metrics_port) == (7070, 9090)


def test_the_supervisor_sees_running_work_oldest_first_and_no_ended_work(both):
    server, supervisor = both
    assert supervisor.work() == []
    first, second = server.begin(DIGESTS[0]), server.begin(DIGESTS[1])
    with server.working(DIGESTS[2]):
        assert [work.digest for work in supervisor.work()] == DIGESTS
        assert all(0 < work.since <= time.monotonic() for work in supervisor.work())
        server.end(first)
        assert [work.digest for work in supervisor.work()] == DIGESTS[1:]
    server.end(second)
    assert supervisor.work() == []


def test_whether_it_is_compiled_is_seen(both):
    server, supervisor = both
    with server.working(DIGESTS[0], compiling=True), server.working(DIGESTS[1]):
        assert {work.digest: work.compiling for work in supervisor.work()} == {DIGESTS[0]: True, DIGESTS[1]: False}
    with server.working(DIGESTS[2]):  # It takes the place of either.
        assert [work.compiling for work in supervisor.work()] == [False]


def test_the_age_of_the_oldest_work_leaves_compiles_out():
    server = Liveness()
    with server.working(DIGESTS[0], compiling=True):
        assert server.oldest_seconds() == 0
        with server.working(DIGESTS[1]), server.working(DIGESTS[2]):
            (_, oldest, _) = server.work()
            least = time.monotonic() - oldest.since
            assert least <= server.oldest_seconds() <= time.monotonic() - oldest.since
    assert server.oldest_seconds() == 0


def test_renewed_work_counts_from_its_renewal(both):
    server, supervisor = both
    with server.working(DIGESTS[0]):
        (before,) = supervisor.work()
        server.renew()
        (after,) = supervisor.work()
        other = threading.Thread(target=server.renew)  # It has nothing that runs.
        other.start()
        other.join()
        assert supervisor.work() == [after]
    assert after.since > before.since
    server.renew()
    assert supervisor.work() == []


def test_an_error_ends_it_too(both):
    server, supervisor = both
    with pytest.raises(ZeroDivisionError), server.working(DIGESTS[0]):
        raise ZeroDivisionError
    assert supervisor.work() == []


def test_more_at_once_than_there_is_room_for_is_not_seen_and_costs_nothing(both):
    server, supervisor = both
    slots = [server.begin(DIGESTS[number % 3]) for number in range(300)]
    assert len(supervisor.work()) == 255
    for slot in slots:
        server.end(slot)
    assert supervisor.work() == []
    with server.working(DIGESTS[0]):
        assert len(supervisor.work()) == 1


def test_another_server_begins_with_nothing(both):
    server, supervisor = both
    server.beat(1, 2)
    server.begin(DIGESTS[0])
    supervisor.clear()
    assert (supervisor.work(), supervisor.last_beat()) == ([], (0.0, 0, 0))


def test_a_process_without_a_supervisor_has_private_memory():
    liveness, other = Liveness(), Liveness()
    liveness.begin(DIGESTS[0])
    assert (len(liveness.work()), other.work()) == (1, [])


def test_a_suspect_is_seen_only_in_its_turn(both):
    server, supervisor = both
    server.probation = Probation(DIGESTS[:2], seconds=1000)
    waits = queue.SimpleQueue()

    def work():
        with server.working(DIGESTS[1], on_wait=waits.put):
            assert [found.digest for found in supervisor.work()] == [DIGESTS[1]]

    other = threading.Thread(target=work)
    with server.working(DIGESTS[0]):
        other.start()
        waits.get(timeout=60)
        with server.working(DIGESTS[2]):  # This one is no suspect.
            assert {found.digest for found in supervisor.work()} == {DIGESTS[0], DIGESTS[2]}
    other.join(60)
    assert supervisor.work() == []
    assert not other.is_alive()
