"""The client's connection to its server.

    calls      makes a call, with `retry` for its tries
    channel    has the methods
    creation   sends a point
    exchange   sends products, over a stream or past gRPC

A product takes a stream or a connection for one exchange, and then gives it back. No
other product uses it meanwhile. So threads of one client do not wait for each other,
and a reply never changes threads.
"""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hvpd import _text
from hvpd._errors import HvpdError, InvalidArgumentError
from hvpd._progress import Reporter, Stage
from hvpd._transport import cancellation
from hvpd._transport import tracing as _tracing
from hvpd._transport.address import host_of, is_local
from hvpd._transport.calls import Calls, answer_of
from hvpd._transport.channel import Channel
from hvpd._transport.creation import Creation, PointStream, Step
from hvpd._transport.credentials import Token
from hvpd._transport.exchange import Asked, Exchange
from hvpd._transport.interrupts import OutsideGrpcError
from hvpd._transport.reach import is_proxied
from hvpd._transport.statistics import Statistics
from hvpd._transport.stream import Filling, Stream
from hvpd._transport.stream_pool import StreamPool
from hvpd._transport.tls import Tls
from hvpd._transport.vector_pool import VectorPool, VectorStream
from hvpd._wire import codec, protocol
from hvpd._wire.frames import Frame
from hvpd.v1 import blob_pb2, curvature_pb2, server_pb2

_log = logging.getLogger("hvpd")

SERVING = b"\x08\x01"
"""A grpc.health.v1.HealthCheckResponse with status SERVING, as bytes."""

_MOST_SECONDS = 1e9
"""Most seconds of a timeout that gRPC and the vector port can state: about 30 years."""


