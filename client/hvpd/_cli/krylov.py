"""`hvpd spectrum`, `hvpd eigsh` and `hvpd solve`: the curvature of an objective."""

import argparse
import itertools
import json
import sys
from typing import TYPE_CHECKING, Any

from hvpd._cli.common import accessing, connect, connection, show, vector
from hvpd._errors import InvalidArgumentError
from hvpd._wire import protocol

if TYPE_CHECKING:
    from hvpd._client import Client
    from hvpd._krylov.spectrum import Spectrum
    from hvpd._progress import Progress

_ROWS = 20
"""Lines of the histogram of a spectrum."""

_BAR = 50
"""Characters of its longest bar."""

_NOT_CONVERGED = 3
"""Exit code of a command whose result is not as exact as was asked for."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the three commands."""
    spectrum = commands.add_parser(
        "spectrum",
        help="show the distribution of the eigenvalues",
        description="Estimate the distribution of the eigenvalues at a point by stochastic Lanczos quadrature, and show it as a "
        "histogram: the share of the eigenvalues in each interval, on a logarithmic scale.",
    )
    _operator(spectrum)
    spectrum.add_argument("--probes", type=int, default=10, help="random vectors (default: 10)")
    spectrum.add_argument("--steps", type=int, default=100, help="steps from each (default: 100)")
    spectrum.add_argument("--png", metavar="FILE", help="also draw the density; needs matplotlib")
    spectrum.add_argument(
        "--sigma", type=float, help="width of the density's Gaussian (default: a hundredth of the range)"
    )
    spectrum.set_defaults(run=_spectrum)

    eigsh = commands.add_parser(
        "eigsh",
        help="compute eigenvalues at an end of the spectrum",
        description="Compute eigenvalues at a point by Lanczos iteration with thick restarts. Exit code 0: all have converged; 3: not.",
    )
    _operator(eigsh)
    eigsh.add_argument("-k", type=int, help="number of eigenvalues (default: 6, at most n)")
    eigsh.add_argument(
        "--which",
        default="LM",
        choices=("LA", "SA", "LM", "BE"),
        help="largest, smallest, largest magnitude, or both ends (default: LM)",
    )
    eigsh.add_argument("--tol", type=float, default=0.0, help="relative residual (default: 0, for rounding)")
    eigsh.add_argument("--maxiter", type=int, help="number of restarts (default: 10 n)")
    eigsh.set_defaults(run=_eigsh)

    solve = commands.add_parser(
        "solve",
        help="solve a linear system",
        description="Solve A x = b at a point. Exit code 0: the residual is within the tolerance; 3: it is not.",
    )
    _operator(solve)
    solve.add_argument("--b", metavar="FILE.npy", help="the right-hand side (default: minus the gradient)")
    solve.add_argument("--tol", type=float, default=1e-5, help="relative residual (default: 1e-5)")
    solve.add_argument("--maxiter", type=int, help="number of steps (default: 10 n)")
    solve.add_argument(
        "--method", default="cg", choices=("cg", "minres"), help="minres also solves indefinite systems (default: cg)"
    )
    solve.set_defaults(run=_solve)


def _operator(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="name or digest of the objective")
    parser.add_argument(
        "--x", metavar="FILE.npy", help="the point, a flat vector (default: standard normal, by the seed)"
    )
    parser.add_argument(
        "--operator", default="hessian", choices=protocol.OPERATORS, help="the curvature (default: hessian)"
    )
    parser.add_argument("--shift", type=float, default=0.0, help="added to the diagonal (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of random vectors (default: 0)")
    parser.add_argument("--save", metavar="FILE.npz", help="also write the whole result; hvpd.krylov.load reads it")
    parser.add_argument("--progress", action="store_true", help="write a line to stderr each second")
    parser.add_argument("--json", action="store_true", help="as JSON")
    connection(parser)


def _connected(arguments: argparse.Namespace) -> "Client":
    latest = 0

    def report(progress: "Progress") -> None:
        nonlocal latest
        if int(progress.seconds) == latest and not progress.finished:
            return
        latest = int(progress.seconds)
        done = f": {progress.done:g} {progress.unit}" if progress.done else ""
        show(f"hvpd: {progress.stage}{done}, {progress.seconds:.0f} s", sys.stderr)

    if arguments.seed < 0:
        raise InvalidArgumentError(f"--seed must be from 0, got {arguments.seed}", reason="INVALID_OPTION")
    return connect(arguments, progress=report if arguments.progress else None)


def _at(client: "Client", arguments: argparse.Namespace) -> Any:
    """Return the operator that the flags choose."""
    import numpy as np

    objective = client.objective(arguments.name)
    x = vector(arguments.x) if arguments.x else np.random.default_rng(arguments.seed).standard_normal(objective.n)
    point = objective.at(x)
    return getattr(point, arguments.operator)(arguments.shift)


def _finish(arguments: argparse.Namespace, result: Any, facts: dict[str, Any], text: str) -> None:
    """Save and show a result."""
    if arguments.save:
        with accessing(f"write {arguments.save}"):
            result.save(arguments.save)
    facts = {"name": arguments.name, "digest": result.digest, "point": _place(arguments)} | facts
    facts["file"] = _file(arguments)
    show(json.dumps(facts) if arguments.json else f"{text}\nat {_place(arguments)}")


def _file(arguments: argparse.Namespace) -> str | None:
    """Return the file that has the whole result, as `save` names it."""
    path: str | None = arguments.save
    return path if not path or path.endswith(".npz") else f"{path}.npz"


