"""A lane: one device, its resident values, and the launches of its products.
Points are made here.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

from hvpd._check import verdicts
from hvpd._wire import codec
from hvpd.v1 import objective_pb2, tensor_pb2
from hvpd_server.device import data_sources
from hvpd_server.device.device import Device, host
from hvpd_server.device.memory_relief import with_relief
from hvpd_server.device.programs import Kernels, Programs
from hvpd_server.device.residency import Residency, no_room
from hvpd_server.engine import probes
from hvpd_server.engine.launches import Launches
from hvpd_server.engine.objective import Objective, Placement, array_bytes, tensor_key
from hvpd_server.engine.point import Point, nonfinite
from hvpd_server.engine.registration_checks import LoosePoint
from hvpd_server.errors import ServiceError, invalid
from hvpd_server.liveness import Liveness
from hvpd_server.scheduling import blocks
from hvpd_server.scheduling.probation import OnWait
from hvpd_server.scheduling.threads import Threads
from hvpd_server.store.store import Store
from hvpd_server.telemetry.metrics import Metrics
from hvpd_server.tenancy.limits import Limits

_log = logging.getLogger(__name__)

_LOOSE_VECTORS = 6
"""Vectors of n elements that a check has on the device at a time: two points, a vector
and its product.
"""


def lanes_of(
    devices: Sequence[Device],
    store: Store,
    limits: Limits,
    metrics: Metrics,
    liveness: Liveness,
    group: Device | None = None,
) -> "list[Lane]":
    """Return a lane for each device. If there are several devices, a last lane has all
    of them together, and each lane has half of the memory. In a group, the last lane
    has the devices of all processes.
    """
    if len(devices) == 1 and group is None:
        return [Lane(devices[0], store, limits, metrics, liveness)]
    all_devices = group or Device.together(devices)
    count = len(devices) if group is None else len(group.parts)
    half = dataclasses.replace(limits, memory_budget_bytes=limits.memory_budget_bytes // 2)
    together = dataclasses.replace(limits, memory_budget_bytes=half.memory_budget_bytes * count)
    single = [Lane(device, store, half, metrics, liveness) for device in devices]
    return [*single, Lane(all_devices, store, together, metrics, liveness)]


class Lane:
    """One device, or several that work as one.

    Args:
        device: The device.
        store: The store, with data.
        limits: Limits of the server.
        metrics: Counters.
        liveness: Shows the supervisor the running work.
    """

    def __init__(self, device: Device, store: Store, limits: Limits, metrics: Metrics, liveness: Liveness) -> None:
        self._liveness = liveness
        self.device = device
        self.budget_bytes = limits.memory_budget_bytes
        self.residency = Residency(
            limits.memory_budget_bytes, metrics.evicted, lambda tenant: limits.tenants(tenant).resident_bytes
        )
        self._store = store
        self._metrics = metrics
        self._expected: dict[Hashable, int] = {}
        self._expecting: collections.Counter[Hashable] = collections.Counter()
        self._served: dict[str, Mapping[Hashable, int]] = {}  # By objective, the bytes of its data.
        self._ahead = Threads(1, "hvpd-read")
        self.launches = Launches(device, self.residency, limits, metrics, liveness)

    def close(self) -> None:
        """Stop reading ahead."""
        self._ahead.shutdown(wait=False, cancel_futures=True)

    # Objectives

    def warm(self, objective: Objective) -> list[data_sources.Pending]:
        """Start, and return, the compiles that a first point and product need."""
        first = [("value_and_grad", 0), (self.launches.base(objective, "hvp"), self.launches.bucket(objective) or 1)]
        if objective.plan.needs_apply:
            first.append(("prepare", 0))
        for block in objective.bundle.blocks:
            program = f"hvp[{','.join(map(str, block.leaves))}]"
            objective.columns(program)
            first.append((program, self.launches.bucket(objective) or 1))
        return [objective.kernels.request(name, width) for name, width in first]

    def objective(self, digest: str, bundle: objective_pb2.Bundle, programs: Programs) -> Objective:
        """Return an objective that is served here."""
        copies = functools.partial(self.device.copies, data=True)
        parts = len(self.device.parts)
        by_leaf = self.device.leaf_copies if bundle.sharded_parameters and parts > 1 else None
        return Objective(digest, bundle, programs, self.budget_bytes, parts=parts, leaf_copies=by_leaf, copies=copies)

    def load_with(self, bundle: objective_pb2.Bundle) -> tuple[int, int, int]:
        """Return the load of this lane with one more objective, as a tuple to compare.

        First come the bytes of data of all objectives, with shared data counted once.
        Then come the bytes that would be new, because copies are a waste, and then the
        number of objectives.
        """
        own = _bytes_of(bundle)
        new = sum(size for key, size in own.items() if key not in self._expected)
        return sum(self._expected.values()) + new, new, len(self._served)

    def expect(self, digest: str, bundle: objective_pb2.Bundle) -> None:
        """Record that an objective is served here."""
        self._served[digest] = own = _bytes_of(bundle)
        self._expected |= own
        self._expecting.update(own.keys())

    def forget(self, digest: str) -> None:
        """Drop an objective that was deleted, with all its points."""
        own = self._served.pop(digest)
        self._expecting.subtract(own.keys())
        for key in [key for key in own if not self._expecting[key]]:
            del self._expected[key], self._expecting[key]
            self.residency.drop(key)
        self.residency.drop_where(lambda value: isinstance(value, Point) and value.objective.digest == digest)

    def drop_points(self, objective: Objective) -> None:
        """Drop the points of an objective that is unloaded."""
        self.residency.drop_where(lambda value: isinstance(value, Point) and value.objective is objective)

    def pinned(self) -> set[str]:
        """Return the digests of objectives with pinned points, or pinned runs."""
        points = [getattr(value, "point", value) for value in self.residency.pinned()]
        return {point.objective.digest for point in points if isinstance(point, Point)}

    def blobs(self) -> set[str]:
        """Return the digests of the data of all resident points."""
        values = self.residency.values()
        return {digest for value in values if isinstance(value, Point) for digest in value.data_digests}

    # Points

    def create_point(
        self,
        objective: Objective,
        data: Sequence[tensor_pb2.Tensor],
        identity: str,
        x: codec.Array,
        tenant: str = "",
        *,
        deadline: float = float("inf"),
        on_wait: OnWait = lambda cancel: None,
    ) -> Point:
        """Make a tenant's point resident: put x and data on the device, and compute
        value and gradient.

        For `deadline` and `on_wait` see `Liveness.working`.
        """
        working = functools.partial(self._liveness.working, objective.digest, deadline=deadline, on_wait=on_wait)
        placement = objective.placement(data)
        self._check_room(objective, data, placement)
        self.residency.check_user(tenant, 2 * objective.vector_bytes, "a point", placement.needs)

        def make() -> tuple[Point, int]:
            source = self.source(objective, data, placement)
            self._check_rows(objective, source, x, working)
            on_device = self._put_x(objective, x)
            source.kernels.request("value_and_grad").result()
            with working():
                started = time.perf_counter()
                value, gradient = map(host, source.call("value_and_grad", 0, on_device))
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
        point = with_relief(self.residency, load, list(placement.needs), asked)
        self.residency.join(identity, tenant)
        return point

    def _check_room(self, objective: Objective, data: Sequence[tensor_pb2.Tensor], placement: Placement) -> None:
        """Raise ServiceError if a point cannot have room, even if all else is evicted.
        The error names the remedy.
        """
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

    def _check_rows(
        self,
        objective: Objective,
        source: data_sources.Source,
        x: codec.Array,
        working: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        """Raise ServiceError if data goes through the device in chunks, and the
        objective is not a mean, or sum, over rows.
        """
        if objective.goes_by_rows.is_set() or not isinstance(source, data_sources.Streamed):
            return
        with objective.probing:
            if objective.goes_by_rows.is_set():
                return
            near = self.device.put(probes.nearby(x))
            eps = verdicts.resolution([leaf.dtype for leaf in objective.bundle.x_leaves], objective.bundle.precision)
            found = probes.goes_by_rows(
                source,
                objective.programs.for_rows,
                near,
                math.sqrt(eps),
                len(self.device.parts),
                working,
            )
            if found is False:
                raise invalid(
                    "ROW_REDUCTION",
                    f"objective {objective.digest[:12]} was registered with row_reduction {source.reduction!r}, and its gradient over some "
                    f"rows is not the {source.reduction} of its gradients over two parts of them. So its data cannot go through the "
                    "device in chunks. A mean may have a penalty added, a sum may not. Register the reduction that holds, or raise "
                    "`hvpd serve --memory-budget` until the data fits",
                )
            if found:
                objective.goes_by_rows.set()

    def loose_points(self, objective: Objective, turn: Callable[[], None]) -> Callable[[codec.Array], LoosePoint]:
        """Return a function that makes points with the registered data, for a check.

        The data stays resident for later points. Nothing is evicted for it.

        Args:
            objective: The objective.
            turn: Called before each launch.

        Raises:
            ServiceError: There is no room beside the resident values.
        """
        placement = objective.placement(objective.bundle.data)
        absent = [size for key, size in placement.needs.items() if self.residency.get(key) is None]
        vectors = _LOOSE_VECTORS * objective.vector_bytes
        size_bytes = sum(absent) + vectors + objective.residual_bytes * objective.plan.needs_apply
        if size_bytes > self.residency.free_bytes():
            raise no_room(size_bytes)
        source = self.source(objective, objective.bundle.data, placement, unnoticed=True)

        def at(x: codec.Array) -> LoosePoint:
            turn()
            self._check_rows(objective, source, x, functools.partial(self._liveness.working, objective.digest))
            on_device = self._put_x(objective, x)

            resident = source if objective.plan.needs_apply and isinstance(source, data_sources.Resident) else None

            def product(row: codec.Array) -> Any:
                block = blocks.join([row], self.launches.bucket(objective) or 1)
                source.kernels.request("apply" if resident else "hvp", len(block)).result()
                with self._liveness.working(objective.digest):
                    if resident:
                        residuals = resident.residuals(objective.described.residuals, on_device)
                        return host(resident.kernels.call("apply", len(block), block, *residuals))[:1]
                    return host(source.call("hvp", len(block), on_device, block))[:1]

            source.kernels.request("value_and_grad").result()
            with self._liveness.working(objective.digest):
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
    ) -> data_sources.Source:
        """Put the data of a point in its place, and return the source."""
        tensors, kernels = [*objective.bundle.captured, *data], objective.kernels_for(data)
        if isinstance(kernels, Kernels):
            return data_sources.Resident(kernels, [self.tensor(tensor, unnoticed=unnoticed) for tensor in tensors])
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
            return [self._put_rows(part, rows) if position in moving else part for position, part in enumerate(parts)]

        return data_sources.Streamed(
            kernels, placement.spans, objective.bundle.row_reduction, load, self._ahead, self._liveness.renew
        )

    def tensor(self, tensor: tensor_pb2.Tensor, *, unnoticed: bool = False) -> Any:
        """Return a tensor on the device. `unnoticed`: evict nothing for it, and leave a
        corrupt one in the store.
        """

        def make() -> tuple[Any, int]:
            if self.device.spans_processes:  # Each process reads its own rows.
                part = self._store.open_tensor(tensor, set_aside=not unnoticed)
                placed = self._put_rows(part, slice(0, tensor.shape[0] if tensor.shape else 1))
            else:
                array = self._store.read_tensor(tensor, set_aside=not unnoticed)
                with self._putting():
                    placed = self.device.put(array, data=True)
            return placed, array_bytes(tensor) * self.device.copies(tensor.shape, data=True)

        return self.residency.load(tensor_key(tensor), "data", make, evict=not unnoticed)

    def _put_x(self, objective: Objective, x: codec.Array) -> Any:
        """Copy x to the device, split by leaf if the objective wants it."""
        with self._putting():
            return self.device.put_by_leaf(x, objective.leaves) if objective.leaves else self.device.put(x)

    def _put_rows(self, part: Any, rows: slice) -> Any:
        """Copy rows of a tensor to the device."""
        with self._putting():
            return self.device.place_rows(part, rows)

    @contextlib.contextmanager
    def _putting(self) -> Iterator[None]:
        """Record how long a copy to the device takes."""
        started = time.perf_counter()
        yield
        self._metrics.put(time.perf_counter() - started)

    # Factors

    def factors(
        self,
        point: Point,
        program: str,
        seed: int | None,
        *,
        deadline: float = float("inf"),
        on_wait: OnWait = lambda cancel: None,
    ) -> tuple[list[codec.Array], float]:
        """Return the Kronecker factors at a point, in the host's memory, and the
        seconds that they took.
        """

        def compute() -> tuple[list[codec.Array], float]:
            point.source.kernels.request(program).result()
            with self._liveness.working(point.objective.digest, deadline=deadline, on_wait=on_wait):
                started = time.perf_counter()
                found = [host(factor) for factor in point.source.call(program, 0, point.x, seed=seed)]
                return found, time.perf_counter() - started

        return with_relief(self.residency, compute, [point.id], program)


def _bytes_of(bundle: objective_pb2.Bundle) -> dict[Hashable, int]:
    return {tensor_key(tensor): array_bytes(tensor) for tensor in [*bundle.captured, *bundle.data]}
