"""Whole solves, near and far: in this process, streamed from a server product by
product, and as Krylov runs on the server; at several distances and bandwidths.

All three run the same iterations. They differ only in two places: where the products
run, and where the iteration runs. Server and client have the same two cores, so a
remote solve can hardly be faster than a local one: the figures show what the distance
costs. A server with a faster device gains its advantage on top.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from scipy.sparse.linalg import LinearOperator
from sklearn.datasets import load_digits

import hvpd
from bench import _delay, _processes, _warm
from bench._objectives import Problem, Vector, mlp, normal
from bench._programs import Programs
from bench._report import Figure, measured

BENCH = "solve"

RIGHT_HAND_SIDES = 16
ITERATIONS = 10
"""Iterations of the minimisation."""
PROBES, STEPS = 8, 40
"""Probes and steps of the spectral density."""
PAIRS = 20
_TOL = 1e-2
"""Tolerance of eigenpairs and of linear systems, in float32."""


@dataclasses.dataclass(frozen=True)
class Link:
    """A way to the server."""

    seconds: float
    """Seconds of a round trip."""
    gigabits: float
    """Gigabits a second in each direction; 0 for the machine's own loopback, without a
    proxy.
    """

    @property
    def label(self) -> str:
        """Return a name for tables."""
        if not self.gigabits:
            return "loopback"
        rate = f"{self.gigabits:g} Gb/s" if self.gigabits >= 1 else f"{self.gigabits * 1e3:g} Mb/s"
        return f"{self.seconds * 1e3:g} ms, {rate}"

    @property
    def bytes_a_second(self) -> float:
        """Return the rate for the proxy."""
        return self.gigabits * 1e9 / 8


LINKS = (
    Link(0.0, 0.0),
    Link(0.001, 10.0),
    Link(0.01, 10.0),
    Link(0.05, 10.0),
    Link(0.01, 1.0),
    Link(0.01, 0.1),
)


def _digits() -> Problem:
    """Return the digits network: 1,797 images of 8 by 8 pixels."""
    images, labels = load_digits(return_X_y=True)
    problem = mlp((64, 82, 10), 1)
    return dataclasses.replace(problem, data=((images / 16).astype(np.float32), labels.astype(np.int32)))


PROBLEMS: Mapping[str, Callable[[], Problem]] = {
    "6 k": _digits,
    "270 k": lambda: mlp((784, 256, 256, 10), 250),
}
PARTS = tuple(PROBLEMS)
"""Parts that can run alone."""


class Point(Protocol):
    """A point with value, gradient and curvature."""

    @property
    def value(self) -> float:
        """Return f(x)."""
        ...

    @property
    def gradient(self) -> Vector:
        """Return the gradient."""
        ...

    def hessian(self) -> Any:
        """Return the Hessian."""
        ...


class Objective(Protocol):
    """What the solves need: in this process, streamed, or on a server."""

    def at(self, x: Any, /) -> Point:
        """Return a point."""
        ...


# The solves

Solve = Callable[[Objective, Vector, float], object]
"""Takes the objective, a start, and a shift that makes the Hessian there definite."""


def _minimize(objective: Objective, x: Vector, shift: float) -> object:
    return hvpd.krylov.minimize(objective, x, "trust-ncg", gtol=1e-6, maxiter=ITERATIONS).fun


def _eigsh(objective: Objective, x: Vector, shift: float) -> object:
    return hvpd.krylov.eigsh(objective.at(x).hessian(), PAIRS, "LA", tol=_TOL).values


def _cg(count: int) -> Solve:
    def solve(objective: Objective, x: Vector, shift: float) -> object:
        b = normal(8, len(x)) if count == 1 else normal(8, len(x), count)
        return hvpd.krylov.solve(_shifted(objective.at(x).hessian(), shift), b, tol=_TOL).x

    return solve


def _spectrum(objective: Objective, x: Vector, shift: float) -> object:
    return hvpd.krylov.spectrum(objective.at(x).hessian(), PROBES, STEPS, reorthogonalize="none").moments(2)


SOLVES: Mapping[str, Solve] = {
    f"trust-ncg, {ITERATIONS} iterations": _minimize,
    f"eigsh, top {PAIRS}": _eigsh,
    "CG": _cg(1),
    f"CG, {RIGHT_HAND_SIDES} right-hand sides": _cg(RIGHT_HAND_SIDES),
    "spectral density": _spectrum,
}

QUICK = (f"trust-ncg, {ITERATIONS} iterations", "CG")
"""The solves of a quick run, which need no blocks."""


def _shifted(H: Any, shift: float) -> Any:
    """Return H + shift I."""
    if isinstance(H, hvpd.CurvatureOperator):
        return H.shifted(shift)
    return LinearOperator(
        H.shape, matvec=lambda v: H @ v + shift * v, matmat=lambda V: H @ V + shift * V, dtype=H.dtype
    )


# The places


class _Local:
    """The objective in this process, compiled as the server compiles it."""

    def __init__(self, problem: Problem) -> None:
        self._programs = Programs(problem)

    def at(self, x: Any, /) -> "_LocalPoint":
        return _LocalPoint(self._programs, np.ascontiguousarray(x, np.float32))


class _LocalPoint:
    def __init__(self, programs: Programs, x: Vector) -> None:
        self._programs, self._x = programs, jax.device_put(x)
        _, self._args = programs.arguments
        value, gradient = programs.compiled("value_and_grad", 0)(self._x, *self._args)[:2]
        self.value, self.gradient = float(value), np.asarray(gradient)

    def hessian(self) -> LinearOperator:
        n = self._programs.n

        def multiply(V: Vector) -> Vector:
            width = V.shape[1]
            bucket = 1 << (width - 1).bit_length()
            rows = np.zeros((bucket, n), np.float32)
            rows[:width] = V.T
            return np.asarray(self._programs.compiled("hvp", bucket)(self._x, rows, *self._args))[:width].T

        return LinearOperator(
            (n, n), matvec=lambda v: multiply(v.reshape(-1, 1))[:, 0], matmat=multiply, dtype=np.float32
        )


class _Streamed:
    """A server's objective whose iterations run here: one call for each product."""

    def __init__(self, objective: Any) -> None:
        self._objective = objective

    def at(self, x: Any, /) -> "_StreamedPoint":
        return _StreamedPoint(self._objective.at(x))


