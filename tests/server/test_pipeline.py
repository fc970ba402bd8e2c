"""A stream's tasks run side by side."""

import concurrent.futures
import threading

import pytest

from hvpd_server.rpc.pipeline import Pipeline, Task

WAIT = 10


@pytest.fixture
def workers():
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        yield pool


def nothing():
    pass


def ready(number, size=1, end=nothing):
    return Task(size, lambda: [number, -number], end)


def given(*tasks):
    yield from tasks


def test_answers_come_as_they_are_ready(workers):
    held = threading.Event()

    def slow():
        assert held.wait(WAIT)
        return ["slow"]

    answers = Pipeline(workers, 8, 100).answers(given(Task(1, slow, nothing), ready(2)))
    assert next(answers) == [2, -2]
    held.set()
    assert next(answers) == ["slow"]
    with pytest.raises(StopIteration):
        next(answers)


def test_nothing_arrives():
    assert list(Pipeline(None, 8, 100).answers(given())) == []


@pytest.mark.parametrize(("most", "most_bytes", "size"), [(3, 100, 1), (100, 3, 1), (100, 10, 1000)])
def test_no_more_is_read_than_there_is_room_for(workers, most, most_bytes, size):
    """As many tasks as fit are taken, or one that is larger. The reader has read one
    more.
    """
    taken, fits = [], 3 if size == 1 else 1

    def arrivals():
        for number in range(50):
            taken.append(number)
            yield ready(number, size)

    pipeline = Pipeline(workers, most, most_bytes)
    answers = pipeline.answers(arrivals())
    found = []
    for count, answer in enumerate(answers):
        assert len(taken) <= count + fits + 1
        found.append(answer)
    assert sorted(first for first, _ in found) == list(range(50))


def test_an_error_of_reading_comes_after_earlier_answers(workers):
    def arrivals():
        yield ready(1)
        yield ready(2)
        raise ZeroDivisionError

    answers = Pipeline(workers, 8, 100).answers(arrivals())
    assert sorted([next(answers), next(answers)]) == [[1, -1], [2, -2]]
    with pytest.raises(ZeroDivisionError):
        next(answers)


def test_a_stopped_pipeline_reads_and_answers_no_more(workers):
    ended, seen = threading.Event(), threading.Event()

    def arrivals():
        try:
            for number in range(1000):
                if number == 3:
                    seen.set()
                yield ready(number)
        finally:
            ended.set()

    pipeline = Pipeline(workers, 2, 100)
    answers = pipeline.answers(arrivals())
    next(answers)
    next(answers)
    assert seen.wait(WAIT)
    pipeline.stop()
    list(answers)
    del answers
    assert ended.wait(WAIT)


def test_last_is_true_for_the_last_answer_only(workers):
    more = threading.Event()

    def arrivals():
        yield ready(1)
        assert more.wait(WAIT)
        yield ready(2)

    pipeline = Pipeline(workers, 8, 100)
    for _ in pipeline.answers(arrivals()):
        assert pipeline.last
        more.set()


# However a stream ends, each task ends once


class Ends:
    """Counts the ends of each task."""

    def __init__(self):
        self.counts = []
        self._changed = threading.Condition()

    def task(self, run=list):
        number = len(self.counts)
        self.counts.append(0)

        def end():
            with self._changed:
                self.counts[number] += 1
                self._changed.notify_all()

        return Task(1, run, end)

    def all(self):
        """Wait until each task has ended; return whether each ended once."""
        with self._changed:
            assert self._changed.wait_for(lambda: all(self.counts), WAIT)
        return set(self.counts) <= {1}


def test_a_task_ends_when_its_answer_was_taken_and_not_before(workers):
    ends = Ends()
    answers = Pipeline(workers, 8, 100).answers(given(*(ends.task() for _ in range(3))))
    for count, _ in enumerate(answers):
        assert sum(ends.counts) == count
    assert ends.counts == [1, 1, 1]


@pytest.mark.parametrize("stopped_first", [True, False])
@pytest.mark.parametrize("taken", range(4))
def test_a_task_ends_although_its_answer_is_not_taken(workers, taken, stopped_first):
    """Of eight tasks some are answered, some are computed, one waits for room, and one
    is not read.
    """
    ends, held, computing = Ends(), threading.Event(), threading.Semaphore(0)
    closed = threading.Event()

    def slow():
        computing.release()
        assert held.wait(WAIT)
        return ["late"]

    def arrivals():
        try:
            for number in range(8):
                yield ends.task(slow if 4 <= number < 6 else list)
        finally:
            closed.set()

    pipeline = Pipeline(workers, 6, 100)
    answers = pipeline.answers(arrivals())
    for _ in range(taken):
        next(answers)
    if taken:  # The reader goes on.
        assert computing.acquire(timeout=WAIT)
        assert computing.acquire(timeout=WAIT)
    if stopped_first:
        pipeline.stop()
    answers.close()
    held.set()
    assert taken == 0 or closed.wait(WAIT)
    assert ends.all()


def test_a_task_that_fails_ends_and_so_does_its_stream(workers):
    ends = Ends()

    def fails():
        raise ZeroDivisionError

    answers = Pipeline(workers, 8, 100).answers(given(ends.task(fails), ends.task()))
    with pytest.raises(ZeroDivisionError):
        list(answers)
    assert ends.all()


def test_tasks_end_if_there_is_no_thread_to_read(workers, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    ends = Ends()
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="thread"):
        list(Pipeline(workers, 8, 100).answers(given(ends.task(), ends.task())))
    assert ends.counts == [1, 0]  # The second was not read.