def _place(arguments: argparse.Namespace) -> str:
    """Describe x."""
    return (
        f"x of {arguments.x}"
        if arguments.x
        else f"a standard normal x, seed {arguments.seed}; --x FILE.npy for another"
    )


def _spectrum(arguments: argparse.Namespace) -> int:
    with _connected(arguments) as client:
        found = _at(client, arguments).spectrum(arguments.probes, arguments.steps, arguments.seed)
    if arguments.png:
        axes = found.plot(sigma=arguments.sigma)
        axes.set_title(f"{arguments.operator} of {arguments.name}")
        with accessing(f"write {arguments.png}"):
            axes.figure.savefig(arguments.png, format="png")
    facts = {
        "n": found.n,
        "smallest": float(found.nodes.min()),
        "largest": float(found.nodes.max()),
        "negative_share": _share(found, -float("inf"), 0.0),
        "mean": float(found.moments(1)[0]),
        "standard_error_of_shares": found.standard_error,
        "steps_error_of_shares": _steps_error(found),
        "products": found.products,
        "reason": found.reason,
    }
    _finish(arguments, found, facts, "\n".join(_histogram(found, arguments)))
    return 0


def _share(found: "Spectrum", low: float, high: float) -> float:
    """Return the share of the eigenvalues in [low, high)."""
    inside = (found.nodes >= low) & (found.nodes < high)
    return float((found.weights * inside).sum(axis=1).mean())


def _edges(found: "Spectrum") -> Any:
    """Return the edges of the histogram."""
    import numpy as np

    low, high = float(found.nodes.min()), float(found.nodes.max())
    edges = np.linspace(low, high, _ROWS + 1) if high > low else np.array([low, low])
    edges[-1] = np.nextafter(high, np.inf)
    return edges


def _steps_error(found: "Spectrum") -> float:
    """Return the largest error by the steps of a share between edges."""
    from hvpd._krylov.quadrature import steps_error

    errors = steps_error(found.nodes, found.weights, found.sizes, found.n, _edges(found)[1:-1])
    return float((errors[:-1] + errors[1:]).max(initial=errors.max(initial=0.0)))


def _histogram(found: "Spectrum", arguments: argparse.Namespace) -> list[str]:
    import numpy as np

    low, high = float(found.nodes.min()), float(found.nodes.max())
    edges = _edges(found)
    shares = [_share(found, start, end) for start, end in itertools.pairwise(edges)]
    # A bar ends at the share of one eigenvalue.
    floor = np.log10(0.5 / found.n)
    title = (
        f"{arguments.operator} of {arguments.name}: {found.n} eigenvalues from {low:.4g} to {high:.4g}, "
        f"{100 * _share(found, -float('inf'), 0.0):.3g} % negative, mean {found.moments(1)[0]:.4g}"
    )
    accuracy = (
        f"{found.products} products; shares are right to {200 * found.standard_error:.2f} percentage points by the probes (two "
        f"standard errors), and to {100 * _steps_error(found):.2f} by the steps (bound)"
    )
    lines = [
        title,
        accuracy,
        "bars are logarithmic; none below half an eigenvalue",
    ]
    for start, end, share in zip(edges[:-1], edges[1:], shares, strict=True):
        bar = "#" * max(round(_BAR * (np.log10(share) - floor) / -floor), 0) if share > 0 else ""
        lines.append(f"{start:>11.4g} to {end:>11.4g} {100 * share:>9.2f} %  {bar}".rstrip())
    return lines


def _eigsh(arguments: argparse.Namespace) -> int:
    from hvpd._krylov.lanczos import NOT_FINITE
    from hvpd._krylov.thick_restart import NotConvergedError

    with _connected(arguments) as client:
        H = _at(client, arguments)
        code = 0
        try:
            found = H.eigsh(
                arguments.k, arguments.which, tol=arguments.tol, maxiter=arguments.maxiter, seed=arguments.seed
            )
        except NotConvergedError as error:
            code, found = _NOT_CONVERGED, error.pairs
    facts = {
        "values": found.values.tolist(),
        "residuals": found.residuals.tolist(),
        "converged": found.converged.tolist(),
        "products": found.products,
        "reason": found.reason,
    }
    lines = [
        f"{value:>22.15g}   residual {residual:.1e}{'' if converged else ', not converged'}"
        for value, residual, converged in zip(found.values, found.residuals, found.converged, strict=True)
    ]
    advice = "; allow more by --maxiter, or a larger residual by --tol" if code and found.reason != NOT_FINITE else ""
    _finish(arguments, found, facts, "\n".join([*lines, f"{found.products} products; {found.reason}{advice}"]))
    return code


def _solve(arguments: argparse.Namespace) -> int:
    with _connected(arguments) as client:
        A = _at(client, arguments)
        b = vector(arguments.b) if arguments.b else -A.point.gradient
        found = A.solve(b, tol=arguments.tol, maxiter=arguments.maxiter, method=arguments.method)
    first, last = (float(found.residual_norms[at].max()) for at in (0, -1))
    facts = {
        "converged": found.converged,
        "residual": last,
        "right_hand_side": first,
        "steps": len(found.residual_norms) - 1,
        "products": found.products,
        "reason": found.reason,
        "curvature": found.curvature,
    }
    path = _file(arguments)
    where = f"the solution is in {path}" if path else "--save FILE.npz writes the solution"
    text = (
        f"residual {last:.3e} of {first:.3e} after {len(found.residual_norms) - 1} steps, {found.products} products; "
        f"{found.reason}\n{where}"
    )
    _finish(arguments, found, facts, text)
    return 0 if found.converged else _NOT_CONVERGED
