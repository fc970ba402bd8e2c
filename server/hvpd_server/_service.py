"""The wire: decodes and validates requests, calls the engine, answers. Knows gRPC and no jax."""

import functools
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf import timestamp_pb2
from google.rpc import status_pb2

import hvpd
from hvpd import _codec, _frames, _protocol
from hvpd._frames import Frame
from hvpd.v1 import blob_pb2, curvature_pb2, objective_pb2, server_pb2
from hvpd_server._engine import Engine
from hvpd_server._errors import Code, ServiceError, to_status
from hvpd_server._gate import abort
from hvpd_server._objective import program_of
from hvpd_server._point import Point
from hvpd_server._streams import Streams

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_ARRIVING = 16
"""Most products whose chunks may interleave on one stream."""


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

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @_unary
    def FindMissingBlobs(  # noqa: N802 - the contract's name
        self, request: blob_pb2.FindMissingBlobsRequest, context: grpc.ServicerContext
    ) -> blob_pb2.FindMissingBlobsResponse:
        if len(request.digests) > 10_000:
            raise ServiceError(
                Code.INVALID_ARGUMENT, "TOO_MANY", f"ask for 10,000 digests at most, got {len(request.digests)}"
            )
        missing = [digest for digest in request.digests if not self._engine.store.has(digest)]
        return blob_pb2.FindMissingBlobsResponse(missing_digests=missing)

    @_unary
    def UploadBlob(  # noqa: N802
        self, request_iterator: Iterator[Frame[blob_pb2.UploadBlobRequest]], context: grpc.ServicerContext
    ) -> blob_pb2.UploadBlobResponse:
        first = next(request_iterator, None)
        if first is None:
            raise ServiceError(Code.INVALID_ARGUMENT, "UPLOAD_SIZE", "an upload without a message")
        with self._engine.store.upload(first.message.digest, first.message.size_bytes) as upload:
            upload.append(first.message.offset_bytes, first.chunk)
            for message, chunk in request_iterator:
                upload.append(message.offset_bytes, chunk)
            size_bytes = upload.commit()
        self._engine.metrics.uploads.inc()
        return blob_pb2.UploadBlobResponse(size_bytes=size_bytes)


