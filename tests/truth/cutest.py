"""Problems of CUTEst, minimised by a server, and by SciPy on the same functions in jax.

The functions and starts are those of the package sif2jax
(https://github.com/johannahaffner/sif2jax). `python -m tests.truth.cutest [NAME ...]`
compares all problems, or those named, and prints a row for each. The suite compares a
few (tests/e2e/test_cutest.py).
"""

import argparse
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.optimize

import hvpd
from bench import _cutest

NAMES = (
    *("ARGTRIGLS", "BARD", "BEALE", "BROWNDEN", "CHNROSNB", "CUBE", "DENSCHNC", "EDENSCH", "ENGVAL2"),
    *("ERRINROS", "EXPFIT", "GENROSE", "HELIX", "JENSMP", "LIARWHD", "LUKSAN11LS", "OSBORNEB"),
    *("QING", "ROSENBR", "S308", "SISSER", "VARDIM"),
)
"""Unconstrained problems of 2 to 5,000 variables."""

METHOD, GTOL = "trust-ncg", 1e-7
"""Method of both, and the norm of the gradient at which they end."""


class Compared(NamedTuple):
    """A problem, minimised twice."""

    name: str
    n: int
    ours: Any
    """SciPy's OptimizeResult, from the server."""
    theirs: Any
    """SciPy's OptimizeResult, from SciPy."""

    @property
    def excess(self) -> float:
        """Return the server's minimum less SciPy's, over its size, or 1 if that is
        less.
        """
        return float((self.ours.fun - self.theirs.fun) / max(1.0, abs(self.theirs.fun)))

    def __str__(self) -> str:
        ours, theirs = self.ours, self.theirs
        return (
            f"{self.name:12}{self.n:7,}{ours.fun:20.10g}{theirs.fun:20.10g}{self.excess:10.1e}"
            f"{ours.nhev:8,}{theirs.nhev:8,}  {ours.message}"
        )


def compare(client: hvpd.Client, problem: Any) -> Compared:
    """Minimise a problem twice, from its published start."""
    with jax.enable_x64(True):
        start = np.asarray(problem.y0, np.float64)

        def fun(x: Any) -> Any:
            return problem.objective(x, problem.args)

        objective = client.register(fun, start, name=f"cutest/{problem.name}")
        ours = objective.minimize(start, METHOD, gtol=GTOL)
        value_and_grad = jax.jit(jax.value_and_grad(fun))
        product = jax.jit(lambda x, p: jax.jvp(jax.grad(fun), (x,), (p,))[1])
        theirs = scipy.optimize.minimize(
            lambda x: tuple(np.asarray(part, np.float64) for part in value_and_grad(x)),
            start,
            jac=True,
            hessp=lambda x, p: np.asarray(product(x, p)),
            method=METHOD,
            options={"gtol": GTOL},
        )
    return Compared(problem.name, start.size, ours, theirs)


def main() -> int:
    """Compare problems; return 1 if the server misses a minimum."""
    parser = argparse.ArgumentParser(prog="python -m tests.truth.cutest", description=__doc__)
    parser.add_argument(
        "names", nargs="*", default=NAMES, metavar="NAME", help="names of CUTEst; by default 22 of them"
    )
    names, missed = parser.parse_args().names, 0
    print(f"{'problem':12}{'n':>7}{'server':>20}{'SciPy':>20}{'excess':>10}{'products':>8}{'SciPy':>8}")
    with hvpd.local() as client:
        for name in names:
            found = compare(client, _cutest.problem(name))
            missed += found.excess > 1e-8
            print(found, flush=True)
    print(f"{len(names) - missed} of {len(names)} minima are SciPy's, or lower")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
