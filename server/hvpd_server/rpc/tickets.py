"""Tickets of the vector port: each lets one connection in, for a short time."""

import collections
import itertools
import secrets
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from hvpd._wire import vector_protocol
from hvpd_server.rpc.call_context import Caller

TICKET_SECONDS = 30
"""Seconds until a ticket expires."""

_TICKETS = 64
"""Most unused tickets of one tenant. One ticket more voids the tenant's oldest."""

_ALL_TICKETS = 4096
"""Most unused tickets of all tenants. One ticket more voids the oldest."""


class Ticket(NamedTuple):
    """Lets one connection in."""

    id: bytes
    server_proof: bytes
    client_proof: bytes
    caller: Caller | None
    """The token of the call that made the ticket; None if the server asks for no
    tokens.
    """
    tenant: str
    """The tenant that the connection's products count for."""
    peer: str
    """The client's end of the call that made the ticket, as gRPC writes it."""
    request_id: str
    """The request id of that call. The connection has the same id."""
    expires: float
    """When the ticket expires, on time.monotonic's clock."""


class Tickets:
    """The unused tickets."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._unused: collections.OrderedDict[bytes, Ticket] = collections.OrderedDict()

    def new(self, caller: Caller | None, tenant: str, peer: str, request_id: str) -> Ticket:
        """Return a new ticket, good for TICKET_SECONDS."""
        now = self._clock()
        identity, server_proof, client_proof = (secrets.token_bytes(vector_protocol.PROOF_BYTES) for _ in range(3))
        expires = now + TICKET_SECONDS
        ticket = Ticket(identity, server_proof, client_proof, caller, tenant, peer, request_id, expires)
        with self._lock:
            expired = itertools.takewhile(lambda each: each.expires <= now, self._unused.values())
            own = [each for each in self._unused.values() if each.tenant == tenant]
            for each in [*expired, *own[: max(len(own) + 1 - _TICKETS, 0)]]:
                self._unused.pop(each.id, None)
            if len(self._unused) >= _ALL_TICKETS:
                self._unused.popitem(last=False)
            self._unused[ticket.id] = ticket
        return ticket

    def use(self, identity: bytes) -> Ticket | None:
        """Take out the ticket of an id. Return None if there is none, or if it has
        expired.
        """
        with self._lock:
            found = self._unused.pop(identity, None)
        return found if found is not None and found.expires > self._clock() else None
