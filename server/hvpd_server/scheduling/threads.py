"""A pool of threads that goes on if the system has no further thread."""

import concurrent.futures


class Threads(concurrent.futures.ThreadPoolExecutor):
    """A pool of threads, of which the first one starts at once.

    If the system has no further thread, a call waits for one of the pool's own.
    Otherwise `submit` would raise an error, and gRPC's server would end its loop by it.

    Args:
        most: Most threads.
        name: Beginning of their names.

    Raises:
        RuntimeError: Not even one thread can be started.
    """

    def __init__(self, most: int, name: str) -> None:
        super().__init__(most, thread_name_prefix=name)
        self.submit(int)

    def _adjust_thread_count(self) -> None:
        try:
            super()._adjust_thread_count()
        except RuntimeError:
            if not self._threads:
                raise
