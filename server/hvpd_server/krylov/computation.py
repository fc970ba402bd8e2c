"""Whole computations next to the device: solutions of linear systems, steps of trust
regions, quadratures and estimates. The algorithms are those of the client.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from hvpd._krylov import preconditioning, probes, solve, trace
from hvpd._krylov.space import NotFiniteError
from hvpd._wire import codec
from hvpd_server.krylov.accelerator_space import AcceleratorSpace
from hvpd_server.krylov.device_runner import DeviceRunner
from hvpd_server.krylov.launcher import is_possible
from hvpd_server.krylov.operator import Operator

_PROGRESS_SECONDS = 0.1
"""Seconds between two reports of progress."""


_LONG_SECONDS = 1.0
"""Seconds after which a compile pays that makes a computation faster."""


class Progress(NamedTuple):
    """How far a computation is."""

    step: int
    residual: float


class Result(NamedTuple):
    """The result of a computation."""

    arrays: Mapping[str, codec.Array]
    reason: str = ""
    reorthogonalize: str = ""
    finite: bool = True


Tick = Callable[[int, float], object]
Compute = Callable[[DeviceRunner, Tick], Result]
"""Computes with a runner, and calls a function with the steps so far and the
residual.
"""


def events(operator: Operator, compute: Compute) -> Iterator[Progress | Result]:
    """Compute in a thread of its own. Yield the progress, and at the end the result.

    The computation ends when the caller of its operator is gone, or when this generator
    is closed.

    Raises:
        Exception: The computation failed.
    """
    found: queue.SimpleQueue[Progress | Result | Exception] = queue.SimpleQueue()
    latest = time.monotonic()

    def tick(step: int, residual: float) -> None:
        nonlocal latest
        now = time.monotonic()
        if now - latest >= _PROGRESS_SECONDS:
            latest = now
            found.put(Progress(step, float(residual)))

    def run() -> None:
        try:
            found.put(compute(DeviceRunner(operator), tick))
        except Exception as error:  # noqa: BLE001 - raised again in the thread of the call
            found.put(error)

    thread = threading.Thread(target=run, name="hvpd-run", daemon=True)
    thread.start()
    try:
        while isinstance(event := found.get(), Progress):
            yield event
        if isinstance(event, Exception):
            raise event
        yield event
    finally:
        operator.work.gone.set()
        thread.join()


def solving(
    arrays: Mapping[str, codec.Array],
    shifts: codec.Array,
    described: preconditioning.Described,
    *,
    tol: float,
    maxiter: int,
    method: str,
) -> Compute:
    """Return the computation of `hvpd._krylov.solve.solved`."""

    def compute(runner: DeviceRunner, tick: Tick) -> Result:
        found = solve.solved(
            runner,
            arrays["B"],
            arrays.get("X"),
            shifts,
            preconditioning.multiply(described),
            tol=tol,
            maxiter=maxiter,
            method=method,
            tick=tick,
        )
        result = {"X": found.X, "history": found.history}
        if found.direction is not None and found.curvature is not None:
            result |= {"direction": found.direction, "curvature": np.array([found.curvature])}
        return Result(result, found.reason)

    return compute


def trust_region_step(
    gradient: codec.Array, described: preconditioning.Described, *, radius: float, tol: float, maxiter: int
) -> Compute:
    """Return the computation of `hvpd._krylov.trust_region.steihaug`."""

    def compute(runner: DeviceRunner, tick: Tick) -> Result:
        precondition = preconditioning.multiply(described)
        found = runner.region_step(gradient, radius, tol=tol, maxiter=maxiter, precondition=precondition, tick=tick)
        return Result({"p": found.p, "predicted": np.array([found.predicted])}, found.reason)

    return compute


def quadrature(*, seed: int, probes_count: int, steps: int, basis_bytes: int, width: int) -> Compute:
    """Return the computation of `hvpd._krylov.probes.tridiagonals`. If it takes long,
    a program is compiled for its blocks, which have `width` vectors. `basis_bytes` is 0
    if no basis fits.
    """

    def compute(runner: DeviceRunner, tick: Tick) -> Result:
        long = time.monotonic() + _LONG_SECONDS

        def ticked(step: int, residual: float) -> None:
            tick(step, residual)
            if time.monotonic() >= long:
                runner.operator.expect(width)

        if basis_bytes and stays_on_devices(runner.operator):
            found = _tridiagonals(runner.operator, seed, probes_count, steps, tick)
        else:
            found = probes.tridiagonals(
                runner.multiply,
                runner.n,
                runner.dtype,
                seed=seed,
                probes=probes_count,
                steps=steps,
                tick=ticked,
                basis_bytes=basis_bytes,
            )
        arrays = {"alphas": found.alphas, "betas": found.betas, "sizes": found.sizes}
        return Result(arrays, reorthogonalize=found.reorthogonalize, finite=found.finite)

    return compute


def stays_on_devices(operator: Operator) -> bool:
    """Return whether the bases of a quadrature stay on the devices, because they split
    x.
    """
    return bool(operator.point.objective.leaves) and operator.terms.U is None and is_possible(operator)


def _tridiagonals(operator: Operator, seed: int, count: int, steps: int, tick: Tick) -> probes.Tridiagonals:
    """Run one Lanczos iteration after the other, each in a basis on the devices. See
    `hvpd._krylov.probes.tridiagonals`.
    """
    found = probes.Tridiagonals(
        np.zeros((count, steps)), np.zeros((count, steps - 1)), np.zeros(count, np.int64), "full", finite=True
    )
    space = AcceleratorSpace(operator)
    space.reserve(space.room_rows(steps + 1)[0])
    for row in range(count):
        space.rewind(0, 0)
        space.begin(probes.signs(seed, row, 1, operator.n, operator.dtype) / operator.dtype.type(np.sqrt(operator.n)))
        try:
            for number, step in enumerate(space.extend(steps)):
                found.alphas[row, number] = step.alpha[0, 0]
                found.betas[row, number : number + 1] = step.beta.reshape(-1)[: steps - 1 - number]
                found.sizes[row] = number + 1
                tick(row * steps + number + 1, 0.0)
        except NotFiniteError:
            found.finite = False
            break
    return found


def estimate(*, of_diagonal: bool, method: str, products: int, seed: int) -> Compute:
    """Return the computation of `hvpd._krylov.trace.estimated`."""

    def compute(runner: DeviceRunner, tick: Tick) -> Result:
        try:
            found = trace.estimated(runner, of_diagonal, method, products, seed, tick)
        except NotFiniteError:
            return Result({}, finite=False)
        return Result({"values": found.values, "errors": found.errors, "size": np.array([found.size])})

    return compute
