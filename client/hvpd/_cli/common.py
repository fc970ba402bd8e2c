"""The common parts of commands: connecting, reading a vector, and showing results."""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hvpd import _text
from hvpd._errors import InvalidArgumentError

if TYPE_CHECKING:
    from hvpd._client import Client
    from hvpd._progress import Progress


def connection(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose a server."""
    parser.add_argument("--profile", metavar="NAME", help="a profile of ~/.config/hvpd/config.toml [$HVPD_PROFILE]")
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="the server, or several joined by commas (default: localhost:7070) [$HVPD_ADDRESS]",
    )
    parser.add_argument(
        "--connect-timeout",
        type=float,
        metavar="SECONDS",
        help="how long to wait for it (default: 10, and 1 if nothing listens there)",
    )
    parser.add_argument(
        "--token",
        help="token of the caller, for servers that ask; other users of this machine see flags, but not variables [$HVPD_TOKEN]",
    )
    parser.add_argument(
        "--tls", action="store_const", const=True, help="encrypt (default: if there is a CA or a certificate)"
    )
    parser.add_argument("--ca", metavar="FILE", help="PEM file of the CAs to trust [$HVPD_CA]")
    parser.add_argument(
        "--cert", metavar="FILE", help="PEM file of a certificate to show, for servers that ask [$HVPD_CERT]"
    )
    parser.add_argument("--key", metavar="FILE", help="PEM file of its key [$HVPD_KEY]")
    parser.add_argument("--insecure", action="store_true", help="send the token as plain text, to another machine too")


def connect(
    arguments: argparse.Namespace,
    progress: "Callable[[Progress], object] | None" = None,
    retry_timeout: float = 60.0,
) -> "Client":
    """Connect to the server that the flags choose.

    Args:
        arguments: The flags of `connection`.
        progress: Shows the progress of long work; None for bars on a terminal.
        retry_timeout: As for `hvpd.connect`.
    """
    from hvpd._connect import connect

    return connect(
        arguments.address,
        token=arguments.token,
        connect_timeout=arguments.connect_timeout,
        tls=arguments.tls,
        ca=arguments.ca,
        cert=arguments.cert,
        key=arguments.key,
        insecure=arguments.insecure,
        profile=arguments.profile,
        progress=progress,
        retry_timeout=retry_timeout,
    )


@contextlib.contextmanager
def accessing(what: str) -> Iterator[None]:
    """Raise the error of a file that cannot be used.

    Args:
        what: The verb and the file, such as "read x.npy".
    """
    try:
        yield
    except OSError as error:
        raise InvalidArgumentError(f"cannot {what}: {error.strerror or error}", reason="FILE_ACCESS") from None


def vector(path: str) -> Any:
    """Return the array of a file of `numpy.save`.

    Raises:
        InvalidArgumentError: The file cannot be read, or holds something else.
    """
    import numpy as np

    with accessing(f"read {path}"), Path(path).open("rb") as file:
        try:
            return np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError):
            raise InvalidArgumentError(
                f"{path} is no file of numpy.save with one array of numbers", reason="FILE_CONTENT"
            ) from None


def show(text: object, file: TextIO | None = None) -> None:
    """Print a text that may come from a server, without control characters."""
    print(_text.printable(str(text), keep="\n"), file=file)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows as aligned columns; the first row has the titles."""
    for line in _text.table(rows):
        print(line)


def show_number(number: float, digits: int = 4) -> str:
    """Return a measured number for people, without an exponent if it is large."""
    return f"{number:,.0f}" if abs(number) >= 10 ** (digits - 1) else f"{number:.{digits}g}"


def show_bytes(size_bytes: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{show_number(size_bytes, 3)} {unit}"
        size_bytes /= 1024
    return f"{show_number(size_bytes, 3)} TiB"
