"""The list of a server's objectives."""

import dataclasses
import datetime

from hvpd._check.verdicts import verdict_of
from hvpd._errors import HvpdError
from hvpd._transport.transport import Transport
from hvpd._wire import codec
from hvpd.v1 import objective_pb2

_MOST_PAGES = 10_000
_MOST_LISTED_BYTES = 256 << 20
"""Most pages of a list of objectives, and bytes of all pages: a million objectives."""


@dataclasses.dataclass(frozen=True)
class Listing:
    """An objective in `Client.objectives()`.

    Example:
        >>> for listing in client.objectives():
        ...     print(listing.name, listing.n, listing.check)
    """

    name: str
    """Name of the objective; empty without one."""
    digest: str
    """SHA-256 of the registered bundle, in hexadecimal."""
    n: int
    """Number of elements of x."""
    dtype: str
    """float32 or float64."""
    precision: str
    """Matrix-multiplication precision; "exported" if the program states its own."""
    mode: str
    """The mode in which products are made."""
    platforms: tuple[str, ...]
    """Platforms that it has branches for; empty if it computes the same on all."""
    data_bytes: int
    """Bytes of the registered data."""
    created: datetime.datetime
    """Time of the registration, UTC."""
    check: str = ""
    """Verdict of the server's check: passed, failed, undecided or pending; or empty."""


def listed(transport: Transport) -> list[Listing]:
    """Return all objectives, sorted by name. See `Client.objectives`."""
    found: list[Listing] = []
    token, room = "", _MOST_LISTED_BYTES
    for _ in range(_MOST_PAGES):
        request = objective_pb2.ListObjectivesRequest(page_token=token)
        response = transport.unary(transport.channel.objectives.ListObjectives, request)
        try:
            found.extend(map(_listing, response.objectives))
        except (TypeError, ValueError, LookupError, OverflowError) as error:
            raise HvpdError(
                f"the server at {transport.address} answered with a list that cannot be read ({error})",
                reason="BAD_ANSWER",
            ) from error
        if token and response.next_page_token == token:
            raise HvpdError(
                f"the server at {transport.address} lists the same page again and again: it is no hvpd server",
                reason="BAD_ANSWER",
            )
        token, room = response.next_page_token, room - response.ByteSize()
        if not token:
            return found
        if room < 0:
            break
    raise HvpdError(
        f"the server at {transport.address} lists objectives without end: {len(found)} of them so far, in pages that go on",
        reason="BAD_ANSWER",
    )


def _listing(message: objective_pb2.Objective) -> Listing:
    bundle = message.bundle
    return Listing(
        name=message.name,
        digest=message.digest,
        n=bundle.n,
        dtype=bundle.dtype,
        precision=bundle.precision,
        mode=message.derivation.mode or bundle.mode,
        platforms=tuple(bundle.platforms),
        data_bytes=sum(codec.count(tensor.shape) * codec.dtype(tensor.dtype).itemsize for tensor in bundle.data),
        created=message.create_time.ToDatetime(datetime.UTC),
        check=verdict_of(message.check),
    )
