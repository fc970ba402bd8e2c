"""50 Lanczos steps as one run on the server: over streaming their products one by one,
at several distances, and over the same steps in process.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import scipy.sparse.linalg
from matfree import decomp

import hvpd
from bench import _delay, _processes, _timing, _warm
from bench._objectives import Problem, Vector, mlp, normal
from bench._programs import Programs, aligned
from bench._report import Figure, Goal, measured
from hvpd._krylov.lanczos import Lanczos
from hvpd._krylov.runner import Runner, runner
from hvpd_server.derivation import lanczos

BENCH = "krylov"
STEPS = 50

LARGE_DISTANCES = (0.01, 0.05)
"""Distances for 1.9 M, where products take more time than the wire."""

ROUNDS = {"6 k": (5, 3, 0.2), "270 k": (5, 3, 0.2), "1.9 M": (3, 1, 0.0)}
"""Rounds on this machine, and at each distance; and the seconds of a contender in a
round on this machine, 0 for one call. 50 steps at 1.9 M take seconds, and the whole
benchmark should end within minutes.
"""

_BUCKET = 64
"""Rows of the basis in the program of several steps, as on the server."""

PROBLEMS: Mapping[str, Callable[[], Problem]] = {
    "6 k": lambda: mlp((64, 82, 10), 500),
    "270 k": lambda: mlp((784, 256, 256, 10), 250),
    "1.9 M": lambda: mlp((784, 1024, 1024, 10), 100),
}

PARTS = tuple(PROBLEMS)
"""Parts that can run alone."""

DISTANCES = (0.0, 0.001, 0.01, 0.02, 0.05)
"""Seconds of a round trip beside that of the machine itself; 0: no proxy."""

GOALS = {("1.9 M", 0.0): Goal(">=", 5.0), ("6 k", 0.02): Goal(">=", 50.0)}
GOAL_IN_PROCESS = Goal("<=", 1.10)

PREDICTED = {
    "6 k": {0.0: 2.0, 0.001: 8.0, 0.01: 27.0, 0.02: 35.0, 0.05: 43.0},
    "270 k": {0.0: 2.0, 0.001: 2.2, 0.01: 3.5, 0.02: 5.0, 0.05: 9.0},
    "1.9 M": {0.0: 1.8, 0.001: 1.8, 0.01: 2.0, 0.02: 2.2, 0.05: 2.6},
}
"""Time of streaming over that of a run.

A streamed step is a round trip, with 2n numbers by gRPC if there is a proxy, the
product, and the orthogonalization in NumPy. A run is one round trip, n numbers, the
products, and the orthogonalization in XLA. At 6 k a step of a run takes 0.15 ms, and a
streamed one 0.3 ms and the distance, so that 50 steps at 20 ms are at most 50 times
faster. At 1.9 M the products themselves take more than the wire.
"""

PREDICTED_IN_PROCESS = {"6 k": 1.15, "270 k": 1.05, "1.9 M": 1.05}
"""A run over the same program in process: one call, and some ten launches in turn."""

SOLVE_STEPS = 64
"""Steps of each solve."""

PREDICTED_SOLVES = {
    "CG": 2.0,
    "CG with 16 right-hand sides": 1.3,
    "CG with 8 shifts": 2.5,
    "MINRES": 2.2,
    "CG with Nyström's preconditioner": 2.2,
}
"""Time of a solve by single products over that of the solve in launches, at n = 6 k.

