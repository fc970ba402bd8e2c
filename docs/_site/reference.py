"""The parts of the reference that come from the code: settings, commands, reasons of
errors, and the protocol.
"""

import argparse
import ast
import dataclasses
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

from hvpd import _errors
from hvpd._cli import main
from hvpd_server import config

ROOT = Path(__file__).resolve().parents[2]

PROTOS = ("curvature", "objective", "blob", "server", "tensor")
"""The files of proto/hvpd/v1."""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


# Settings


def settings() -> str:
    """Return the table of the server's settings."""
    rows = ["| flag and variable | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(config.Config):
        default = "" if field.default is None else "off" if field.default is False else f"`{field.default}`"
        if field.default is dataclasses.MISSING:
            default = "`~/.local/share/hvpd`"
        elif isinstance(field.default, int) and field.default >= 1 << 30:
            default = f"`{field.default >> 30}G`"
        flag = f"`--{field.name.replace('_', '-')}`<br>`HVPD_{field.name.upper()}`"
        rows.append(f"| {flag} | {default} | {_cell(field.metadata['help'])} |")
    return "\n".join(rows)


# Commands


def commands() -> str:
    """Return the help of each command, as argparse prints it."""
    return "\n\n".join(_command(parser) for parser in _leaves(main._parser()))  # noqa: SLF001 - the public entry runs it


def _leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]  # noqa: SLF001
    if not nested or parser.get_default("run"):
        yield parser
    for action in nested:
        for child in action.choices.values():
            yield from _leaves(child)


def _command(parser: argparse.ArgumentParser) -> str:
    lines = [f"### {parser.prog}", _cell(parser.description or ""), ""]
    if parser.prog == "hvpd serve":
        return "\n".join([*lines, "Its flags are the [settings](settings.md)."])
    rows = []
    for action in parser._actions:  # noqa: SLF001
        if action.help and not isinstance(action, argparse._HelpAction):  # noqa: SLF001
            value = f" {action.metavar or action.dest.upper()}" if action.nargs != 0 else ""
            names = ", ".join(f"{option}{value}" for option in action.option_strings) or value.strip()
            rows.append(f"| `{names}` | {_cell(action.help % {'default': action.default, 'prog': parser.prog})} |")
    if rows:
        lines += ["| argument | meaning |", "|---|---|", *rows]
    return "\n".join(lines)


# Reasons


def reasons() -> str:
    """Return the table of all reasons: the class that the client raises, and the
    messages.
    """
    found: dict[str, dict[str, None]] = {}
    classes: dict[str, dict[str, None]] = {}
    for part in ("server/hvpd_server", "client/hvpd"):
        for path in sorted((ROOT / part).rglob("*.py")):
            if "v1" not in path.parts:
                for reason, kind, message in _raised(ast.parse(path.read_text())):
                    classes.setdefault(reason, {}).update({kind: None} if kind else {})
                    found.setdefault(reason, {}).update({message: None} if message else {})
    rows = ["| reason | class | message |", "|---|---|---|"]
    for reason in sorted(found):
        kinds = "<br>".join(f"`{kind}`" for kind in classes[reason])
        rows.append(f"| `{reason}` | {kinds} | {'<br>'.join(map(_cell, found[reason]))} |")
    return "\n".join(rows)


def _raised(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Yield (reason, class, message) of the errors that a module makes. A class or a
    message that is not written in one place is empty.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            values = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "reason")]
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if not name.endswith(("Error", "Refused")):
                continue
        elif isinstance(node, ast.Tuple):
            values, name = node.elts, ""
            if not (values and isinstance(values[0], ast.Attribute) and ast.unparse(values[0]).startswith("Code.")):
                continue
        else:
            continue
        reason = next((text for value in values if (text := _reason(value))), "")
        texts = [_text(value) for value in values if not _reason(value)]
        codes = (value for value in values if isinstance(value, ast.Attribute))
        code = next((value.attr for value in codes if ast.unparse(value).startswith("Code.")), "")
        kind = name if name in _errors.__dict__ and name != "ServiceError" else _class(code, reason)
        if reason:
            yield reason, kind, max(texts, key=len, default="")


_CONSTANT = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")


def _reason(value: ast.expr) -> str:
    if isinstance(value, ast.Constant) and isinstance(value.value, str) and _CONSTANT.fullmatch(value.value):
        return value.value
    if isinstance(value, ast.Name) and _CONSTANT.fullmatch(value.id):
        return value.id if value.id in _rules() else ""
    return value.attr if isinstance(value, ast.Attribute) and value.attr in _rules() else ""


def _rules() -> frozenset[str]:
    from hvpd_server.importer import refusals

    return refusals.REASONS


def _class(code: str, reason: str) -> str:
    if not code:
        return ""
    status = grpc.StatusCode[code]
    return _errors._REASONS.get(reason, _errors._CLASSES.get(status, _errors.HvpdError)).__name__  # noqa: SLF001


