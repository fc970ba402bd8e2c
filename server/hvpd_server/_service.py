"""The wire: decodes and validates requests, calls the engine, answers. Knows gRPC and no jax."""

import concurrent.futures
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import grpc
from google.protobuf import timestamp_pb2

import hvpd
from hvpd import _codec, _frames, _protocol
from hvpd._frames import Frame
from hvpd.v1 import blob_pb2, curvature_pb2, objective_pb2, server_pb2
from hvpd_server import _requests
from hvpd_server._arriving import Arriving, Product, Vectors, vectors_of, whole
from hvpd_server._calls import Arrivals, Stalls
from hvpd_server._engine import Engine
from hvpd_server._errors import Code, ServiceError
from hvpd_server._gate import abort, caller_of, tenant_of
from hvpd_server._metrics import Metrics
from hvpd_server._objective import Objective, program_of
from hvpd_server._pipeline import Pipeline, Task
from hvpd_server._products import OnQueue, Products, nothing, quadratic_form
from hvpd_server._requests import Failed, Request, owner_of
from hvpd_server._streams import Stream, Streams
from hvpd_server._tracing import Tracing
from hvpd_server._vector_port import TICKET_SECONDS, VectorPort

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_ENDING_SECONDS = 0.1
"""Within which gRPC says that a call has ended of which no more comes, if it has."""

_PIPELINED = 64
_PIPELINED_BYTES = 64 << 20
"""Most products of one stream that are computed beside each other, and most bytes of them; one may be larger."""

_MESSAGE_BYTES = 4 << 20
"""Most bytes of a reply that a client takes."""

_REST_BYTES = 64 << 10
"""Room in a reply for what is not known of an objective before it is registered: its name, its time, its check."""

_PAGE_BYTES = 2 << 20
"""Bytes of objectives after which a page of them ends, counted with their structures, which take time to read."""

_ERROR_CHARACTERS = 1000
"""Most characters of the error of a compile in a plan."""

_WORKERS = 256
"""Threads for the products of streams that send ahead."""


def _unary(method: Callable[[Any, Any, grpc.ServicerContext], _T]) -> Callable[[Any, Any, grpc.ServicerContext], _T]:
    @functools.wraps(method)
    def call(self: Any, request: Any, context: grpc.ServicerContext) -> _T:
        try:
            return method(self, request, context)
        except Exception as error:
            abort(context, error)
            raise

    return call


def _streaming(
    method: Callable[[Any, Any, grpc.ServicerContext], Iterator[_T]],
) -> Callable[[Any, Any, grpc.ServicerContext], Iterator[_T]]:
    @functools.wraps(method)
    def call(self: Any, request: Any, context: grpc.ServicerContext) -> Iterator[_T]:
        try:
            yield from method(self, request, context)
        except Exception as error:  # noqa: BLE001 - likewise
            abort(context, error)

    return call


class BlobService:
    """Blobs in and out of the store."""

    def __init__(self, engine: Engine, stalls: Stalls | None = None) -> None:
        self._engine = engine
        self._stalls = stalls or Stalls()

    @_unary
    def FindMissingBlobs(  # noqa: N802 - the contract's name
        self, request: blob_pb2.FindMissingBlobsRequest, context: grpc.ServicerContext
    ) -> blob_pb2.FindMissingBlobsResponse:
        if len(request.digests) > 10_000:
            raise ServiceError(
                Code.INVALID_ARGUMENT, "TOO_MANY", f"ask for 10,000 digests at most, got {len(request.digests)}"
            )
        owners, owner = self._engine.owners, owner_of(context)
        missing = [digest for digest in request.digests if not owners.has_blob(owner, digest)]
        return blob_pb2.FindMissingBlobsResponse(missing_digests=missing)

    @_unary
    def UploadBlob(  # noqa: N802
        self, request_iterator: Iterator[Frame[blob_pb2.UploadBlobRequest]], context: grpc.ServicerContext
    ) -> blob_pb2.UploadBlobResponse:
        request_iterator = self._stalls.watch(request_iterator, context)
        first = next(request_iterator, None)
        if first is None:
            raise ServiceError(Code.INVALID_ARGUMENT, "UPLOAD_SIZE", "an upload without a message")
        digest, announced = first.message.digest, first.message.size_bytes
        owner, store = owner_of(context), self._engine.store
        if owner and self._engine.owners.has_blob(owner, digest) and store.size(digest) == announced:
            # An earlier try of this call stored it, and its answer was lost: there may be no room to store it twice.
            return blob_pb2.UploadBlobResponse(size_bytes=announced)
        upload = store.upload(digest, announced)
        with self._engine.owners.adding_blob(owner, digest, announced), upload:
            upload.append(first.message.offset_bytes, first.chunk)
            for message, chunk in request_iterator:
                upload.append(message.offset_bytes, chunk)
            size_bytes = upload.commit()
        self._engine.metrics.uploaded()
        return blob_pb2.UploadBlobResponse(size_bytes=size_bytes)

    @_unary
    def PruneBlobs(  # noqa: N802
        self, request: blob_pb2.PruneBlobsRequest, context: grpc.ServicerContext
    ) -> blob_pb2.PruneBlobsResponse:
        tenant = request.tenant or owner_of(context)
        if tenant != owner_of(context):
            _check_administers(context, "what other tenants have stored")
        found = self._engine.prune(tenant)
        return blob_pb2.PruneBlobsResponse(pruned_count=found.count, pruned_bytes=found.size_bytes)


