"""What commands have in common: how they connect, and how they show what they found."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from hvpd import _text

if TYPE_CHECKING:
    from hvpd._client import Client


def connection(parser: argparse.ArgumentParser) -> None:
    """Adds how to reach a server."""
    parser.add_argument("--address", metavar="HOST:PORT", help="the server (default: localhost:7070) [$HVPD_ADDRESS]")
    parser.add_argument(
        "--connect-timeout", type=float, default=10.0, metavar="SECONDS", help="how long to wait for it (default: 10)"
    )
    parser.add_argument(
        "--token",
        help="who calls, for servers that ask; others on this machine see flags, and no variables [$HVPD_TOKEN]",
    )
    parser.add_argument("--tls", action="store_const", const=True, help="encrypt (default: where there is a CA)")
    parser.add_argument("--ca", metavar="FILE", help="PEM file of the CAs to trust [$HVPD_CA]")
    parser.add_argument(
        "--cert", metavar="FILE", help="PEM file of a certificate to show, for servers that ask [$HVPD_CERT]"
    )
    parser.add_argument("--key", metavar="FILE", help="PEM file of its key [$HVPD_KEY]")
    parser.add_argument("--insecure", action="store_true", help="send the token as plain text, to another machine too")


def connect(arguments: argparse.Namespace) -> "Client":
    """Connects as the flags say."""
    from hvpd._client import connect

    return connect(
        arguments.address,
        token=arguments.token,
        connect_timeout=arguments.connect_timeout,
        tls=arguments.tls,
        ca=arguments.ca,
        cert=arguments.cert,
        key=arguments.key,
        insecure=arguments.insecure,
    )


def show(text: object, file: TextIO | None = None) -> None:
    """Print a text that may have parts of a server's, without what would steer the terminal."""
    print(_text.printable(str(text), keep="\n"), file=file)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints columns, the titles first."""
    rows = [[_text.printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_bytes(size_bytes: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.3g} TiB"
