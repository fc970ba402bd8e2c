"""The server without its transport: objectives, points and products, from the store to
the device and back.

A registration: `registration` (checks the parts, adds to the store) -> `objectives`
(vets, compiles, chooses a lane). A product: `multiply` -> `launches` (one for each
device) -> `batcher` (queue, coalesce) -> `programs` (executables). A point:
`create_point` -> `lane` -> `store` (data by digest) -> `residency` (entries on the
device) -> `programs`.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hvpd._wire import codec
from hvpd.v1 import curvature_pb2, objective_pb2, server_pb2, tensor_pb2
from hvpd_server import bundle as _admission
from hvpd_server.admission.vetting import Vetter
from hvpd_server.device.device import Device, host
from hvpd_server.device.group_device import GroupDevice
from hvpd_server.engine.lane import lanes_of
from hvpd_server.engine.launches import Iteration
from hvpd_server.engine.objective import Objective
from hvpd_server.engine.objectives import Objectives
from hvpd_server.engine.point import Point, point_id
from hvpd_server.engine.product_checks import check_operator, check_product
from hvpd_server.engine.registration import Registration, not_stored
from hvpd_server.engine.registration_checks import Checks
from hvpd_server.errors import Code, ServiceError, invalid
from hvpd_server.liveness import Liveness
from hvpd_server.scheduling.job import Job
from hvpd_server.scheduling.probation import OnWait, Probation
from hvpd_server.store.quarantine import Quarantine
from hvpd_server.store.store import Store
from hvpd_server.store.tenant_content import Owners
from hvpd_server.telemetry.metrics import Metrics
from hvpd_server.telemetry.readings import Live, Memory
from hvpd_server.tenancy.limits import Limits, no_limits
from hvpd_server.tenancy.meters import Meters


class Place(NamedTuple):
    """The parts of a point. `Engine.locate` finds them once for a request."""

    objective: Objective
    data: Sequence[tensor_pb2.Tensor]
    x_digest: str
    id: str
    """The point's id."""


