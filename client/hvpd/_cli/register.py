"""`hvpd register`: the objective that a Python file defines, or an exported program."""

import argparse
import inspect
import runpy
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvpd._cli.common import accessing, connect, connection, show
from hvpd._errors import InvalidArgumentError, MissingExtraError
from hvpd._wire import protocol

if TYPE_CHECKING:
    from hvpd._plan import DerivativeRules


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
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
    register.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
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
    with accessing(f"read {path}"):
        return Path(path).read_bytes()


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
