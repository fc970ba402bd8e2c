"""The runs that are resident: found by their id, counted in the memory budget and in
the share of their tenants, and evicted like points.
"""

import contextlib
import secrets
import threading
from collections.abc import Hashable, Iterator
from typing import NamedTuple

from hvpd._wire import codec, protocol
from hvpd_server.device.residency import Residency
from hvpd_server.engine.engine import Engine
from hvpd_server.engine.point import Point
from hvpd_server.errors import Code, ServiceError, invalid
from hvpd_server.krylov.accelerator_space import AcceleratorSpace
from hvpd_server.krylov.device_space import DeviceSpace
from hvpd_server.krylov.host_space import HostSpace
from hvpd_server.krylov.launcher import is_possible
from hvpd_server.krylov.operator import Operator, Work

_RETRY_SECONDS = 0.2
"""Seconds until a computation that was ended may be repeated."""

_POLL_SECONDS = 0.05
"""Seconds between two checks whether a request still waits for its turn."""


class Position(NamedTuple):
    """A position that a client states."""

    point_id: str
    run_id: str
    changes: int
    rows: int
    waiting: int


class Run:
    """One run with its basis.

    Args:
        operator: Multiplies.
        space: The basis.
        owner: The owner.
    """

    def __init__(self, operator: Operator, space: HostSpace | AcceleratorSpace, owner: str) -> None:
        self.id = secrets.token_hex(16)
        self.operator = operator
        self.space = space
        self.owner = owner
        self.changes = 0
        """How often rows were appended after the start, or replaced."""
        self.size_bytes = 0
        """Bytes that the run counts."""
        self._busy = threading.Lock()

    @property
    def point(self) -> Point:
        """The point that the run needs."""
        return self.operator.point

    @property
    def key(self) -> tuple[str, str]:
        """The key of the run's entry on the device."""
        return "run", self.id

    @contextlib.contextmanager
    def working(self, work: Work) -> Iterator[None]:
        """Let one request at a time use the run. A new request ends the one before it,
        whose client has gone or has given up.
        """
        self.operator.work.gone.set()
        while not self._busy.acquire(timeout=_POLL_SECONDS):
            work.check()
            self.operator.work.gone.set()
            self.operator.work.end()
        try:
            self.operator.work = work
            work.check()
            yield
        finally:
            self._busy.release()


