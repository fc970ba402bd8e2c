"""`hvpd top`: the load of a server, or of several, live."""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from google.protobuf import json_format

from hvpd import _text
from hvpd._cli.common import connect, connection, show, show_bytes, show_number
from hvpd._errors import InvalidArgumentError
from hvpd._transport.address import is_fleet
from hvpd._wire.distribution import Distribution
from hvpd.v1 import server_pb2

if TYPE_CHECKING:
    pass

Loads: TypeAlias = "Mapping[str, server_pb2.GetLoadResponse | None]"
"""Loads of servers by address; None for one that does not answer."""

_ROWS = 20
"""Most objectives in the table."""

_CLEAR = "\x1b[H\x1b[2J"


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    top = commands.add_parser(
        "top",
        help="show the load of a server, live; needs the right administer",
        description="Show products and vectors a second, latency, queue, memory, and the objectives and tenants with most device time, "
        "until Ctrl-C. Several servers are one row each.",
    )
    top.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="seconds of each line (default: 2)")
    top.add_argument("--count", type=int, default=0, metavar="N", help="how often to show it (default: until Ctrl-C)")
    top.add_argument("--json", action="store_true", help="the counts since the start, one JSON object a line")
    connection(top)
    top.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if not 0 < arguments.interval < float("inf") or arguments.count < 0:
        raise InvalidArgumentError("--interval must be above 0, and --count must be from 0", reason="INVALID_OPTION")
    live = sys.stdout.isatty() and not arguments.json
    shown = 0
    with connect(arguments) as client:
        fleet = is_fleet(client.address)

        def read() -> Loads:
            return client.loads() if fleet else {client.address: client.load()}

        before = read()
        try:
            if live:  # Otherwise the screen would be empty for the first interval.
                _show(_frame(before, before, fleet=fleet), live=live)
            while not arguments.count or shown < arguments.count:
                time.sleep(arguments.interval)
                now = read()
                if arguments.json:
                    for address, load in now.items():
                        print(json.dumps(({"address": address} if fleet else {}) | _json(load)), flush=True)
                else:
                    _show(_frame(before, now, fleet=fleet), live=live)
                # A server that was away in between counts from its latest answer.
                before, shown = {address: load or before.get(address) for address, load in now.items()}, shown + 1
        except KeyboardInterrupt:
            pass
    return 0


def _json(load: server_pb2.GetLoadResponse | None) -> dict[str, object]:
    if load is None:
        return {"state": "away"}
    found: dict[str, object] = json_format.MessageToDict(load, preserving_proto_field_name=True)
    return found


def _show(lines: Sequence[str], *, live: bool) -> None:
    if live:
        print(_CLEAR, end="")
    show("\n".join(lines))
    sys.stdout.flush()


def _frame(before: Loads, now: Loads, *, fleet: bool) -> list[str]:
    if fleet:
        return fleet_frame(before, now)
    [(address, load)] = now.items()
    assert load is not None
    return frame(address, before[address] or load, load)


def frame(address: str, before: server_pb2.GetLoadResponse, now: server_pb2.GetLoadResponse) -> list[str]:
    """Return the lines that show the load between two moments.

    If these are one moment, there are no rates, and "-" is in their places.
    """
    seconds = (now.time.ToNanoseconds() - before.time.ToNanoseconds()) / 1e9
    if now.products < before.products:  # The server was started again.
        before = server_pb2.GetLoadResponse()

    def rate(name: str, digits: int = 4) -> str:
        return _rate(getattr(now, name) - getattr(before, name), seconds, digits)

    queue = _spread(before.queue_seconds, now.queue_seconds, seconds)
    width = _since(before.launch_vectors, now.launch_vectors).quantile(0.5)
    return [
        f"{address}  {now.state}  {now.open_calls} calls",
        f"products {rate('products')}/s   vectors {rate('vectors')}/s   failures {rate('failures', 3)}/s",
        f"latency  {_spread(before.request_seconds, now.request_seconds, seconds)}",
        f"queue    {queue}   waiting {now.pending_vectors} of {now.pending_limit} vectors",
        f"device   {now.in_flight_vectors} vectors in flight   median launch {math.ceil(width) if width else '-'} vectors",
        f"memory   {show_bytes(now.resident_bytes)} of {show_bytes(now.budget_bytes)} resident   {now.points} points",
        "",
        *_text.table(_shares(before, now, seconds)),
    ]


_FLEET = (
    "SERVER",
    "STATE",
    "CALLS",
    "PRODUCTS/s",
    "VECTORS/s",
    "FAILURES/s",
    "LATENCY p50",
    "WAITING",
    "POINTS",
    "RESIDENT",
)


