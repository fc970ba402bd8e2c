"""Runs the conformance suite against a server."""

import dataclasses
from collections.abc import Iterator

from hvpd._conformance import checks
from hvpd._conformance.golden import load
from hvpd._transport.address import parts
from hvpd._transport.raw_calls import RawCalls
from hvpd._transport.transport import Transport


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one check."""

    name: str
    """What was checked, in words."""
    result: str
    """"ok", "FAIL" or "skip"."""
    reason: str
    """Why it failed or was skipped; empty otherwise."""


def run(transport: Transport) -> Iterator[Outcome]:
    """Yield the outcome of each check. The server keeps nothing of the suite."""
    host = parts(transport.address)[0]
    server = checks.Server(RawCalls(transport.channel), load(), host, encrypted=transport.settings["tls"] is not None)
    try:
        for name, check in zip(checks.names(), checks.CHECKS, strict=True):
            yield Outcome(name, *checks.run(server, check))
    finally:
        if server.registered:  # The caller stopped early.
            checks.run(server, checks.objective_is_deleted)
