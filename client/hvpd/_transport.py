"""Every call to the server goes through here: one channel, one retry rule, one place where errors become hvpd's.

A product takes a stream out of a pool, has it to itself for one exchange, and puts it back: threads of one client do not wait
for each other, and a reply never changes threads.
"""

import contextlib
import dataclasses
import ipaddress
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import grpc
import numpy as np

from hvpd import _codec, _frames, _protocol, _request_id, _tracing
from hvpd._errors import (
    Failure,
    HvpdError,
    IncompatibleError,
    InvalidArgumentError,
    UnavailableError,
    failure_of_rpc,
    to_error,
)
from hvpd._exchange import Asked, Exchange, ProductStream
from hvpd._frames import Frame
from hvpd._stream import Filling, RpcFailure, Stream, never_free
from hvpd._tls import Tls, diagnose
from hvpd._vector_pool import VectorPool, VectorStream
from hvpd._version import __version__
from hvpd.v1 import (
    blob_pb2,
    curvature_pb2,
    objective_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

_T = TypeVar("_T")

_SERVING = b"\x08\x01"
"""A grpc.health.v1.HealthCheckResponse with status SERVING; its package is none of a client's."""

_INLINE_BYTES = 64 << 10
"""Points up to this size send x with the question whether it is resident."""

_PATIENCE = 0.5
"""Seconds without an answer after which a client looks whether it is understood at all."""

_ALIVE = 10.0
"""Seconds within which a server that is there says so."""

_PAUSE = 0.02
"""Seconds before a call is repeated for the first time."""

_AT_WORK = 2.0
"""Seconds after which the server was at a call that was cut off; one that cannot be reached says so sooner."""

_TOKEN_LENGTH = 4096
"""Most characters of a token: gRPC has room for 8 KiB of metadata."""

_CODE = grpc.StatusCode


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a client's products were, since it connected. Durations are sums, in seconds."""

    products: int = 0
    """Products answered, of calls that have ended: a wide block may be several."""
    vectors: int = 0
    """Vectors multiplied."""
    seconds: float = 0.0
    """From call to result."""
    queue_seconds: float = 0.0
    """Of these, waiting for the device."""
    compute_seconds: float = 0.0
    """Of these, on the device."""
    launched_vectors: int = 0
    """Sum over products of the vectors in the launch, of all clients."""
    retries: int = 0
    """Calls repeated because the server was away, busy, or had forgotten a point."""

    def __sub__(self, earlier: "Statistics") -> "Statistics":
        """What came between two snapshots."""
        return Statistics(*(getattr(self, f.name) - getattr(earlier, f.name) for f in dataclasses.fields(self)))

    @property
    def mean_batch_width(self) -> float:
        """Vectors in the launch of a product, of all clients, on average."""
        return self.launched_vectors / self.products if self.products else 0.0


@dataclasses.dataclass(frozen=True)
class Step:
    """How a point comes about from one that the server may hold: x = base.x + alpha * direction."""

    base_id: str
    """Point.id of the base."""
    alpha: float
    """In the objective's dtype."""
    direction: _codec.Array
    """Of shape (n,), in the objective's dtype."""

    @property
    def message(self) -> curvature_pb2.Move:
        """As it goes over the wire."""
        digest = _codec.digest(_codec.payload(self.direction))
        return curvature_pb2.Move(base_id=self.base_id, alpha=self.alpha, direction_digest=digest)


class _Interrupted(BaseException):
    """An interrupt that struck outside of gRPC.

    Args:
        by: What it was.
    """

    def __init__(self, by: BaseException) -> None:
        super().__init__()
        self.by = by


class Transport:
    """A connection to one server.

    Args:
        address: "host:port".
        token: Sent as a bearer token, where given.
        connect_timeout: Seconds to wait for a server at first.
        retry_timeout: Seconds for which a call is repeated while the server is away.
        timeout: Seconds that one call may take, its retries included; None: as long as it takes.
        priority: Of all products.
        tls: What to encrypt with; None: speak plain text.
        insecure: Whether a token may be sent as plain text to another machine.

    Raises:
        InvalidArgumentError: An argument is not what it must be, or the token would be sent for everybody to read.
        UnavailableError: Nothing answers at the address, or not as asked, over TLS or without.
        IncompatibleError: What answers is no hvpd server, or one of another protocol.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None,
        connect_timeout: float,
        retry_timeout: float,
        timeout: float | None,
        priority: int = 0,
        tls: Tls | None = None,
        insecure: bool = False,
    ) -> None:
        host = _host(address)
        _check_token(token)
        if token is not None and tls is None and not insecure and not _is_local(host):
            raise InvalidArgumentError(
                f"a token would go to {address} as plain text, for everybody on the way to read: say tls=True, or ca=FILE with the "
                "server's CA; or insecure=True, where something else encrypts what is sent"
            )
        _check_seconds("connect_timeout", connect_timeout)
        _check_seconds("retry_timeout", retry_timeout)
        if timeout is not None:
            _check_seconds("timeout", timeout)
        _check_priority(priority)
        self.address = address
        self._retry_timeout = retry_timeout
        self._timeout = timeout
        self._priority = priority
        credentials = () if token is None else (("authorization", f"Bearer {token}"),)
        identity = ((_protocol.VERSION_KEY, __version__), *credentials)
        self._metadata: tuple[tuple[str, str | bytes], ...] = (
            (_protocol.REVISION_KEY, str(_protocol.NEWEST)),
            *identity,
        )
        self._local = _is_local(host)
        self._restoring = (
            threading.local()
        )  # `ends`: when the call must end for which this thread makes a point again, if it does.
        self._tls = tls
        self._tracing = _tracing.of(address)
        self._owner = os.getpid()
        self._streams: list[ProductStream] = []
        self._lock = threading.Lock()
        self._counts: dict[str, Any] = dataclasses.asdict(Statistics())
        self._vectors = VectorPool(host, tls, self._ticket, self._alive)
        self._closed = False
        self._open_channel()
        try:
            self.server = self._handshake(connect_timeout)
        except Exception:
            self.close()
            raise
        self._widest = max(self.server.max_block_width, 1)
        self._vectors.offered = self._has_vector_port(self.server) and not self._proxied(host)

    def _open_channel(self) -> None:
        options = [
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.min_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            # A dead network is noticed within half a minute, also while a product computes.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.max_send_message_length", 4 << 20),
            ("grpc.max_receive_message_length", 4 << 20),
            # A channel of its own, and none that an interrupt has left behind (see `_abandon`).
            ("grpc.use_local_subchannel_pool", 1),
            *([("grpc.enable_http_proxy", 0)] if self._local else []),
        ]
        if self._tls is None:
            self._channel = grpc.insecure_channel(self.address, options)
        else:
            self._channel = grpc.secure_channel(self.address, self._tls.credentials, options)
        self._find_missing = _call(self._channel, blob_pb2, "FindMissingBlobs")
        self._upload = _call(self._channel, blob_pb2, "UploadBlob")
        self._create_point = _call(self._channel, curvature_pb2, "CreatePoint")
        self._stream_products = _call(self._channel, curvature_pb2, "StreamProducts")
        self._create_vector_ticket = _call(self._channel, curvature_pb2, "CreateVectorTicket")
        self._compute_factors = _call(self._channel, curvature_pb2, "ComputeFactors")
        self.prune_blobs = _call(self._channel, blob_pb2, "PruneBlobs")
        self.get_usage = _call(self._channel, server_pb2, "GetUsage")
        self.objectives = objective_pb2_grpc.ObjectiveServiceStub(self._channel)

    def _abandon(self) -> None:
        """Leaves the channel as it is and opens another.

        An interrupt (Ctrl-C) can strike while gRPC holds its locks, and then whoever touches that channel again, be it to cancel
        or to close, may wait for ever. Calls of other threads go on with it.
        """
        with self._lock:
            never_free((self._channel, self._streams))
            self._streams = []
            self._open_channel()

    def _handshake(self, connect_timeout: float) -> server_pb2.GetServerResponse:
        try:
            server = self._get_server(connect_timeout)
        except grpc.RpcError as error:
            failure = failure_of_rpc(error)
            if failure.code in (_CODE.DEADLINE_EXCEEDED, _CODE.UNAVAILABLE):
                raise UnavailableError(
                    f"no hvpd server answers at {self.address} (waited {connect_timeout:g} s): is it running there "
                    "(`hvpd serve`), and is the address right (argument, or $HVPD_ADDRESS)?"
                ) from None
            raise to_error(failure, self.address) from None
        self._answered(server)
        if not server.min_protocol <= _protocol.NEWEST or not server.max_protocol >= _protocol.OLDEST:
            raise IncompatibleError(
                f"the server at {self.address} (hvpd {server.version}) speaks protocol {server.min_protocol} to "
                f"{server.max_protocol}, this client (hvpd {__version__}) {_protocol.OLDEST} to {_protocol.NEWEST}: "
                "install the same version on both",
                reason="PROTOCOL_MISMATCH",
            )
        # The revision that both know: an older server is spoken to in its own.
        revision = str(min(_protocol.NEWEST, server.max_protocol))
        self._metadata = ((_protocol.REVISION_KEY, revision), *self._metadata[1:])
        return server

    def _get_server(self, connect_timeout: float) -> server_pb2.GetServerResponse:
        """Asks what the server is, and while it does not answer finds out whether it is there and speaks otherwise.

        Raises:
            UnavailableError: It does.
            grpc.RpcError: No answer, for another reason.
        """
        ends, patience = time.monotonic() + connect_timeout, min(_PATIENCE, connect_timeout / 2)
        asked = server_pb2_grpc.ServerServiceStub(self._channel).GetServer.future(
            server_pb2.GetServerRequest(),
            metadata=(*self._metadata, (_request_id.KEY, _request_id.new())),
            timeout=connect_timeout,
            wait_for_ready=True,
        )
        while True:
            # gRPC would try again and again, and say at the end that time is over.
            left = ends - time.monotonic()
            try:
                answer: server_pb2.GetServerResponse = asked.result(timeout=patience if left > patience else None)
            except grpc.FutureTimeoutError:
                why = diagnose(self.address, self._tls, min(1.0, max(left, 0.1)))
                if why is not None and not asked.done():
                    asked.cancel()
                    raise UnavailableError(f"no connection to {self.address}: {why}", reason="TLS") from None
            else:
                return answer

    def serving(self) -> bool:
        """Whether the server says, by grpc.health.v1, that it is SERVING."""
        check: Callable[..., bytes] = self._channel.unary_unary("/grpc.health.v1.Health/Check")
        return self.unary(check, b"") == _SERVING

    def close(self) -> None:
        """Ends all streams and the connection."""
        with self._lock:
            self._closed = True
            streams, self._streams = self._streams, []
        if os.getpid() != self._owner:  # The channel is the parent's.
            return
        self._vectors.close()
        for stream in streams:
            stream.close()
        self._channel.close()

    def statistics(self) -> Statistics:
        """Counts so far."""
        with self._lock:
            return Statistics(**self._counts)

    # One call

    def call(
        self,
        attempt: Callable[[float | None], _T],
        *,
        restore: Callable[[], None] | None = None,
        request_id: str = "",
    ) -> _T:
        """Runs `attempt(seconds left)` until it succeeds; repeats what can be repeated. Everything on this wire can.

        All tries of a call have one id: it is what the user quotes, and the server's log has a line for each of them. A product
        goes as one of many over a stream; its id is the stream's and its tag, and each try has another.

        Args:
            attempt: One try; raises grpc.RpcError or RpcFailure.
            restore: Makes the point resident again, when the server has forgotten it: by calls of its own, within the time of this one.
            request_id: What it is sent with; empty where a stream knows.

        Raises:
            HvpdError: The attempt failed for good, or for longer than the retry timeout.
        """
        started = time.monotonic()
        ends = float("inf")
        if self._timeout is not None:
            ends = min(started + self._timeout, getattr(self._restoring, "ends", ends))
        gives_up: float | None = None
        pause, cut = _PAUSE, 0
        while True:
            tried = time.monotonic()
            left = None if self._timeout is None else max(ends - tried, 0.001)
            try:
                return self._try(attempt, left, request_id)
            except RpcFailure as error:
                failure = error.failure
                if error.progress:  # What is left has not failed yet.
                    gives_up, pause = None, _PAUSE
            now = time.monotonic()
            cut += failure.code is _CODE.UNAVAILABLE and now - tried > _AT_WORK
            # Counted from the first failure: a product may have been under way for longer than that.
            gives_up = gives_up or min(now + self._retry_timeout, ends)
            if failure.reason == "POINT_NOT_RESIDENT" and restore is not None:
                if now < gives_up:
                    self._repeats(failure)
                    try:
                        self._restoring.ends = ends
                        restore()
                    finally:  # Also where an interrupt comes first: a time that is over would end all later calls.
                        self._restoring.ends = float("inf")
                    continue
                failure = dataclasses.replace(
                    failure,
                    code=_CODE.DEADLINE_EXCEEDED if now >= ends else _CODE.RESOURCE_EXHAUSTED,
                    message=f"the server at {self.address} forgot the point as often as it was made again, for "
                    f"retry_timeout={self._retry_timeout:g} s: it has too little memory for all that is asked of it",
                )
            wait = failure.retry_after if failure.retry_after is not None else pause
            if failure.code is _CODE.DEADLINE_EXCEEDED and self._timeout is not None:
                failure = dataclasses.replace(
                    failure, message=f"the server at {self.address} did not answer within timeout={self._timeout:g} s"
                )
            if not _is_transient(failure) or now + wait > gives_up:
                if self._tracing is not None:
                    self._tracing.failed(failure)
                raise to_error(_with_hint(failure, cut), self.address)
            self._repeats(failure)
            time.sleep(wait * random.uniform(1.0, 1.3))  # noqa: S311 - spreads the retries of many clients
            pause = min(2 * pause, 1.0)

    def _try(self, attempt: Callable[[float | None], _T], left: float | None, request_id: str) -> _T:
        """One try; raises RpcFailure where the server, or the way there, did not let it succeed."""
        before = sys.exc_info()[1]
        try:
            self._check_usable()
            return attempt(left)
        except grpc.RpcError as error:
            raise RpcFailure(failure_of_rpc(error).sent_as(request_id)) from None
        except (RpcFailure, HvpdError):
            raise
        except _Interrupted as error:
            raise error.by from None
        except Exception as error:
            interrupt = _interrupt(error, before)
            if interrupt is None:
                raise
            self._abandon()
            raise interrupt from None
        except BaseException:
            self._abandon()
            raise

    def _repeats(self, failure: Failure) -> None:
        with self._lock:
            self._counts["retries"] += 1
        if self._tracing is not None:
            self._tracing.repeated(failure)

    @contextlib.contextmanager
    def _sending(self, method: Callable[[], str], **facts: Any) -> "Iterator[tuple[Any, str]]":
        """Around a call of its own, all tries: gives its metadata and its id.

        Args:
            method: Which, "hvpd.v1.Service/Method"; asked where spans are made.
            facts: For the span.
        """
        request_id = _request_id.new()
        metadata = (*self._metadata, (_request_id.KEY, request_id))
        if self._tracing is None:
            yield metadata, request_id
            return
        with self._tracing.call(method(), request_id, **facts) as span:
            yield (*metadata, *span.metadata), request_id

    def inside(self, name: str, /, **facts: Any) -> "contextlib.AbstractContextManager[None]":
        """Around several calls that are one thing to the user: they are in one span, where spans are made."""
        return contextlib.nullcontext() if self._tracing is None else self._tracing.inside(name, **facts)

    def _check_usable(self) -> None:
        if self._closed:
            raise HvpdError(f"this client of {self.address} is closed")
        if os.getpid() != self._owner:
            raise HvpdError(
                f"this client of {self.address} was connected before a fork, and gRPC does not survive one: connect again in "
                "this process"
            )

    def unary(self, method: Callable[..., _T], request: Any) -> _T:
        """Calls a unary method."""
        with self._sending(lambda: _tracing.method_of(request)) as (metadata, request_id):
            return self._answered(
                self.call(lambda left: method(request, metadata=metadata, timeout=left), request_id=request_id)
            )

    def _answered(self, answer: _T) -> _T:
        """Refuses None, which gRPC gives where a server ends a call well, and without the answer that belongs to it."""
        if answer is None:
            raise HvpdError(f"the server at {self.address} ended a call without an answer: it is no hvpd server")
        return answer

    # Blobs

    def missing(self, digests: Sequence[str]) -> list[str]:
        """Those digests that the server does not hold.

        Raises:
            HvpdError: The server asks for others.
        """
        request = blob_pb2.FindMissingBlobsRequest(digests=digests)
        missing = set(self.unary(self._find_missing, request).missing_digests)
        if others := missing.difference(digests):
            raise HvpdError(
                f"the server at {self.address} asks for {len(others)} blobs that were not offered: it is no hvpd server"
            )
        return [digest for digest in digests if digest in missing]

    def store(self, contents: Mapping[str, _codec.Buffer]) -> None:
        """Uploads what the server does not have, of bytes by their digests."""
        for digest in self.missing(list(contents)) if contents else ():
            self.upload(digest, contents[digest])

    def upload(self, digest: str, content: _codec.Buffer) -> None:
        """Stores a blob."""
        size = memoryview(content).nbytes

        def messages() -> Iterator[Frame[blob_pb2.UploadBlobRequest]]:
            offset = 0
            for chunk in _codec.chunks(content):
                message = blob_pb2.UploadBlobRequest(offset_bytes=offset)
                if offset == 0:
                    message.digest, message.size_bytes = digest, size
                yield Frame(message, chunk)
                offset += len(chunk)

        with self._sending(lambda: "hvpd.v1.BlobService/UploadBlob", digest=digest, size_bytes=size) as (
            metadata,
            request_id,
        ):
            self.call(lambda left: self._upload(messages(), metadata=metadata, timeout=left), request_id=request_id)

    # Points and products

    def create_point(
        self,
        spec: curvature_pb2.PointSpec,
        x: _codec.Array,
        *,
        step: "Step | None" = None,
        pin_seconds: int | None = None,
    ) -> tuple[curvature_pb2.Point, _codec.Array]:
        """Makes a point resident; returns it and its gradient[n]. Sends x only where the server cannot have it otherwise."""
        payload = _codec.payload(x)
        inline = bytes(payload) if len(payload) <= _INLINE_BYTES else b""
        move = step.message if step is not None else None
        opening = curvature_pb2.CreatePointRequest(spec=spec, inline_x=inline, move=move, pin_seconds=pin_seconds)

        def attempt(left: float | None) -> tuple[curvature_pb2.Point, _codec.Array]:
            stream: Stream[Frame[curvature_pb2.CreatePointRequest], Frame[curvature_pb2.CreatePointResponse]]
            stream = Stream(self._create_point, metadata, left, request_id)
            point, gradient = None, Filling(x.shape, x.dtype)
            # Each is sent once, however often a server asks for it.
            wanted = {"x_wanted": payload}
            if step is not None:
                wanted["direction_wanted"] = _codec.payload(step.direction)
            try:
                stream.send([Frame(opening)])
                while point is None or not gradient.complete:
                    response, chunk = stream.receive()
                    for name in [name for name in wanted if getattr(response, name)]:
                        stream.send(_pieces(wanted.pop(name)))
                    if response.HasField("point"):
                        point = response.point
                    gradient.append(chunk)
            except BaseException as error:
                stream.drop(error)
                raise
            stream.close()
            if not _codec.is_digest(point.id):
                raise HvpdError(f"the server at {self.address} gives a point an id that is no digest")
            return point, gradient.array

        facts = {"objective": spec.objective_digest, "n": x.size}
        with self._sending(lambda: "hvpd.v1.CurvatureService/CreatePoint", **facts) as (metadata, request_id):
            return self.call(attempt)

    def multiply(
        self,
        asked: Asked,
        block: _codec.Array,
        *,
        restore: Callable[[], None],
        objective: str = "",
    ) -> _codec.Array:
        """V[k,n] -> HV[k,n], or k numbers v'Hv for a quadratic form, in one round trip.

        Blocks wider than the server's limit are several products of one exchange. The digest of the objective is for the span.
        """
        exchange = Exchange(asked, block, limit=self._widest, priority=self._priority)
        infos: list[curvature_pb2.ProductInfo] = []
        span: _tracing.Span | None = None
        started = time.perf_counter()

        def attempt(left: float | None) -> None:
            if exchange.single and self._attempt_past(exchange, left, infos.append, span):
                return
            with self._stream(left) as stream:
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
                self._count_products(infos)
            raise
        self._count_products(infos, len(block), time.perf_counter() - started)
        return exchange.result

    def _attempt_past(
        self,
        exchange: Exchange,
        left: float | None,
        on_info: Callable[[curvature_pb2.ProductInfo], None],
        span: _tracing.Span | None,
    ) -> bool:
        """One try past gRPC; returns whether there is a way at the moment."""
        past: VectorStream | None = None
        try:
            past = self._vectors.take()
            if past is None:
                return False
            refused = exchange.attempt_past(past, left, on_info, span)
        except Exception:  # Nobody knows what is still on its way.
            if past is not None:
                past.close()
            raise
        except BaseException as error:  # noqa: BLE001 - raised again by `_try`
            if past is not None:
                past.close()
            self._vectors.replace()
            raise _Interrupted(error) from None
        self._vectors.give_back(past)
        if self._streams:
            self._end_streams()
        if refused is not None:
            raise refused
        return True

    def factors(
        self,
        request: curvature_pb2.ComputeFactorsRequest,
        sizes: Sequence[int],
        dtype: "np.dtype[Any]",
        *,
        restore: Callable[[], None],
    ) -> list[_codec.Array]:
        """The Kronecker factors at a point: square matrices of these sizes."""

        def attempt(left: float | None) -> list[_codec.Array]:
            try:
                found = Filling((sum(size**2 for size in sizes),), dtype, empty=len(sizes))
            except (MemoryError, ValueError):  # numpy's word for more bytes than there are addresses.
                raise HvpdError(
                    f"the Kronecker factors are square matrices of {', '.join(map(str, sizes[:8]))}{', ...' * (len(sizes) > 8)} rows, "
                    "and this machine has too little memory for them"
                ) from None
            for _, chunk in self._compute_factors(request, metadata=metadata, timeout=left):
                found.append(chunk)
            if not found.complete:
                raise HvpdError(f"the server at {self.address} sent fewer Kronecker factors than the objective has")
            parts = np.split(found.array, np.cumsum([size**2 for size in sizes])[:-1])
            return [part.reshape(size, size) for part, size in zip(parts, sizes, strict=True)]

        with self._sending(lambda: _tracing.method_of(request)) as (metadata, request_id):
            return self.call(attempt, restore=restore, request_id=request_id)

    @staticmethod
    def _product_span(
        tracing: _tracing.Tracing, asked: Asked, block: _codec.Array, objective: str
    ) -> "contextlib.AbstractContextManager[_tracing.Span]":
        """Around a product, all tries."""
        facts = {
            "objective": objective,
            "operator": curvature_pb2.Operator.Name(asked.operator).removeprefix("OPERATOR_").lower(),  # type: ignore[arg-type]  # an open enum
            "n": block.shape[1],
            "k": len(block),
        }
        return tracing.call(_tracing.PRODUCTS, name="hvpd.product", **facts)

    def _count_products(
        self, infos: Sequence[curvature_pb2.ProductInfo], vectors: int = 0, seconds: float = 0.0
    ) -> None:
        """Counts products that were answered, and the vectors of a block that was as a whole."""
        with self._lock:
            counts = self._counts
            for info in infos:
                counts["products"] += 1
                counts["queue_seconds"] += info.queue_duration_ns / 1e9
                counts["compute_seconds"] += info.compute_duration_ns / 1e9
                counts["launched_vectors"] += info.batch_width
            counts["vectors"] += vectors
            counts["seconds"] += seconds

    def _ticket(self, seconds: float) -> tuple[curvature_pb2.CreateVectorTicketResponse, str]:
        """For a connection to the vector port; outside of `call`: without it, products go over streams.

        Raises:
            ConnectionError: The ticket is for another port than the server's own. A server that was started again has another port than
                at first, so the server is asked anew.
        """
        request_id = _request_id.new()
        metadata = (*self._metadata, (_request_id.KEY, request_id))
        stub = server_pb2_grpc.ServerServiceStub(self._channel)
        server = stub.GetServer(server_pb2.GetServerRequest(), metadata=self._metadata, timeout=seconds)
        request = curvature_pb2.CreateVectorTicketRequest()
        ticket: curvature_pb2.CreateVectorTicketResponse
        ticket = self._create_vector_ticket(request, metadata=metadata, timeout=seconds)
        unanswered = None in (server, ticket)  # gRPC gives None for a call that ended well and without an answer.
        if unanswered or not self._has_vector_port(server) or ticket.port != server.vector_port:
            raise ConnectionError("the ticket is not for the vector port that the server states")
        return ticket, request_id

    def _has_vector_port(self, server: server_pb2.GetServerResponse) -> bool:
        """Return whether the server states a vector port that is reached as the server itself is.

        A tunnel or a proxy has a port of its own, and nothing is to go past it.
        """
        return 0 < server.vector_port < 1 << 16 and self.address.endswith(f":{server.port}")

    def _proxied(self, host: str) -> bool:
        """Return whether gRPC goes to that host through a proxy that the environment names."""
        if self._local:
            return False
        from urllib.request import getproxies_environment, proxy_bypass

        named = {"grpc", "https", "http"} & set(getproxies_environment())
        return bool(named) and not proxy_bypass(host)

    def _alive(self) -> bool:
        """Whether the server answers at all."""
        request, stub = server_pb2.GetServerRequest(), server_pb2_grpc.ServerServiceStub(self._channel)
        try:
            stub.GetServer(request, metadata=self._metadata, timeout=_ALIVE)
        except (grpc.RpcError, ValueError):  # The second of a channel that was closed meanwhile.
            return False
        return True

    def _end_streams(self) -> None:
        """Ends the streams that nobody uses: each takes a thread of the server."""
        with self._lock:
            streams, self._streams = self._streams, []
        for stream in streams:
            stream.close()

    @contextlib.contextmanager
    def _stream(self, left: float | None) -> "Iterator[ProductStream]":
        """A stream for one exchange. With a timeout it is a new one, whose deadline the server sees; else one of the pool."""
        stream = None
        if left is None:
            with self._lock:
                stream = self._streams.pop() if self._streams else None
        if stream is None:
            request_id = _request_id.new()
            metadata = (*self._metadata, (_request_id.KEY, request_id))
            stream = Stream(self._stream_products, metadata, left, request_id)
        try:
            yield stream
        except BaseException as error:  # Nobody knows what is still on its way.
            stream.drop(error)
            raise
        with self._lock:
            keep = left is None and not self._closed and not self._vectors.ready
            if keep:
                self._streams.append(stream)
        if not keep:
            stream.close()


def _pieces(payload: memoryview) -> Iterator[Frame[curvature_pb2.CreatePointRequest]]:
    empty = curvature_pb2.CreatePointRequest()
    return (Frame(empty, piece) for piece in _codec.chunks(payload))


def _call(channel: grpc.Channel, file: Any, name: str) -> Callable[..., Any]:
    """What a stub has for a method, messages with chunks as frames."""
    services = file.DESCRIPTOR.services_by_name.values()
    return _frames.call(channel, next(service.methods_by_name[name] for service in services))


def _host(address: object) -> str:
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    if not host or not port.isdecimal() or int(port) > 65535 or set(host) & set(" /\t\n"):
        raise InvalidArgumentError(f"an address is host:port, such as gpu-box:7070, got {address!r}")
    return host


def _check_token(token: object) -> None:
    if token is not None and not (isinstance(token, str) and token.isascii() and token.isprintable()):
        raise InvalidArgumentError("a token is made of printable ASCII characters")
    if token is not None and not 0 < len(token.strip()) <= _TOKEN_LENGTH:
        raise InvalidArgumentError(f"a token has from 1 to {_TOKEN_LENGTH} characters, got {len(token)}")


def _check_seconds(name: str, seconds: object) -> None:
    if not isinstance(seconds, int | float) or not seconds >= 0:
        raise InvalidArgumentError(f"{name} is a number of seconds, got {seconds!r}")


def _check_priority(priority: object) -> None:
    most = _protocol.MAX_PRIORITY
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > most:
        raise InvalidArgumentError(f"priority is a whole number from -{most} to {most}, got {priority!r}")


def _interrupt(error: BaseException, before: BaseException | None) -> BaseException | None:
    """The interrupt that an error took the place of: where one strikes in the middle of a `with`, Python's and gRPC's own conditions leave a lock
    that is not held, and raise RuntimeError. What was being handled `before` is not looked at.
    """
    found: BaseException | None = error
    while found is not None and found is not before:
        if not isinstance(found, Exception):
            return found
        found = found.__context__
    return None


def _with_hint(failure: Failure, cut: int) -> Failure:
    """The failure of a call that was cut off so many times: the server may have gone away because of it."""
    if failure.code is not _CODE.UNAVAILABLE or cut < 2:
        return failure
    hint = f"it went away {cut} times in the middle of this call; what is asked for may never end, or crash the server, whose log says so"
    return dataclasses.replace(failure, message=f"{failure.message}; {hint}")


def _is_transient(failure: Failure) -> bool:
    if failure.code is _CODE.UNAVAILABLE:
        return True
    if failure.code is _CODE.RESOURCE_EXHAUSTED:
        # The second is gRPC's own refusal, of a call beyond the server's limit.
        return failure.retry_after is not None or "concurrent rpc limit" in failure.message.lower()
    if failure.code is _CODE.CANCELLED and not failure.reason:
        return True  # Nobody here cancels: it came while the server drained (grpc issue 41785).
    # How a server that was killed in the middle of a reply can look.
    return (
        failure.code in (_CODE.INTERNAL, _CODE.UNKNOWN) and not failure.reason and "stream" in failure.message.lower()
    )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
