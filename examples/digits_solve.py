"""The solver of the demo: it minimises an objective that it knows by name only.
digits.py starts it.

It needs numpy, SciPy and hvpd. At its end it checks that jax was never imported.
Usage: digits_solve.py ADDRESS NAME OUT.npz
"""

import concurrent.futures
import sys
import time

import numpy as np
from scipy.optimize import minimize
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, cg, eigsh

import hvpd

SHIFTS = np.geomspace(1e-1, 1e-3, 8)
"""The lambdas of (H + lambda I) d = -g."""
CG_TOLERANCE = 1e-8
EIGSH_TOLERANCE = 1e-6
"""Tolerance of the bottom eigenvalues, relative to the largest eigenvalue."""


class Phase:
    """A phase of the work: its share of the client's statistics, and lines that show
    progress.
    """

    def __init__(self, client, name):
        self.client, self.name = client, name
        self.before, self.started = client.statistics(), time.perf_counter()
        self.said = self.started

    def figures(self):
        """Return products, seconds, ms a product from call to result, ms of it on the
        device, and mean width of a batch.
        """
        done = self.client.statistics() - self.before
        each = max(done.products, 1)
        return (
            done.products,
            time.perf_counter() - self.started,
            1e3 * done.seconds / each,
            1e3 * done.compute_seconds / each,
            done.mean_batch_width,
        )

    def say(self, text, every=0.0):
        """Print a line, unless the last line is less than `every` seconds old."""
        if time.perf_counter() - self.said < every:
            return
        self.said = time.perf_counter()
        products, seconds, latency, _, _ = self.figures()
        print(f"  {self.name:<9} {seconds:5.1f} s {products:6,} products {latency:5.1f} ms each  {text}", flush=True)


def descend(phase, objective, x0):
    """Minimise from x0; return SciPy's result and rows of (products, f, |g|)."""
    history = []

    def visited(x):
        value, gradient = objective.value_and_grad(x)  # The point is resident, so nothing is computed again.
        history.append((phase.figures()[0], value, np.linalg.norm(gradient)))
        if len(history) % 5 == 1:
            phase.say(f"iteration {len(history):3}  f {value:.6f}  |g| {history[-1][2]:.1e}")

    result = minimize(
        objective.value_and_grad,
        x0,
        jac=True,
        hessp=objective.hessp,
        method="trust-ncg",
        callback=visited,
        options={"gtol": 1e-5, "maxiter": 150},
    )
    phase.say(f"{result.message} {result.nit} iterations, |g| {np.linalg.norm(result.jac):.1e}")
    return result, np.array(history)


def counted(operator, phase, text):
    """Return the operator, which prints the solver's progress from time to time."""

    def multiply(v):
        phase.say(text, every=3.0)
        return operator @ v

    return LinearOperator(operator.shape, matvec=multiply, dtype=operator.dtype)


def written(eigenvalues):
    """Return sorted numbers as text with few digits."""
    return "  ".join(f"{value:.3e}" for value in np.sort(eigenvalues))


def spectrum(phase, point):
    """Return the bottom 5 and top 5 eigenvalues, ascending, with eigenvectors as
    columns.
    """
    start = np.random.default_rng(1).normal(size=point.n)
    top, V = eigsh(counted(point.hessian(), phase, "top 5"), k=5, which="LA", tol=1e-10, v0=start)
    phase.say(f"top 5:    {written(top)}")
    # ARPACK's tolerance is relative to each eigenvalue, which is too strict near 0.
    # After a shift by -top, the bottom eigenvalues are the largest in magnitude, and
    # the tolerance is relative to the whole spectrum.
    shifted = counted(point.hessian(shift=-top.max()), phase, "bottom 5 (they lie close together: this takes longest)")
    try:
        bottom, W = eigsh(shifted, k=5, which="LM", ncv=300, maxiter=30, tol=EIGSH_TOLERANCE, v0=start)
    except ArpackNoConvergence as error:
        bottom, W = error.eigenvalues, error.eigenvectors
        phase.say(f"only {len(bottom)} of the bottom 5 converged; these are reported")
    bottom = bottom + top.max()
    phase.say(f"bottom {len(bottom)}: {written(bottom)}")
    order = np.argsort(np.concatenate([bottom, top]))
    return np.concatenate([bottom, top])[order], np.hstack([W, V])[:, order]


