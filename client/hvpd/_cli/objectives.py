"""`hvpd objectives`: the objectives of a server."""

import argparse
import dataclasses
import json

from hvpd._cli.common import connect, connection, print_table, show, show_bytes


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its own commands."""
    objectives = commands.add_parser("objectives", help="list, show or rename the registered objectives")
    objectives.add_argument("--json", action="store_true", help="one JSON object a line")
    connection(objectives)
    objectives.set_defaults(run=_list)
    more = objectives.add_subparsers(metavar="COMMAND")
    details = more.add_parser(
        "show", argument_default=argparse.SUPPRESS, help="show one objective: leaves, data, mode, check, compiles, plan"
    )
    details.add_argument("name", metavar="NAME", help="name or digest")
    connection(details)
    details.set_defaults(run=_show)
    rename = more.add_parser("rename", argument_default=argparse.SUPPRESS, help="give an objective another name")
    rename.add_argument("name", metavar="NAME", help="the name")
    rename.add_argument("new", metavar="NEW", help="the new name")
    connection(rename)
    rename.set_defaults(run=_rename)


def _list(arguments: argparse.Namespace) -> int:
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


def _show(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        objective = client.objective(arguments.name)
        check, compiles, plan = objective.registration_check(), objective.compiles(), objective.plan()
    show(f"{objective.label} {objective.digest}")
    show(f"n={objective.n} {objective.dtype} {objective.mode} precision={objective.precision}")
    show(f"check: {check.verdict or '-'}{f' ({check.reason})' if check.reason else ''}")
    rows = [("LEAF", "SHAPE", "DTYPE", "OFFSET")]
    rows += [(leaf.name or "-", str(list(leaf.shape)), leaf.dtype, str(leaf.offset)) for leaf in objective.leaves]
    print_table(rows)
    rows = [("PROGRAM", "WIDTH", "STATE", "SECONDS")]
    rows += [(each.program, str(each.width or "-"), each.state, f"{each.seconds:.2f}") for each in compiles]
    print_table(rows)
    for choice in plan:
        show(f"width {choice.width}: {choice.program}, {choice.reason}")
    return 0


def _rename(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        objective = client.rename(arguments.name, arguments.new)
    show(f"{objective.name} {objective.digest}")
    return 0
