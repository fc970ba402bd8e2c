"""Solves that go on while servers leave and come back."""

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
import scipy.sparse.linalg

import hvpd

_WAIT = 120.0


class Solves:
    """Threads that solve by conjugate gradients until the block ends. Each has its own
    client, and compares each product and each solution with the truth.

    Args:
        address: Address of the servers.
        hessians: The Hessians of registered quadratic objectives, by name.
        count: Number of threads.
    """

    def __init__(self, address: str, hessians: Mapping[str, np.ndarray], count: int) -> None:
        self._address = address
        self._hessians = list(hessians.items())
        self._done = threading.Event()
        self._solved = [threading.Semaphore(0) for _ in range(count)]
        self._pool = ThreadPoolExecutor(count)
        self.counts: list[tuple[int, int, int]] = []
        """After the block, for each thread: the products that it requested, the
        products that were answered, and the repeated calls.
        """

    def __enter__(self) -> Self:
        self._solves = [self._pool.submit(self._solve, number) for number in range(len(self._solved))]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._pool.shutdown()
        if error is None:
            self.counts = [each.result() for each in self._solves]

    def wait_for_each(self) -> None:
        """Wait until each thread has solved once more."""
        for each in self._solved:
            assert each.acquire(timeout=_WAIT)

    def _solve(self, number: int) -> tuple[int, int, int]:
        asked, solved, rng = 0, self._solved[number], np.random.default_rng(number)
        name, A = self._hessians[number % len(self._hessians)]
        with hvpd.connect(self._address, retry_timeout=_WAIT) as client:
            try:
                while not self._done.is_set():
                    H = client.objective(name).at(rng.normal(size=len(A))).hessian()

                    def matvec(v: np.ndarray, H: Any = H) -> np.ndarray:
                        nonlocal asked
                        asked += 1
                        product = H @ v
                        np.testing.assert_allclose(product, A @ v, rtol=1e-9, atol=1e-9)
                        return product

                    b = rng.normal(size=len(A))
                    operator = scipy.sparse.linalg.LinearOperator(A.shape, matvec, dtype=float)
                    solution, code = scipy.sparse.linalg.cg(operator, b, rtol=1e-12, maxiter=5000)
                    assert code == 0
                    np.testing.assert_allclose(solution, np.linalg.solve(A, b), rtol=1e-6, atol=1e-9)
                    solved.release()
            finally:
                solved.release(1000)  # The error is in the thread's result.
            statistics = client.statistics()
        return asked, statistics.vectors, statistics.retries
