"""The `hvpd` command: serve, register and use objectives; see _cli_operate for the rest. Each does what a call of the library does."""

import argparse
import dataclasses
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvpd import _cli_operate
from hvpd._cli_common import connect, connection, print_table, show, show_bytes
from hvpd._errors import HvpdError, InvalidArgumentError, MissingExtraError
from hvpd._version import __version__

if TYPE_CHECKING:
    from hvpd._objective import DerivativeRules


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 1 failed, 2 wrong usage, 3 a check that found errors."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except HvpdError as error:
        show(f"hvpd: {error}", sys.stderr)
        return 1
    except BrokenPipeError:  # `hvpd objectives | head`
        sys.stderr.close()
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hvpd",
        description="Hessian-vector products as a service: a server that owns the accelerator, solvers that run anywhere.",
    )
    parser.add_argument("--version", action="version", version=f"hvpd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="serve products until SIGTERM",
        description="Serve products until SIGTERM or Ctrl-C; then running products finish. Each flag is also the environment "
        "variable in brackets; flags win. `hvpd: serving on HOST:PORT` on stderr says that it is ready.",
    )
    from hvpd_server import _config

    _config.add_arguments(serve)
    serve.set_defaults(run=_serve)

    _add_register(commands)

    objectives = commands.add_parser("objectives", help="list the registered objectives")
    objectives.add_argument("--json", action="store_true", help="one JSON object a line")
    connection(objectives)
    objectives.set_defaults(run=_objectives)

    check = commands.add_parser(
        "check",
        help="check an objective's products against its gradients and values",
        description="Check an objective at a point: symmetry, linearity, blocks against vectors, repeats, rounding, central "
        "differences, Taylor remainders; of a composite's other curvature, that it is not negative. Exit code 0: no item failed; 3: one did; 1: it could not be checked.",
    )
    check.add_argument("name", metavar="NAME", help="name or digest of the objective")
    check.add_argument("--x", metavar="FILE.npy", help="where, a flat vector (default: standard normal, by the seed)")
    check.add_argument(
        "--operator", default="hessian", help="hessian, ggn, fisher or empirical_fisher (default: hessian)"
    )
    check.add_argument("--seed", type=int, default=0, help="of the probes, and of x (default: 0)")
    check.add_argument("--probes", type=int, default=4, help="how many tangents (default: 4)")
    check.add_argument("--json", action="store_true", help="as JSON")
    connection(check)
    check.set_defaults(run=_check)

    bench = commands.add_parser(
        "bench",
        help="how fast a server answers products of an objective",
        description="Ask for products at one point as fast as they are answered, with each block width and each number of callers, and "
        "say how long they take and where the time goes.",
    )
    bench.add_argument("name", metavar="NAME", help="name or digest of the objective")
    bench.add_argument("--k", default="1,4,16", help="block widths (default: 1,4,16)")
    bench.add_argument("--callers", default="1", help="callers at once, threads of this process (default: 1)")
    bench.add_argument("--seconds", type=float, default=2.0, help="for each line (default: 2)")
    bench.add_argument("--seed", type=int, default=0, help="of x, standard normal (default: 0)")
    bench.add_argument("--json", action="store_true", help="one JSON object a line")
    connection(bench)
    bench.set_defaults(run=_bench)

    info = commands.add_parser("info", help="what a server is: versions, device, limits")
    info.add_argument("--json", action="store_true", help="as JSON")
    connection(info)
    info.set_defaults(run=_info)

    _cli_operate.server_commands(commands)
    _health_command(commands.add_parser("health", help="whether a server is serving: exit code 0 if so, 1 if not"))
    _cli_operate.file_commands(commands)
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    from hvpd_server import _config

    try:
        config = _config.load(arguments)
    except ValueError as error:
        print(f"hvpd: {error}", file=sys.stderr)
        return 2
    from hvpd._local import missing_packages
    from hvpd_server import _supervisor

    if missing := missing_packages():
        raise MissingExtraError(f"serving needs {', '.join(missing)}: pip install 'hvpd[server]'")
    return _supervisor.run(config)