def _text(value: ast.expr) -> str:
    """Return a message; an ellipsis stands for each value in it."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return re.sub(r"%[sdr]", "…", value.value)
    if isinstance(value, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in value.values)
    if isinstance(value, ast.BinOp):
        return _text(value.left)
    return ""


# The protocol


def protocol() -> dict[str, str]:
    """Return a page for each file of the protocol."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "set.binpb")
        import importlib.resources

        google = importlib.resources.files("google.rpc") / ".." / ".."
        well_known = importlib.resources.files("grpc_tools") / "_proto"
        failed = protoc.main(
            [
                "protoc",
                *(f"-I{include}" for include in (ROOT / "proto", google, well_known)),
                "--include_source_info",
                f"--descriptor_set_out={path}",
                *(f"hvpd/v1/{name}.proto" for name in PROTOS),
            ]
        )
        if failed:
            sys.exit("protoc failed: its message is above")
        files = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file
    index = (
        "# Protocol\n\nThe protocol `hvpd.v1` is gRPC. These pages are made from the comments of `proto/hvpd/v1`.\n"
        "[From an objective to its programs](../../architecture/programs.md) explains bundles, and\n"
        "[Upgrading](../../operate/upgrading.md#the-protocol) which versions fit together.\n\n"
        "| file | content |\n|---|---|\n"
    )
    pages = {}
    for file in files:
        name = Path(file.name).stem
        pages[f"reference/protocol/{name}.md"] = _File(file).page()
        inside = [*(service.name for service in file.service), *(message.name for message in file.message_type)]
        index += f"| [{name}.proto]({name}.md) | {', '.join(f'`{part}`' for part in inside)} |\n"
    return {**pages, "reference/protocol/index.md": index}


class _File:
    """One .proto file, with the comments of its parts by their paths."""

    def __init__(self, file: descriptor_pb2.FileDescriptorProto) -> None:
        self._file = file
        self._comments = {
            tuple(location.path): location.leading_comments.strip() or location.trailing_comments.strip()
            for location in file.source_code_info.location
        }

    def page(self) -> str:
        parts = [f"# {Path(self._file.name).name}"]
        for i, service in enumerate(self._file.service):
            parts += [f"## {service.name}", self._comment(6, i)]
            for j, method in enumerate(service.method):
                request, response = (
                    ("stream " if streams else "") + kind.rpartition(".")[2]
                    for kind, streams in (
                        (method.input_type, method.client_streaming),
                        (method.output_type, method.server_streaming),
                    )
                )
                parts += [f"### {method.name}", f"`{request}` → `{response}`", self._comment(6, i, 2, j)]
        for i, message in enumerate(self._file.message_type):
            parts += self._message(message, (4, i), message.name)
        for i, enum in enumerate(self._file.enum_type):
            parts += self._enum(enum, (5, i), enum.name)
        return "\n\n".join(part for part in parts if part) + "\n"

    def _comment(self, *path: int) -> str:
        return self._comments.get(path, "")

    def _message(self, message: descriptor_pb2.DescriptorProto, path: tuple[int, ...], name: str) -> Iterator[str]:
        if message.options.map_entry:
            return
        yield f"## {name}"
        yield self._comment(*path)
        rows = ["| field | type | meaning |", "|---|---|---|"]
        maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
        for i, field in enumerate(message.field):
            rows.append(f"| `{field.name}` | {_type(field, maps)} | {_cell(self._comment(*path, 2, i))} |")
        if message.field:
            yield "\n".join(rows)
        for i, nested in enumerate(message.nested_type):
            yield from self._message(nested, (*path, 3, i), f"{name}.{nested.name}")
        for i, enum in enumerate(message.enum_type):
            yield from self._enum(enum, (*path, 4, i), f"{name}.{enum.name}")

    def _enum(self, enum: descriptor_pb2.EnumDescriptorProto, path: tuple[int, ...], name: str) -> Iterator[str]:
        yield f"## {name}"
        yield self._comment(*path)
        rows = [
            f"| `{value.name}` | {value.number} | {_cell(self._comment(*path, 2, i))} |"
            for i, value in enumerate(enum.value)
        ]
        yield "\n".join(["| value | number | meaning |", "|---|---|---|", *rows])


def _type(field: Any, maps: Mapping[str, Any]) -> str:
    name = field.type_name.rpartition(".")[2]
    if name in maps:
        key, value = maps[name].field
        return f"map of {_type(key, {})} to {_type(value, {})}"
    kind = name or descriptor_pb2.FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    return ("repeated " if field.label == descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED else "") + f"`{kind}`"


PARTS: dict[str, Callable[[], str]] = {"settings": settings, "commands": commands, "reasons": reasons}
"""The parts of pages that `<!-- generated: NAME -->` stands for."""