class _StreamedPoint:
    def __init__(self, point: Any) -> None:
        self._point = point

    @property
    def value(self) -> float:
        return float(self._point.value)

    @property
    def gradient(self) -> Vector:
        gradient: Vector = self._point.gradient
        return gradient

    def hessian(self) -> LinearOperator:
        H = self._point.hessian()
        return LinearOperator(H.shape, matvec=lambda v: H @ v, matmat=lambda V: H @ V, dtype=H.dtype)


# The measurement


def run(*, quick: bool, part: str | None = None) -> Iterator[Figure]:
    """Yield the figures of each size."""
    with _processes.serving() as server:
        for label in [part] if part else list(PROBLEMS)[: 1 if quick else None]:
            yield from _size(label, _processes.address(server), quick=quick)


def _size(label: str, address: str, *, quick: bool) -> Iterator[Figure]:
    problem = PROBLEMS[label]()
    x, local = problem.flat(), _Local(problem)
    solves = {name: SOLVES[name] for name in (QUICK if quick else SOLVES)}
    shift = 1.5 * _lowest(local, x)
    with hvpd.connect(address) as client:
        objective = _warm.registered(client, problem, name=f"bench/solve/{problem.n}")
        H = objective.at(problem.x).hessian()
        _warm.vectors(objective, H)
        _warm.blocks(objective, H, 1 if quick else RIGHT_HAND_SIDES)
    for link in LINKS[:2] if quick else LINKS:
        with _connected(address, link) as (client, proxy):
            far = client.objective(f"bench/solve/{problem.n}")
            places: dict[str, Objective] = {"local": local, "streamed": _Streamed(far), "run": far}
            for name, solve in solves.items():
                yield from _figures(label, problem.n, name, link, solve, places, proxy, x, shift)