def _add_register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    register = commands.add_parser(
        "register",
        help="register an objective that a Python file defines",
        description="Register the objective of a Python file. SOURCE is FILE.py:NAME; NAME is a function without arguments that "
        "returns (fun, x, *data), as for client.register(fun, x, *data).",
    )
    register.add_argument(
        "source",
        metavar="SOURCE",
        help="FILE.py:NAME; with --exported, NAME returns data alone, or SOURCE is left out if there is none",
        nargs="?",
    )
    register.add_argument(
        "--exported", metavar="FILE", help="the bytes of a jax.export.Exported, serialized with vjp_order=2"
    )
    register.add_argument(
        "--stablehlo",
        metavar="FILE",
        help="a StableHLO module of any framework: portable artifact, MLIR bytecode or text, or a jax.export.Exported; with it, "
        "SOURCE returns (x, *data)",
    )
    register.add_argument(
        "--mode", default="forward_over_reverse", help="how products are made (default: forward_over_reverse)"
    )
    register.add_argument("--any-rows", action="store_true", help="allow data of any number of rows")
    register.add_argument(
        "--row-reduction", help="mean or sum: how it goes over rows; then data may be larger than the device"
    )
    register.add_argument(
        "--block",
        action="append",
        default=[],
        metavar="LEAF[,LEAF]",
        help="a principal block with programs of its own; repeatable",
    )
    register.add_argument("--fixed-bucket", type=int, help="the only width of launches, for bits that never change")
    register.add_argument("--name", help="name for the objective, such as digits/mlp")
    register.add_argument("--shared", action="store_true", help="let other tenants use it")
    register.add_argument(
        "--platforms",
        default="cpu,cuda",
        help="platforms whose branches a function keeps that has some (default: cpu,cuda)",
    )
    register.add_argument("--precision", default="highest", help="highest, high or default (default: highest)")
    connection(register)
    register.set_defaults(run=_register)


def _register(arguments: argparse.Namespace) -> int:
    if arguments.source is None and (arguments.exported is None or arguments.stablehlo is not None):
        raise InvalidArgumentError("say SOURCE (FILE.py:NAME), or --exported FILE")
    if arguments.exported is not None and arguments.stablehlo is not None:
        raise InvalidArgumentError("say --exported FILE or --stablehlo FILE, not both")
    made = () if arguments.source is None else _made_by(arguments.source)
    with connect(arguments) as client:
        if arguments.exported is not None:
            exported = _content(arguments.exported)
            objective = client.register_exported(exported, *made, name=arguments.name, shared=arguments.shared)
        elif arguments.stablehlo is not None:
            if not made:
                raise InvalidArgumentError(f"{arguments.source} must return (x, *data)")
            objective = client.register_stablehlo(
                _content(arguments.stablehlo),
                *made,
                name=arguments.name,
                mode=arguments.mode,
                precision=arguments.precision,
                shared=arguments.shared,
            )
            _print_rules(objective.derivative_rules())
        else:
            if len(made) < 2 or not callable(made[0]):
                raise InvalidArgumentError(f"{arguments.source} must return (fun, x, *data)")
            objective = client.register(
                *made,
                name=arguments.name,
                platforms=tuple(filter(None, arguments.platforms.split(","))),
                precision=arguments.precision,
                mode=arguments.mode,
                any_rows=arguments.any_rows,
                row_reduction=arguments.row_reduction,
                blocks=[block.split(",") for block in arguments.block],
                fixed_bucket=arguments.fixed_bucket,
                shared=arguments.shared,
            )
        check = objective.registration_check().verdict
        facts = f"n={objective.n} {objective.dtype} {objective.mode} check={check or '-'}"
        show(f"{objective.name or '-'} {objective.digest} {facts}")
    return 0


def _content(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"cannot read {path}: {error.strerror}") from None


def _print_rules(rules: "DerivativeRules") -> None:
    """Say on stderr which derivative rules were recognised and which were presumed."""
    for what, found in [("recognised", rules.recognised), ("presumed", rules.presumed)]:
        for rule, count in sorted(found.items()):
            show(f"hvpd: {what} {count} time{'s' * (count != 1)}: {rule}", sys.stderr)


def _made_by(source: str) -> tuple[Any, ...]:
    """What FILE.py:NAME returns."""
    path, separator, name = source.rpartition(":")
    if not separator or not path:
        raise InvalidArgumentError(f"SOURCE is FILE.py:NAME, got {source!r}")
    try:
        defined = runpy.run_path(path)
    except OSError as error:
        raise InvalidArgumentError(f"cannot read {path}: {error.strerror}") from None
    if not callable(defined.get(name)):
        raise InvalidArgumentError(f"{path} defines no function {name!r}")
    made = defined[name]()
    if not isinstance(made, tuple):
        raise InvalidArgumentError(f"{name}() in {path} must return a tuple, it returned {type(made).__name__}")
    return made


