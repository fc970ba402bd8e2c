"""Work of one stream that runs side by side while more of it arrives. This module knows
neither gRPC nor the work.
"""

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Task(NamedTuple, Generic[T]):
    """One piece of work, and the end of its answer."""

    size: int
    """Bytes that the task holds until its answer has left."""
    run: Callable[[], Sequence[T]]
    """Returns the messages of the answer. Must not raise."""
    end: Callable[[], None]
    """Called once, in any thread, when the answer has left or never will."""


class Pipeline(Generic[T]):
    """Runs tasks as they arrive, and yields their answers as they are done.

    The tasks that have arrived and not left are bounded. At the bound, no more is read
    until the reader of the answers has taken one.

    Args:
        workers: Runs the tasks.
        most: The most tasks at once.
        most_bytes: The most bytes at once. One task may have more.
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
        self._done: queue.SimpleQueue[tuple[Sequence[T], Task[T]] | None] = queue.SimpleQueue()

    @property
    def last(self) -> bool:
        """Whether the answer that is being taken belongs to the only task."""
        return self._count == 1

    def stop(self) -> None:
        """Stop: no thread waits for answers any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._done.put(None)

    def answers(self, arrivals: Generator[Task[T], None, None]) -> Generator[Sequence[T], None, None]:
        """Read tasks in a thread of its own, which closes `arrivals`, and yield their
        answers.

        Raises:
            Exception: Reading raised it. Answers to earlier messages come first.
        """
        reader = threading.Thread(target=self._read, args=(arrivals,), name="hvpd-stream", daemon=True)
        try:
            try:
                reader.start()
            except RuntimeError:  # The system has no more threads.
                self.stop()
                self._read(arrivals)
                raise
            while (found := self._done.get()) is not None:
                answer, task = found
                del found
                try:
                    yield answer
                finally:
                    task.end()
                size = task.size
                del answer, task  # They may be large, and the next answer may come much later.
                with self._changed:
                    self._count -= 1
                    self._bytes -= size
                    self._changed.notify_all()
                    if not self._reading and not self._count:
                        break
            if self._error is not None and not self._stopped:
                raise self._error
        finally:
            self.stop()
            self._drop()

    def _drop(self) -> None:
        """End the tasks whose answers are not taken any more. A stopped pipeline adds
        no tasks.
        """
        while True:
            try:
                found = self._done.get_nowait()
            except queue.Empty:
                return
            if found is not None:
                found[1].end()

    def _read(self, arrivals: Generator[Task[T], None, None]) -> None:
        try:
            for task in arrivals:
                with self._changed:
                    self._changed.wait_for(lambda size=task.size: self._stopped or self._fits(size))  # type: ignore[misc]
                    if self._stopped:
                        task.end()
                        return
                    self._count += 1
                    self._bytes += task.size
                self._workers.submit(self._run, task)
                del task  # It may be large, and the next one may come much later.
        except Exception as error:  # noqa: BLE001 - raised again where the answers are read
            self._error = error
        finally:
            with self._changed:
                self._reading = False
                if not self._count:
                    self._done.put(None)
            arrivals.close()

    def _fits(self, size: int) -> bool:
        return not self._count or (self._count < self._most and self._bytes + size <= self._most_bytes)

    def _run(self, task: Task[T]) -> None:
        answer: Sequence[T] = ()
        try:
            if not self._stopped:
                answer = task.run()
        except Exception as error:  # noqa: BLE001 - raised again where the answers are read
            self._error = error
        with self._changed:
            if not self._stopped:
                self._done.put((answer, task))
                return
        task.end()
