"""The servers of a fleet: which are there, and which one takes an objective.

A *member* is one server, with a connection of its own. A member is *away* until it
answers, and after it stopped answering. A thread then looks for it again, with longer
and longer pauses. A member can be *full* for one objective: it lacks a place in its
queue or memory, or it lacks the objective.

`placement` gives the order of members for an objective. This file takes the first one
that is neither away nor full. It makes no call of a user: `fleet_transport` does.
"""

import enum
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np

from hvpd._errors import Failure, HvpdError, InvalidArgumentError, UnavailableError
from hvpd._transport import placement
from hvpd._transport.absence import Absence
from hvpd._transport.retry import is_transient
from hvpd._transport.statistics import Counts
from hvpd._transport.transport import SERVING, Transport
from hvpd._warnings import warn
from hvpd.v1 import server_pb2

_log = logging.getLogger("hvpd")

_AWAY = (1.0, 30.0)
"""Seconds of a member's first absence, and of its longest."""

_FULL = (5.0, 300.0)
"""Seconds for which one objective leaves a full member: at first, and at most."""

_OTHERS_SECONDS = 2.0
"""Seconds that `connect` waits for the other members after the first has answered."""

_LOOK_SECONDS = 2.0
"""Seconds within which a member that is there answers."""

_RESOLVE_SECONDS = 30.0
"""Seconds between two looks at the addresses of a name."""

_ID_LENGTH = 64
"""Most characters of a server's id that count."""

_MOST_WEIGHT = 1024
"""Most devices of a member that count."""

_KEPT_SECONDS = 90.0
"""Seconds for which the connection to a server is kept that left DNS and is away. Its
calls have failed by then."""

_MOST_OBJECTIVES = 4096
"""Most objectives whose order is remembered."""

_FULL_REASONS = frozenset(
    {
        *("QUEUE_FULL", "ARRIVALS_FULL", "TOO_MANY_CALLS"),
        *("DEVICE_MEMORY", "MEMORY_BUDGET", "HOST_MEMORY", "DESCRIPTORS", "PROGRAM_MEMORY"),
        *("STORE_UNAVAILABLE", "STORE_DAMAGED"),
    }
)
"""Reasons of failures that another member may not have. Limits of a tenant are missing
here: moving must not evade them."""

_LEAVING_REASONS = frozenset({"WARMING_UP", "SHUTTING_DOWN"})
"""Reasons by which a member says that it is away."""


