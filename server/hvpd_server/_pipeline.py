"""Work of one stream that is done side by side while more of it arrives. Knows neither gRPC nor what the work is."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Task(NamedTuple, Generic[T]):
    """Something to be done, and answered."""

    size: int
    """Bytes that it holds until its answer has left."""
    run: Callable[[], Sequence[T]]
    """Returns the messages of its answer; does not raise."""


class Pipeline(Generic[T]):
    """Runs tasks as they arrive, and gives their answers as they come.

    What has arrived and not left is bounded: beyond, no more is read until the reader of the answers has taken some.

    Args:
        workers: Where tasks run.
        most: How many at once.
        most_bytes: How much at once; one task may be larger.
    """

    def __init__(self, workers: Executor, most: int, most_bytes: int) -> None:
        self._workers = workers
        self._most = most
        self._most_bytes = most_bytes
        self._changed = threading.Condition()
        self._count = 0
        self._bytes = 0
        self._reading = True
        self._stopped = False
        self._error: Exception | None = None
        self._done: queue.SimpleQueue[tuple[Sequence[T], int] | None] = queue.SimpleQueue()

    @property
    def last(self) -> bool:
        """Whether the answer that is being taken is to the only task that there is."""
        return self._count == 1

    def stop(self) -> None:
        """Nobody waits for answers any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._done.put(None)

    def answers(self, arrivals: Iterator[Task[T]]) -> Iterator[Sequence[T]]:
        """Reads tasks in a thread of its own; yields their answers, each when the one before has been taken.

        Raises:
            Exception: What reading raised, after the answers to what was read before.
        """
        threading.Thread(target=self._read, args=(arrivals,), name="hvpd-stream", daemon=True).start()
        while (found := self._done.get()) is not None:
            answer, size = found
            yield answer
            with self._changed:
                self._count -= 1
                self._bytes -= size
                self._changed.notify_all()
                if not self._reading and not self._count:
                    break
        if self._error is not None and not self._stopped:
            raise self._error

    def _read(self, arrivals: Iterator[Task[T]]) -> None:
        try:
            for task in arrivals:
                with self._changed:
                    self._changed.wait_for(lambda size=task.size: self._stopped or self._fits(size))  # type: ignore[misc]
                    if self._stopped:
                        return
                    self._count += 1
                    self._bytes += task.size
                self._workers.submit(self._run, task)
        except Exception as error:  # noqa: BLE001 - raised again where the answers are read
            self._error = error
        finally:
            with self._changed:
                self._reading = False
                if not self._count:
                    self._done.put(None)

    def _fits(self, size: int) -> bool:
        return not self._count or (self._count < self._most and self._bytes + size <= self._most_bytes)

    def _run(self, task: Task[T]) -> None:
        self._done.put((task.run(), task.size))