class ObjectiveService:
    """Objectives by name and digest."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @_unary
    def CreateObjective(  # noqa: N802
        self, request: objective_pb2.CreateObjectiveRequest, context: grpc.ServicerContext
    ) -> objective_pb2.CreateObjectiveResponse:
        self._engine.register(request.digest, request.name, request.x_digest)
        return objective_pb2.CreateObjectiveResponse(objective=self._objective(request.name or request.digest))

    @_unary
    def GetObjective(  # noqa: N802
        self, request: objective_pb2.GetObjectiveRequest, context: grpc.ServicerContext
    ) -> objective_pb2.GetObjectiveResponse:
        return objective_pb2.GetObjectiveResponse(objective=self._objective(request.name))

    @_unary
    def ListObjectives(  # noqa: N802
        self, request: objective_pb2.ListObjectivesRequest, context: grpc.ServicerContext
    ) -> objective_pb2.ListObjectivesResponse:
        size = min(request.page_size or 100, 100)
        if size < 0 or not (request.page_token or "0").isdecimal():
            raise ServiceError(
                Code.INVALID_ARGUMENT, "INVALID_PAGE", "page_size or page_token is not one of this server's"
            )
        start = int(request.page_token or 0)
        known = self._engine.store.objectives()
        response = objective_pb2.ListObjectivesResponse()
        for name, digest, created in known[start : start + size]:
            try:
                objective = self._message(name, digest, created)
            except ServiceError as error:
                _log.error("objective %s cannot be listed: %s", name or digest, error)
                continue
            for structure in ("x_tree", "x_leaves", "data_tree", "residuals"):
                objective.bundle.ClearField(structure)
            response.objectives.append(objective)
        if start + size < len(known):
            response.next_page_token = str(start + size)
        return response

    @_unary
    def GetPlan(  # noqa: N802
        self, request: objective_pb2.GetPlanRequest, context: grpc.ServicerContext
    ) -> objective_pb2.GetPlanResponse:
        return self._engine.choices(request.digest)

    def _objective(self, name: str) -> objective_pb2.Objective:
        return self._message(*self._engine.store.objective(name))

    def _message(self, name: str, digest: str, created: int) -> objective_pb2.Objective:
        created_at = timestamp_pb2.Timestamp()
        created_at.FromNanoseconds(created)
        bundle = self._engine.bundle(digest)
        check = self._engine.checks.found(digest, bundle)
        return objective_pb2.Objective(name=name, digest=digest, bundle=bundle, create_time=created_at, check=check)


class CurvatureService:
    """Points and products."""

    def __init__(self, engine: Engine, max_streams: int) -> None:
        self._engine = engine
        self.streams = Streams(max_streams)

    @_streaming
    def CreatePoint(  # noqa: N802
        self, request_iterator: Iterator[Frame[curvature_pb2.CreatePointRequest]], context: grpc.ServicerContext
    ) -> Iterator[Frame[curvature_pb2.CreatePointResponse]]:
        first, chunk = next(request_iterator, Frame(curvature_pb2.CreatePointRequest()))
        if not first.HasField("spec") or chunk:
            raise ServiceError(Code.INVALID_ARGUMENT, "SPEC_MISSING", "the first message must have the point's spec")
        point = self._engine.find_point(first.spec)
        if point is None:
            x = yield from self._x(first, request_iterator)
            point = self._engine.create_point(first.spec, x)
        if first.HasField("pin_seconds"):
            self._engine.pin(point, max(first.pin_seconds, 0))
        yield Frame(curvature_pb2.CreatePointResponse(point=point.message()))
        for chunk in _codec.chunks(_codec.payload(point.gradient)):
            yield Frame(curvature_pb2.CreatePointResponse(), chunk)

    def _x(
        self, first: curvature_pb2.CreatePointRequest, messages: Iterator[Frame[curvature_pb2.CreatePointRequest]]
    ) -> Generator[Frame[curvature_pb2.CreatePointResponse], None, _codec.Array]:
        """The x of a new point: as it came, as a step from another point, or asked for."""
        objective = self._engine.objective(first.spec.objective_digest)
        if first.inline_x:
            return _whole(_Vectors(1, objective.n, objective.dtype), [first.inline_x])
        if first.HasField("move"):
            try:
                x = self._engine.moved(first.spec, first.move)
            except ServiceError as error:
                if error.reason != "DIRECTION_NOT_RESIDENT":
                    raise
                yield Frame(curvature_pb2.CreatePointResponse(direction_wanted=True))
                direction = _whole(_Vectors(1, objective.n, objective.dtype), (chunk for _, chunk in messages))
                self._engine.keep_direction(first.spec, first.move.direction_digest, direction)
                x = self._engine.moved(first.spec, first.move, direction)
            if x is not None and _codec.digest(_codec.payload(x)) == first.spec.x_digest:
                return x
        yield Frame(curvature_pb2.CreatePointResponse(x_wanted=True))
        return _whole(_Vectors(1, objective.n, objective.dtype), (chunk for _, chunk in messages))

    @_unary
    def ComputeProduct(  # noqa: N802
        self, request: curvature_pb2.ComputeProductRequest, context: grpc.ServicerContext
    ) -> curvature_pb2.ComputeProductResponse:
        point = self._engine.resident(request.spec)
        vectors = _vectors(request.spec, point)
        vectors.append(request.vectors)
        if not vectors.complete:
            raise ServiceError(Code.INVALID_ARGUMENT, "SIZE_MISMATCH", f"V has the wrong size: {vectors.progress}")
        cancel = _Cancel(context)
        result, info = self._engine.multiply(
            point,
            program_of(request.spec),
            vectors.block,
            seed=request.spec.seed,
            tenant=context.peer(),
            priority=request.spec.priority,
            deadline=_deadline(context),
            on_queue=cancel.instead,
        )
        if request.spec.quadratic_form:
            result = _quadratic_form(vectors.block, result)
        return curvature_pb2.ComputeProductResponse(vectors=bytes(_codec.payload(result)), info=info)

    @_streaming
    def ComputeFactors(  # noqa: N802
        self, request: curvature_pb2.ComputeFactorsRequest, context: grpc.ServicerContext
    ) -> Iterator[Frame[curvature_pb2.ComputeFactorsResponse]]:
        for factor in self._engine.factors(request.point_id, request.seed if request.HasField("seed") else None):
            for chunk in _codec.chunks(_codec.payload(factor)):
                yield Frame(curvature_pb2.ComputeFactorsResponse(), chunk)

    @_streaming
    def StreamProducts(  # noqa: N802
        self, request_iterator: Iterator[Frame[curvature_pb2.StreamProductsRequest]], context: grpc.ServicerContext
    ) -> Iterator[Frame[curvature_pb2.StreamProductsResponse]]:
        arriving: dict[int, tuple[curvature_pb2.ProductSpec, Point, _Vectors]] = {}
        cancel = _Cancel(context)
        tenant = context.peer()
        with self.streams.opened(context) as stream:
            for message, chunk in request_iterator:
                stream.begin()
                # A product is refused with its first chunk; the chunks that are on their way are of no use to anybody.
                if message.HasField("spec") or message.tag in arriving:
                    try:
                        complete = _arrive(self._engine, arriving, message, chunk)
                    except Exception as error:  # noqa: BLE001 - one product's error, the stream goes on
                        arriving.pop(message.tag, None)
                        yield _refusal(message.tag, error)
                    else:
                        if complete is not None:
                            spec, point, block = complete
                            yield from self._answer(message.tag, spec, point, block, tenant, context, cancel)
                if not arriving and stream.end():
                    return

    def _answer(
        self,
        tag: int,
        spec: curvature_pb2.ProductSpec,
        point: Point,
        block: _codec.Array,
        tenant: str,
        context: grpc.ServicerContext,
        cancel: "_Cancel",
    ) -> Iterator[Frame[curvature_pb2.StreamProductsResponse]]:
        try:
            result, info = self._engine.multiply(
                point,
                program_of(spec),
                block,
                seed=spec.seed,
                tenant=tenant,
                priority=spec.priority,
                deadline=_deadline(context),
                on_queue=cancel.instead,
            )
        except Exception as error:  # noqa: BLE001 - one product's error, the stream goes on
            yield _refusal(tag, error)
            return
        if spec.quadratic_form:
            result = _quadratic_form(block, result)
        for index, chunk in enumerate(_codec.chunks(_codec.payload(result))):
            yield Frame(curvature_pb2.StreamProductsResponse(tag=tag, info=None if index else info), chunk)


class ServerService:
    """Facts about the server."""

    def __init__(self, engine: Engine) -> None:
        device = engine.devices[0]
        oldest, newest = device.calling_conventions
        self._response = server_pb2.GetServerResponse(
            version=hvpd.__version__,
            min_protocol=_protocol.OLDEST,
            max_protocol=_protocol.NEWEST,
            jax_version=device.jax_version,
            min_calling_convention_version=oldest,
            max_calling_convention_version=newest,
            platform=device.platform,
            device_kind=device.kind,
            max_block_width=engine.limits.max_block_width,
            stablehlo_version=device.stablehlo_version,
            device_count=len(engine.devices),
        )

    def GetServer(  # noqa: N802
        self, request: server_pb2.GetServerRequest, context: grpc.ServicerContext
    ) -> server_pb2.GetServerResponse:
        return self._response


def add_to_server(server: grpc.Server, file: Any, servicer: object) -> None:
    """Registers the one service of a proto file; its methods take and give messages with chunks as frames."""
    (service,) = file.DESCRIPTOR.services_by_name.values()
    handlers = {method.name: _frames.handler(servicer, method) for method in service.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


class _Vectors:
    """A block V[k,n] that arrives in chunks. One that comes whole is used where it lies."""

    def __init__(self, k: int, n: int, dtype: "np.dtype[Any]") -> None:
        self._shape, self._dtype = (k, n), dtype
        self._size = k * n * self._dtype.itemsize
        self._received = 0
        self._buffer: Any = None

    def append(self, chunk: _codec.Buffer) -> bool:
        """Takes the next bytes; returns whether all are there."""
        end = self._received + len(chunk)
        if end > self._size:
            self._received = end
            raise ServiceError(
                Code.INVALID_ARGUMENT, "SIZE_MISMATCH", f"the vectors have the wrong size: {self.progress}"
            )
        if end - self._received == self._size:
            self._buffer = chunk
        else:
            if self._buffer is None:
                self._buffer = np.empty(self._size, np.uint8).data  # Not zeroed: all of it is overwritten.
            self._buffer[self._received : end] = chunk
        self._received = end
        return self.complete

    @property
    def complete(self) -> bool:
        return self._received == self._size

    @property
    def progress(self) -> str:
        k, n = self._shape
        return f"got {self._received} bytes, {k} x {n} of {self._dtype.name} are {self._size}"

    @property
    def block(self) -> _codec.Array:
        found: _codec.Array = np.frombuffer(self._buffer, self._dtype).reshape(self._shape)
        return found


def _whole(vector: _Vectors, chunks: Iterable[_codec.Buffer]) -> _codec.Array:
    """One vector from its chunks; takes no more of them than it needs."""
    for chunk in chunks:
        if vector.append(chunk):
            found: _codec.Array = vector.block[0]
            return found
    raise ServiceError(Code.INVALID_ARGUMENT, "SIZE_MISMATCH", f"x ended early: {vector.progress}")


def _vectors(spec: curvature_pb2.ProductSpec, point: Point) -> _Vectors:
    """For the vectors of a product."""
    return _Vectors(spec.k, point.objective.sizes[spec.block], point.objective.dtype)


class _Cancel:
    """Cancels the product that waits when its call ends before its time."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._cancel: Callable[[], None] = lambda: None
        context.add_callback(lambda: self._cancel())  # noqa: PLW0108 - looked up when it is called

    def instead(self, cancel: Callable[[], None]) -> None:
        """From now on, this is what to cancel."""
        self._cancel = cancel