class Transport(Calls):
    """A connection to one server.

    Args:
        address: "host:port".
        token: Bearer token of each call; None for none.
        connect_timeout: Seconds to wait for a server at first; see `Channel.greet`.
        retry_timeout: Seconds for which a call is repeated while the server is away.
        timeout: Seconds that one call may take, its retries included; None for no
            limit.
        priority: Priority of all products.
        tls: Certificates to trust and to show; None for plain text.
        insecure: Whether a token may be sent as plain text to another machine.
        reporter: Shows work that takes long.
        server_name: Name in the server's certificate; None for the address's host.

    Attributes:
        channel: The gRPC channel, with the methods that `unary` takes.
        priority: Priority of all products.

    Raises:
        InvalidArgumentError: An argument is not valid, or the token would be sent as
            plain text.
        UnavailableError: No server answers at the address, or client and server
            disagree on TLS.
        IncompatibleError: The server is no hvpd server, or has another protocol.
    """

    def __init__(
        self,
        address: str,
        *,
        token: Token | None,
        connect_timeout: float | None,
        retry_timeout: float,
        timeout: float | None,
        priority: int = 0,
        tls: Tls | None = None,
        insecure: bool = False,
        reporter: Reporter | None = None,
        server_name: str | None = None,
    ) -> None:
        host = host_of(address)
        local = is_local(host)
        if token is not None and tls is None and not insecure and not local:
            raise InvalidArgumentError(
                f"the token would go to {address} as plain text, which every machine on the way can read: pass tls=True, or "
                "ca=FILE with the server's CA, or insecure=True if something else encrypts the connection",
                reason="TOKEN_UNPROTECTED",
            )
        if connect_timeout is not None:
            _check_seconds("connect_timeout", connect_timeout)
        _check_seconds("retry_timeout", retry_timeout, float("inf"))
        if timeout is not None:
            _check_seconds("timeout", timeout)
        _check_priority(priority)
        if tls is not None and server_name is not None:
            tls = dataclasses.replace(tls, server_name=server_name)
        super().__init__(
            address, Channel(address, token, tls, local=local), retry_timeout, timeout, reporter or Reporter()
        )
        self.priority = priority
        self.client_again: Callable[[dict[str, Any]], Any]
        """Makes the client of a pickle from `settings`."""
        self.objective_again: Callable[[dict[str, Any], str], Any]
        """Makes the objective of a pickle from `settings` and its digest."""
        # A pickle keeps these. Tokens, certificates and keys stay in the environment.
        self.settings: dict[str, Any] = {
            "address": address,
            "connect_timeout": connect_timeout,
            "retry_timeout": retry_timeout,
            "timeout": timeout,
            "priority": priority,
            "tls": tls is not None or None,
            "insecure": insecure,
        }
        self._vectors = VectorPool(host, tls, self._ticket, self.channel.is_alive, local=local)
        self._streams = StreamPool(self.channel, lambda: not self._closed and not self._vectors.ready)
        try:
            with self.reporter.stage(f"connecting to {address}"):
                self._server = self.channel.greet(connect_timeout)
        except Exception:
            self.close()
            raise
        _log.info("connected to %s: hvpd %s on %s", address, self.server.version, self.server.device_kind)
        self._direct = not is_proxied(host)
        self.restarted(self._server)

    @property
    def server(self) -> server_pb2.GetServerResponse:
        """Return facts about the server, from the time when this client connected."""
        return self._link()._server  # noqa: SLF001 - of its own kind

    def placed(self, digest: str) -> "Transport":
        """Return the transport for an objective. A fleet has one for each objective."""
        return self

    def staying(self) -> "Transport":
        """Return the transport for a point, which stays at its server."""
        return self

    def each(self) -> "dict[str, Transport | None]":
        """Return the connections by address; None for a server that never answered."""
        return {self.address: self}

    def _link(self) -> "Transport":
        """Return the connection that takes the next call. A fleet has several."""
        return self

    def _widest(self) -> int:
        """Return the most vectors of one product."""
        return max(self.server.max_block_width, 1)

    def restarted(self, server: server_pb2.GetServerResponse) -> None:
        """Take the facts of a server that was started, perhaps again."""
        self._server = server
        self._vectors.offered = self._direct and self._has_vector_port(server)

    def serving(self) -> bool:
        """Return whether the server says, by grpc.health.v1, that it is SERVING."""
        return self.unary(self.channel.check_health, b"") == SERVING

    def close(self) -> None:
        """End all streams and the connection."""
        self._closed = True
        streams = self._streams.forget()
        if os.getpid() != self._owner:  # The channel belongs to the parent process.
            return
        self._vectors.close()
        for stream in streams:
            stream.close()
        self.channel.close()

    def statistics(self) -> Statistics:
        """Return the counts so far."""
        return self._counts.snapshot()

    def _abandon(self) -> None:
        link = self._link()
        link.channel.replace(link._streams.forget())  # noqa: SLF001 - of its own kind

    # Blobs

    def missing(self, digests: Sequence[str]) -> list[str]:
        """Return the digests that the server does not hold.

        Raises:
            HvpdError: The server asks for other blobs.
        """
        request = blob_pb2.FindMissingBlobsRequest(digests=digests)
        missing = set(self.unary(self.channel.find_missing, request).missing_digests)
        if others := missing.difference(digests):
            raise HvpdError(
                f"the server at {self.address} asks for {len(others)} blobs that were not offered: it is no hvpd server",
                reason="BAD_ANSWER",
            )
        return [digest for digest in digests if digest in missing]

    def store(self, contents: Mapping[str, codec.Buffer]) -> None:
        """Upload blobs, by their digests, that the server does not hold."""
        missing = self.missing(list(contents)) if contents else []
        if missing:
            total = sum(memoryview(contents[digest]).nbytes for digest in missing)
            with self.reporter.stage("uploading", total, "B") as stage:
                for digest in missing:
                    self.upload(digest, contents[digest], stage)

    def upload(self, digest: str, content: codec.Buffer, stage: Stage | None = None) -> None:
        """Upload a blob, and count its bytes in a stage."""
        size = memoryview(content).nbytes
        before = stage.done if stage is not None else 0.0

        def messages() -> Iterator[Frame[blob_pb2.UploadBlobRequest]]:
            offset = 0
            for chunk in codec.chunks(content):
                message = blob_pb2.UploadBlobRequest(offset_bytes=offset)
                if offset == 0:
                    message.digest, message.size_bytes = digest, size
                yield Frame(message, chunk)
                offset += len(chunk)
                if stage is not None:
                    stage.done = before + offset

        def attempt(left: float | None) -> None:
            answer_of(self.channel.upload, messages(), metadata, left)

        with self.sending(lambda: "hvpd.v1.BlobService/UploadBlob", digest=digest, size_bytes=size) as call:
            metadata, request_id = call
            self.call(attempt, request_id=request_id)

    # Points and products

    def create_point(
        self,
        spec: curvature_pb2.PointSpec,
        x: codec.Array,
        *,
        step: Step | None = None,
        pin_seconds: int | None = None,
    ) -> tuple[curvature_pb2.Point, codec.Array]:
        """Make a point resident; return it and its gradient of shape (n,)."""
        creation = Creation(spec, x, step, pin_seconds)

        def attempt(left: float | None) -> tuple[curvature_pb2.Point, codec.Array]:
            stream: PointStream = Stream(self.channel.create_point, metadata, left, request_id)
            with cancellation.ending(stream.cancel):
                return creation.attempt(stream)

        facts = {"objective": spec.objective_digest, "n": x.size}
        with (
            self.reporter.stage("making a point"),
            self.sending(lambda: "hvpd.v1.CurvatureService/CreatePoint", **facts) as (metadata, request_id),
        ):
            point, gradient = self.call(attempt)
            if not codec.is_digest(point.id):
                raise HvpdError(
                    f"the server at {self.address} gives a point an id that is no digest", reason="BAD_ANSWER"
                )
        return point, gradient

    def multiply(
        self,
        asked: Asked,
        block: codec.Array,
        *,
        restore: Callable[[], None],
        objective: str = "",
    ) -> codec.Array:
        """Multiply V[k,n] -> HV[k,n], or v'Hv[k] for a quadratic form, in one round
        trip.

        Blocks wider than the server's limit become several products of one exchange.

        Args:
            asked: The operator.
            block: V[k,n].
            restore: Makes the point resident again.
            objective: Digest of the objective, for the span.
        """
        exchange = Exchange(asked, block, limit=self._widest(), priority=self.priority)
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("product of %d vectors of %d to %s", *block.shape, self.address)
        infos: list[curvature_pb2.ProductInfo] = []
        span: _tracing.Span | None = None
        started = time.perf_counter()

        def attempt(left: float | None) -> None:
            if exchange.fits_vector_port and self._attempt_past(exchange, left, infos.append, span):
                return
            streams = self._link()._streams  # noqa: SLF001 - of its own kind
            with streams.take(left) as stream, cancellation.ending(stream.cancel):
                refused = exchange.attempt(stream, infos.append, span)
            if refused is not None:
                raise refused

        try:
            if self._tracing is None:
                self.call(attempt, restore=restore)
            else:
                with self._product_span(self._tracing, asked, block, objective) as span:
                    self.call(attempt, restore=restore)
        except BaseException:
            if infos:
                self._counts.add_products(infos)
            raise
        self._counts.add_products(infos, len(block), time.perf_counter() - started)
        return exchange.result

    def _attempt_past(
        self,
        exchange: Exchange,
        left: float | None,
        on_info: Callable[[curvature_pb2.ProductInfo], None],
        span: _tracing.Span | None,
    ) -> bool:
        """Try once past gRPC; return False if there is no connection at the moment."""
        past: VectorStream | None = None
        link = self._link()
        vectors, streams = link._vectors, link._streams  # noqa: SLF001 - of its own kind
        try:
            past = vectors.take()
            if past is None:
                return False
            with cancellation.ending(past.interrupt):
                refused = exchange.attempt_past(past, left, on_info, span)
        except Exception:  # Answers may still arrive on this connection.
            if past is not None:
                past.close()
            raise
        except BaseException as error:  # noqa: BLE001 - raised again by `_try`
            if past is not None:
                past.close()
            vectors.replace()
            raise OutsideGrpcError(error) from None
        vectors.give_back(past)
        streams.end_idle()
        if refused is not None:
            raise refused
        return True

    @staticmethod
    def _product_span(
        tracing: _tracing.Tracing, asked: Asked, block: codec.Array, objective: str
    ) -> "contextlib.AbstractContextManager[_tracing.Span]":
        """Make a span around all tries of a product."""
        facts = {
            "objective": objective,
            "operator": curvature_pb2.Operator.Name(asked.operator).removeprefix("OPERATOR_").lower(),  # type: ignore[arg-type]  # an open enum
            "n": block.shape[1],
            "k": len(block),
        }
        return tracing.call(_tracing.PRODUCTS, name="hvpd.product", **facts)

    def factors(
        self,
        request: curvature_pb2.ComputeFactorsRequest,
        sizes: Sequence[int],
        dtype: "np.dtype[Any]",
        *,
        restore: Callable[[], None],
    ) -> list[codec.Array]:
        """Return the Kronecker factors at a point: square matrices of these sizes."""

        def attempt(left: float | None) -> list[codec.Array]:
            try:
                found = Filling((sum(size**2 for size in sizes),), dtype, empty=len(sizes))
            except (MemoryError, ValueError):  # numpy raises ValueError above the address space.
                raise HvpdError(
                    f"the Kronecker factors are square matrices of {', '.join(map(str, sizes[:8]))}{', ...' * (len(sizes) > 8)} rows, "
                    "and this machine has too little memory for them",
                    reason="CLIENT_MEMORY",
                ) from None
            for _, chunk in self.channel.compute_factors(request, metadata=metadata, timeout=left):
                found.append(chunk)
            if not found.complete:
                raise HvpdError(
                    f"the server at {self.address} sent fewer Kronecker factors than the objective has",
                    reason="BAD_ANSWER",
                )
            parts = np.split(found.array, np.cumsum([size**2 for size in sizes])[:-1])
            return [part.reshape(size, size) for part, size in zip(parts, sizes, strict=True)]

        with self.sending(lambda: _tracing.method_of(request)) as (metadata, request_id):
            return self.call(attempt, restore=restore, request_id=request_id)

    # The vector port

    def _ticket(self, seconds: float) -> tuple[curvature_pb2.CreateVectorTicketResponse, str]:
        """Ask for a ticket of the vector port; return it and the id of the call.

        The call is not repeated, because products go over streams without a ticket.

        Raises:
            ConnectionError: The ticket is for another port than the server states now.
                A restarted server may have another port than before.
        """
        metadata, request_id = self.channel.new_call()
        server = self.channel.server.GetServer(
            server_pb2.GetServerRequest(), metadata=self.channel.metadata, timeout=seconds
        )
        request = curvature_pb2.CreateVectorTicketRequest()
        ticket: curvature_pb2.CreateVectorTicketResponse
        ticket = self.channel.create_vector_ticket(request, metadata=metadata, timeout=seconds)
        unanswered = None in (server, ticket)  # gRPC returns None for a call that ended well without an answer.
        if unanswered or not self._has_vector_port(server) or ticket.port != server.vector_port:
            raise ConnectionError("the ticket is not for the vector port that the server states")
        return ticket, request_id

    def by_unix_socket(self) -> bool:
        """Return whether products can go over the server's Unix socket."""
        return self._link()._vectors.by_unix_socket()  # noqa: SLF001 - of its own kind

    def _has_vector_port(self, server: server_pb2.GetServerResponse) -> bool:
        """Return whether the client may connect to the vector port.

        It may not if the client's address has another port than the server's own. Then
        there is a tunnel or a proxy, which products must not bypass.
        """
        return 0 < server.vector_port < 1 << 16 and self.address.endswith(f":{server.port}")


def _check_seconds(name: str, seconds: object, most: float = _MOST_SECONDS) -> None:
    if not isinstance(seconds, int | float) or not 0 <= seconds <= most:
        raise InvalidArgumentError(
            f"{name} must be a number of seconds from 0 to {most:g}, got {_text.described(seconds)}",
            reason="INVALID_OPTION",
        )


def _check_priority(priority: object) -> None:
    most = protocol.MAX_PRIORITY
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > most:
        raise InvalidArgumentError(
            f"priority must be a whole number from -{most} to {most}, got {_text.described(priority)}",
            reason="PRIORITY",
        )
