"""`hvpd conformance`: does a server speak the protocol?"""

import argparse
import dataclasses
import json

from hvpd._cli.common import connect, connection, show
from hvpd._errors import InvalidArgumentError
from hvpd._transport.address import is_fleet


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    conformance = commands.add_parser(
        "conformance",
        help="check that a server speaks the protocol, byte by byte",
        description="Send golden frames of revision 1, and compare the answers with closed forms. It registers an objective under a "
        "name of its own, and deletes it at the end, so it needs the rights use and publish. Exit code 0: no check failed; 3: a check "
        "failed; 1: the suite could not run.",
    )
    conformance.add_argument("server", metavar="HOST:PORT", nargs="?", help="the server, in place of --address")
    conformance.add_argument("--json", action="store_true", help="one JSON object a line")
    connection(conformance)
    conformance.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from hvpd._conformance import suite

    if arguments.server is not None:
        if arguments.address is not None:
            raise InvalidArgumentError("say HOST:PORT or --address, not both", reason="CONFLICTING_OPTIONS")
        arguments.address = arguments.server
    counts = {"ok": 0, "FAIL": 0, "skip": 0}
    with connect(arguments) as client:
        if is_fleet(client.address):
            raise InvalidArgumentError(
                f"conformance checks one server, got {client.address}: say HOST:PORT of one", reason="ADDRESS"
            )
        for outcome in suite.run(client._transport):  # noqa: SLF001 - our own
            counts[outcome.result] += 1
            if arguments.json:
                print(json.dumps(dataclasses.asdict(outcome)), flush=True)
            else:
                show(f"{outcome.result:<4}  {outcome.name}{f': {outcome.reason}' if outcome.reason else ''}")
    if not arguments.json:
        print(f"{counts['ok']} ok, {counts['FAIL']} failed, {counts['skip']} skipped")
    return 3 if counts["FAIL"] else 0