class Runs:
    """The runs of all clients.

    Args:
        engine: Holds points and computes products.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def start(self, operator: Operator, rows: codec.Array, steps: int, reorthogonalize: str, work: Work) -> Run:
        """Return a new run that starts with orthonormal rows, and has memory for steps.

        Raises:
            ServiceError: There is no room for the basis.
        """
        space = self._space(operator, len(rows), reorthogonalize)
        run = Run(operator, space, work.owner)
        operator.on_turn = lambda: self._touch(run)
        residency, point = self._residency(run), operator.point
        room_rows, run.size_bytes = self._room(run, len(rows) * (steps + 1), len(rows), point.id)
        residency.put(run.key, "run", run, run.size_bytes, needs=[point.id])
        residency.join(run.key, work.owner)
        space.reserve(room_rows)
        space.begin(rows)
        return run

    def _space(self, operator: Operator, block: int, reorthogonalize: str) -> HostSpace | AcceleratorSpace:
        """Return an empty space, in the best place for its steps."""
        if reorthogonalize != "full" or operator.terms.U is not None or not is_possible(operator):
            return HostSpace(operator, reorthogonalize)
        objective = operator.point.objective
        if self._engine.objectives.lane(objective).device.platform == "cpu" and not objective.leaves:
            return DeviceSpace(operator)
        return AcceleratorSpace(operator) if block == 1 else HostSpace(operator, reorthogonalize)

    @contextlib.contextmanager
    def holding(self, operator: Operator, size_bytes: int, what: str) -> Iterator[None]:
        """Count the memory of a computation while it runs.

        Raises:
            ServiceError: There is no room.
        """
        residency = self._engine.objectives.lane(operator.point.objective).residency
        key, owner, point = ("computation", secrets.token_hex(16)), operator.work.owner, operator.point
        what = f"{what} of {operator.n} elements each takes {size_bytes} bytes. A computation"
        residency.check(size_bytes, what, {point.id: 0})
        residency.check_user(owner, size_bytes, what, {point.id: 0})
        residency.put(key, "run", operator, size_bytes, needs=[point.id])
        residency.join(key, owner)

        def touch() -> None:
            if residency.get(key) is None:
                raise ServiceError(
                    Code.RESOURCE_EXHAUSTED,
                    "MEMORY_BUDGET",
                    "the computation was ended, because other work needed its memory: repeat it",
                    retry_after=_RETRY_SECONDS,
                )

        operator.on_turn = touch
        try:
            yield
        finally:
            residency.drop(key)

    def room_bytes(self, operator: Operator) -> int:
        """Return the bytes that a computation should take at most: a quarter of what
        its tenant may have.
        """
        engine = self._engine
        limit = engine.limits.tenants(operator.work.owner).resident_bytes
        budget = engine.objectives.lane(operator.point.objective).residency.budget_bytes
        return (budget if limit is None else min(limit, budget)) // 4

    def find(self, position: Position, owner: str) -> Run:
        """Return a run of a tenant.

        Raises:
            ServiceError: The run is not resident, or belongs to another point.
        """
        for lane in self._engine.lanes:
            run: Run | None = lane.residency.get(("run", position.run_id), owner)
            if run is not None:
                if run.operator.point.id != position.point_id:
                    raise invalid(
                        "RUN_OF_ANOTHER_POINT",
                        f"run {position.run_id[:12]} belongs to point {run.operator.point.id[:12]}, and the request states point "
                        f"{position.point_id[:12]}: use the run with the operator that started it",
                    )
                return run
        raise _not_resident(position.run_id)

    def go_to(self, run: Run, position: Position) -> None:
        """Go back to the position of a request.

        Raises:
            ServiceError: NOT_FOUND with reason RUN_NOT_RESIDENT: that is impossible.
        """
        if run.changes != position.changes or not run.space.rewind(position.rows, position.waiting):
            raise _not_resident(run.id)

    def extend(self, run: Run, rows: int) -> None:
        """Get memory for more rows of the basis.

        Raises:
            ServiceError: There is no room. The run is as before.
        """
        total, waiting = run.space.rows + rows, run.space.waiting
        if min(self._bytes(run, choice, waiting) for choice in run.space.room_rows(total)) > run.size_bytes:
            room_rows, size_bytes = self._room(run, total, waiting, run.key)
            if not self._residency(run).resize(run.key, size_bytes):
                raise _not_resident(run.id)
            run.size_bytes = size_bytes
            run.space.reserve(room_rows)

    def pin(self, run: Run, seconds: int) -> None:
        """Keep a run until it has not been used for `seconds`; 0 removes the pin."""
        self._residency(run).pin(run.key, seconds, run.owner)

    def close(self, run: Run) -> None:
        """Free a run."""
        run.operator.work.gone.set()
        self._residency(run).drop(run.key)

    def _residency(self, run: Run) -> Residency:
        return self._engine.objectives.lane(run.operator.point.objective).residency

    def _touch(self, run: Run) -> None:
        """Note a use of the run and of its point.

        Raises:
            ServiceError: It was evicted.
        """
        if self._residency(run).get(run.key) is None:
            raise _not_resident(run.id)

    def _bytes(self, run: Run, room_rows: int, waiting: int) -> int:
        operator = run.operator
        vectors = room_rows + _BESIDE * waiting
        return vectors * operator.n * operator.dtype.itemsize + operator.terms.size_bytes

    def _room(self, run: Run, rows: int, waiting: int, beside: Hashable) -> tuple[int, int]:
        """Return the rows that a run has memory for, and its bytes.

        Args:
            run: The run.
            rows: Rows that its basis needs.
            waiting: Rows of its block.
            beside: The key of the run, or of its point if the run is new.

        Raises:
            ServiceError: There is no room.
        """
        operator, residency = run.operator, self._residency(run)
        choices = run.space.room_rows(rows)
        for choice in choices:
            size_bytes = self._bytes(run, choice, waiting)
            more = size_bytes - run.size_bytes
            what = (
                f"a run that keeps {choice + _BESIDE * waiting} vectors of {operator.n} {operator.dtype} ({size_bytes} bytes), of "
                f"which {more} bytes are new"
            )
            try:
                residency.check(more, what, {beside: 0})
                residency.check_user(run.owner, more, what, {beside: 0})
            except ServiceError:
                if choice == choices[-1]:
                    raise
            else:
                break
        return choice, size_bytes


_BESIDE = 3
"""Blocks of vectors beside the basis: a product, its copy, and the next block."""


def check_pin(seconds: int) -> None:
    """Raise ServiceError if a pin has an invalid number of seconds."""
    if not 0 <= seconds <= protocol.MAX_PIN_SECONDS:
        raise invalid("PIN_SECONDS", f"pin_seconds must be from 0 to {protocol.MAX_PIN_SECONDS}, got {seconds}")


def _not_resident(run_id: str) -> ServiceError:
    return ServiceError(
        Code.NOT_FOUND,
        "RUN_NOT_RESIDENT",
        f"this tenant has no run {_shown(run_id)} in the state that the request starts from (evicted, closed, of another tenant, or "
        "the server restarted): start the run again",
    )


def _shown(run_id: str) -> str:
    return run_id[:12] if run_id.isalnum() else "of this id"
