"""A device with what is resident on it: a point's way there, and who launches its products."""

import collections
import concurrent.futures
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from hvpd import _check, _codec
from hvpd.v1 import objective_pb2, tensor_pb2
from hvpd_server import _batcher, _kernels, _probes, _sources
from hvpd_server._board import Board
from hvpd_server._checks import LoosePoint
from hvpd_server._errors import Code, ServiceError
from hvpd_server._launches import Launches
from hvpd_server._limits import Limits
from hvpd_server._metrics import Metrics
from hvpd_server._objective import Objective, Placement, array_bytes, tensor_key
from hvpd_server._point import Point, nonfinite
from hvpd_server._relief import relieving
from hvpd_server._residency import Residency, no_room
from hvpd_server._store import Store

_log = logging.getLogger(__name__)


_LOOSE_VECTORS = 6
"""Of n elements, that a check has on the device at a time: two points, a vector and its product."""


def lanes(
    devices: Sequence[_kernels.Device], store: Store, limits: Limits, metrics: Metrics, board: Board
) -> "list[Lane]":
    """One for each device; where there are several, a last one for all together, and then each has half of the memory for each."""
    if len(devices) == 1:
        return [Lane(devices[0], store, limits, metrics, board)]
    half = dataclasses.replace(limits, memory_budget_bytes=limits.memory_budget_bytes // 2)
    together = dataclasses.replace(limits, memory_budget_bytes=half.memory_budget_bytes * len(devices))
    single = [Lane(device, store, half, metrics, board) for device in devices]
    return [*single, Lane(_kernels.Device.together(devices), store, together, metrics, board)]


class Lane:
    """One device, or several that work as one.

    Args:
        device: Where programs run.
        store: What is on disk.
        limits: What may be used.
        metrics: Counts.
        board: Where others see what runs.
    """

    def __init__(self, device: _kernels.Device, store: Store, limits: Limits, metrics: Metrics, board: Board) -> None:
        self._board = board
        self.device = device
        self.budget_bytes = limits.memory_budget_bytes
        self.residency = Residency(
            limits.memory_budget_bytes, metrics.evicted, lambda tenant: limits.tenants(tenant).resident_bytes
        )
        self._store = store
        self._metrics = metrics
        self._expected: dict[Hashable, int] = {}
        self._expecting: collections.Counter[Hashable] = collections.Counter()
        self._objectives = 0
        self._ahead = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="hvpd-read")
        self.launches = Launches(device, self.residency, limits, metrics, board)

    def close(self) -> None:
        """Reads nothing more."""
        self._ahead.shutdown(wait=False, cancel_futures=True)

    @property
    def pending(self) -> int:
        """Vectors that wait for the device."""
        return self.launches.pending

    @property
    def in_flight(self) -> int:
        """Vectors in launches."""
        return self.launches.in_flight

    # Objectives

    def warm(self, objective: Objective) -> list[_sources.Pending]:
        """Compiles what a first point and a first product need, in the background."""
        first = [("value_and_grad", 0), (self.launches.base(objective, "hvp"), self.launches.bucket(objective) or 1)]
        if objective.plan.needs_apply:
            first.append(("prepare", 0))
        for block in objective.bundle.blocks:
            program = f"hvp[{','.join(map(str, block.leaves))}]"
            objective.columns(program)
            first.append((program, self.launches.bucket(objective) or 1))
        return [objective.kernels.request(name, width) for name, width in first]

    def objective(self, digest: str, bundle: objective_pb2.Bundle, programs: _kernels.Programs) -> Objective:
        """An objective to be served here."""
        copies = functools.partial(self.device.copies, data=True)
        return Objective(digest, bundle, programs, self.budget_bytes, parts=len(self.device.parts), copies=copies)

    def load_with(self, bundle: objective_pb2.Bundle) -> tuple[int, int, int]:
        """How much there would be to do here with one more objective: the less, the better it is put here.

        First the bytes of data of all, where what several have counts once; among equals, the bytes that would be new, since
        copies are a waste; then how many objectives there are.
        """
        own = _bytes_of(bundle)
        new = sum(size for key, size in own.items() if key not in self._expected)
        return sum(self._expected.values()) + new, new, self._objectives

    def expect(self, bundle: objective_pb2.Bundle) -> None:
        """Notes that an objective was put here."""
        self._expected |= _bytes_of(bundle)
        self._expecting.update(_bytes_of(bundle).keys())
        self._objectives += 1

    def forget(self, objective: Objective) -> None:
        """Drops an objective that was deleted, with all its points."""
        self._objectives -= 1
        self._expecting.subtract(_bytes_of(objective.bundle).keys())
        for key in [key for key in _bytes_of(objective.bundle) if not self._expecting[key]]:
            del self._expected[key], self._expecting[key]
            self.residency.drop(key)
        self.residency.drop_where(lambda value: isinstance(value, Point) and value.objective is objective)

    def blobs(self) -> set[str]:
        """The digests of the data of all resident points."""
        values = self.residency.values()
        return {digest for value in values if isinstance(value, Point) for digest in value.data_digests}

    # Points

    def create_point(
        self, objective: Objective, data: Sequence[tensor_pb2.Tensor], identity: str, x: _codec.Array, tenant: str = ""
    ) -> Point:
        """Makes a tenant's point resident: x and its data on the device, value and gradient computed."""
        placement = objective.placement(data)
        self._check_room(objective, data, placement)
        self.residency.check_user(tenant, 2 * objective.vector_bytes, "a point", placement.needs)

        def make() -> tuple[Point, int]:
            source = self.source(objective, data, placement)
            self._check_rows(objective, source, x)
            on_device = self._put(x)
            source.kernels.request("value_and_grad").result()
            started = time.perf_counter()
            with self._board.working(objective.digest):
                value, gradient = map(_kernels.host, source.call("value_and_grad", 0, on_device))
            seconds = time.perf_counter() - started
            self._metrics.made(identity)
            digests = tuple(tensor.digest for tensor in data)
            point = Point(
                identity, objective, source, on_device, float(value), gradient, nonfinite(x), digests, seconds
            )
            return point, 2 * objective.vector_bytes

        def load() -> Point:
            point: Point = self.residency.load(identity, "point", make, needs=list(placement.needs))
            return point

        asked = f"a point of {2 * objective.vector_bytes} bytes, with data of {sum(placement.needs.values())}"
        point = relieving(self.residency, load, list(placement.needs), asked)
        self.residency.join(identity, tenant)
        return point

    def _check_room(self, objective: Objective, data: Sequence[tensor_pb2.Tensor], placement: Placement) -> None:
        """Raises ServiceError where a point has no room, whatever is dropped for it; says what would help."""
        try:
            self.residency.check(2 * objective.vector_bytes, "a point", placement.needs)
        except ServiceError as error:
            if error.reason != "MEMORY_BUDGET":
                raise
            if placement.spans:
                rows, row = placement.spans[0].stop, placement.row_bytes
                hint = f" (its data goes through the device in chunks, two at a time, the smallest of {rows} rows of {row} bytes)"
            elif data and not objective.bundle.row_reduction:
                hint = ", or, if it is a mean or a sum over the rows of its data, register it with row_reduction"
            else:
                raise
            raise ServiceError(error.code, error.reason, f"{error}{hint}", error.metadata) from None

    def _check_rows(self, objective: Objective, source: _sources.Source, x: _codec.Array) -> None:
        """Raises ServiceError where data is to be gone through in chunks, and the objective is no mean, or sum, over its rows."""
        if objective.goes_by_rows.is_set() or not isinstance(source, _sources.Streamed):
            return
        with objective.probing:
            if objective.goes_by_rows.is_set():
                return
            near = self.device.put(_probes.nearby(x))
            eps = _check.resolution([leaf.dtype for leaf in objective.bundle.x_leaves], objective.bundle.precision)
            found = _probes.goes_by_rows(
                source,
                objective.programs.for_rows,
                near,
                math.sqrt(eps),
                len(self.device.parts),
                functools.partial(self._board.working, objective.digest),
            )
            if found is False:
                raise ServiceError(
                    Code.INVALID_ARGUMENT,
                    "ROW_REDUCTION",
                    f"objective {objective.digest[:12]} was registered with row_reduction {source.reduction!r}, and its gradient over some "
                    f"rows is not the {source.reduction} of its gradients over two parts of them: so its data cannot be gone through in "
                    "chunks. A mean may have a penalty beside it, a sum may not; register it as what it is, or raise "
                    "`hvpd serve --memory-budget` until the data fits",
                )
            if found:
                objective.goes_by_rows.set()

    def loose_points(self, objective: Objective, turn: Callable[[], None]) -> Callable[[_codec.Array], LoosePoint]:
        """Makes points with the registered data for a check. The data stays, for who comes next; nothing is dropped for it.

        Raises:
            ServiceError: There is no room beside what is resident.
        """
        placement = objective.placement(objective.bundle.data)
        absent = [size for key, size in placement.needs.items() if self.residency.get(key) is None]
        vectors = _LOOSE_VECTORS * objective.vector_bytes
        size_bytes = sum(absent) + vectors + objective.residual_bytes * objective.plan.needs_apply
        if size_bytes > self.residency.free_bytes():
            raise no_room(size_bytes)
        source = self.source(objective, objective.bundle.data, placement, unnoticed=True)

        def at(x: _codec.Array) -> LoosePoint:
            turn()
            self._check_rows(objective, source, x)
            on_device = self.device.put(x)

            resident = source if objective.plan.needs_apply and isinstance(source, _sources.Resident) else None

            def product(row: _codec.Array) -> Any:
                block = _batcher.pad([row], self.launches.bucket(objective) or 1)
                source.kernels.request("apply" if resident else "hvp", len(block)).result()
                with self._board.working(objective.digest):
                    if resident:
                        residuals = resident.residuals(objective.described.residuals, on_device)
                        return _kernels.host(resident.kernels.call("apply", len(block), block, *residuals))[:1]
                    return _kernels.host(source.call("hvp", len(block), on_device, block))[:1]

            source.kernels.request("value_and_grad").result()
            with self._board.working(objective.digest):
                return LoosePoint(source, x, on_device, product, turn)

        return at

    # Data

    def source(
        self,
        objective: Objective,
        data: Sequence[tensor_pb2.Tensor],
        placement: Placement,
        *,
        unnoticed: bool = False,
    ) -> _sources.Source:
        """The data of a point, put where it goes."""
        tensors, kernels = [*objective.bundle.captured, *data], objective.kernels_for(data)
        if isinstance(kernels, _kernels.Kernels):
            return _sources.Resident(kernels, [self.tensor(tensor, unnoticed=unnoticed) for tensor in tensors])
        room_bytes = placement.needs[placement.room_key]
        self.residency.load(placement.room_key, "data", lambda: (True, room_bytes), evict=not unnoticed)
        moving = {len(objective.bundle.captured) + leaf for leaf in objective.bundle.row_leaves}
        parts = [
            self._store.open_tensor(tensor, set_aside=not unnoticed)
            if position in moving
            else self.tensor(tensor, unnoticed=unnoticed)
            for position, tensor in enumerate(tensors)
        ]

        def load(rows: slice) -> list[Any]:
            return [
                self._put(part[rows], data=True, owned=True) if position in moving else part
                for position, part in enumerate(parts)
            ]

        return _sources.Streamed(
            kernels, placement.spans, objective.bundle.row_reduction, load, self._ahead, self._board.renew
        )

    def tensor(self, tensor: tensor_pb2.Tensor, *, unnoticed: bool = False) -> Any:
        """A tensor on the device; unnoticed, nothing is dropped for it, and a corrupt one stays in the store for others to find."""

        def make() -> tuple[Any, int]:
            array = self._store.read_tensor(tensor, set_aside=not unnoticed)
            return self._put(array, data=True), array.nbytes * self.device.copies(array.shape, data=True)

        return self.residency.load(tensor_key(tensor), "data", make, evict=not unnoticed)

    def _put(self, array: _codec.Array, *, data: bool = False, owned: bool = False) -> Any:
        """Copies an array to the device, and counts how long that took."""
        started = time.perf_counter()
        placed = self.device.put(array, data=data, owned=owned)
        self._metrics.put(time.perf_counter() - started)
        return placed

    # Factors

    def factors(self, point: Point, program: str, seed: int | None) -> tuple[list[_codec.Array], float]:
        """The Kronecker factors at a point, in the host's memory, and the seconds that they took."""

        def compute() -> tuple[list[_codec.Array], float]:
            point.source.kernels.request(program).result()
            started = time.perf_counter()
            with self._board.working(point.objective.digest):
                found = [_kernels.host(factor) for factor in point.source.call(program, 0, point.x, seed=seed)]
            return found, time.perf_counter() - started

        return relieving(self.residency, compute, [point.id], program)


def _bytes_of(bundle: objective_pb2.Bundle) -> dict[Hashable, int]:
    return {tensor_key(tensor): array_bytes(tensor) for tensor in [*bundle.captured, *bundle.data]}
