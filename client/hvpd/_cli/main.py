"""The command `hvpd`. Each of its commands makes one call of the library."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hvpd import _environment
from hvpd._cli import (
    bench,
    check,
    completion,
    conformance,
    doctor,
    krylov,
    objectives,
    operate,
    register,
    top,
    umbridge,
)
from hvpd._cli.common import connect, connection, show
from hvpd._errors import HvpdError, MissingExtraError
from hvpd._version import __version__

if TYPE_CHECKING:
    pass


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

    register.add(commands)
    objectives.add(commands)
    check.add(commands)
    bench.add(commands)
    krylov.add(commands)

    info = commands.add_parser("info", help="describe a server: versions, device, limits")
    info.add_argument("--json", action="store_true", help="as JSON")
    connection(info)
    info.set_defaults(run=_info)

    operate.server_commands(commands)
    health = commands.add_parser("health", help="check whether a server is serving: exit code 0 if so, 1 if not")
    connection(health)
    health.set_defaults(run=_health)
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


def _health(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        serving = client._transport.serving()  # noqa: SLF001 - our own
    print("serving" if serving else "not serving: it starts, or is about to end")
    return 0 if serving else 1
