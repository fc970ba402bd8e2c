"""What a ComputeRequest asks for: the computation, its arrays and its memory."""

from typing import NamedTuple

import numpy as np

from hvpd import _text
from hvpd._krylov import preconditioning, probes, solve, trace
from hvpd.v1 import krylov_pb2
from hvpd_server.errors import invalid
from hvpd_server.krylov import computation
from hvpd_server.krylov.device_space import capacity
from hvpd_server.krylov.operator import Operator
from hvpd_server.rpc.run_requests import Arrays, Expected
from hvpd_server.scheduling.holdback import bucket_of

MAX_STEPS = 1 << 20
"""Most steps, products or random vectors of a request."""

_MOST_ITERATIONS = 1 << 40
"""Most steps of a solve or of a step of a trust region."""

_MOST_SYSTEMS = 4096
"""Most systems of a request: right-hand sides times shifts."""

_PRECONDITIONER = {
    "diagonal": {"M": Expected(("n",))},
    "low_rank": {"M_U": Expected(("n", None)), "M_weights": Expected((None,))},
    "kronecker": {
        "M_elements_#": Expected((None, None), required=False, integers=True),
        **{f"M_{part}_#": Expected((None, None), required=False) for part in ("a", "g", "weights")},
    },
}


class Computation(NamedTuple):
    """A computation that can begin."""

    name: str
    compute: computation.Compute
    size_bytes: int
    """Bytes of the memory that it takes."""
    what: str
    """The largest part of it, in words."""


def arrays_of(spec: krylov_pb2.ComputationSpec) -> dict[str, Expected]:
    """Return the arrays that a computation takes."""
    kind = spec.WhichOneof("kind")
    own = {
        "solve": {"B": Expected((None, "n")), "X": Expected((None, "n"), required=False)},
        "step": {"gradient": Expected(("n",))},
    }.get(kind or "", {})
    preconditioner = (spec.step if kind == "step" else spec.solve).preconditioner.kind
    if preconditioner not in ("", *_PRECONDITIONER):
        raise invalid(
            "PRECONDITIONER",
            f"a preconditioner's kind is one of {', '.join(_PRECONDITIONER)}, got {_text.quoted(preconditioner, 40)}",
        )
    return {**own, **_PRECONDITIONER.get(preconditioner, {})}


def computation_of(
    spec: krylov_pb2.ComputationSpec, operator: Operator, arrays: Arrays, room_bytes: int
) -> Computation:
    """Return the computation of a request.

    Args:
        spec: The request.
        operator: Its operator.
        arrays: Its arrays, as `arrays_of` asks for them.
        room_bytes: Bytes that all bases may take, if the request leaves it open.

    Raises:
        ServiceError: The request is wrong.
    """
    kind = spec.WhichOneof("kind")
    if kind == "solve":
        return _solve(spec.solve, operator, arrays)
    if kind == "step":
        return _step(spec.step, operator, arrays)
    if kind == "tridiagonals":
        return _tridiagonals(spec.tridiagonals, operator, room_bytes)
    if kind == "estimate":
        return _estimate(spec.estimate, operator)
    raise invalid("SPEC_MISSING", "the first message must say what to compute: solve, step, tridiagonals or estimate")


def _solve(spec: krylov_pb2.SolveSpec, operator: Operator, arrays: Arrays) -> Computation:
    B, X, shifts = arrays["B"], arrays.get("X"), np.array(spec.shifts, np.float64)
    _check_word(spec.method, "method", solve.METHODS)
    _check_limits(spec)
    if not (len(shifts) and np.isfinite(shifts).all()):
        raise invalid("SOLVE", f"at least one shift is needed, and all must be finite, got {len(shifts)} shifts")
    if len(B) > operator.engine.limits.max_block_width or len(B) * len(shifts) > _MOST_SYSTEMS:
        raise invalid(
            "SOLVE",
            f"a request has at most {operator.engine.limits.max_block_width} right-hand sides and {_MOST_SYSTEMS} systems, got "
            f"{len(B)} right-hand sides with {len(shifts)} shifts",
        )
    if (X is not None and X.shape != B.shape) or not all(
        np.isfinite(each).all() for each in (B, X) if each is not None
    ):
        raise invalid("SOLVE", "B and X must be finite, and have one shape")
    if len(shifts) > 1 and (X is not None or spec.HasField("preconditioner")):
        raise invalid("SOLVE", "several shifts need the Krylov space of B itself: send no X and no preconditioner")
    described = _described(spec.preconditioner, operator, arrays)
    # A launch has its state, the one before it, and the vectors of a step.
    rows, systems = bucket_of(len(B)), bucket_of(len(B)) * bucket_of(len(shifts))
    vectors = 8 * rows + (11 if spec.method == "minres" else 6) * systems
    size_bytes = vectors * operator.n * operator.dtype.itemsize + _beside(operator, arrays)
    compute = computation.solving(arrays, shifts, described, tol=spec.tol, maxiter=spec.maxiter, method=spec.method)
    return Computation("solve", compute, size_bytes, f"a solve with {vectors} vectors")