def _arrive(
    engine: Engine,
    arriving: dict[int, tuple[curvature_pb2.ProductSpec, Point, _Vectors]],
    message: curvature_pb2.StreamProductsRequest,
    chunk: _codec.Buffer,
) -> tuple[curvature_pb2.ProductSpec, Point, _codec.Array] | None:
    """Takes one message of a product; returns the product when it is complete."""
    if message.HasField("spec"):
        if message.tag in arriving or len(arriving) >= _ARRIVING:
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                "INVALID_TAG",
                f"tag {message.tag} is in use, or more than {_ARRIVING} products of one stream arrive at once",
            )
        point = engine.resident(message.spec)
        arriving[message.tag] = message.spec, point, _vectors(message.spec, point)
    spec, point, vectors = arriving[message.tag]
    if not vectors.append(chunk):
        return None
    del arriving[message.tag]
    return spec, point, vectors.block


def _quadratic_form(vectors: _codec.Array, products: _codec.Array) -> _codec.Array:
    """V[k,n], HV[k,n] -> v'Hv for each row."""
    form: _codec.Array = np.einsum("kn,kn->k", vectors, products)
    return form


def _refusal(tag: int, error: Exception) -> Frame[curvature_pb2.StreamProductsResponse]:
    status: status_pb2.Status = to_status(error)
    return Frame(curvature_pb2.StreamProductsResponse(tag=tag, error=status))


def _deadline(context: grpc.ServicerContext) -> float:
    """When the call's time is over, on time.monotonic's clock."""
    return time.monotonic() + context.time_remaining()