def _objectives(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        found = client.objectives()
    if arguments.json:
        for listing in found:
            print(json.dumps(dataclasses.asdict(listing) | {"created": listing.created.isoformat()}))
        return 0
    rows = [("NAME", "N", "DTYPE", "PRECISION", "MODE", "PLATFORMS", "DATA", "CHECK", "CREATED", "DIGEST")]
    rows += [
        (
            listing.name or "-",
            str(listing.n),
            listing.dtype,
            listing.precision,
            listing.mode,
            ",".join(listing.platforms) or "any",
            show_bytes(listing.data_bytes),
            listing.check or "-",
            listing.created.strftime("%Y-%m-%d %H:%M"),
            listing.digest[:12],
        )
        for listing in found
    ]
    print_table(rows)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    import numpy as np

    x = None
    if arguments.x is not None:
        try:
            x = np.load(arguments.x, allow_pickle=False)
        except OSError as error:
            raise InvalidArgumentError(f"cannot read {arguments.x}: {error.strerror or error}") from None
        except (ValueError, EOFError) as error:
            raise InvalidArgumentError(f"{arguments.x} is no array of numpy.save: {error}") from None
    elif arguments.seed < 0:
        raise InvalidArgumentError(f"--seed must be from 0, got {arguments.seed}")
    with connect(arguments) as client:
        objective = client.objective(arguments.name)
        if x is None:
            x = np.random.default_rng(arguments.seed).standard_normal(objective.n)
        certificate = objective.check(x, seed=arguments.seed, probes=arguments.probes, operator=arguments.operator)
    show(json.dumps(certificate.to_json()) if arguments.json else certificate)
    return 0 if certificate.passed else 3


def _bench(arguments: argparse.Namespace) -> int:
    import numpy as np

    from hvpd import _bench

    widths, callers = _numbers(arguments.k, "--k"), _numbers(arguments.callers, "--callers")
    if not 0 <= arguments.seconds < float("inf") or arguments.seed < 0:
        raise InvalidArgumentError("--seconds and --seed must be from 0")
    with connect(arguments) as client:
        objective = client.objective(arguments.name)
        H = objective.at(np.random.default_rng(arguments.seed).standard_normal(objective.n)).hessian()
        if not arguments.json:
            print(f"{objective.label}: n = {objective.n}, {objective.dtype}, at {client.address}")
            print(
                _BENCH_ROW.format(
                    "K", "CALLERS", "PRODUCTS", "MEDIAN ms", "P90 ms", "VECTORS/s", "QUEUE ms", "COMPUTE ms", "WIDTH"
                )
            )
        for k in widths:
            for count in callers:
                reading = _bench.measure(client, H, k, count, arguments.seconds)
                row = dataclasses.astuple(reading)
                print(
                    json.dumps({"name": objective.label, "n": objective.n} | dataclasses.asdict(reading))
                    if arguments.json
                    else _BENCH_ROW.format(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
                )
    return 0


_BENCH_ROW = "{:>5} {:>8} {:>9} {:>10} {:>10} {:>10} {:>9} {:>11} {:>6}"


def _numbers(text: str, flag: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.isdecimal() and 0 < int(number) <= 4096 for number in numbers):
        raise InvalidArgumentError(f"{flag} is numbers from 1 to 4096 joined by commas, got {text!r}")
    return [int(number) for number in numbers]


def _info(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        facts = {"address": client.address} | {
            field.name: getattr(client.server, field.name) for field in client.server.DESCRIPTOR.fields
        }
    if arguments.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            show(f"{name.replace('_', ' ')}: {'none' if name == 'vector_port' and not value else value}")
    return 0


def _health_command(health: argparse.ArgumentParser) -> None:
    connection(health)
    health.set_defaults(run=_health)


def _health(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        serving = client._transport.serving()  # noqa: SLF001 - our own
    print("serving" if serving else "not serving: it starts, or is about to end")
    return 0 if serving else 1


if __name__ == "__main__":
    sys.exit(main())
