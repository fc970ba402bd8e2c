"""Calls to a fleet: the same calls as to one server, and each try chooses its server.

A client and an objective use the first member in the objective's order. A point stays
at the member where it was made, until that one is away or full. At the next member the
server does not know the point, and the client makes it again, as after a restart.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import grpc

from hvpd._progress import Reporter
from hvpd._transport import address as _address
from hvpd._transport import cancellation, tracing
from hvpd._transport.calls import Calls
from hvpd._transport.channel import Channel
from hvpd._transport.fleet import Fleet, Member
from hvpd._transport.stream import RpcFailure
from hvpd._transport.transport import Transport
from hvpd.v1 import server_pb2

_T = TypeVar("_T")


class FleetTransport(Transport):
    """The calls of a client, an objective or a point of a fleet.

    Args:
        fleet: The fleet.
        reporter: Shows work that takes long.
        digest: Digest of the objective; empty for calls about no objective.
        stays: Whether calls stay at their member as long as it is there.
    """

    def __init__(self, fleet: Fleet, reporter: Reporter, digest: str = "", *, stays: bool = False) -> None:
        settings = fleet.settings
        Calls.__init__(
            self,
            fleet.address,
            cast("Channel", _Routed(lambda: self._link().channel)),
            settings["retry_timeout"],
            settings["timeout"],
            reporter,
            fleet.counts,
        )
        self._owner = fleet.owner
        self.settings = settings
        self.priority = settings["priority"]
        self._fleet = fleet
        self._digest = digest
        self._stays = stays
        self._take(fleet.choose(digest)[0])

    @property
    def closed(self) -> bool:
        """Return whether the connections were ended."""
        return self._fleet.closed

    @property
    def server(self) -> server_pb2.GetServerResponse:
        """Return facts about one server, with limits that every server meets."""
        found = server_pb2.GetServerResponse()
        found.CopyFrom(self._link().server)
        self._fleet.limit(found)
        return found

    def close(self) -> None:
        """End all connections."""
        self._fleet.close()

    def placed(self, digest: str) -> Transport:
        """Return the transport for an objective."""
        return self._other(digest, stays=False)

    def staying(self) -> Transport:
        """Return the transport for a point, which stays at its server."""
        return self._other(self._digest, stays=True)

    def _other(self, digest: str, *, stays: bool) -> Transport:
        self._check_usable()  # A fork may have inherited locks that are held.
        found = FleetTransport(self._fleet, self.reporter, digest, stays=stays)
        found.client_again, found.objective_again = self.client_again, self.objective_again
        return found

    def each(self) -> dict[str, Transport | None]:
        """Return the connections by address; None for a server that never answered."""
        return {member.address: member.link for member in self._fleet.members()}

    @property
    def member(self) -> Member:
        """Return the member that took the latest try."""
        return self._member

    def _link(self) -> Transport:
        return self._member.linked

    def _widest(self) -> int:
        return self._fleet.widest

    def _try(self, attempt: Callable[[float | None], _T], left: float | None, request_id: str) -> _T:
        """Run one try. After a failure that another member may not have, the next try
        goes there at once.
        """
        self._check_usable()
        member = self._member
        if member.away or not self._stays:
            member = self._fleet.choose(self._digest)[0]
            self._take(member)
        away = member.away
        try:
            result = super()._try(attempt, left, request_id)
        except RpcFailure as error:
            cancellation.check()
            if self._fleet.leave(member, self._digest, error.failure) and self._moved(member):
                error.failure = dataclasses.replace(error.failure, code=grpc.StatusCode.UNAVAILABLE, retry_after=0.0)
            raise
        if away:  # Not if it drains, and only finishes this call.
            self._fleet.answered(member)
        return result

    def _moved(self, member: Member) -> bool:
        """Leave a member; return whether another one is neither away nor full."""
        if self._member is not member:  # Another thread has left it.
            return True
        found, free = self._fleet.choose(self._digest)
        if not free or found is member:
            return False
        self._take(found)
        return True

    def _take(self, member: Member) -> None:
        """Use a member from now on. Spans of later calls name it."""
        self._member = member
        self._tracing = tracing.of(member.address)


class _Routed:
    """The channel of whichever member takes the next try. Methods are looked up when
    they are called.

    Args:
        channel: Returns the channel.
        path: Names from the channel to a method.
    """

    def __init__(self, channel: Callable[[], Channel], path: tuple[str, ...] = ()) -> None:
        self._channel = channel
        self._path = path

    def __getattr__(self, name: str) -> "_Routed":
        if name.startswith("_"):
            raise AttributeError(name)
        return _Routed(self._channel, (*self._path, name))

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return functools.reduce(getattr, self._path, cast("Any", self._channel()))(*arguments, **options)


def connected(address: str, make: Callable[..., Transport], reporter: Reporter) -> Transport:
    """Connect to one server, or to the fleet that an address names.

    Args:
        address: "host:port"; several of them, joined by commas; or "dns:///host:port".
        make: Connects to one address.
        reporter: Shows work that takes long.
    """
    if not _address.is_fleet(address):
        return make(address)
    if address.startswith(_address.DNS):
        host, _ = _address.named(address)
        fleet = Fleet(
            address,
            functools.partial(_address.resolved, address),
            functools.partial(make, server_name=host),
            resolves=True,
        )
    else:
        found = _address.listed(address)
        fleet = Fleet(",".join(found), lambda: found, make)
    with reporter.stage(f"connecting to {fleet.address}"):
        fleet.open()
    return FleetTransport(fleet, reporter)
