"""`hvpd check`: an objective's products against its gradients and values."""

import argparse
import json
import sys

from hvpd._cli.common import connect, connection, show, vector
from hvpd._errors import InvalidArgumentError
from hvpd._wire import protocol


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    check = commands.add_parser(
        "check",
        help="check an objective's products against its gradients and values",
        description="Check an objective at a point: symmetry, linearity, blocks against vectors, repeats, rounding, central "
        "differences, Taylor remainders. Other operators of a composite must not be negative. Exit code 0: no item failed; "
        "3: an item failed; 1: the check could not run.",
    )
    check.add_argument("name", metavar="NAME", help="name or digest of the objective")
    check.add_argument(
        "--x", metavar="FILE.npy", help="the point, a flat vector (default: standard normal, by the seed)"
    )
    check.add_argument(
        "--operator", default="hessian", choices=protocol.OPERATORS, help="the operator (default: hessian)"
    )
    check.add_argument("--seed", type=int, default=0, help="seed of the probes, and of x (default: 0)")
    check.add_argument("--probes", type=int, default=4, help="number of tangents (default: 4)")
    check.add_argument("--json", action="store_true", help="as JSON")
    connection(check)
    check.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import numpy as np

    x = None if arguments.x is None else vector(arguments.x)
    if x is None and arguments.seed < 0:
        raise InvalidArgumentError(f"--seed must be from 0, got {arguments.seed}", reason="INVALID_OPTION")
    with connect(arguments) as client:
        objective = client.objective(arguments.name)
        if x is None:
            x = np.random.default_rng(arguments.seed).standard_normal(objective.n)
        certificate = objective.check(x, seed=arguments.seed, probes=arguments.probes, operator=arguments.operator)
        earlier = objective.registration_check().verdict
    if certificate.passed and earlier in ("failed", "undecided"):
        show(
            f"hvpd: the server's check at the x of the registration is {earlier}, and this check is at another x: products may be "
            "wrong close to that x",
            sys.stderr,
        )
    show(json.dumps(certificate.to_json()) if arguments.json else certificate)
    return 0 if certificate.passed else 3
