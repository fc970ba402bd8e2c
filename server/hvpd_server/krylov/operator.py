"""The operator of a run: products at a point, with what the client adds to them.

Each product queues like any other product. If the tenant is over a limit or the queue
is full, the run waits, and does not fail.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from hvpd._wire import codec
from hvpd_server.engine.engine import Engine
from hvpd_server.engine.point import Point
from hvpd_server.errors import Code, ServiceError
from hvpd_server.scheduling.probation import OnWait

_T = TypeVar("_T")


@dataclasses.dataclass
class Work:
    """The call that a run works for, and how it ends."""

    tenant: str = ""
    """The tenant that shares the device."""
    owner: str = ""
    """The owner of points and runs."""
    deadline: float = float("inf")
    """When the caller stops waiting, on time.monotonic's clock."""
    on_wait: OnWait = lambda cancel: None
    """Receives a function that cancels the product while it waits."""
    gone: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Set when the caller is gone, or another request has taken its place."""
    end: Callable[[], object] = lambda: None
    """Ends the call, also while it waits for its client to read."""

    def check(self) -> None:
        """Raise ServiceError if no caller waits for the result any more."""
        if self.gone.is_set():
            raise ServiceError(Code.CANCELLED, "CANCELLED", "the caller ended the run")
        if time.monotonic() >= self.deadline:
            raise ServiceError(
                Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "the deadline passed before the run had ended"
            )

    def wait(self, seconds: float) -> None:
        """Wait for so long, or until the caller is gone."""
        self.gone.wait(min(seconds, max(self.deadline - time.monotonic(), 0.0)))
        self.check()


@dataclasses.dataclass(frozen=True)
class Terms:
    """The terms around a curvature A: scale A + shift I + U C U^T."""

    scale: float = 1.0
    shift: float = 0.0
    U: codec.Array | None = None
    """Array of shape (n, r); None for no such term."""
    C: codec.Array | None = None
    """Symmetric array of shape (r, r)."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the low-rank term."""
        return (self.U.nbytes if self.U is not None else 0) + (self.C.nbytes if self.C is not None else 0)

    def added(self, rows: codec.Array, product: codec.Array) -> codec.Array:
        """Return (scale A + shift I + U C U^T) rows, given the product A rows."""
        if self.scale == 1.0 and not self.shift and self.U is None:
            return product
        dtype = product.dtype.type
        found: codec.Array = product * dtype(self.scale)
        if self.shift:
            found += dtype(self.shift) * rows
        if self.U is not None:
            found += (rows @ self.U) @ self.C @ self.U.T
        return found


class Operator:
    """Multiplies for one run.

    Args:
        engine: Computes.
        point: The point.
        program: The program of the curvature.
        seed: Seed of a curvature that is drawn.
        priority: Priority among the tenant's products.
        terms: The terms around the curvature.

    Attributes:
        n: Elements of a vector.
        dtype: dtype of vectors.
        products: Vectors that were multiplied.
        device_seconds: Seconds of the device for them.
    """

    def __init__(
        self, engine: Engine, point: Point, program: str, *, seed: int = 0, priority: int = 0, terms: Terms
    ) -> None:
        self.engine = engine
        self.point = point
        self.program = program
        self.seed = seed
        self.priority = priority
        self.terms = terms
        self.n = point.objective.columns(program)
        self.dtype = point.objective.dtype
        self.products = 0
        self.device_seconds = 0.0
        self.work = Work()
        """The call to work for now."""
        self.on_turn: Callable[[], None] = lambda: None
        """Called before each launch; raises ServiceError if the run must end."""

    def multiply(self, rows: codec.Array) -> codec.Array:
        """Multiply V[k,n] -> (scale A + shift I + U C U^T) V[k,n].

        Raises:
            ServiceError: The caller is gone, or the product failed.
        """
        most = self.engine.limits.max_block_width
        parts = [self._product(rows[start : start + most]) for start in range(0, len(rows), most)]
        return self.terms.added(rows, parts[0] if len(parts) == 1 else np.concatenate(parts))

    def expect(self, width: int) -> None:
        """Have a program compiled in the background for blocks of so many vectors,
        because many of them follow. Blocks are padded otherwise.
        """
        objective, kernels = self.point.objective, self.point.source.kernels
        if not objective.fixed_bucket and width <= self.engine.limits.max_block_width:
            kernels.request(self.engine.objectives.lane(objective).launches.base(objective, self.program), width)

    def in_turn(self, launch: Callable[[], _T]) -> _T:
        """Return the result of a launch; repeat it while the tenant is over a limit."""
        while True:
            self.work.check()
            self.on_turn()
            try:
                return launch()
            except ServiceError as error:
                if error.retry_after is None:
                    raise
                delay = error.retry_after
            self.work.wait(delay)

    def _product(self, block: codec.Array) -> codec.Array:
        def launch() -> codec.Array:
            work = self.work
            found, info = self.engine.multiply(
                self.point,
                self.program,
                block,
                seed=self.seed,
                tenant=work.tenant,
                priority=self.priority,
                deadline=work.deadline,
                on_queue=work.on_wait,
            )
            self.products += len(block)
            share = len(block) / max(info.batch_width, 1)
            self.device_seconds += info.compute_duration_ns * 1e-9 * share
            return found

        return self.in_turn(launch)