A product takes 0.2 ms, and a step from Python 0.2 ms more for the queue and for the
vectors in NumPy: more of them with 8 shifts. A block of 16 takes so long that the rest
counts less.
"""

GOAL_SOLVES = Goal(">=", 1.0)


def run(*, quick: bool, part: str | None = None) -> Iterator[Figure]:
    """Yield the figures of each size."""
    with _processes.serving(None, "--metrics-port", "0") as server:
        for label in [part] if part else list(PROBLEMS)[: 1 if quick else None]:
            yield from _figures(label, server, quick=quick)
            if label == "6 k":
                yield from _solves(label, server, quick=quick)


def _figures(label: str, server: _processes.Child, *, quick: bool) -> Iterator[Figure]:
    problem = PROBLEMS[label]()
    n = problem.n
    rounds, far_rounds, seconds = (1, 1, 0.02) if quick else ROUNDS[label]
    with hvpd.connect(_processes.address(server)) as client:
        objective = _warm.registered(client, problem, name=f"bench/krylov/{n}")
        H = objective.at(problem.x).hessian()
        _warm.vectors(objective, H)
        _warm.launched(H, STEPS)
        near = {"run": _run(H), "streamed": _streamed(H)}
        contenders = {**near, **_in_process(problem)}
        times = {
            name: np.array(found)
            for name, found in _timing.interleave(contenders, rounds=rounds, seconds=seconds).items()
        }
    ratio = times["run"] / times["in process, the same program"]
    yield measured(
        BENCH,
        f"{label}: a run over the same program in process",
        "",
        ratio,
        n=n,
        predicted=PREDICTED_IN_PROCESS[label],
        goal=GOAL_IN_PROCESS,
    )
    for name, taken in times.items():
        yield measured(BENCH, f"{label}: {STEPS} steps, {name}", "ms", taken * 1e3, n=n)
    yield _over_streaming(label, 0.0, n, times["streamed"] / times["run"])
    distances = LARGE_DISTANCES if label == "1.9 M" else DISTANCES[1:]
    for distance in (0.01,) if quick else distances:
        with (
            _delay.distance(_processes.address(server), distance) as far,
            hvpd.connect(far.address) as client,
        ):
            H = client.objective(f"bench/krylov/{n}").at(problem.x).hessian()
            contenders = {"run": _run(H), "streamed": _streamed(H)}
            found = _timing.interleave(contenders, rounds=far_rounds, seconds=0.0)
            yield _over_streaming(label, distance, n, np.array(found["streamed"]) / np.array(found["run"]))
            if distance == DISTANCES[2]:
                yield from _bytes(label, n, far, contenders)


def _solves(label: str, server: _processes.Child, *, quick: bool) -> Iterator[Figure]:
    """Yield the time of each solve by single products over that in launches.

    An objective with a fixed bucket has no launches of several steps.
    """
    problem, (rounds, _, seconds) = PROBLEMS[label](), (1, 1, 0.02) if quick else ROUNDS[label]
    with hvpd.connect(_processes.address(server)) as client:
        point = client.objective(f"bench/krylov/{problem.n}").at(problem.x)
        H = point.hessian()
        shift = 1.01 * abs(float(H.eigsh(1, "SA", tol=1e-2).values[0]))
        fixed = client.register(problem.fun, problem.x, *problem.data, fixed_bucket=1)
        definite, single = point.hessian(shift), fixed.at(problem.x).hessian(shift)
        M = hvpd.nystrom(definite, 20)
        for method, predicted in PREDICTED_SOLVES.items():
            contenders = {"launches": _solve(definite, method, M), "products": _solve(single, method, M)}
            _warm.until(lambda: _launched(server, contenders["launches"]))  # noqa: B023 - called here
            found = _timing.interleave(contenders, rounds=rounds, seconds=seconds)
            yield measured(
                BENCH,
                f"{label}: {SOLVE_STEPS} steps of {method}, single products over launches",
                "",
                np.array(found["products"]) / np.array(found["launches"]),
                n=problem.n,
                k=16 if "16" in method else 1,
                predicted=predicted,
                goal=GOAL_SOLVES,
            )
            yield measured(
                BENCH, f"{label}: {SOLVE_STEPS} steps of {method}", "ms", np.array(found["launches"]) * 1e3, n=problem.n
            )


def _solve(H: hvpd.CurvatureOperator, method: str, M: object) -> Callable[[], object]:
    n = H.shape[0]
    options: dict[str, dict[str, Any]] = {
        "CG with 8 shifts": {"shifts": np.linspace(0.0, 1.0, 8)},
        "MINRES": {"method": "minres"},
        "CG with Nyström's preconditioner": {"M": M},
    }
    b = normal(8, 16, n).T if "16" in method else normal(8, n)
    return lambda: H.solve(b, tol=0.0, maxiter=SOLVE_STEPS, **options.get(method, {}))


def _launched(server: _processes.Child, solve: Callable[[], object]) -> bool:
    """Solve. Return whether steps were launched together."""
    several = r'hvpd_launches_total{program="(cg|shifted_cg|minres)_(hvp|apply)"}'
    before = _processes.metric(server, several)
    solve()
    return _processes.metric(server, several) > before


def _over_streaming(label: str, seconds: float, n: int, ratio: Vector) -> Figure:
    where = f"{seconds * 1e3:g} ms away" if seconds else "on loopback"
    predicted, goal = PREDICTED[label][seconds], GOALS.get((label, seconds))
    return measured(BENCH, f"{label}: streaming over a run, {where}", "", ratio, n=n, predicted=predicted, goal=goal)


def _bytes(
    label: str, n: int, far: _delay.Distance, contenders: Mapping[str, Callable[[], object]]
) -> Iterator[Figure]:
    """Yield the bytes on the wire of each contender, in vectors."""
    for name, call in contenders.items():
        before = far.counted()
        call()
        after = far.counted()
        for way, sent in (("up", after.up - before.up), ("down", after.down - before.down)):
            yield measured(BENCH, f"{label}: bytes {way}, {name}", "vectors", [sent / (4 * n)], n=n)


def _start(n: int) -> Vector:
    return normal(8, 1, n)


def _run(H: hvpd.CurvatureOperator) -> Callable[[], object]:
    runs, start = runner(H), _start(H.shape[0])

    def call() -> object:
        with Lanczos(runs.space(), start) as run:
            return run.extend(STEPS).alphas

    return call


def _streamed(H: hvpd.CurvatureOperator) -> Callable[[], object]:
    runs, start = runner(H), _start(H.shape[0])
    return lambda: Lanczos(Runner.space(runs), start).extend(STEPS).alphas


def _in_process(problem: Problem) -> dict[str, Callable[[], object]]:
    """Return the same steps in this process, by several libraries."""
    programs, n = Programs(problem), problem.n
    multiply, start = programs.multiply("hvp"), aligned(_start(n))
    operator = scipy.sparse.linalg.LinearOperator((n, n), lambda v: multiply(v.reshape(1, -1))[0], dtype=np.float32)

    def numpy() -> object:
        return hvpd.krylov.lanczos(operator, STEPS, v0=start[0]).alphas

    def same() -> object:
        with jax.enable_x64(True):  # The program has numbers in float64.
            return _launches(programs, start)

    def scipy_eigsh() -> object:
        try:
            return scipy.sparse.linalg.eigsh(operator, k=10, ncv=STEPS, maxiter=1, v0=start[0])
        except scipy.sparse.linalg.ArpackNoConvergence as error:
            return error.eigenvalues

    hvp, (x, args) = programs.function("hvp", 1), programs.arguments
    iteration = jax.jit(
        lambda v, x, *args: decomp.tridiag_sym(STEPS, reortho="full")(lambda u: hvp(x, u[None], *args)[0], v)
    )

    def matfree() -> object:
        return jax.block_until_ready(iteration(start[0], x, *args))

    return {
        "in process, the same program": same,
        "in process, NumPy": numpy,
        "in process, matfree": matfree,
        "in process, SciPy's eigsh": scipy_eigsh,
    }


def _launches(programs: Programs, start: Vector) -> list[float]:
    """Run the server's program of several steps, launch by launch."""
    n = programs.n
    program, most = programs.compiled(f"{lanczos.PREFIX}apply", _BUCKET), lanczos.steps_of(n)
    Q = aligned(np.zeros((_BUCKET, n), np.float32))
    Q[0] = start[0] / np.linalg.norm(start[0].astype(float))
    rows, size, alphas = 1, 0.0, list[float]()
    x, residuals = programs.arguments[0], programs.residuals()
    while rows <= STEPS:
        counts = np.array([rows, min(most, STEPS + 1 - rows)], np.int32)
        found = program(x, Q, np.array([1.0, 0.0, size]), counts, *residuals)
        new, some, _, facts = map(np.asarray, found)
        taken, size = int(facts[0]), float(facts[2])
        Q[rows : rows + taken] = new[:taken]
        alphas.extend(some[:taken])
        rows += taken
    return alphas
