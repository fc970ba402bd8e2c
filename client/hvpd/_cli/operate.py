"""Commands for operators: a server's objectives, tenants and files."""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hvpd._cli.common import accessing, connect, connection, print_table, show, show_bytes
from hvpd._errors import InvalidArgumentError


def server_commands(commands: Any) -> None:
    """Add the commands that call a server."""
    delete = commands.add_parser(
        "delete",
        help="delete an objective from a server",
        description="Delete a name of an objective, and with its last name the objective and its stored data. On a server with tenants "
        "the objective must be the tenant's own, unless the token has the right administer.",
    )
    delete.add_argument("name", metavar="NAME", help="a name; or a digest, for all its names")
    delete.set_defaults(run=_delete)
    prune = commands.add_parser(
        "prune", help="delete stored data that belongs to no objective, and is older than an hour"
    )
    prune.add_argument("--tenant", default="", help="another tenant (default: the own); needs the right administer")
    prune.set_defaults(run=_prune)
    usage = commands.add_parser("usage", help="show the limits and the usage of a tenant")
    usage.add_argument("--all", action="store_true", help="show all tenants; needs the right administer")
    usage.add_argument("--json", action="store_true", help="one JSON object a line")
    usage.set_defaults(run=_usage)
    release = commands.add_parser("release", help="serve a quarantined objective again; needs the right administer")
    release.add_argument("name", metavar="NAME", help="name or digest of the objective")
    release.set_defaults(run=_release)
    for command in (delete, prune, usage, release):
        connection(command)


def file_commands(commands: Any) -> None:
    """Add the commands that work on files of this machine, without a server."""
    _token_commands(commands.add_parser("token", help="make, list and revoke the tokens of a server"))
    _limit_commands(commands.add_parser("limit", help="set and list the limits of each tenant of a server"))
    _store_commands(commands.add_parser("store", help="verify or copy the files of a server, or of a backup"))


def _token_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    new = commands.add_parser(
        "new",
        help="make a token",
        description="Make a token, add it to the file of `hvpd serve --tokens FILE`, and print it. It cannot "
        "be shown again, because the file has only its SHA-256. A running server reads it at once.",
    )
    new.add_argument("--tenant", required=True, help="the tenant of the token: tenants share the device fairly")
    new.add_argument(
        "--rights", default="use", help="some of use, publish, administer, joined by commas (default: use)"
    )
    new.add_argument(
        "--expires", metavar="TIME", help="such as 90d (m, h, d, w), or 2027-02-19T17:00:00Z (default: never)"
    )
    new.add_argument(
        "--weight", type=float, default=1.0, help="the tenant's share of the device, against others' (default: 1)"
    )
    new.add_argument("--label", default="", help="purpose of the token, for people")
    new.set_defaults(run=_token_new)
    listing = commands.add_parser("list", help="list the tokens of a file, without the tokens themselves")
    listing.set_defaults(run=_token_list)
    revoke = commands.add_parser("revoke", help="revoke a token; a running server ends its calls within seconds")
    revoke.add_argument("token", metavar="ID", help="its ID in `hvpd token list`, or its label")
    revoke.set_defaults(run=_token_revoke)
    for command in (new, listing, revoke):
        command.add_argument("--file", required=True, metavar="FILE", type=Path, help="the file of tokens")


def _limit_commands(parser: argparse.ArgumentParser) -> None:
    from hvpd_server import config

    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    change = commands.add_parser(
        "set",
        help="set limits of a tenant",
        description="Set limits of a tenant in the file of `hvpd serve --tokens FILE`; other limits stay as they are, and "
        "`none` removes one. A running server applies them within seconds.",
    )
    sizes = {
        "resident_bytes": "points, residuals and data on each device",
        "stored_bytes": "blobs, names and registrations in the store",
        "transit_bytes": "vectors and answers in the host's memory",
        "program_bytes": "compiled programs in the host's memory, and as many on the disk",
    }
    numbers = {
        "vectors_per_second": (float, "vectors multiplied in a second; a point that is made counts as one"),
        "vectors_in_flight": (int, "vectors that wait for the device, or are being multiplied"),
        "device_share": (float, "seconds of device time in a second, on the average over ten"),
    }
    for name, (kind, text) in numbers.items():
        change.add_argument(
            f"--{name.replace('_', '-')}", type=_or_none(kind), default=_UNCHANGED, metavar="N", help=text
        )
    for name, text in sizes.items():
        change.add_argument(
            f"--{name.replace('_', '-')}",
            type=_or_none(config.parse_bytes),
            default=_UNCHANGED,
            metavar="BYTES",
            help=f"{text}, such as 16G",
        )
    change.set_defaults(run=_limit_set)
    remove = commands.add_parser("remove", help="remove a tenant's own limits, so that those of '*' apply")
    remove.set_defaults(run=_limit_remove)
    for command in (change, remove):
        command.add_argument(
            "tenant", metavar="TENANT", help="the tenant; '*' stands for all tenants without limits of their own"
        )
    listing = commands.add_parser("list", help="list the limits of a file")
    listing.set_defaults(run=_limit_list)
    for command in (change, remove, listing):
        command.add_argument("--file", required=True, metavar="FILE", type=Path, help="the file of tokens")


