"""The command `hvpd`: serve, register and use objectives.

Other commands are in `operate`. Each command makes one call of the library.
"""

import argparse
import dataclasses
import inspect
import json
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvpd import _environment
from hvpd._cli import completion, conformance, doctor, krylov, objectives, operate, top, umbridge
from hvpd._cli.common import connect, connection, show, show_number, vector
from hvpd._errors import HvpdError, InvalidArgumentError, MissingExtraError
from hvpd._version import __version__
from hvpd._wire import protocol

if TYPE_CHECKING:
    from hvpd._plan import DerivativeRules


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code.

    0: done. 1: failed. 2: wrong usage. 3: a check found errors. 130: Ctrl-C.
    """
    if argv is None:  # A program, in which no line of code is the user's.
        warnings.formatwarning = lambda message, *_: f"hvpd: warning: {message}\n"
    parser = _parser()
    completion.complete(parser)
    given = sys.argv[1:] if argv is None else argv
    if not given:
        parser.print_help(sys.stderr)
        return 2
    if given[0].startswith("-") and given[0] not in ("-h", "--help", "--version"):
        parser.error(f"options come after the command, such as: hvpd info {given[0]} ...")
    arguments = parser.parse_args(given)
    try:
        code: int = arguments.run(arguments)
    except HvpdError as error:
        show(f"hvpd: {error}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        show("hvpd: interrupted", sys.stderr)
        return 130
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
    from hvpd_server import config as _config

    _config.add_arguments(serve)
    serve.add_argument(
        "--check-config",
        action="store_true",
        help="serve nothing: check the settings, and the files, ports and directories that they name. Exit code 0: nothing is wrong; "
        "2: something is",
    )
    serve.set_defaults(run=_serve)

    _add_register(commands)

    objectives.add(commands)

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
    check.set_defaults(run=_check)

    bench = commands.add_parser(
        "bench",
        help="measure how fast a server answers products of an objective",
        description="Ask for products at one point as fast as they are answered, with each block width and each number of callers, and "
        "say how long they take and where the time goes.",
    )
    bench.add_argument("name", metavar="NAME", help="name or digest of the objective")
    bench.add_argument("--k", default="1,4,16", help="block widths (default: 1,4,16)")
    bench.add_argument("--callers", default="1", help="callers at once, threads of this process (default: 1)")
    bench.add_argument("--seconds", type=float, default=2.0, help="seconds for each line (default: 2)")
    bench.add_argument("--seed", type=int, default=0, help="seed of x, which is standard normal (default: 0)")
    bench.add_argument("--json", action="store_true", help="one JSON object a line")
    connection(bench)
    bench.set_defaults(run=_bench)

    krylov.add(commands)

    info = commands.add_parser("info", help="describe a server: versions, device, limits")
    info.add_argument("--json", action="store_true", help="as JSON")
    connection(info)
    info.set_defaults(run=_info)

    operate.server_commands(commands)
    _health_command(
        commands.add_parser("health", help="check whether a server is serving: exit code 0 if so, 1 if not")
    )
    doctor.add(commands)
    top.add(commands)
    umbridge.add(commands)
    conformance.add(commands)
    operate.file_commands(commands)
    completion.add(commands)
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    from hvpd_server import config as _config

    try:
        config = _config.load(arguments)
    except ValueError as error:
        print(f"hvpd: {error}", file=sys.stderr)
        return 2
    from hvpd._local import missing_packages
    from hvpd_server import config_check, supervisor

    for line in _environment.unknown(os.environ):
        show(f"hvpd: warning: {line}", sys.stderr)
    if missing := missing_packages():
        raise MissingExtraError(f"serving needs {', '.join(missing)}: pip install 'hvpd[server]'")
    if arguments.check_config:
        for line in config_check.warnings(config):
            show(f"hvpd: warning: {line}", sys.stderr)
        problems = list(config_check.problems(config))
        for line in problems:
            show(f"hvpd: {line}", sys.stderr)
        if problems:
            print(f"{len(problems)} problem{'s' * (len(problems) > 1)}")
        elif config.rank:
            print(f"the settings are good: hvpd serve can join the leader at {config.leader}, and listens on no port")
        else:
            print(f"the settings are good: hvpd serve can listen on {config.host}:{config.port}")
        return 2 if problems else 0
    # The server itself would notice after its imports, which take seconds. With
    # --group, this rank may not be the one that listens.
    taken = None if config.group else next(config_check.taken_ports(config), None)
    if taken is not None:
        show(f"hvpd: cannot start: {taken}", sys.stderr)
        return 1
    return supervisor.run(config)


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
        "--mode",
        default="forward_over_reverse",
        choices=protocol.MODES,
        help="how products are made (default: forward_over_reverse)",
    )
    register.add_argument("--any-rows", action="store_true", help="allow data of any number of rows")
    register.add_argument(
        "--row-reduction",
        choices=protocol.REDUCTIONS,
        help="how it reduces rows; then data may be larger than the device",
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
        help="platforms whose branches are kept, if the function has some (default: cpu,cuda)",
    )
    register.add_argument(
        "--precision",
        default="highest",
        choices=protocol.PRECISIONS,
        help="precision of matrix products that state none (default: highest)",
    )
    connection(register)
    register.set_defaults(run=_register)


def _register(arguments: argparse.Namespace) -> int:
    if arguments.source is None and (arguments.exported is None or arguments.stablehlo is not None):
        raise InvalidArgumentError("say SOURCE (FILE.py:NAME), or --exported FILE", reason="CONFLICTING_OPTIONS")
    if arguments.exported is not None and arguments.stablehlo is not None:
        raise InvalidArgumentError("say --exported FILE or --stablehlo FILE, not both", reason="CONFLICTING_OPTIONS")
    made = () if arguments.source is None else _made_by(arguments.source)
    with connect(arguments) as client:
        if arguments.exported is not None:
            exported = _content(arguments.exported)
            objective = client.register_exported(exported, *made, name=arguments.name, shared=arguments.shared)
        elif arguments.stablehlo is not None:
            if not made:
                raise InvalidArgumentError(f"{arguments.source} must return (x, *data)", reason="FILE_CONTENT")
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
                raise InvalidArgumentError(f"{arguments.source} must return (fun, x, *data)", reason="FILE_CONTENT")
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
        raise InvalidArgumentError(f"cannot read {path}: {error.strerror}", reason="FILE_ACCESS") from None


def _print_rules(rules: "DerivativeRules") -> None:
    """List recognised and presumed derivative rules on stderr."""
    for what, found in [("recognised", rules.recognised), ("presumed", rules.presumed)]:
        for rule, count in sorted(found.items()):
            show(f"hvpd: {what} {count} time{'s' * (count != 1)}: {rule}", sys.stderr)


def _made_by(source: str) -> tuple[Any, ...]:
    """Call the function FILE.py:NAME."""
    path, separator, name = source.rpartition(":")
    if not separator or not path:
        raise InvalidArgumentError(f"SOURCE must be FILE.py:NAME, got {source!r}", reason="INVALID_OPTION")
    try:
        defined = runpy.run_path(path)
    except OSError as error:
        raise InvalidArgumentError(f"cannot read {path}: {error.strerror}", reason="FILE_ACCESS") from None
    except ModuleNotFoundError as error:
        if error.name != "jax":
            raise _failed(path, error) from None
        raise MissingExtraError(
            f"{path} needs jax here (the server's is not enough): pip install 'hvpd[jax]'"
        ) from None
    except Exception as error:  # noqa: BLE001 - the file can raise anything
        raise _failed(path, error) from None
    if not callable(defined.get(name)):
        raise InvalidArgumentError(f"{path} defines no function {name!r}", reason="FILE_CONTENT")
    try:
        signature = inspect.signature(defined[name])
        signature.bind()
    except TypeError:
        raise InvalidArgumentError(
            f"{name} in {path} needs arguments {signature}: name a function without arguments that returns (fun, x, *data)",
            reason="FILE_CONTENT",
        ) from None
    try:
        made = defined[name]()
    except Exception as error:  # noqa: BLE001 - as above
        raise _failed(path, error) from None
    if not isinstance(made, tuple):
        raise InvalidArgumentError(
            f"{name}() in {path} must return a tuple, it returned {type(made).__name__}", reason="FILE_CONTENT"
        )
    return made


def _failed(path: str, error: Exception) -> InvalidArgumentError:
    """Return the error of a file that raised one, in one line."""
    if isinstance(error, SyntaxError):
        place = f"{error.filename}:{error.lineno}"
    else:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        place = f"{path}:{lines[-1]}" if lines else path
    said = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return InvalidArgumentError(f"{place}: {type(error).__name__}: {said}", reason="FILE_CONTENT")


def _check(arguments: argparse.Namespace) -> int:
    import numpy as np

    x = None
    if arguments.x is not None:
        x = vector(arguments.x)
    elif arguments.seed < 0:
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


def _bench(arguments: argparse.Namespace) -> int:
    import numpy as np

    from hvpd._cli import bench as _bench

    widths, callers = _numbers(arguments.k, "--k"), _numbers(arguments.callers, "--callers")
    if not 0 <= arguments.seconds < float("inf") or arguments.seed < 0:
        raise InvalidArgumentError("--seconds and --seed must be from 0", reason="INVALID_OPTION")
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
                    else _BENCH_ROW.format(
                        *(show_number(cell) if isinstance(cell, float) else str(cell) for cell in row)
                    )
                )
    return 0


_BENCH_ROW = "{:>5} {:>8} {:>9} {:>10} {:>10} {:>10} {:>9} {:>11} {:>6}"


def _numbers(text: str, flag: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.isdecimal() and 0 < int(number) <= 4096 for number in numbers):
        raise InvalidArgumentError(
            f"{flag} must be numbers from 1 to 4096 joined by commas, got {text!r}", reason="INVALID_OPTION"
        )
    return [int(number) for number in numbers]


def _info(arguments: argparse.Namespace) -> int:
    from google.protobuf.timestamp_pb2 import Timestamp

    with connect(arguments) as client:
        facts = {"address": client.address} | {
            field.name: getattr(client.server, field.name) for field in client.server.DESCRIPTOR.fields
        }
    facts = {name: value.ToJsonString() if isinstance(value, Timestamp) else value for name, value in facts.items()}
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