class Engine:
    """Makes points and computes products. Its `registration` registers and deletes
    objectives, and its `objectives` loads them.

    Args:
        store: The store.
        devices: The devices.
        limits: Limits of the server.
        metrics: Counters.
        liveness: Shows the supervisor the work that runs.
        quarantine_after: Crashes after which an objective is not served any more.
        vetter: Reads programs before they are used; by default the engine starts one.
        group: The devices of all processes of a group as one; None: there is no group.
    """

    def __init__(
        self,
        store: Store,
        devices: Sequence[Device],
        limits: Limits,
        metrics: Metrics,
        *,
        liveness: Liveness | None = None,
        quarantine_after: int = 3,
        vetter: Vetter | None = None,
        group: GroupDevice | None = None,
    ) -> None:
        self.store = store
        self.owners = Owners(store, lambda tenant: limits.tenants(tenant).stored_bytes)
        self._stack = contextlib.ExitStack()
        if vetter is None:
            vetter = self._stack.enter_context(contextlib.closing(Vetter()))
        self.vetter = vetter
        self.devices = devices
        self._group = group
        self.device_count = len(devices if group is None else group.parts)
        """Number of devices, with those of the other processes of a group."""
        self.limits = limits
        self.metrics = metrics
        self.quarantine = quarantine = Quarantine(store.objects, quarantine_after)
        store.watch(quarantine.load)
        self._liveness = liveness = liveness or Liveness()
        liveness.probation = self._probation(quarantine)
        self.lanes = lanes_of(devices, store, limits, metrics, liveness, group)
        self.objectives = Objectives(store, self.owners, self.lanes, vetter, quarantine, metrics, liveness, limits)
        self.checks = Checks(store, self._pending, metrics.checked)
        self.registration = Registration(store, self.owners, self.objectives, quarantine, self.checks, metrics.named)
        self._meters = Meters(limits.tenants)
        metrics.observe(self._live)

    def close(self) -> None:
        """Stop compiling, checking and reading."""
        self.checks.close()
        self._stack.close()
        for lane in self.lanes:
            lane.close()
        self.objectives.close()

    def _probation(self, quarantine: Quarantine) -> Probation:
        """Return the probation of the objectives that may have crashed the server."""
        probation = quarantine.probation()
        if probation is None:
            return Probation()
        names = {digest: name for name, digest, _ in self.store.objectives() if name}
        return Probation(
            probation.suspects,
            everyone=probation.everyone,
            seconds=probation.until - time.time(),
            label=lambda digest: names.get(digest, digest[:12]),
        )

    def usage(self, tenant: str = "") -> server_pb2.Usage:
        """Return the limits and the usage of a tenant; without tokens, of the tenant
        with the empty name.
        """
        limits = self.limits.tenants(tenant)
        meter = self._meters.of(tenant)
        return server_pb2.Usage(
            tenant=tenant,
            weight=self.limits.weights(tenant),
            vectors_per_second_limit=limits.vectors_per_second,
            vectors_in_flight_limit=limits.vectors_in_flight,
            vectors_in_flight=meter.in_flight if meter is not None else 0,
            device_share_limit=limits.device_share,
            resident_bytes_limit=limits.resident_bytes,
            resident_bytes=max(lane.residency.had_bytes(tenant) for lane in self.lanes),
            stored_bytes_limit=limits.stored_bytes,
            stored_bytes=self.owners.stored_bytes(tenant),
            transit_bytes_limit=limits.transit_bytes,
            program_bytes_limit=limits.program_bytes,
            program_bytes=self.objectives.memory.used_bytes(tenant),
            cached_program_bytes=self.objectives.cache.bytes_of(tenant),
        )

    def _used_bytes(self) -> Mapping[str, int]:
        return sum((collections.Counter(lane.residency.used_bytes()) for lane in self.lanes), collections.Counter())

    @property
    def busy(self) -> bool:
        """Whether products run, or wait."""
        return any(lane.launches.in_flight or lane.launches.pending for lane in self.lanes)

    def _pending(self) -> int:
        return sum(lane.launches.pending for lane in self.lanes)

    def _live(self) -> Live:
        """Return the current values for the metrics."""
        asked = [lane.residency.asked() for lane in self.lanes]
        told = {f"{device.platform}:{index}": device.memory_use() for index, device in enumerate(self.devices)}
        return Live(
            resident_bytes=self._used_bytes(),
            resident_entries=sum(
                (collections.Counter(lane.residency.counts()) for lane in self.lanes), collections.Counter()
            ),
            budget_bytes=sum(lane.residency.budget_bytes for lane in self.lanes),
            hits=sum((collections.Counter(hits) for hits, _ in asked), collections.Counter()),
            misses=sum((collections.Counter(misses) for _, misses in asked), collections.Counter()),
            pending=self._pending(),
            pending_limit=self.limits.max_pending * len(self.lanes),
            in_flight=sum(lane.launches.in_flight for lane in self.lanes),
            oldest_work_seconds=self._liveness.oldest_seconds(),
            program_bytes=self.objectives.memory.used_bytes(),
            program_budget_bytes=self.limits.program_bytes,
            memory=[Memory(name, *use) for name, use in told.items() if use is not None],
            **(self._group.readings() if self._group is not None else {}),
        )

    # Points

    def locate(self, spec: curvature_pb2.PointSpec, tenant: str = "") -> Place:
        """Return the objective and the data that a spec names.

        Raises:
            ServiceError: The tenant has no such objective, or the data does not fit it,
                or is not the tenant's.
        """
        digest = spec.objective_digest
        self.store.look()
        if not (self.store.registered(digest) and self.owners.may_use(tenant, digest)):
            _, digest, _ = self.owners.find(tenant, digest)  # Raises the reason.
        objective = self.objectives.load(digest)
        data = objective.bundle.data if spec.default_data else spec.data
        _admission.check_data(objective.bundle, data)
        if tenant and not spec.default_data:
            registered = {tensor.digest for tensor in objective.bundle.data}
            given = {tensor.digest for tensor in data} - registered
            if missing := sorted(each for each in given if not self.owners.has_blob(tenant, each)):
                raise not_stored(missing)
        return Place(objective, data, spec.x_digest, point_id(objective.digest, data, spec.x_digest))

    def find_point(self, place: Place, tenant: str = "") -> Point | None:
        """Return the point of a place; None if it is not resident, or the tenant has
        not shown that it has the point's x.
        """
        found: Point | None = self.objectives.lane(place.objective).residency.get(place.id, tenant)
        if found is not None:
            self.metrics.found()
        return found

    def moved(
        self,
        place: Place,
        move: curvature_pb2.Move,
        direction: codec.Array | None = None,
        tenant: str = "",
    ) -> codec.Array | None:
        """Return the x of a step from another point, in the host's memory; None if the
        other point is not resident, or has another objective.

        Args:
            place: The new point.
            move: The step.
            direction: The direction, if the request had it; else it must be resident.
            tenant: The tenant that the other point and the direction belong to.

        Raises:
            ServiceError: NOT_FOUND with reason DIRECTION_NOT_RESIDENT: the client must
                send the direction.
        """
        objective = place.objective
        residency = self.objectives.lane(objective).residency
        base: Point | None = residency.get(move.base_id, tenant)
        if base is None or base.objective is not objective:
            return None
        if direction is None:
            direction = residency.get(("direction", tenant, move.direction_digest))
        if direction is None or direction.dtype != objective.dtype or direction.size != objective.n:
            raise ServiceError(Code.NOT_FOUND, "DIRECTION_NOT_RESIDENT", "the direction is not resident: send it")
        with np.errstate(all="ignore"):  # The new point reports NaN and infinity.
            x: codec.Array = direction * objective.dtype.type(move.alpha)
            x += host(base.x)
        return x

    def keep_direction(self, objective: Objective, digest: str, direction: codec.Array, tenant: str = "") -> None:
        """Keep the direction of a move, for later steps along it."""
        if codec.digest(codec.payload(direction)) != digest:
            raise invalid("DIGEST_MISMATCH", "the direction does not have its digest: send it again")
        residency = self.objectives.lane(objective).residency
        key = "direction", tenant, digest
        with contextlib.suppress(ServiceError):  # If there is no room, later steps send the direction again.
            residency.check_user(tenant, direction.nbytes, "a direction")
            residency.put(key, "direction", direction, direction.nbytes)
            residency.join(key, tenant)

    def pin(self, point: Point, seconds: int, tenant: str = "") -> None:
        """Keep a point on the device until it has not been used for `seconds`."""
        self.objectives.lane(point.objective).residency.pin(point.id, seconds, tenant)

    def create_point(
        self,
        place: Place,
        x: codec.Array,
        tenant: str = "",
        *,
        deadline: float = float("inf"),
        on_wait: OnWait = lambda cancel: None,
    ) -> Point:
        """Make a point resident: put x and data on the device, and compute value and
        gradient.

        Args:
            place: The objective and the data, located for this tenant.
            x: The flat vector.
            tenant: The tenant that asks.
            deadline: Until when an objective on probation waits for its turn, on
                time.monotonic's clock.
            on_wait: Called with a function that cancels this wait.
        """
        objective, data, x_digest, identity = place
        if codec.digest(codec.payload(x)) != x_digest:
            raise invalid("DIGEST_MISMATCH", "x does not have the digest that the spec gives: send it again")
        with self._metered(tenant, 1) as charge:
            lane = self.objectives.lane(objective)
            point = lane.create_point(objective, data, identity, x, tenant, deadline=deadline, on_wait=on_wait)
            charge(point.seconds, 1)
        return point

    # Products

    def resident(self, spec: curvature_pb2.ProductSpec, tenant: str = "") -> Point:
        """Return the point of a product, and check the request, except its vectors.

        Raises:
            ServiceError: NOT_FOUND with reason POINT_NOT_RESIDENT, or the request is
                invalid.
        """
        check_operator(spec)
        point = self.point(spec.point_id, tenant)
        check_product(spec, point.objective, self.limits.max_block_width)
        return point

    def point(self, identity: str, tenant: str = "") -> Point:
        """Return a resident point of a tenant.

        Raises:
            ServiceError: NOT_FOUND with reason POINT_NOT_RESIDENT.
        """
        for lane in self.lanes:
            found: Point | None = lane.residency.get(identity, tenant)
            if found is not None and self.owners.may_use(tenant, found.objective.digest):
                return found
        raise ServiceError(
            Code.NOT_FOUND,
            "POINT_NOT_RESIDENT",
            f"point {identity[:12]} is not on the device (evicted, or the server restarted): create it again and repeat",
        )

    def factors(
        self,
        identity: str,
        seed: int | None,
        tenant: str = "",
        *,
        deadline: float = float("inf"),
        on_wait: OnWait = lambda cancel: None,
    ) -> list[codec.Array]:
        """Return the Kronecker factors A_0, G_0, A_1, ... of the dense layers at a
        point, in the host's memory.

        Args:
            identity: Id of the point.
            seed: Seed of targets that are drawn; None: use the loss's Hessian.
            tenant: The tenant that asks.
            deadline: As in `create_point`.
            on_wait: As in `create_point`.

        Raises:
            ServiceError: As for `resident`.
        """
        point = self.point(identity, tenant)
        program = "kfac" if seed is None else "sampled_kfac"
        if program not in point.objective.described.programs:
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                "NO_SUCH_OPERATOR",
                f"objective {point.objective.digest[:12]} has no {program}: register "
                "hvpd.composite(model, loss) with a model of dense layers; a seed needs its distribution, too",
            )
        with self._metered(tenant, 1) as charge:
            lane = self.objectives.lane(point.objective)
            found, seconds = lane.factors(point, program, seed, deadline=deadline, on_wait=on_wait)
            charge(seconds, 1)
        return found

    def multiply(
        self,
        point: Point,
        program: str,
        vectors: codec.Array,
        *,
        seed: int = 0,
        tenant: str = "",
        priority: int = 0,
        deadline: float = float("inf"),
        on_queue: Callable[[Callable[[], None]], object] = lambda cancel: None,
    ) -> tuple[codec.Array, curvature_pb2.ProductInfo]:
        """Multiply V[k,n] -> HV[k,n], coalesced with other products at the same point.

        Args:
            point: The point.
            program: The program, from `program_of`.
            vectors: V[k,n].
            seed: Seed, if the operator draws random numbers.
            tenant: The tenant that asks. Tenants share the device fairly.
            priority: Products of a higher priority go first among those of one tenant.
            deadline: On time.monotonic's clock.
            on_queue: Called with a function that cancels the product while it waits.
        """
        job = Job((point, program, seed), vectors, tenant, deadline, priority)
        launches = self.objectives.lane(point.objective).launches
        if self.limits.tenants is no_limits or not self.limits.tenants(tenant):
            return launches.multiply(job, on_queue)
        with self._metered(tenant, len(vectors)) as charge:
            answer = launches.multiply(job, on_queue)
            charge(job.device_seconds, len(vectors))
        return answer

    def iterate(
        self,
        iteration: Iteration,
        *,
        tenant: str = "",
        priority: int = 0,
        deadline: float = float("inf"),
        on_queue: OnWait = lambda cancel: None,
    ) -> tuple[list[Any], float]:
        """Launch several steps of an iteration in their turn. Return the results, as
        `Launches.iterate` does, and the seconds of the device.

        The tenant pays for the steps that were taken.

        Args:
            iteration: The steps.
            tenant: As in `multiply`.
            priority: As in `multiply`.
            deadline: As in `multiply`.
            on_queue: As in `multiply`.
        """
        block = np.empty((iteration.columns, 0))  # The queue counts its rows.
        job = Job(iteration, block, tenant, deadline, priority)
        launches = self.objectives.lane(iteration.point.objective).launches
        with self._metered(tenant, iteration.columns) as charge:
            found = launches.iterate(job, on_queue)
            charge(job.device_seconds, iteration.multiplied(found))
        return found, job.device_seconds

    def record_deferred(self) -> None:
        """Record launches whose record was deferred until their answer was sent."""
        for lane in self.lanes:
            lane.launches.record_deferred()

    @contextlib.contextmanager
    def _metered(self, tenant: str, columns: int) -> Iterator[Callable[[float, int], None]]:
        """Count vectors against the limits of a tenant. Yield a function that counts
        seconds of the device, and the vectors that were multiplied.

        Raises:
            ServiceError: The tenant is over a limit.
        """
        meter = self._meters.of(tenant)
        if meter is None:
            yield lambda seconds, multiplied: None
            return
        meter.begin(columns)
        used = (0.0, 0)

        def charge(seconds: float, multiplied: int) -> None:
            nonlocal used
            used = seconds, multiplied

        try:
            yield charge
        finally:
            meter.end(columns, *used)

    def choices(self, digest: str, tenant: str = "") -> objective_pb2.GetPlanResponse:
        """Return the plan's choice for each block width, and the compiles."""
        _, digest, _ = self.owners.find(tenant, digest)
        objective = self.objectives.load(digest)
        kernels = objective.kernels
        widths = sorted({width for name in ("hvp", "apply") for width in kernels.widths(name)})
        return objective_pb2.GetPlanResponse(
            choices=[objective.plan.choose(width) for width in widths],
            residual_bytes=objective.residual_bytes,
            compiles=kernels.compiles(),
        )