_UNCHANGED = object()


def _or_none(parse: Callable[[str], float]) -> Callable[[str], float | None]:
    def parsed(text: str) -> float | None:
        return None if text == "none" else parse(text)

    return parsed


def _store_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    verify = commands.add_parser(
        "verify",
        help="read a whole store, and list damaged and missing files",
        description="Read a whole store, or a backup of one, and list damaged and missing files. It changes nothing, and may run beside "
        "the server. Exit code 0: the store is whole; 1: it is not, or there is none.",
    )
    verify.add_argument("--store", metavar="DIR|URL", help="as of `hvpd serve` [$HVPD_STORE]")
    verify.add_argument("--json", action="store_true", help="as JSON")
    verify.set_defaults(run=_store_verify)
    copy = commands.add_parser(
        "copy",
        help="copy a store to another directory, or to or from an object store",
        description="Copy a store with everything in it but compiled programs, and verify its data. Servers may use the store "
        "meanwhile: what they register after the begin may be missing. If the copy is broken off, give the same command again.",
    )
    for name in ("source", "target"):
        copy.add_argument(name, metavar=name.upper(), help="a directory, or a URL as of `hvpd serve --store`")
    copy.set_defaults(run=_store_copy)


def _delete(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        gone = client.delete(arguments.name)
    print("deleted" if gone else "the name is off; the objective stays: it has another name, or another owner")
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        print(f"gave up {show_bytes(client.prune(arguments.tenant))}; blobs younger than an hour stay")
    return 0


def _usage(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        found = client.usages() if arguments.all else [client.usage()]
    if arguments.json:
        for usage in found:
            print(json.dumps(dataclasses.asdict(usage)))
        return 0
    rows = [
        ("TENANT", "WEIGHT", "VECTORS/s", "IN FLIGHT", "DEVICE", "RESIDENT", "STORED", "TRANSIT", "PROGRAMS", "CACHED")
    ]
    rows += [
        (
            usage.tenant or "-",
            f"{usage.weight:g}",
            "-" if usage.vectors_per_second_limit is None else f"of {usage.vectors_per_second_limit:g}",
            _of(str(usage.vectors_in_flight), usage.vectors_in_flight_limit, str),
            "-" if usage.device_share_limit is None else f"of {usage.device_share_limit:g}",
            _of(show_bytes(usage.resident_bytes), usage.resident_bytes_limit, show_bytes),
            _of(show_bytes(usage.stored_bytes), usage.stored_bytes_limit, show_bytes),
            _of(show_bytes(usage.transit_bytes), usage.transit_bytes_limit, show_bytes),
            _of(show_bytes(usage.program_bytes), usage.program_bytes_limit, show_bytes),
            _of(show_bytes(usage.cached_program_bytes), usage.program_bytes_limit, show_bytes),
        )
        for usage in found
    ]
    print_table(rows)
    return 0


def _of(used: str, limit: int | None, show: Callable[[int], str]) -> str:
    return used if limit is None else f"{used} of {show(limit)}"


def _release(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        strikes = client.release(arguments.name)
    print(f"released: it had ended the server {strikes} times" if strikes else "it was not quarantined")
    return 0


def _token_new(arguments: argparse.Namespace) -> int:
    from hvpd_server.tenancy import token_file

    with _token_file(arguments):
        now = datetime.datetime.now(datetime.UTC)
        token, grant = token_file.create(
            arguments.file,
            arguments.tenant,
            arguments.rights.split(","),
            expires=None if arguments.expires is None else token_file.parse_expiry(arguments.expires, now),
            weight=arguments.weight,
            label=arguments.label,
        )
    print(token)
    print(f"hvpd: token {grant.id} of tenant {grant.tenant}; it cannot be shown again", file=sys.stderr)
    return 0


def _token_list(arguments: argparse.Namespace) -> int:
    from hvpd_server.tenancy import token_file

    with _token_file(arguments):
        print_table(token_file.describe(token_file.read(arguments.file).grants, datetime.datetime.now(datetime.UTC)))
    return 0


def _token_revoke(arguments: argparse.Namespace) -> int:
    from hvpd_server.tenancy import token_file

    with _token_file(arguments):
        grant = token_file.revoke(arguments.file, arguments.token)
    print(f"hvpd: token {grant.id} of tenant {grant.tenant} is revoked", file=sys.stderr)
    return 0


def _limit_set(arguments: argparse.Namespace) -> int:
    from hvpd_server.tenancy import limits, token_file

    found = {name: getattr(arguments, name) for name in limits.FIELDS}
    changes = {name: value for name, value in found.items() if value is not _UNCHANGED}
    with _token_file(arguments):
        token_file.limit(arguments.file, arguments.tenant, changes)
        known = {grant.tenant for grant in token_file.read(arguments.file).grants}
    if arguments.tenant not in (*known, limits.ALL_TENANTS):
        show(
            f"hvpd: warning: no token of {arguments.file} belongs to tenant {arguments.tenant}; its tenants are "
            f"{', '.join(sorted(known)) or 'none'}",
            sys.stderr,
        )
    return 0


def _limit_remove(arguments: argparse.Namespace) -> int:
    from hvpd_server.tenancy import token_file

    with _token_file(arguments):
        token_file.unlimit(arguments.file, arguments.tenant)
    return 0


def _limit_list(arguments: argparse.Namespace) -> int:
    from hvpd_server.tenancy import limits, token_file

    with _token_file(arguments):
        print_table(limits.describe(token_file.read(arguments.file).limits))
    return 0


def _store_verify(arguments: argparse.Namespace) -> int:
    from hvpd_server import config
    from hvpd_server.errors import ServiceError
    from hvpd_server.store import verify as _verify
    from hvpd_server.store.location import objects_of

    default = os.environ.get("HVPD_STORE")
    try:
        where = config.parse_store(str(arguments.store or default or config.Config().store))
        found = _verify.verify(objects_of(config.Config(store=where)))
    except argparse.ArgumentTypeError as error:
        raise InvalidArgumentError(str(error), reason="INVALID_OPTION") from None
    except (ValueError, ServiceError) as error:
        raise InvalidArgumentError(str(error), reason="FILE_CONTENT") from None
    except OSError as error:
        raise InvalidArgumentError(f"cannot read {error.filename}: {error.strerror}", reason="FILE_ACCESS") from None
    if arguments.json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        print(*found.problems, sep="\n", end="\n" if found.problems else "")
        print(
            f"{found.objectives} objectives, {found.names} names, {found.blobs} blobs ({show_bytes(found.blob_bytes)}), of which no "
            f"objective needs {len(found.unreferenced)} ({show_bytes(found.unreferenced_bytes)}): "
            + (f"{len(found.problems)} problems" if found.problems else "whole")
        )
    return 1 if found.problems else 0


def _store_copy(arguments: argparse.Namespace) -> int:
    from hvpd_server import config as _config
    from hvpd_server.errors import ServiceError
    from hvpd_server.store import copy as _copy
    from hvpd_server.store.location import objects_of

    try:
        places = [_config.Config(store=_config.parse_store(text)) for text in (arguments.source, arguments.target)]
        found = _copy.copy(*map(objects_of, places))
    except argparse.ArgumentTypeError as error:
        raise InvalidArgumentError(str(error), reason="INVALID_OPTION") from None
    except ServiceError as error:
        raise InvalidArgumentError(str(error), reason="FILE_CONTENT") from None
    except OSError as error:
        raise InvalidArgumentError(f"cannot copy {error.filename}: {error.strerror}", reason="FILE_ACCESS") from None
    print(
        f"copied {found.blobs} blobs ({show_bytes(found.blob_bytes)}) and {found.records} records; {found.present} blobs were "
        "there already"
    )
    return 0


@contextlib.contextmanager
def _token_file(arguments: argparse.Namespace) -> Iterator[None]:
    with accessing(f"change {arguments.file}"):
        try:
            yield
        except ValueError as error:
            raise InvalidArgumentError(str(error), reason="INVALID_OPTION") from None
