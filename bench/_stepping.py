"""Takes steps of a Krylov method on a server, in runs that follow each other without a
pause: `python -m bench._stepping ADDRESS METHOD ROWS STEPS` repeats runs of so many
steps until it is ended. The objective is a perceptron with so many rows of data.
"""

import sys
from collections.abc import Callable
from typing import Literal

import hvpd
from bench import _warm
from bench._objectives import Problem, mlp, normal

NAME = "bench/stepping"
"""Name of the objective."""

METHODS = {
    "lanczos": "Lanczos in launches of several steps",
    "cg": "CG in launches of several steps",
    "products": "Lanczos in single products",
}


def problem(rows: int) -> Problem:
    """Return the perceptron, with n = 6,160."""
    return mlp((64, 82, 10), rows)


def run_of(H: hvpd.CurvatureOperator, method: str, steps: int) -> Callable[[], object]:
    """Return a function that takes at most so many steps."""
    b = normal(8, H.shape[0])
    if method == "cg":
        definite = H.shifted(1.01 * abs(float(H.eigsh(1, "SA", tol=1e-2).values[0])))
        return lambda: definite.solve(b, tol=0.0, maxiter=steps)
    basis: Literal["full", "none"] = "full" if method == "lanczos" else "none"

    def run() -> None:
        with H.lanczos(steps, v0=b, reorthogonalize=basis):
            pass

    return run


def main() -> None:
    """Repeat runs."""
    address, method, rows, steps = sys.argv[1:]
    with hvpd.connect(address) as client:
        made = problem(int(rows))
        objective = _warm.registered(client, made, name=NAME)
        H = objective.at(made.x).hessian()
        _warm.vectors(objective, H)
        if method == "lanczos":
            _warm.launched(H, int(steps))
        run = run_of(H, method, int(steps))
        run()
        print("stepping", file=sys.stderr, flush=True)
        while True:
            run()


if __name__ == "__main__":
    main()
