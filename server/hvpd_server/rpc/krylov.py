"""KrylovService: runs, whose basis stays on the server."""

import contextlib
import logging
import time
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from hvpd import _text
from hvpd._krylov.space import NotFiniteError, Step
from hvpd._wire import codec
from hvpd._wire.frames import Frame
from hvpd.v1 import krylov_pb2
from hvpd_server.engine.engine import Engine
from hvpd_server.errors import Code, ServiceError, invalid
from hvpd_server.krylov import computation
from hvpd_server.krylov.operator import Operator
from hvpd_server.krylov.runs import Position, Run, Runs, check_pin
from hvpd_server.rpc.call_context import GrpcCall
from hvpd_server.rpc.call_limits import Arrivals, Stalls
from hvpd_server.rpc.methods import streaming, unary
from hvpd_server.rpc.run_computations import MAX_STEPS, arrays_of, computation_of
from hvpd_server.rpc.run_requests import (
    Chunks,
    Expected,
    Requests,
    Specs,
    check_bytes,
    first_of,
    rest,
    work_of,
)
from hvpd_server.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)

_LONG_SECONDS = 1.0
"""Seconds from which on the end of a run is logged at INFO."""

_FLUSH_SECONDS = 0.1
"""Seconds between two messages with steps."""


class KrylovService:
    """Krylov runs.

    Args:
        engine: Holds points and computes products.
        metrics: Counts runs and computations.
        stalls: Ends calls whose client stops sending or reading.
        arrivals: Counts the bytes in transit.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics | None = None,
        *,
        stalls: Stalls | None = None,
        arrivals: Arrivals | None = None,
    ) -> None:
        self._engine = engine
        self._metrics = metrics or Metrics()
        self._runs = Runs(engine)
        self.stalls = stalls or Stalls()
        self._room = arrivals or Arrivals(1 << 62)
        self._requests = Requests(engine, self._room)

    @streaming
    def StartRun(  # noqa: N802
        self, request_iterator: Iterator[Frame[krylov_pb2.StartRunRequest]], call: GrpcCall
    ) -> Generator[krylov_pb2.StartRunResponse, None, None]:
        messages = self.stalls.watch(request_iterator, call)
        first, chunk = first_of(messages, Frame(krylov_pb2.StartRunRequest()), "spec")
        spec, work = first.spec, work_of(call)
        _check_steps(spec.steps)
        check_pin(spec.pin_seconds)
        if spec.reorthogonalize not in ("full", "none"):
            raise invalid(
                "REORTHOGONALIZE",
                f"reorthogonalize must be 'full' or 'none', got {_text.quoted(spec.reorthogonalize, 40)}",
            )
        with self._requests.operator(
            spec.operator, spec.arrays, {"Q": Expected((None, "n"))}, rest(chunk, messages), call
        ) as found:
            operator, arrays = found
            rows = arrays["Q"]
            _check_rows(rows, operator.n)
            run = self._runs.start(operator, rows, spec.steps, spec.reorthogonalize, work)
        if spec.pin_seconds:
            self._runs.pin(run, spec.pin_seconds)
        with run.working(work), self._counted("lanczos", run.operator):
            yield krylov_pb2.StartRunResponse(state=_state(run))
            for steps, state in self._steps(run, spec.steps):
                yield krylov_pb2.StartRunResponse(steps=steps, state=state, done=state is not None)

    @streaming
    def ExtendRun(  # noqa: N802
        self, request: krylov_pb2.ExtendRunRequest, call: GrpcCall
    ) -> Generator[krylov_pb2.ExtendRunResponse, None, None]:
        _check_steps(request.steps)
        check_pin(request.pin_seconds)
        with self._at(request.position, call) as run:
            if request.HasField("pin_seconds"):
                self._runs.pin(run, request.pin_seconds)
            self._runs.extend(run, request.steps * run.space.waiting)
            with self._counted("lanczos", run.operator):
                for steps, state in self._steps(run, request.steps):
                    yield krylov_pb2.ExtendRunResponse(steps=steps, state=state, done=state is not None)

    @unary
    def AppendRun(  # noqa: N802
        self, request_iterator: Iterator[Frame[krylov_pb2.AppendRunRequest]], call: GrpcCall
    ) -> krylov_pb2.AppendRunResponse:
        messages = self.stalls.watch(request_iterator, call)
        first, chunk = first_of(messages, Frame(krylov_pb2.AppendRunRequest()), "position")
        with self._at(first.position, call) as run:
            operator = run.operator
            if not 1 <= first.k <= self._engine.limits.max_block_width:
                raise invalid(
                    "BLOCK_WIDTH", f"k must be from 1 to {self._engine.limits.max_block_width}, got {first.k}"
                )
            with self._requests.received(
                {"V": ((first.k, operator.n), operator.dtype)}, rest(chunk, messages), call
            ) as arrays:
                self._runs.extend(run, first.k)
                try:
                    beta = run.space.append(arrays["V"])
                except NotFiniteError:
                    raise invalid("NOT_FINITE", "V holds NaN or infinity") from None
            run.changes += 1
            return krylov_pb2.AppendRunResponse(beta=beta.ravel(), state=_state(run))

    @unary
    def RestartRun(  # noqa: N802
        self, request_iterator: Iterator[Frame[krylov_pb2.RestartRunRequest]], call: GrpcCall
    ) -> krylov_pb2.RestartRunResponse:
        messages = self.stalls.watch(request_iterator, call)
        first, chunk = first_of(messages, Frame(krylov_pb2.RestartRunRequest()), "position")
        with self._at(first.position, call) as run, self._matrix(run, first, rest(chunk, messages), call) as Y:
            if first.columns > first.rows:
                raise invalid("SHAPE", f"a restart cannot make {first.columns} rows of {first.rows}: columns <= rows")
            run.space.restart(Y, waiting=not first.drop_waiting)
            run.changes += 1
            return krylov_pb2.RestartRunResponse(state=_state(run))

    @streaming
    def CombineRun(  # noqa: N802
        self, request_iterator: Iterator[Frame[krylov_pb2.CombineRunRequest]], call: GrpcCall
    ) -> Generator[Frame[krylov_pb2.CombineRunResponse], None, None]:
        messages = self.stalls.watch(request_iterator, call)
        first, chunk = first_of(messages, Frame(krylov_pb2.CombineRunRequest()), "position")
        with self._at(first.position, call) as run, self._matrix(run, first, rest(chunk, messages), call) as Y:
            size_bytes = first.columns * run.operator.n * run.operator.dtype.itemsize
            check_bytes(self._engine, size_bytes, "the combinations")
            self._room.take(call.tenant, size_bytes)
            try:
                combined = run.space.combine(Y)
            except BaseException:
                self._room.give_back(call.tenant, size_bytes)
                raise
        try:
            for part in codec.chunks(codec.payload(combined)):
                yield Frame(krylov_pb2.CombineRunResponse(), part)
        finally:
            self._room.give_back(call.tenant, size_bytes)

    @unary
    def CloseRun(  # noqa: N802
        self, request: krylov_pb2.CloseRunRequest, call: GrpcCall
    ) -> krylov_pb2.CloseRunResponse:
        with contextlib.suppress(ServiceError):
            self._runs.close(self._runs.find(Position(request.point_id, request.run_id, 0, 0, 0), call.owner))
        return krylov_pb2.CloseRunResponse()

    @streaming
    def Compute(  # noqa: N802
        self, request_iterator: Iterator[Frame[krylov_pb2.ComputeRequest]], call: GrpcCall
    ) -> Generator[Frame[krylov_pb2.ComputeResponse], None, None]:
        began = time.monotonic()
        messages = self.stalls.watch(request_iterator, call)
        first, chunk = first_of(messages, Frame(krylov_pb2.ComputeRequest()), "spec")
        spec, chunks = first.spec, rest(chunk, messages)
        with self._requests.operator(spec.operator, spec.arrays, arrays_of(spec), chunks, call) as (operator, arrays):
            found = computation_of(spec, operator, arrays, self._runs.room_bytes(operator))
        counted = self._counted(found.name, operator)
        with self._runs.holding(operator, found.size_bytes, found.what), counted:
            for event in computation.events(operator, found.compute):
                if isinstance(event, computation.Progress):
                    progress = krylov_pb2.RunProgress(
                        step=event.step,
                        products=operator.products,
                        residual=event.residual,
                        seconds=time.monotonic() - began,
                    )
                    yield Frame(krylov_pb2.ComputeResponse(progress=progress))
                    continue
                arrays = {name: np.ascontiguousarray(array) for name, array in event.arrays.items()}
                result = krylov_pb2.RunResult(
                    arrays=[
                        krylov_pb2.RunArray(name=name, dtype=array.dtype.name, shape=array.shape)
                        for name, array in arrays.items()
                    ],
                    reason=event.reason,
                    products=operator.products,
                    seconds=time.monotonic() - began,
                    device_seconds=operator.device_seconds,
                    reorthogonalize=event.reorthogonalize,
                    nonfinite=not event.finite,
                )
                yield Frame(krylov_pb2.ComputeResponse(result=result))
                with self._room.holding(call.tenant, sum(array.nbytes for array in arrays.values())):
                    for array in arrays.values():
                        for part in codec.chunks(codec.payload(array)):
                            yield Frame(krylov_pb2.ComputeResponse(), part)

    # Parts of requests

    @contextlib.contextmanager
    def _counted(self, kind: str, operator: Operator) -> Iterator[None]:
        """Count and log steps, or a computation, when they end."""
        began, products, outcome = time.monotonic(), operator.products, "left"
        try:
            yield
            outcome = "done"
        except ServiceError as error:
            outcome = "left" if error.code is Code.CANCELLED else "failed"
            raise
        except Exception:
            outcome = "failed"
            raise
        finally:
            self._metrics.ran(kind, outcome)
            digest, seconds = operator.point.objective.digest, time.monotonic() - began
            level = logging.INFO if seconds >= _LONG_SECONDS else logging.DEBUG
            _log.log(
                level,
                "%s of objective %s is %s after %d vectors in %.2f s",
                *(kind, digest[:12], outcome, operator.products - products, seconds),
            )

    @contextlib.contextmanager
    def _at(self, position: krylov_pb2.RunPosition, call: GrpcCall) -> Iterator[Run]:
        """Yield the run of a request, at the position that the request starts from."""
        found = Position(position.point_id, position.run_id, position.changes, position.rows, position.waiting)
        run = self._runs.find(found, call.owner)
        call.objective = run.operator.point.objective.digest
        with run.working(work_of(call)):
            self._runs.go_to(run, found)
            yield run

    def _steps(self, run: Run, steps: int) -> Iterator[tuple[list[krylov_pb2.RunStep], krylov_pb2.RunState | None]]:
        """Take steps. Yield those since the last message, and at the end the state."""
        operator, ready = run.operator, list[krylov_pb2.RunStep]()
        products, seconds, nonfinite = operator.products, operator.device_seconds, False
        flushed = time.monotonic()
        try:
            for step in run.space.extend(steps):
                ready.append(_step(step))
                now = time.monotonic()
                if now - flushed >= _FLUSH_SECONDS:
                    yield ready, None
                    ready, flushed = [], now
        except NotFiniteError:
            nonfinite = True
        state = _state(run, nonfinite=nonfinite)
        state.products, state.device_seconds = operator.products - products, operator.device_seconds - seconds
        yield ready, state

    @contextlib.contextmanager
    def _matrix(self, run: Run, first: Any, chunks: Chunks, call: GrpcCall) -> Iterator[codec.Array]:
        """Yield the small matrix of a request: float64[rows, columns]."""
        if run.space.reorthogonalize == "none":
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                "NO_BASIS",
                "this run keeps no basis, because it was started with reorthogonalize 'none': start it with 'full'",
            )
        if not (1 <= first.rows <= run.space.rows and 1 <= first.columns <= MAX_STEPS):
            raise invalid(
                "SHAPE",
                f"Y has from 1 to {run.space.rows} rows, those of the basis, and at least 1 column, got {first.rows} x {first.columns}",
            )
        specs: Specs = {"Y": ((first.rows, first.columns), np.dtype(np.float64))}
        with self._requests.received(specs, chunks, call) as arrays:
            if not np.isfinite(arrays["Y"]).all():
                raise invalid("NOT_FINITE", "Y holds NaN or infinity")
            yield arrays["Y"]


def _state(run: Run, *, nonfinite: bool = False) -> krylov_pb2.RunState:
    space = run.space
    return krylov_pb2.RunState(
        run_id=run.id,
        changes=run.changes,
        rows=space.rows,
        waiting=space.waiting,
        nonfinite=nonfinite,
        place=space.place,
    )


def _step(step: Step) -> krylov_pb2.RunStep:
    return krylov_pb2.RunStep(alpha=step.alpha.ravel(), beta=step.beta.ravel())


def _check_steps(steps: int) -> None:
    if not 0 <= steps <= MAX_STEPS:
        raise invalid("STEPS", f"steps must be from 0 to {MAX_STEPS}, got {steps}")


def _check_rows(rows: codec.Array, n: int) -> None:
    """Raise ServiceError unless rows are orthonormal, to a tenth."""
    if len(rows) > n:
        raise invalid("SHAPE", f"Q has {len(rows)} rows, and the dimension is {n}")
    gram = rows.astype(np.float64) @ rows.T.astype(np.float64)
    if not (abs(gram - np.eye(len(rows))) < 0.1).all():
        raise invalid("NOT_ORTHONORMAL", "the rows of Q must be finite and orthonormal")