def newton_step(phase, point, shift, open_solves):
    """Solve (H + shift I) d = -g by CG; return d and the relative residuals that CG
    updates.
    """
    H = point.hessian(shift)
    residual = -point.gradient
    history, last, d = [1.0], {}, np.zeros(point.n)

    def multiply(p):
        last["p"], last["Hp"] = p.copy(), H @ p
        return last["Hp"]

    def stepped(x):
        nonlocal residual, d
        length = (x - d) @ last["p"] / (last["p"] @ last["p"])
        residual, d = residual - length * last["Hp"], x.copy()
        history.append(np.linalg.norm(residual) / np.linalg.norm(point.gradient))
        phase.say(f"{len(open_solves)} of {len(SHIFTS)} solves under way", every=2.0)

    operator = LinearOperator(H.shape, matvec=multiply, dtype=H.dtype)
    d, info = cg(operator, -point.gradient, rtol=CG_TOLERANCE, maxiter=2_000, callback=stepped)
    open_solves.discard(shift)
    phase.say(f"lambda {shift:.1e}: {'converged' if info == 0 else 'stopped'} after {len(history) - 1} iterations")
    return d, np.array(history)


def newton_steps(phase, point):
    """Solve for all shifts at once, in threads of one client. Products that meet at the
    server share a launch.
    """
    open_solves = set(SHIFTS)
    with concurrent.futures.ThreadPoolExecutor(len(SHIFTS)) as pool:
        solves = list(pool.map(lambda shift: newton_step(phase, point, shift, open_solves), SHIFTS))
    steps, histories = zip(*solves, strict=True)
    return np.array(steps), histories


def blocks(H, V):
    """Multiply blocks of 2, 4 and 8 early, so that they are compiled when solves run
    side by side.
    """
    return np.hstack([H @ block for block in np.split(V, [2, 6], axis=1)])


def main(address, name, out):
    """Solve, and write the results to the file `out`."""
    with hvpd.connect(address) as client:
        objective = client.objective(name)
        print(
            f"  found {name}: {objective.n:,} variables, {objective.dtype}; what it computes is the server's business"
        )
        rng = np.random.default_rng(0)
        x0 = 0.1 * rng.normal(size=objective.n)
        V = rng.normal(size=(objective.n, 14))
        start_HV = blocks(objective.at(x0).hessian(), V)
        figures = {}

        phase = Phase(client, "trust-ncg")
        result, convergence = descend(phase, objective, x0)
        figures["minimise: trust-ncg"] = phase.figures()

        point = objective.at(result.x)
        phase = Phase(client, "eigsh")
        eigenvalues, eigenvectors = spectrum(phase, point)
        figures["spectrum: eigsh"] = phase.figures()

        phase = Phase(client, "cg")
        steps, histories = newton_steps(phase, point)
        figures[f"solve: cg, {len(SHIFTS)} at once"] = phase.figures()

        # digits.py compares these with plain jax, at the first point and at the last.
        points = [objective.at(x0), point]
        np.savez(
            out,
            x=[p.x for p in points],
            value=[p.value for p in points],
            gradient=[p.gradient for p in points],
            V=V,
            HV=[start_HV, blocks(point.hessian(), V)],
            convergence=convergence,
            eigenvalues=eigenvalues,
            eigenvectors=eigenvectors,
            shifts=SHIFTS,
            steps=steps,
            phases=list(figures),
            figures=list(figures.values()),
            **{f"cg_{index}": history for index, history in enumerate(histories)},
        )
    assert "jax" not in sys.modules
    print("  done, and jax was never imported in this process", flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