def fleet_frame(before: "Loads", now: "Loads") -> list[str]:
    """Return the lines that show the load of several servers between two moments: a row
    for each, and then the objectives and tenants of all, with the servers that have
    most of their device time.
    """
    rows: list[Sequence[str]] = [_FLEET]
    earlier, later, seconds = server_pb2.GetLoadResponse(), server_pb2.GetLoadResponse(), 0.0
    places: dict[tuple[str, str], dict[str, float]] = {}
    for address, load in now.items():
        if load is None:
            rows.append((address, "away", *["-"] * (len(_FLEET) - 2)))
            continue
        was = before.get(address) or load
        grown = (load.time.ToNanoseconds() - was.time.ToNanoseconds()) / 1e9
        if load.products < was.products:  # The server was started again.
            was = server_pb2.GetLoadResponse()
        latency = _since(was.request_seconds, load.request_seconds).quantile(0.5) if grown else None
        rows.append(
            (
                address,
                load.state,
                str(load.open_calls),
                *(_rate(getattr(load, name) - getattr(was, name), grown, 4) for name in ("products", "vectors")),
                _rate(load.failures - was.failures, grown, 3),
                "-" if latency is None else f"{show_number(latency * 1e3, 3)} ms",
                f"{load.pending_vectors} of {load.pending_limit}",
                str(load.points),
                f"{show_bytes(load.resident_bytes)} of {show_bytes(load.budget_bytes)}",
            )
        )
        for share, _, device in _grown(was, load):
            places.setdefault((share.objective, share.tenant), {})[address] = device
        _add(earlier, was)
        _add(later, load)
        seconds = max(seconds, grown)
    return [*_text.table(rows), "", *_text.table(_shares(earlier, later, seconds, places))]


def _add(total: server_pb2.GetLoadResponse, load: server_pb2.GetLoadResponse) -> None:
    """Add the counts by objective and tenant of one server."""
    found = {(share.objective, share.tenant): share for share in total.shares}
    for share in load.shares:
        mine = found.get((share.objective, share.tenant)) or total.shares.add(
            objective=share.objective, tenant=share.tenant
        )
        mine.products += share.products
        mine.vectors += share.vectors
        mine.device_seconds += share.device_seconds


def _rate(grown: float, seconds: float, digits: int) -> str:
    return show_number(grown / seconds, digits) if seconds > 0 else "-"


def _grown(
    before: server_pb2.GetLoadResponse, now: server_pb2.GetLoadResponse
) -> list[tuple[server_pb2.Share, server_pb2.Share, float]]:
    """Return the shares with their earlier state and the device time between."""
    earlier = {(share.objective, share.tenant): share for share in before.shares}
    found = []
    for share in now.shares:
        if not share.products and not share.device_seconds:  # Only refused calls.
            continue
        was = earlier.get((share.objective, share.tenant), server_pb2.Share())
        if was.products > share.products:  # Another pair had the account.
            was = server_pb2.Share()
        found.append((share, was, share.device_seconds - was.device_seconds))
    return found


def _shares(
    before: server_pb2.GetLoadResponse,
    now: server_pb2.GetLoadResponse,
    seconds: float,
    places: "Mapping[tuple[str, str], Mapping[str, float]] | None" = None,
) -> Sequence[Sequence[str]]:
    """Return the table of objectives and tenants, by device time.

    Args:
        before: The counts at the first moment.
        now: The counts at the second moment.
        seconds: Seconds between both.
        places: Of several servers, the device time of each pair by server.
    """
    rows = sorted(_grown(before, now), key=lambda row: (-row[2], row[0].objective, row[0].tenant))
    return [
        ("OBJECTIVE", "TENANT", "PRODUCTS/s", "VECTORS/s", "DEVICE", *(["SERVERS"] if places is not None else [])),
        *(
            (
                share.objective,
                share.tenant or "-",
                _rate(share.products - was.products, seconds, 4),
                _rate(share.vectors - was.vectors, seconds, 4),
                f"{device / seconds:.0%}" if seconds > 0 else "-",
                *([_placed(places[share.objective, share.tenant])] if places is not None else []),
            )
            for share, was, device in rows[:_ROWS]
        ),
    ]


def _placed(device: "Mapping[str, float]") -> str:
    """Return the servers by their part of a device time, without those below 1 %."""
    total = sum(device.values())
    if total <= 0:
        return "-"
    parts = sorted(((seconds / total, address) for address, seconds in device.items()), reverse=True)
    return ", ".join(f"{address} {part:.0%}" for part, address in parts if part >= 0.01)


def _since(before: server_pb2.Histogram, now: server_pb2.Histogram) -> Distribution:
    """Return the growth of a histogram between two moments."""
    earlier = list(before.counts) or [0] * len(now.counts)
    return Distribution(now.bounds, now.counts).since(Distribution(now.bounds, earlier))


def _spread(before: server_pb2.Histogram, now: server_pb2.Histogram, seconds: float) -> str:
    grown = _since(before, now)
    if not sum(grown.counts):
        return "no products" if seconds > 0 else "-"
    return "   ".join(
        f"p{share * 100:g} {show_number((grown.quantile(share) or 0.0) * 1e3, 3)} ms" for share in (0.5, 0.9, 0.99)
    )