def _figures(
    label: str,
    n: int,
    name: str,
    link: Link,
    solve: Solve,
    places: Mapping[str, Objective],
    proxy: _delay.Distance | None,
    x: Vector,
    shift: float,
) -> Iterator[Figure]:
    """Yield the times of one solve by one link, over the local one's."""
    rounds = 1 if proxy else 2
    if not proxy:
        for objective in places.values():  # Compiles, on the server too.
            solve(objective, x, shift)
    taken: dict[str, list[float]] = {place: [] for place in places}
    sent: dict[str, float] = {}
    for turn in range(rounds):
        order = list(places)
        for place in order[turn % 3 :] + order[: turn % 3]:
            before = sum(proxy.counted()) if proxy else 0
            started = time.perf_counter()
            solve(places[place], x, shift)
            taken[place].append(time.perf_counter() - started)
            sent[place] = (sum(proxy.counted()) if proxy else 0) - before
    print(f"solve: {label}: {name}, {link.label}", file=sys.stderr, flush=True)
    local = np.array(taken["local"])
    for place in ("streamed", "run"):
        start = f"{label}: {name}: {link.label}: {place}"
        ratio = np.array(taken[place]) / local
        predicted = predictions(label, name, link)[place]
        yield measured(BENCH, f"{start} over local", "", ratio, n=n, predicted=predicted)
        yield measured(BENCH, start, "s", taken[place], n=n)
        if proxy:
            yield measured(BENCH, f"{start}, bytes", "vectors", [sent[place] / (4 * n)], n=n)
    yield measured(BENCH, f"{label}: {name}: {link.label}: local", "s", local, n=n)


@contextlib.contextmanager
def _connected(address: str, link: Link) -> Iterator[tuple[hvpd.Client, _delay.Distance | None]]:
    """Yield a client by a link, and the proxy, if there is one."""
    with contextlib.ExitStack() as stack:
        proxy = None
        if link.gigabits:
            proxy = stack.enter_context(_delay.distance(address, link.seconds, link.bytes_a_second))
        yield stack.enter_context(hvpd.connect(proxy.address if proxy else address)), proxy


def _lowest(local: _Local, x: Vector) -> float:
    """Return the size of the Hessian's lowest eigenvalue, which is negative."""
    values = hvpd.krylov.eigsh(local.at(x).hessian(), 1, "SA", tol=1e-2).values
    return abs(float(values[0]))


# The predictions

_PRODUCT_SECONDS = {"6 k": 1.2e-3, "270 k": 4e-3}
"""Seconds of a product in process."""

_SIZE = {"6 k": 6_160, "270 k": 269_322}

_WORK = {
    f"trust-ncg, {ITERATIONS} iterations": (100, 1, 30, 30),
    f"eigsh, top {PAIRS}": (80, 1, 6, 22),
    "CG": (60, 1, 4, 2),
    f"CG, {RIGHT_HAND_SIDES} right-hand sides": (25, RIGHT_HAND_SIDES, 4, 2 * RIGHT_HAND_SIDES),
    "spectral density": (STEPS, PROBES, 3, 1),
}
"""For each solve: products, vectors of a product, round trips of a run, and vectors
that a run sends and receives.
"""


def predictions(label: str, name: str, link: Link) -> dict[str, float]:
    """Return the predicted times over the local one. A streamed product adds a round
    trip, 0.4 ms of gRPC and Python, and two vectors on the wire. A run adds a tenth, a
    few round trips of 1 ms each besides the distance, and a few vectors.
    """
    products, width, trips, vectors = _WORK[name]
    rate = link.bytes_a_second or 1e9
    local = products * width * _PRODUCT_SECONDS[label]
    wire = 4 * _SIZE[label] / rate
    streamed = local + products * (link.seconds + 0.4e-3 + 2 * width * wire)
    run = 1.1 * local + (trips + 1) * (link.seconds + 1e-3) + (vectors + 1) * wire
    return {"streamed": streamed / local, "run": run / local}
