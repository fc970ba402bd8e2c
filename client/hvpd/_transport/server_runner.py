"""Krylov iterations on the server; see `hvpd._krylov.runner`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hvpd import _text
from hvpd._errors import HvpdError
from hvpd._krylov import preconditioning
from hvpd._krylov.computed import Estimated, Solved
from hvpd._krylov.probes import BASIS_BYTES, Ticking, Tridiagonals
from hvpd._krylov.runner import Runner
from hvpd._krylov.space import Multiply, NotFiniteError, Space
from hvpd._krylov.trust_region import Step
from hvpd._transport.interrupts import interrupt_behind, leave
from hvpd._transport.server_space import ServerOperator, ServerSpace, bad_answer, chunked, described_arrays
from hvpd._transport.stream import Filling
from hvpd._wire import codec
from hvpd.v1 import krylov_pb2

_MOST_SYSTEMS = 4096
"""Most systems of one request: right-hand sides times shifts."""

_MOST_CHECKS = 1 << 10
"""Most entries of a history beside those of the steps."""


class _Expected(NamedTuple):
    """An array of a result."""

    shape: tuple[int, ...]
    """Sizes. A negative one stands for sizes from 1 to its negative."""
    dtype: str = "float64"
    required: bool = True


class _Answer(NamedTuple):
    result: krylov_pb2.RunResult
    arrays: Mapping[str, codec.Array]


class ServerRunner(Runner):
    """Runs Krylov iterations of an operator on the server.

    Args:
        operator: The operator, as the server knows it.
        multiply: Multiplies by it, for methods that the server does not run.
        facts: As for `Runner`.
    """

    def __init__(self, operator: ServerOperator, multiply: Multiply, **facts: Any) -> None:
        super().__init__(multiply, operator.n, operator.dtype, **facts)
        self._operator = operator

    def space(self, reorthogonalize: str = "full") -> Space:
        """See `Runner.space`."""
        return ServerSpace(self._operator, reorthogonalize)

    def solve(
        self,
        B: codec.Array,
        X: codec.Array | None,
        shifts: codec.Array,
        M: Any,
        *,
        tol: float,
        maxiter: int,
        method: str,
        tick: Ticking,
    ) -> Solved | None:
        """See `Runner.solve`."""
        described = preconditioning.described(M, self.dtype)
        most = self._operator.transport.server.max_block_width
        if described is None or len(B) > most or len(B) * len(shifts) > _MOST_SYSTEMS:
            return None
        spec = krylov_pb2.SolveSpec(method=method, tol=tol, maxiter=maxiter, shifts=shifts)
        if described.kind:
            spec.preconditioner.kind, spec.preconditioner.shift = described.kind, described.shift
        arrays = {"B": B, **({} if X is None else {"X": X}), **described.arrays}
        systems, vector = (len(shifts), len(B)), self.dtype.name
        expected = {
            "X": _Expected((*systems, self.n), vector),
            "history": _Expected((-maxiter - _MOST_CHECKS, *systems)),
            "direction": _Expected((self.n,), vector, required=False),
            "curvature": _Expected((1,), required=False),
        }
        result, found = self._compute(krylov_pb2.ComputationSpec(solve=spec), arrays, expected, tick)
        curvature = found.get("curvature")
        return Solved(
            found["X"],
            found["history"],
            result.reason,
            found.get("direction"),
            None if curvature is None else float(curvature[0]),
        )

    def steihaug(self, gradient: codec.Array, radius: float, *, tol: float, maxiter: int, M: Any = None) -> Step:
        """See `Runner.steihaug`."""
        described = preconditioning.described(M, self.dtype)
        if described is None:
            return super().steihaug(gradient, radius, tol=tol, maxiter=maxiter, M=M)
        spec = krylov_pb2.StepSpec(radius=radius, tol=tol, maxiter=maxiter)
        if described.kind:
            spec.preconditioner.kind, spec.preconditioner.shift = described.kind, described.shift
        arrays = {"gradient": np.ascontiguousarray(gradient, self.dtype), **described.arrays}
        expected = {"p": _Expected((self.n,), self.dtype.name), "predicted": _Expected((1,))}
        result, found = self._compute(krylov_pb2.ComputationSpec(step=spec), arrays, expected, lambda *_: None)
        return Step(found["p"], float(found["predicted"][0]), result.products, result.reason)

    def estimate(self, of_diagonal: bool, method: str, products: int, seed: int, tick: Ticking) -> Estimated | None:
        """See `Runner.estimate`."""
        if seed >= 1 << 64:
            return None
        spec = krylov_pb2.EstimateSpec(diagonal=of_diagonal, method=method, products=products, seed=seed)
        size = (self.n if of_diagonal else 1,)
        expected = {"values": _Expected(size), "errors": _Expected(size), "size": _Expected((1,))}
        result, found = self._compute(krylov_pb2.ComputationSpec(estimate=spec), {}, expected, tick)
        if result.nonfinite:
            raise NotFiniteError
        return Estimated(found["values"], found["errors"], float(found["size"][0]))

    def tridiagonals(
        self, *, seed: int, probes: int, steps: int, tick: Ticking, basis_bytes: int = BASIS_BYTES
    ) -> Tridiagonals:
        """See `Runner.tridiagonals`."""
        if seed >= 1 << 64:
            return super().tridiagonals(seed=seed, probes=probes, steps=steps, tick=tick, basis_bytes=basis_bytes)
        spec = krylov_pb2.TridiagonalsSpec(seed=seed, probes=probes, steps=steps)
        spec.reorthogonalize = {0: "none", BASIS_BYTES: ""}.get(basis_bytes, "full")
        expected = {
            "alphas": _Expected((probes, steps)),
            "betas": _Expected((probes, max(steps - 1, 0))),
            "sizes": _Expected((probes,), "int64"),
        }
        result, found = self._compute(krylov_pb2.ComputationSpec(tridiagonals=spec), {}, expected, tick)
        if not found or (found["sizes"] < 0).any() or (found["sizes"] > steps).any():
            raise self._bad("the iterations have more steps than were asked for, or none")
        return Tridiagonals(
            found["alphas"], found["betas"], found["sizes"], result.reorthogonalize, finite=not result.nonfinite
        )

    def _compute(
        self,
        spec: krylov_pb2.ComputationSpec,
        arrays: Mapping[str, codec.Array],
        expected: Mapping[str, _Expected],
        tick: Ticking,
    ) -> _Answer:
        """Have the server compute. If the call breaks, it is repeated as a whole.

        Args:
            spec: The computation.
            arrays: Its arrays.
            expected: The arrays of its result.
            tick: Shows the progress.
        """
        transport = self._operator.transport
        arrays = {**arrays, **self._operator.arrays}
        spec.operator.CopyFrom(self._operator.message)
        spec.arrays.extend(described_arrays(arrays))
        first = krylov_pb2.ComputeRequest(spec=spec)

        def attempt(left: float | None) -> _Answer:
            messages = chunked(first, krylov_pb2.ComputeRequest, *arrays.values())
            call = transport.channel.compute(messages, metadata=metadata, timeout=left)
            try:
                return self._read(call, expected, tick)
            except Exception as error:
                if interrupt_behind(error, None) is None:
                    call.cancel()
                else:
                    leave(call)
                raise
            except BaseException:  # An interrupt: gRPC's locks may be held.
                leave(call)
                raise

        with transport.sending(lambda: "hvpd.v1.KrylovService/Compute") as (metadata, request_id):
            found = transport.call(attempt, restore=self._operator.restore, request_id=request_id)
        self.products += found.result.products
        return found

    def _read(self, call: Any, expected: Mapping[str, _Expected], tick: Ticking) -> _Answer:
        """Read the answers of a call, and show the progress."""
        result: krylov_pb2.RunResult | None = None
        filling: dict[str, Filling] = {}
        for message, chunk in call:
            if message.HasField("progress"):
                tick(message.progress.step, message.progress.residual)
            elif message.HasField("result"):
                if result is not None:
                    raise self._bad("a computation has two results")
                result = message.result
                filling = {array.name: self._filling(array, expected) for array in result.arrays}
            else:
                part = next((each for each in filling.values() if not each.complete), None)
                if part is None:
                    raise self._bad("a result has more bytes than its arrays")
                part.append(chunk)
        missing = [name for name, each in expected.items() if each.required and name not in filling]
        if result is None or (missing and not result.nonfinite) or not all(each.complete for each in filling.values()):
            raise self._bad("a computation ended without its whole result")
        return _Answer(result, {name: each.array for name, each in filling.items()})

    def _filling(self, array: krylov_pb2.RunArray, expected: Mapping[str, _Expected]) -> Filling:
        """Return the memory for an array of a result."""
        found = expected.get(array.name)
        shape = list(array.shape)
        fits = (
            found is not None
            and array.dtype == found.dtype
            and len(shape) == len(found.shape)
            and all(
                0 <= got <= -want if want < 0 else got == want for got, want in zip(shape, found.shape, strict=True)
            )
        )
        if found is None or not fits:
            raise self._bad(f"array {_text.quoted(array.name, 40)} of a result has another shape or dtype")
        try:
            return Filling(shape, np.dtype(found.dtype))
        except (MemoryError, ValueError):  # numpy raises ValueError above the address space.
            raise HvpdError(
                f"array {array.name} of a result has the shape {shape}, and this machine has too little memory for it",
                reason="CLIENT_MEMORY",
            ) from None

    def _bad(self, why: str) -> HvpdError:
        return bad_answer(self._operator.transport, why)
