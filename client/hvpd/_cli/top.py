"""`hvpd top`: the load of a server, live."""

import argparse
import json
import sys
import time
from collections.abc import Sequence

from google.protobuf import json_format

from hvpd import _text
from hvpd._cli.common import connect, connection, show, show_bytes
from hvpd._errors import InvalidArgumentError
from hvpd._wire.distribution import Distribution
from hvpd.v1 import server_pb2

_ROWS = 20
"""Most objectives in the table."""

_CLEAR = "\x1b[H\x1b[2J"


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    top = commands.add_parser(
        "top",
        help="show the load of a server, live; needs the right administer",
        description="Show products and vectors a second, latency, queue, memory, and the objectives and tenants with most device time, "
        "until Ctrl-C.",
    )
    top.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="seconds of each line (default: 2)")
    top.add_argument("--count", type=int, default=0, metavar="N", help="how often to show it (default: until Ctrl-C)")
    top.add_argument("--json", action="store_true", help="the counts since the start, one JSON object a line")
    connection(top)
    top.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if not 0 < arguments.interval < float("inf") or arguments.count < 0:
        raise InvalidArgumentError("--interval must be above 0, and --count must be from 0")
    shown = 0
    with connect(arguments) as client:
        before = client.load()
        try:
            while not arguments.count or shown < arguments.count:
                time.sleep(arguments.interval)
                now = client.load()
                if arguments.json:
                    print(json.dumps(json_format.MessageToDict(now, preserving_proto_field_name=True)), flush=True)
                else:
                    if sys.stdout.isatty():
                        print(_CLEAR, end="")
                    show("\n".join(frame(client.address, before, now)))
                    sys.stdout.flush()
                before, shown = now, shown + 1
        except KeyboardInterrupt:
            pass
    return 0


def frame(address: str, before: server_pb2.GetLoadResponse, now: server_pb2.GetLoadResponse) -> list[str]:
    """Return the lines that show the load between two moments."""
    seconds = max((now.time.ToNanoseconds() - before.time.ToNanoseconds()) / 1e9, 1e-9)
    if now.products < before.products:  # The server was started again.
        before = server_pb2.GetLoadResponse()

    def rate(name: str) -> float:
        grown: float = getattr(now, name) - getattr(before, name)
        return grown / seconds

    width = _since(before.launch_vectors, now.launch_vectors).quantile(0.5) or 0.0
    return [
        f"{address}  {now.state}  {now.open_calls} calls",
        f"products {rate('products'):.4g}/s   vectors {rate('vectors'):.4g}/s   failures {rate('failures'):.3g}/s",
        f"latency  {_spread(before.request_seconds, now.request_seconds)}",
        f"queue    {_spread(before.queue_seconds, now.queue_seconds)}   waiting {now.pending_vectors} of {now.pending_limit} vectors",
        f"device   {now.in_flight_vectors} vectors in flight   median launch {width:.3g} vectors",
        f"memory   {show_bytes(now.resident_bytes)} of {show_bytes(now.budget_bytes)} resident",
        "",
        *_text.table(_shares(before, now, seconds)),
    ]


def _shares(
    before: server_pb2.GetLoadResponse, now: server_pb2.GetLoadResponse, seconds: float
) -> Sequence[Sequence[str]]:
    """Return the table of objectives and tenants, by device time."""
    earlier = {(share.objective, share.tenant): share for share in before.shares}
    rows = []
    for share in now.shares:
        was = earlier.get((share.objective, share.tenant), server_pb2.Share())
        if was.products > share.products:  # Another pair had the account.
            was = server_pb2.Share()
        device = (share.device_seconds - was.device_seconds) / seconds
        rows.append((device, share, (share.products - was.products) / seconds, (share.vectors - was.vectors) / seconds))
    rows.sort(key=lambda row: (-row[0], row[1].objective, row[1].tenant))
    return [
        ("OBJECTIVE", "TENANT", "PRODUCTS/s", "VECTORS/s", "DEVICE"),
        *(
            (share.objective, share.tenant or "-", f"{products:.4g}", f"{vectors:.4g}", f"{device:.0%}")
            for device, share, products, vectors in rows[:_ROWS]
        ),
    ]


def _since(before: server_pb2.Histogram, now: server_pb2.Histogram) -> Distribution:
    """Return the growth of a histogram between two moments."""
    earlier = list(before.counts) or [0] * len(now.counts)
    return Distribution(now.bounds, now.counts).since(Distribution(now.bounds, earlier))


def _spread(before: server_pb2.Histogram, now: server_pb2.Histogram) -> str:
    grown = _since(before, now)
    if not sum(grown.counts):
        return "no products"
    return "   ".join(f"p{share * 100:g} {(grown.quantile(share) or 0.0) * 1e3:.3g} ms" for share in (0.5, 0.9, 0.99))
