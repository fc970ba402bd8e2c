"""A connection as the user holds it: register, find, list, delete, operate."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from hvpd import _html, _text
from hvpd._arguments import name_or_digest
from hvpd._errors import HvpdError
from hvpd._listing import Listing, listed
from hvpd._naming import deleted, renamed
from hvpd._objective import Objective
from hvpd._registrar import Registrar
from hvpd._transport.statistics import Statistics
from hvpd._transport.transport import Transport
from hvpd._usage import Usage, usages
from hvpd.v1 import blob_pb2, objective_pb2, server_pb2


class Client(Registrar):
    """A connection to a server; also a context manager.

    Made by `hvpd.connect` and `hvpd.local`. Threads may share it. Calls survive a
    restart of the server.

    Attributes:
        address: "host:port" of the server, or the addresses of all servers.

    Example:
        >>> with hvpd.connect("gpu-box:7070") as client:
        ...     objective = client.objective("demo/logistic")
    """

    def __init__(self, transport: Transport, on_close: Callable[[], None] = lambda: None) -> None:
        super().__init__(transport)
        self._on_close = on_close
        self.address: str = transport.address

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        server = self._transport.server
        facts = f"hvpd {server.version} at {self.address}, {server.platform} ({server.device_kind})"
        return f"<Client of {_text.printable(facts)}>"

    def _repr_html_(self) -> str:
        server = self._transport.server
        facts = {
            "server": f"hvpd {server.version}, jax {server.jax_version}",
            "address": self.address,
            "device": f"{server.device_count or 1} x {server.device_kind} ({server.platform})",
        }
        return _html.facts("Client", facts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return this object: copies of estimators and of settings share it."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return self._transport.client_again, (self._transport.settings,)

    def close(self) -> None:
        """End the connection, and the server if it is an embedded one.

        Example:
            >>> client = hvpd.local()
            >>> client.close()
        """
        for watch in self._watches.values():
            if watch.used and not watch.over:
                watch.look(now=True)
        self._transport.close()
        self._on_close()

    @property
    def server(self) -> server_pb2.GetServerResponse:
        """Return the server's description of itself when this client connected.

        Of several servers, it describes one, with limits that all of them meet.

        Example:
            >>> client.server.version, client.server.platform
        """
        return self._transport.server

    def statistics(self) -> Statistics:
        """Return the counts of this client's products so far.

        Example:
            >>> client.statistics().mean_batch_width
        """
        return self._transport.statistics()

    def objective(self, name: str) -> Objective:
        """Return the objective with a name or digest. Needs no jax.

        On a server with tenants, `name` is the tenant's own objective. `tenant/name` is
        a shared objective of another tenant.

        Raises:
            NotFoundError: There is none; the message suggests similar names.

        Example:
            >>> objective = client.objective("demo/logistic")
        """
        request = objective_pb2.GetObjectiveRequest(name=name_or_digest(name))
        return self._objective(
            self._transport.unary(self._transport.channel.objectives.GetObjective, request).objective
        )

    def objectives(self) -> list[Listing]:
        """Return all objectives, sorted by name, those without a name last.

        Example:
            >>> [listing.name for listing in client.objectives()]
        """
        return listed(self._transport)

    def delete(self, name: str) -> bool:
        """Delete a name of an objective, and with its last name the objective.

        The server then also deletes its points, and blobs that nothing else needs.

        Args:
            name: A name, or a digest for all names of the objective. On a server with
                tenants, they must be the tenant's own.

        Returns:
            Whether the objective is gone. It stays if it has other names. A tenant does
            not learn whether others have registered it too.

        Raises:
            NotFoundError: There is none.
            AccessError: It belongs to another tenant (reason `NOT_YOURS`), or the token
                lacks the right `publish`.

        Example:
            >>> client.delete("demo/logistic")
        """
        return deleted(self._transport, name_or_digest(name))

    def prune(self, tenant: str = "") -> int:
        """Delete stored blobs of the tenant that no objective or resident point needs.

        Finished solves leave such blobs. Blobs younger than an hour stay. If a client
        needs a deleted blob again, the client uploads it again.

        Args:
            tenant: Another tenant, for tokens with the right `administer`; empty for
                the token's own tenant.

        Returns:
            Bytes that do not belong to the tenant any more.

        Example:
            >>> freed = client.prune()
        """
        response: blob_pb2.PruneBlobsResponse
        response = self._transport.unary(self._transport.channel.prune_blobs, blob_pb2.PruneBlobsRequest(tenant=tenant))
        return response.pruned_bytes

    def usage(self) -> Usage:
        """Return the limits and the usage of this tenant.

        Example:
            >>> client.usage().stored_bytes
        """
        found = usages(self._transport)
        if len(found) != 1:
            raise HvpdError(
                f"the server at {self.address} returned the usage of {len(found)} tenants instead of one",
                reason="BAD_ANSWER",
            )
        return found[0]

    def usages(self) -> list[Usage]:
        """Return the limits and the usage of all tenants, by name.

        The token needs the right `administer`.

        Example:
            >>> [usage.tenant for usage in client.usages()]
        """
        return usages(self._transport, all_tenants=True)

    def load(self) -> server_pb2.GetLoadResponse:
        """Return the server's counts since its start, and its load at the moment.

        The token needs the right `administer`.

        Raises:
            AccessError: The token lacks the right.
            IncompatibleError: The server is older.

        Example:
            >>> before = client.load()
            >>> client.load().products - before.products
        """
        request = server_pb2.GetLoadRequest()
        response: server_pb2.GetLoadResponse = self._transport.unary(self._transport.channel.server.GetLoad, request)
        return response

    def loads(self) -> dict[str, server_pb2.GetLoadResponse | None]:
        """Return the counts of each server by its address, as `load` does for one.

        None stands for a server that does not answer within a second.

        Raises:
            HvpdError: No server answers; as `load`.

        Example:
            >>> [address for address, load in client.loads().items() if load is None]
        """
        request, found = server_pb2.GetLoadRequest(), dict[str, server_pb2.GetLoadResponse | None]()
        for address, link in self._transport.each().items():
            found[address] = None if link is None else link.ask_once(link.channel.server.GetLoad, request)
        if not any(found.values()):
            self.load()  # Its error says why.
        return found

    def rename(self, name: str, new: str) -> Objective:
        """Give an objective another name; return the objective.

        This is like `register` under the new name, then `delete` of the old name. It
        needs no function. The new name points at the objective before the old name is
        deleted.

        Args:
            name: The name.
            new: The new name.

        Raises:
            NotFoundError: There is no objective with this name.
            InvalidArgumentError: `new` is the name of another objective (reason
                `NAME_TAKEN`).
            AccessError: It belongs to another tenant (reason `NOT_YOURS`), or the token
                lacks the right `publish`.

        Example:
            >>> client.rename("digits/mlp", "digits/mlp-2026")
        """
        return self._objective(renamed(self._transport, name_or_digest(name), name_or_digest(new)))

    def release(self, name: str) -> int:
        """Release an objective from quarantine.

        The server quarantines an objective that ended the server too often.

        The token needs the right `administer`.

        Args:
            name: Name or digest of the objective.

        Returns:
            How many times the objective had ended the server.

        Example:
            >>> client.release("demo/logistic")
        """
        request = objective_pb2.ReleaseObjectiveRequest(name=name_or_digest(name))
        return self._transport.unary(self._transport.channel.objectives.ReleaseObjective, request).strikes