class ObjectiveService:
    """Objectives by name and digest."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @_unary
    def CreateObjective(  # noqa: N802
        self, request: objective_pb2.CreateObjectiveRequest, context: grpc.ServicerContext
    ) -> objective_pb2.CreateObjectiveResponse:
        owner = owner_of(context)
        _requests.of(context).objective = request.name or request.digest
        self._engine.register(
            request.digest,
            request.name,
            request.x_digest,
            tenant=owner,
            shared=request.shared,
            accept=_check_fits,
        )
        return objective_pb2.CreateObjectiveResponse(objective=self._objective(request.name or request.digest, owner))

    @_unary
    def GetObjective(  # noqa: N802
        self, request: objective_pb2.GetObjectiveRequest, context: grpc.ServicerContext
    ) -> objective_pb2.GetObjectiveResponse:
        _requests.of(context).objective = request.name
        return objective_pb2.GetObjectiveResponse(objective=self._objective(request.name, owner_of(context)))

    @_unary
    def ListObjectives(  # noqa: N802
        self, request: objective_pb2.ListObjectivesRequest, context: grpc.ServicerContext
    ) -> objective_pb2.ListObjectivesResponse:
        size = min(request.page_size or 100, 100)
        if size < 0 or len(request.page_token) > 9 or not (request.page_token or "0").isdecimal():
            raise ServiceError(
                Code.INVALID_ARGUMENT, "INVALID_PAGE", "page_size or page_token is not one of this server's"
            )
        start = int(request.page_token or 0)
        owner = owner_of(context)
        known = self._engine.owners.listing(owner)
        response = objective_pb2.ListObjectivesResponse()
        used, end = 0, min(start + size, len(known))
        for index in range(start, end):
            name, digest, created = known[index]
            try:
                objective = self._message(name, digest, created, owner)
            except ServiceError as error:
                _log.error("objective %s cannot be listed: %s", name or digest, error)
                continue
            used += objective.ByteSize()
            if response.objectives and used > _PAGE_BYTES:
                end = index
                break
            for structure in ("x_tree", "x_leaves", "data_tree"):
                objective.bundle.ClearField(structure)
            for long in ("residuals", "dense_layers", "recognised", "presumed"):
                objective.derivation.ClearField(long)
            if objective.ByteSize() > _MESSAGE_BYTES - _REST_BYTES // 2:  # An older server has registered it.
                _log.error("objective %s cannot be listed: it is larger than a message", name or digest)
                continue
            response.objectives.append(objective)
        if end < len(known):
            response.next_page_token = str(end)
        return response

    @_unary
    def GetPlan(  # noqa: N802
        self, request: objective_pb2.GetPlanRequest, context: grpc.ServicerContext
    ) -> objective_pb2.GetPlanResponse:
        _requests.of(context).objective = request.digest
        plan = self._engine.choices(request.digest, owner_of(context))
        for compile_ in plan.compiles:
            compile_.error = compile_.error[:_ERROR_CHARACTERS]
        excess = plan.ByteSize() - _MESSAGE_BYTES
        while excess > 0:
            excess -= plan.compiles.pop().ByteSize()
        return plan

    @_unary
    def DeleteObjective(  # noqa: N802
        self, request: objective_pb2.DeleteObjectiveRequest, context: grpc.ServicerContext
    ) -> objective_pb2.DeleteObjectiveResponse:
        _requests.of(context).objective = request.name
        found = self._engine.delete(
            request.name,
            owner_of(context),
            expected=request.digest,
            anybodys=_requests.may_administer(context),
        )
        return objective_pb2.DeleteObjectiveResponse(digest=found.digest, deleted=found.gone)

    @_unary
    def ReleaseObjective(  # noqa: N802
        self, request: objective_pb2.ReleaseObjectiveRequest, context: grpc.ServicerContext
    ) -> objective_pb2.ReleaseObjectiveResponse:
        _requests.of(context).objective = request.name
        return objective_pb2.ReleaseObjectiveResponse(strikes=self._engine.release(request.name))

    def _objective(self, name: str, owner: str) -> objective_pb2.Objective:
        return self._message(*self._engine.owners.find(owner, name), owner)

    def _message(self, name: str, digest: str, created: int, owner: str) -> objective_pb2.Objective:
        created_at = timestamp_pb2.Timestamp()
        created_at.FromNanoseconds(created)
        bundle = self._engine.bundle(digest)
        whose, _ = self._engine.owners.told(owner, digest)
        check = self._engine.checks.found(digest, bundle, whose)
        return objective_pb2.Objective(
            name=name,
            digest=digest,
            bundle=bundle,
            create_time=created_at,
            check=check,
            derivation=self._engine.derivation(digest),
        )


class CurvatureService:
    """Points and products.

    Args:
        engine: What computes.
        max_streams: Most product streams that are kept open.
        metrics: Counts.
        tracing: Where products are traced, if they are.
        stalls: Ends calls that do not go on.
        arrivals: Counts the memory of what arrives in pieces.
    """

    def __init__(
        self,
        engine: Engine,
        max_streams: int,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
        *,
        stalls: Stalls | None = None,
        arrivals: Arrivals | None = None,
    ) -> None:
        self._engine = engine
        self._stalls = stalls or Stalls()
        self._room = arrivals or Arrivals(1 << 62)
        self.products = Products(engine, metrics or Metrics(), tracing)
        self.vector_port: VectorPort | None = None
        """Where products can go past this, once it is there."""
        self._workers = concurrent.futures.ThreadPoolExecutor(_WORKERS, thread_name_prefix="hvpd-product")
        self.streams = Streams(max_streams)

    @_streaming
    def CreatePoint(  # noqa: N802
        self, request_iterator: Iterator[Frame[curvature_pb2.CreatePointRequest]], context: grpc.ServicerContext
    ) -> Iterator[Frame[curvature_pb2.CreatePointResponse]]:
        request_iterator = self._stalls.watch(request_iterator, context)
        first, chunk = next(request_iterator, Frame(curvature_pb2.CreatePointRequest()))
        if not first.HasField("spec") or chunk:
            raise ServiceError(Code.INVALID_ARGUMENT, "SPEC_MISSING", "the first message must have the point's spec")
        owner = owner_of(context)
        _requests.of(context).objective = first.spec.objective_digest
        point = self._engine.find_point(first.spec, owner)
        if point is None:
            x = yield from self._x(first, request_iterator, owner)
            point = self._engine.create_point(first.spec, x, owner)
        if first.HasField("pin_seconds"):
            self._engine.pin(point, max(first.pin_seconds, 0), owner)
        yield Frame(curvature_pb2.CreatePointResponse(point=point.message()))
        for chunk in _codec.chunks(_codec.payload(point.gradient)):
            yield Frame(curvature_pb2.CreatePointResponse(), chunk)

    def _x(
        self,
        first: curvature_pb2.CreatePointRequest,
        messages: Iterator[Frame[curvature_pb2.CreatePointRequest]],
        owner: str,
    ) -> Generator[Frame[curvature_pb2.CreatePointResponse], None, _codec.Array]:
        """The x of a new point: as it came, as a step from another point, or asked for."""
        objective = self._engine.objective(first.spec.objective_digest)
        if first.inline_x:
            return whole(Vectors(1, objective.n, objective.dtype), [first.inline_x])
        if first.HasField("move"):
            try:
                x = self._engine.moved(first.spec, first.move, tenant=owner)
            except ServiceError as error:
                if error.reason != "DIRECTION_NOT_RESIDENT":
                    raise
                yield Frame(curvature_pb2.CreatePointResponse(direction_wanted=True))
                direction = whole(Vectors(1, objective.n, objective.dtype), (chunk for _, chunk in messages))
                self._engine.keep_direction(first.spec, first.move.direction_digest, direction, owner)
                x = self._engine.moved(first.spec, first.move, direction, owner)
            if x is not None and _codec.digest(_codec.payload(x)) == first.spec.x_digest:
                return x
        yield Frame(curvature_pb2.CreatePointResponse(x_wanted=True))
        return whole(Vectors(1, objective.n, objective.dtype), (chunk for _, chunk in messages))

    @_unary
    def ComputeProduct(  # noqa: N802
        self, request: curvature_pb2.ComputeProductRequest, context: grpc.ServicerContext
    ) -> curvature_pb2.ComputeProductResponse:
        point = self._engine.resident(request.spec, owner_of(context))
        call = _requests.of(context)
        call.objective = point.objective.digest
        vectors = vectors_of(request.spec, point)
        vectors.append(request.vectors)
        if not vectors.complete:
            raise ServiceError(Code.INVALID_ARGUMENT, "SIZE_MISMATCH", f"V has the wrong size: {vectors.progress}")
        cancel = _Cancel(context)
        result, info = self._engine.multiply(
            point,
            program_of(request.spec, point.objective.bundle),
            vectors.block,
            seed=request.spec.seed,
            tenant=tenant_of(context),
            priority=request.spec.priority,
            deadline=_deadline(context),
            on_queue=cancel.instead,
        )
        if call.span is not None:
            call.span.made(info, time.monotonic(), n=vectors.block.shape[1], k=request.spec.k)
        self._engine.settle()
        if request.spec.quadratic_form:
            result = quadratic_form(vectors.block, result)
        return curvature_pb2.ComputeProductResponse(vectors=bytes(_codec.payload(result)), info=info)

    @_unary
    def CreateVectorTicket(  # noqa: N802
        self, request: curvature_pb2.CreateVectorTicketRequest, context: grpc.ServicerContext
    ) -> curvature_pb2.CreateVectorTicketResponse:
        if self.vector_port is None:
            raise ServiceError(
                Code.FAILED_PRECONDITION, "NO_VECTOR_PORT", "the server has no vector port: use StreamProducts"
            )
        ticket = self.vector_port.tickets.new(
            caller_of(context), tenant_of(context), str(context.peer()), _requests.of(context).id
        )
        return curvature_pb2.CreateVectorTicketResponse(
            port=self.vector_port.port,
            greeting=self.vector_port.greeting,
            id=ticket.id,
            server_proof=ticket.server_proof,
            client_proof=ticket.client_proof,
            valid_seconds=TICKET_SECONDS,
        )

    @_streaming
    def ComputeFactors(  # noqa: N802
        self, request: curvature_pb2.ComputeFactorsRequest, context: grpc.ServicerContext
    ) -> Iterator[Frame[curvature_pb2.ComputeFactorsResponse]]:
        seed = request.seed if request.HasField("seed") else None
        for factor in self._engine.factors(request.point_id, seed, owner_of(context)):
            for chunk in _codec.chunks(_codec.payload(factor)):
                yield Frame(curvature_pb2.ComputeFactorsResponse(), chunk)

    @_streaming
    def StreamProducts(  # noqa: N802
        self, request_iterator: Iterator[Frame[curvature_pb2.StreamProductsRequest]], context: grpc.ServicerContext
    ) -> Iterator[Frame[curvature_pb2.StreamProductsResponse]]:
        tenant = tenant_of(context)
        arriving = Arriving(self._engine, owner_of(context), tenant, self._room)
        request_iterator = self._stalls.watch(request_iterator, context, lambda: bool(arriving))
        cancel = _Cancel(context)
        request = _requests.of(context)
        with self.streams.opened(context) as stream:
            arrivals = self._arrivals(arriving, request_iterator, stream, request)
            for tag, found in arrivals:
                if isinstance(found, Frame):
                    yield found
                elif found is not None and found.spec.pipelined:
                    together = itertools.chain([(tag, found)], arrivals)
                    yield from self._pipelined(together, arriving, stream, tenant, context, request)
                    return
                elif found is not None:
                    for frame in self._answer(tag, found, tenant, context, request, cancel.instead):
                        yield frame
                        _forget(frame)
                del found  # Its vectors are not kept while the next ones come.
                if not arriving and stream.end():
                    return

    def _arrivals(
        self,
        arriving: "Arriving",
        messages: Iterator[Frame[curvature_pb2.StreamProductsRequest]],
        stream: Stream,
        request: Request,
    ) -> Iterator["_Arrival"]:
        """What becomes of each message, with its tag: the product that it completes, why there is none, or nothing yet."""
        for message, chunk in messages:
            arrived = time.monotonic()
            stream.begin()
            found: Product | Frame[curvature_pb2.StreamProductsResponse] | None
            try:
                found = arriving.take(message, chunk)
            except Exception as error:  # noqa: BLE001 - one product's error, the stream goes on
                spec = message.spec if message.HasField("spec") else None
                found = _refusal(message.tag, self.products.refused(request, message.tag, error, arrived, spec))
            yield message.tag, found
            found = None  # Nobody knows for how long.
        gone = bool(arriving) and _ends(stream.context)
        for tag, early in arriving.unfinished():
            # Of one who is gone it is not known that too little was sent.
            why = ServiceError(Code.CANCELLED, "CANCELLED", f"the caller went away: {early}") if gone else early
            yield tag, _refusal(tag, self.products.refused(request, tag, why, time.monotonic()))

    def _pipelined(
        self,
        arrivals: Iterable["_Arrival"],
        arriving: "Arriving",
        stream: Stream,
        tenant: str,
        context: grpc.ServicerContext,
        request: Request,
    ) -> Iterator[Frame[curvature_pb2.StreamProductsResponse]]:
        """Answers products of one stream that are computed beside each other."""
        pipeline: Pipeline[Frame[curvature_pb2.StreamProductsResponse]]
        pipeline = Pipeline(self._workers, _PIPELINED, _PIPELINED_BYTES)
        cancels = arriving.computing

        def tasks() -> Iterator[Task[Frame[curvature_pb2.StreamProductsResponse]]]:
            for tag, found in arrivals:
                if isinstance(found, Frame):
                    yield Task(0, functools.partial(list, [found]))
                elif found is not None:
                    cancels[tag] = nothing
                    compute = functools.partial(self._computed, tag, found, tenant, context, request, cancels)
                    yield Task(found.vectors.size, compute)

        def stop() -> None:
            pipeline.stop()
            for cancel in list(cancels.values()):
                cancel()

        if not context.add_callback(stop):
            return  # The call has ended already.
        for frames in pipeline.answers(tasks()):
            yield from frames
            if pipeline.last and not arriving and stream.end():
                return

    def _computed(
        self,
        tag: int,
        product: "Product",
        tenant: str,
        context: grpc.ServicerContext,
        request: Request,
        cancels: dict[int, Callable[[], None]],
    ) -> list[Frame[curvature_pb2.StreamProductsResponse]]:
        """An answer, all of it at once: how long the transport takes is not measured then."""
        try:
            on_queue = functools.partial(cancels.__setitem__, tag)
            return list(self._answer(tag, product, tenant, context, request, on_queue))
        finally:
            cancels.pop(tag, None)

    def _answer(
        self,
        tag: int,
        product: Product,
        tenant: str,
        context: grpc.ServicerContext,
        request: Request,
        on_queue: OnQueue,
    ) -> Iterator[Frame[curvature_pb2.StreamProductsResponse]]:
        answer = self.products.multiply(request, tag, product, tenant, _deadline(context), on_queue)
        if isinstance(answer, Failed):
            yield _refusal(tag, answer)
            return
        try:
            for index, chunk in enumerate(_codec.chunks(_codec.payload(answer.result))):
                yield Frame(curvature_pb2.StreamProductsResponse(tag=tag, info=None if index else answer.info), chunk)
        finally:  # Whoever takes the chunks comes back when the transport has the last; or never, where the caller is content with that.
            self.products.sent(request, tag, product, answer)


def _ends(context: grpc.ServicerContext) -> bool:
    """Whether a call of which no more comes has ended, which gRPC says a moment later; else the caller waits for what it has asked for."""
    ended = threading.Event()
    return not context.add_callback(ended.set) or ended.wait(_ENDING_SECONDS)


class ServerService:
    """Facts about the server.

    Args:
        engine: Whose.
        tenants: All there are; one without a name where they are not told apart.
        port: Where it listens.
        vector_port: Where products go past gRPC; 0: nowhere.
    """

    def __init__(
        self,
        engine: Engine,
        tenants: Callable[[], Sequence[str]] = lambda: [""],
        *,
        port: int = 0,
        vector_port: int = 0,
    ) -> None:
        self._engine = engine
        self._tenants = tenants
        device = engine.devices[0]
        self._response = server_pb2.GetServerResponse(
            version=hvpd.__version__,
            min_protocol=_protocol.OLDEST,
            max_protocol=_protocol.NEWEST,
            jax_version=device.jax_version,
            platform=device.platform,
            device_kind=device.kind,
            max_block_width=engine.limits.max_block_width,
            stablehlo_version=device.stablehlo_version,
            device_count=len(engine.devices),
            port=port,
            vector_port=vector_port,
        )

    def GetServer(  # noqa: N802
        self, request: server_pb2.GetServerRequest, context: grpc.ServicerContext
    ) -> server_pb2.GetServerResponse:
        return self._response

    @_unary
    def GetUsage(  # noqa: N802
        self, request: server_pb2.GetUsageRequest, context: grpc.ServicerContext
    ) -> server_pb2.GetUsageResponse:
        tenants = [owner_of(context)]
        if request.all_tenants:
            _check_administers(context, "what other tenants use")
            tenants = list(self._tenants())
        return server_pb2.GetUsageResponse(usages=map(self._engine.usage, tenants))


def add_to_server(server: grpc.Server, file: Any, servicer: object) -> None:
    """Registers the one service of a proto file; its methods take and give messages with chunks as frames."""
    (service,) = file.DESCRIPTOR.services_by_name.values()
    handlers = {method.name: _frames.handler(servicer, method) for method in service.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def _check_fits(objective: Objective) -> None:
    """Raise ServiceError if no reply has room for an objective."""
    bundle, derived = objective.bundle.ByteSize(), objective.described.ByteSize()
    if bundle + derived > _MESSAGE_BYTES - _REST_BYTES:
        raise ServiceError(
            Code.INVALID_ARGUMENT,
            "BUNDLE_INVALID",
            f"the bundle has {bundle} bytes and what the server derives from it {derived}, together at most "
            f"{_MESSAGE_BYTES - _REST_BYTES} are allowed: x or data must have fewer leaves, with shorter names",
        )


def _check_administers(context: grpc.ServicerContext, what: str) -> None:
    """Raises ServiceError where something is not the caller's business."""
    if not _requests.may_administer(context):
        raise ServiceError(
            Code.PERMISSION_DENIED,
            "RIGHT_MISSING",
            f"{what} is for tokens with the right 'administer'",
            {"right": "administer", "tenant": owner_of(context)},
        )


class _Cancel:
    """Cancels the product that waits when its call ends before its time."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._cancel: Callable[[], None] = nothing
        context.add_callback(lambda: self._cancel())  # noqa: PLW0108 - looked up when it is called

    def instead(self, cancel: Callable[[], None]) -> None:
        """From now on, this is what to cancel."""
        self._cancel = cancel


_Arrival = tuple[int, Product | Frame[curvature_pb2.StreamProductsResponse] | None]


def _refusal(tag: int, failed: Failed) -> Frame[curvature_pb2.StreamProductsResponse]:
    """What is answered to a product of a stream that failed."""
    return Frame(curvature_pb2.StreamProductsResponse(tag=tag, error=failed.status))


def _forget(frame: Frame[curvature_pb2.StreamProductsResponse]) -> None:
    """Lets go of what was sent: gRPC holds on to the frame until it takes the next one."""
    if isinstance(frame.chunk, memoryview):
        frame.chunk.release()


def _deadline(context: grpc.ServicerContext) -> float:
    """When the call's time is over, on time.monotonic's clock."""
    return time.monotonic() + context.time_remaining()