class Member:
    """One server of a fleet.

    Attributes:
        link: Its connection; None until it has answered once.
        away: Whether it does not answer.
        absence: For how long it is not asked.
        error: Why it did not answer at first; None if it did, or was not asked yet.
        watched: Whether a thread looks for it.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.link: Transport | None = None
        self.away = True
        self.absence = Absence(*_AWAY)
        self.error: HvpdError | None = None
        self.watched = False

    @property
    def linked(self) -> Transport:
        """Return the connection of a member that has answered."""
        assert self.link is not None
        return self.link


class _Readiness(enum.IntEnum):
    """How good a member is for an objective at the moment, the best first."""

    FREE = 0
    FULL = 1
    DUE = 2
    """It is away, and may be asked again."""
    AWAY = 3


class Fleet:
    """The members, and their choice.

    Args:
        address: The addresses as the user wrote them.
        addresses: Returns the addresses of all members at the moment; raises OSError.
        make: Connects to one address.
        resolves: Whether the addresses can change.
        clock: Returns the time in seconds.

    Attributes:
        settings: Settings for a pickle, as a transport has them.
        counts: Counts of all products.
        owner: Process that may use the fleet.
        widest: Most vectors of one product that every member takes.
    """

    def __init__(
        self,
        address: str,
        addresses: Callable[[], Sequence[str]],
        make: Callable[[str], Transport],
        *,
        resolves: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address = address
        self.counts = Counts()
        self.widest = 1
        self.owner = os.getpid()
        self.settings: dict[str, Any] = {}
        self._addresses = addresses
        self._make = make
        self._resolves = resolves
        self._clock = clock
        self._resolving = False
        self._resolved = self._clock()
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._forgotten = False
        self._members: list[Member] = []
        self._former: list[Member] = []
        self._links: list[Transport] = []
        self._orders: dict[str, list[Member]] = {}
        self._full: dict[tuple[str, str], Absence] = {}

    @property
    def closed(self) -> bool:
        """Return whether the connections were ended."""
        return self._forgotten or self._closed.is_set()

    def open(self) -> None:
        """Connect to all members, and wait for the first ones.

        Warn of members that do not answer.

        Raises:
            UnavailableError: None answers.
            HvpdError: None answers as it must; or an argument is wrong.
        """
        try:
            self._join(self._addresses())
        except OSError as error:
            raise UnavailableError(
                f"{self.address} has no address ({error.strerror or error}): check its spelling",
                reason="HOST_NOT_FOUND",
            ) from None
        try:
            self._await()
        except BaseException:
            self.close()
            raise

    def _await(self) -> None:
        """Wait until a member has answered, and the others had time to."""
        first = float("inf")
        with self._changed:
            while not all(each.link or each.error for each in self._members):
                self._raise_wrong_argument()
                if first == float("inf") and any(each.link for each in self._members):
                    first = self._clock()
                left = first + _OTHERS_SECONDS - self._clock()
                if left <= 0:
                    break
                self._changed.wait(min(left, 60.0))
            self._raise_wrong_argument()
            missing = [each for each in self._members if each.link is None]
            linked = [each.link for each in self._members if each.link is not None]
        if not linked:
            raise self._none_answers()
        self.settings = linked[0].settings | {"address": self.address}
        if missing:
            causes = "; ".join(str(each.error or f"{each.address} has not answered yet") for each in missing)
            warn(
                f"{len(missing)} of {len(missing) + len(linked)} servers cannot be used: {causes}. The client uses the other "
                "servers, and looks for these again"
            )

    def close(self) -> None:
        """End all connections."""
        if os.getpid() != self.owner:  # The connections belong to the parent process, as may a lock.
            self._forgotten = True
            return
        with self._changed:
            self._closed.set()
            links, self._links = self._links, []
            self._changed.notify_all()
        for link in links:
            link.close()

    def members(self) -> list[Member]:
        """Return the members at the moment."""
        with self._changed:
            return list(self._members)

    def limit(self, server: server_pb2.GetServerResponse) -> None:
        """Lower what a server can do to what every member can do.

        Members differ while they are upgraded one after the other.
        """
        with self._changed:
            all_facts = [each.server for each in self._links]
        server.max_block_width = self.widest
        server.stablehlo_version = min((each.stablehlo_version for each in all_facts), key=_version, default="")
        server.krylov_runs = all(each.krylov_runs for each in all_facts)

    # The choice

    def choose(self, digest: str) -> tuple[Member, bool]:
        """Return the member for an objective, and whether it is neither away nor full.

        Args:
            digest: Digest of the objective; empty for calls about no objective.
        """
        self._resolve()
        now = self._clock()
        with self._changed:
            found = [(self._readiness(each, digest, now), each) for each in self._order(digest)]
        best, member = min(
            found, key=lambda each: (each[0], each[1].absence.until if each[0] is _Readiness.AWAY else 0.0)
        )
        return member, best is _Readiness.FREE

    def leave(self, member: Member, digest: str, failure: Failure) -> bool:
        """Note a failure of a member. Return whether its callers should leave it.

        Args:
            member: The member that failed.
            digest: Digest of the objective that the call was about, or empty.
            failure: The failure.
        """
        now = self._clock()
        if _is_full(failure, digest):
            with self._changed:
                if len(self._full) > _MOST_OBJECTIVES:
                    self._full = {key: each for key, each in self._full.items() if not each.over(now)}
                self._full.setdefault((digest, member.address), Absence(*_FULL)).begin(now)
            _log.info("%s is full for %s: %s", member.address, digest[:12], failure.reason or failure.message)
            return True
        if failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED or not is_transient(failure):
            return False
        if not member.away and failure.reason not in _LEAVING_REASONS and _serves(member.linked):
            return False  # Only a connection broke.
        with self._changed:
            was, member.away = member.away, True
            member.absence.begin(now)
        if not was:
            _log.info("%s is away: %s", member.address, failure.reason or failure.message)
            self._watch(member)
        return True

    def answered(self, member: Member) -> None:
        """Note that a member answers which was away."""
        with self._changed:
            member.away = False

    def _readiness(self, member: Member, digest: str, now: float) -> _Readiness:
        if member.away:
            return _Readiness.DUE if member.absence.over(now) else _Readiness.AWAY
        full = self._full.get((digest, member.address))
        return _Readiness.FREE if full is None or full.over(now) else _Readiness.FULL

    def _order(self, digest: str) -> list[Member]:
        """Return the members that have answered, the best for an objective first."""
        found = self._orders.get(digest)
        if found is None:
            if len(self._orders) >= _MOST_OBJECTIVES:
                self._orders.clear()
            members = [each for each in self._members if each.link is not None]
            servers = [each.linked.server for each in members]
            ids = [each.id[:_ID_LENGTH] for each in servers]
            # Machines that were copied can have one id. Then their addresses count.
            names = [
                id_ if id_ and ids.count(id_) == 1 else member.address for member, id_ in zip(members, ids, strict=True)
            ]
            keys = np.array([placement.key(name) for name in names])
            weights = np.array([min(max(each.device_count, 1), _MOST_WEIGHT) for each in servers], float)
            found = self._orders[digest] = [members[place] for place in placement.order(digest, keys, weights)]
        return found

    # The members

    def _join(self, addresses: Sequence[str]) -> None:
        """Take these addresses as the members. Connect to the new ones."""
        with self._changed:
            known = {each.address: each for each in self._members}
            new = [Member(address) for address in addresses if address not in known]
            kept = [known[address] for address in addresses if address in known]
            if not new and len(kept) == len(self._members):
                return
            if not any(each.link for each in kept) and self._links:
                kept = self._members  # A client keeps what works until something else does.
            self._former += [each for each in self._members if each not in kept and each.link is not None]
            self._members = kept + new
            self._orders.clear()
        for member in new:
            self._watch(member)

    def _resolve(self) -> None:
        """Look up the name again from time to time, in the background."""
        now = self._clock()
        with self._changed:
            due = self._resolves and not self._resolving and now - self._resolved > _RESOLVE_SECONDS
            if due:
                self._resolving, self._resolved = True, now
        if due:
            try:
                threading.Thread(target=_look_up, args=(weakref.ref(self),), name="hvpd-fleet", daemon=True).start()
            except RuntimeError:  # The system has no more threads. Look up the name the next time.
                self._resolving = False

    def look_up(self) -> None:
        """Look up the name, and take its addresses as the members."""
        try:
            self._join(self._addresses())
        except OSError as error:
            _log.info("%s has no address at the moment: %s", self.address, error)
        finally:
            self._end_former()
            self._resolving = False

    def _end_former(self) -> None:
        """End the connections to members that left, and that no point uses any more."""
        for member in list(self._former):
            if not member.away and not _serves(member.linked):
                with self._changed:
                    member.away = True
                    member.absence.begin(self._clock())
            if member.away and self._clock() > member.absence.until + _KEPT_SECONDS:
                with self._changed:
                    self._former.remove(member)
                    self._links = [link for link in self._links if link is not member.link]
                member.linked.close()

    def _watch(self, member: Member) -> None:
        """Look for a member in the background until it answers."""
        with self._changed:
            if member.watched:
                return
            member.watched = True
        arguments = (weakref.ref(self), member, self._closed, self.pause(member))
        try:
            threading.Thread(target=_look_for, args=arguments, name="hvpd-fleet", daemon=True).start()
        except RuntimeError:  # The system has no more threads.
            member.watched = False

    def found(self, member: Member) -> bool:
        """Look for a member once. Return whether there is nothing left to look for."""
        with self._changed:
            if self.closed or member not in self._members or not (member.away or member.link is None):
                member.watched = False
                return True
        try:
            if member.link is None:
                self._linked(member, self._make(member.address))
            elif not _serves(member.link) or not self._asked(member.link):
                with self._changed:
                    member.absence.begin(self._clock())
                return False
        except Exception as error:  # noqa: BLE001 - `open` reports it; a thread has no caller
            with self._changed:
                # A new error, because the frames of this one would keep the fleet.
                kind, reason = (type(error), error.reason) if isinstance(error, HvpdError) else (HvpdError, "")
                member.error = kind(str(error), reason=reason)
                member.absence.begin(self._clock())
                self._changed.notify_all()
            return False
        with self._changed:
            member.away, member.error, member.watched = False, None, False
            self._orders.clear()
            self.widest = max(min((each.server.max_block_width for each in self._links), default=1), 1)
            self._changed.notify_all()
        _log.info("%s is there", member.address)
        return True

    def pause(self, member: Member) -> float:
        """Return the seconds after which a member is looked for again."""
        return max(member.absence.until - self._clock(), 0.0)

    def _linked(self, member: Member, link: Transport) -> None:
        """Keep a new connection."""
        with self._changed:
            closed = self.closed
            if not closed:
                member.link = link
                self._links.append(link)
        if closed:
            link.close()

    def _asked(self, link: Transport) -> bool:
        """Ask a member for its facts, which a restart can change."""
        channel = link.channel
        server = link.ask_once(channel.server.GetServer, server_pb2.GetServerRequest())
        if server is not None:
            link.restarted(server)
        return server is not None

    def _raise_wrong_argument(self) -> None:
        for each in self._members:
            if isinstance(each.error, InvalidArgumentError):
                raise each.error

    def _none_answers(self) -> HvpdError:
        """Return the error of a fleet without a member that answers."""
        errors = [each.error for each in self._members if each.error is not None]
        if not errors:
            return UnavailableError(f"{self.address} names no server")
        # An answer that refuses says more than no answer.
        worst = next((each for each in errors if not isinstance(each, UnavailableError)), errors[0])
        return type(worst)(
            f"none of the {len(errors)} servers can be used: {'; '.join(map(str, errors))}", reason=worst.reason
        )


def _look_up(ref: "weakref.ref[Fleet]") -> None:
    fleet = ref()
    if fleet is not None:
        fleet.look_up()


def _look_for(ref: "weakref.ref[Fleet]", member: Member, closed: threading.Event, pause: float) -> None:
    """Look for a member until it answers, or the fleet is gone."""
    while not closed.wait(pause):
        fleet = ref()
        if fleet is None or fleet.found(member):
            return
        pause = fleet.pause(member)
        del fleet  # So that a client which is not closed can end.


def _version(text: str) -> tuple[int, ...]:
    """Return a version such as "1.17.0" as numbers; none for anything else."""
    parts = text.split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() and len(part) < 10 for part in parts) else ()


def _is_full(failure: Failure, digest: str) -> bool:
    """Return whether another member may do what this one cannot."""
    if failure.reason == "OBJECTIVE_NOT_FOUND":
        return bool(digest)
    if failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED and not failure.reason:
        return is_transient(failure)  # gRPC's own limit of calls.
    return failure.reason in _FULL_REASONS


def _serves(link: Transport) -> bool:
    """Return whether a server says that it is SERVING."""
    try:
        answer = link.channel.check_health(b"", metadata=link.channel.metadata, timeout=_LOOK_SECONDS)
    except (grpc.RpcError, ValueError):  # ValueError: the channel was closed meanwhile.
        return False
    return answer == SERVING