def _step(spec: krylov_pb2.StepSpec, operator: Operator, arrays: Arrays) -> Computation:
    gradient = arrays["gradient"]
    _check_limits(spec)
    if not (spec.radius > 0 and np.isfinite(gradient).all()):
        raise invalid("SOLVE", f"radius must be positive, and the gradient finite, got a radius of {spec.radius}")
    described = _described(spec.preconditioner, operator, arrays)
    size_bytes = 8 * operator.n * operator.dtype.itemsize + _beside(operator, arrays)
    compute = computation.trust_region_step(gradient, described, radius=spec.radius, tol=spec.tol, maxiter=spec.maxiter)
    return Computation("step", compute, size_bytes, "a step with 8 vectors")


def _beside(operator: Operator, arrays: Arrays) -> int:
    """Return the bytes of the arrays of a request and of the low-rank term. Launches
    take the term and the preconditioner in copies of up to twice their rank.
    """
    copied = sum(array.nbytes for name, array in arrays.items() if name.startswith("M"))
    return sum(array.nbytes for array in arrays.values()) + 2 * copied + 3 * operator.terms.size_bytes


def _check_limits(spec: krylov_pb2.SolveSpec | krylov_pb2.StepSpec) -> None:
    if not spec.tol >= 0:
        raise invalid("SOLVE", f"tol must be at least 0, got {spec.tol}")
    if not 0 <= spec.maxiter <= _MOST_ITERATIONS:
        raise invalid("SOLVE", f"maxiter must be from 0 to {_MOST_ITERATIONS}, got {spec.maxiter}")


def _described(spec: krylov_pb2.Preconditioner, operator: Operator, arrays: Arrays) -> preconditioning.Described:
    own = {name: array for name, array in arrays.items() if name.startswith("M")}
    described = preconditioning.Described(spec.kind, own, spec.shift)
    if fault := preconditioning.fault(described, operator.n):
        raise invalid("PRECONDITIONER", f"the preconditioner is wrong: {fault}")
    return described


def _tridiagonals(spec: krylov_pb2.TridiagonalsSpec, operator: Operator, room_bytes: int) -> Computation:
    _check_count(spec.probes, "probes")
    _check_count(spec.steps, "steps", operator.n)
    if spec.probes * spec.steps > MAX_STEPS:
        raise invalid("STEPS", f"a request takes at most {MAX_STEPS} steps, got {spec.probes} x {spec.steps}")
    _check_word(spec.reorthogonalize, "reorthogonalize", ("", "full", "none"))
    vector = operator.n * operator.dtype.itemsize
    devices = computation.stays_on_devices(operator)
    one = (capacity(spec.steps + 1) if devices else spec.steps) * vector
    most = {"none": 0, "full": max(room_bytes, one)}.get(spec.reorthogonalize, room_bytes)
    if not devices:
        most = min(most, max(probes.BASIS_BYTES, one if spec.reorthogonalize == "full" else 0))
    group = min(spec.probes, max(most // one, 1) if one <= most else probes.GROUP_BYTES // vector or 1)
    if devices and one <= most:  # One basis after the other.
        group = 1
    size_bytes = (one * group if one <= most else 0) + 5 * group * vector
    compute = computation.quadrature(
        seed=spec.seed, probes_count=spec.probes, steps=spec.steps, basis_bytes=most if one <= most else 0, width=group
    )
    return Computation("tridiagonals", compute, size_bytes, f"{group} iterations with {size_bytes // vector} vectors")


def _estimate(spec: krylov_pb2.EstimateSpec, operator: Operator) -> Computation:
    _check_word(spec.method, "method", (*(trace.DIAGONAL if spec.diagonal else trace.TRACE), "exact"))
    _check_count(spec.products, "products", operator.n)
    least = {"xtrace": 2, "hutch++": 3, "xdiag": 2}.get(spec.method, 1)
    if spec.products < least:
        raise invalid("STEPS", f"{spec.method} takes at least {least} products, got {spec.products}")
    count = {"xtrace": spec.products // 2, "xdiag": spec.products // 2, "hutch++": spec.products // 3}.get(spec.method)
    # A sketch has four blocks of vectors, and a factorization in float64.
    per_vector = operator.n * (4 * operator.dtype.itemsize + 24)
    if count is None:
        count = spec.products if spec.diagonal and spec.method == "hutchinson" else 64
    compute = computation.estimate(
        of_diagonal=spec.diagonal, method=spec.method, products=spec.products, seed=spec.seed
    )
    name = "diagonal" if spec.diagonal else "trace"
    return Computation(name, compute, max(count, 64) * per_vector, f"an estimate with {count} random vectors")


def _check_word(word: str, name: str, words: tuple[str, ...]) -> None:
    if word not in words:
        raise invalid("METHOD", f"{name} must be one of {', '.join(map(repr, words))}, got {_text.quoted(word, 40)}")


def _check_count(count: int, name: str, most: int = MAX_STEPS) -> None:
    if not 1 <= count <= min(most, MAX_STEPS):
        raise invalid("STEPS", f"{name} must be from 1 to {min(most, MAX_STEPS)}, got {count}")
