"""Pairs (x, v): products of a small objective at several points, in one launch.

The points must have the same data. Knows no queue.
"""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from hvpd._wire import codec
from hvpd_server.device import data_sources, memory_relief
from hvpd_server.device.device import host
from hvpd_server.errors import ServiceError
from hvpd_server.scheduling.blocks import join, split
from hvpd_server.scheduling.holdback import bucket_of
from hvpd_server.scheduling.job import Job
from hvpd_server.telemetry.metrics import Metrics

PROGRAM = "hvp_pairs"


@dataclasses.dataclass(frozen=True, eq=False)
class PairKey(data_sources.Resident):
    """The key of small points with the same data, whose products can share a launch.

    Two keys are equal if they have the same arrays on the device.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PairKey) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[int, ...]:
        return id(self.kernels), *map(id, self.args)


def multiply(
    key: PairKey, jobs: Sequence[Job], points: int, max_width: int, metrics: Metrics
) -> Sequence[codec.Array] | None:
    """Multiply in one launch; None if that is slower, or not compiled yet.

    Args:
        key: The key of the jobs.
        jobs: Products of the Hessian, in the objective's own mode.
        points: Number of different points.
        max_width: Most vectors of a launch.
        metrics: Counters.
    """
    plan, widths = jobs[0].point.objective.plan, [len(job.block) for job in jobs]
    total = sum(widths)
    bucket = min(bucket_of(total), max_width)
    if total > bucket or not plan.pairs(bucket, points):
        return None
    if not key.kernels.ready(PROGRAM, bucket):
        key.kernels.request(PROGRAM, bucket)
        return None
    X = np.repeat([host(job.point.x) for job in jobs], widths, axis=0)
    X = np.concatenate([X, X[-1:].repeat(bucket - total, axis=0)])
    started = time.perf_counter()
    try:
        whole = host(key.call(PROGRAM, bucket, X, join([job.block for job in jobs], bucket)))
    except ServiceError as error:
        if error.reason != memory_relief.REASON:
            raise
        return None  # Launches one after the other take less memory.
    plan.add(PROGRAM, bucket, time.perf_counter() - started)
    metrics.launched(PROGRAM, bucket, bucket - total)
    return split(whole, widths)
