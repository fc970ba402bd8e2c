"""Work of a stream that is done side by side."""

import concurrent.futures
import threading

import pytest

from hvpd_server._pipeline import Pipeline, Task

WAIT = 10


@pytest.fixture
def workers():
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        yield pool


def ready(number, size=1):
    return Task(size, lambda: [number, -number])


def test_answers_come_as_they_are_ready(workers):
    held = threading.Event()

    def slow():
        assert held.wait(WAIT)
        return ["slow"]

    answers = Pipeline(workers, 8, 100).answers(iter([Task(1, slow), ready(2)]))
    assert next(answers) == [2, -2]
    held.set()
    assert next(answers) == ["slow"]
    with pytest.raises(StopIteration):
        next(answers)


def test_nothing_arrives():
    assert list(Pipeline(None, 8, 100).answers(iter([]))) == []


@pytest.mark.parametrize(("most", "most_bytes", "size"), [(3, 100, 1), (100, 3, 1), (100, 10, 1000)])
def test_no_more_is_read_than_there_is_room_for(workers, most, most_bytes, size):
    """As many as fit, or one that is larger than all room; one more is in the reader's hands."""
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


def test_an_error_of_reading_comes_after_the_answers_to_what_was_read(workers):
    def arrivals():
        yield ready(1)
        yield ready(2)
        raise ZeroDivisionError

    answers = Pipeline(workers, 8, 100).answers(arrivals())
    assert sorted([next(answers), next(answers)]) == [[1, -1], [2, -2]]
    with pytest.raises(ZeroDivisionError):
        next(answers)


def test_stopped_it_reads_and_answers_no_more(workers):
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


def test_it_tells_when_an_answer_is_the_last_that_is_due(workers):
    more = threading.Event()

    def arrivals():
        yield ready(1)
        assert more.wait(WAIT)
        yield ready(2)

    pipeline = Pipeline(workers, 8, 100)
    for _ in pipeline.answers(arrivals()):
        assert pipeline.last
        more.set()
