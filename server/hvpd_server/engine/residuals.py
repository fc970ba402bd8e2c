"""Residuals: values that depend on x alone, computed once at a point, so that `apply`
need not repeat the work.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from hvpd_server.device import memory_relief
from hvpd_server.device.data_sources import Resident
from hvpd_server.device.device import computed
from hvpd_server.device.residency import Residency
from hvpd_server.engine.plan import Plan
from hvpd_server.engine.point import Point
from hvpd_server.errors import ServiceError


def residuals_of(point: Point, source: Resident, width: int, plan: Plan, residency: Residency) -> Sequence[Any] | None:
    """Return the residuals of a point, if `apply` should multiply now; else None.

    Args:
        point: The point.
        source: The data of the point.
        width: Block width of the launch.
        plan: Chooses `apply` or `hvp` for the width.
        residency: Keeps residuals.
    """
    kernels = source.kernels
    if plan.program(width) != "apply":
        return None
    ready, waits = kernels.ready("apply", width), plan.needs_apply
    found: Sequence[Any] | None = residency.get(("residuals", point.id)) if ready or waits else None
    if found is not None:
        return found
    if not waits:
        if not (ready and kernels.ready("prepare")):
            kernels.request("prepare")
            kernels.request("apply", width)
            return None
        if point.launches < 2:  # Residuals do not pay for a single product.
            return None
    return _make(point, source, plan, residency)


def _make(point: Point, source: Resident, plan: Plan, residency: Residency) -> Sequence[Any] | None:
    """Compute residuals, and keep them if there is room; None if they are not required
    and there is no room.

    With a fixed bucket the program is fixed, too. Then residuals without room are
    computed for each product.
    """
    objective, size_bytes = point.objective, point.objective.residual_bytes
    fixed, stay = objective.fixed_bucket > 0, True

    def make() -> Sequence[Any]:
        made: Sequence[Any] = computed(source.residuals(objective.described.residuals, point.x))
        return made

    try:
        residency.check(size_bytes, "residuals", {point.id: 0})
        for tenant in residency.users(point.id):
            residency.check_user(tenant, size_bytes, "residuals", {point.id: 0})
    except ServiceError:
        if not fixed:
            return None
        stay = False
    try:
        found = memory_relief.with_relief(residency, make, [point.id], f"residuals of {size_bytes} bytes")
    except ServiceError as error:
        if fixed or error.reason != memory_relief.REASON:
            raise
        plan.forgo_residuals()
        return None
    if stay:
        with contextlib.suppress(ServiceError):  # Another entry was pinned meanwhile.
            residency.put(("residuals", point.id), "residuals", found, size_bytes, needs=[point.id])
        residency.fit(point.id)
    return found
