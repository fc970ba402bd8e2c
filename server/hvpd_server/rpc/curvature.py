"""CurvatureService: points and products."""

import functools
import math
from collections.abc import Generator, Iterable, Iterator

from hvpd._wire import codec, protocol
from hvpd._wire.frames import Frame
from hvpd.v1 import curvature_pb2
from hvpd_server.engine.engine import Engine, Place
from hvpd_server.engine.point import Point
from hvpd_server.errors import Code, ServiceError, invalid
from hvpd_server.rpc.call_context import GrpcCall
from hvpd_server.rpc.call_limits import Arrivals, Stalls
from hvpd_server.rpc.incoming import Arriving, Vectors, product_of, whole
from hvpd_server.rpc.methods import streaming, unary
from hvpd_server.rpc.product_stream import ProductStream
from hvpd_server.rpc.products import Cancellation, Products
from hvpd_server.rpc.streams import Streams
from hvpd_server.rpc.tickets import TICKET_SECONDS
from hvpd_server.rpc.vector_port import VectorPort, is_same_host
from hvpd_server.scheduling.threads import Threads
from hvpd_server.telemetry.metrics import Metrics
from hvpd_server.telemetry.tracing import Tracing

_WORKERS = 256
"""Threads for products of streams that are computed beside each other."""


class CurvatureService:
    """Points and products.

    Args:
        engine: Makes points and computes products.
        streams: The open product streams.
        metrics: Counts the products.
        tracing: Traces the products, unless it is None.
        stalls: Ends calls whose client stops sending or reading.
        arrivals: Counts the bytes in transit.
    """

    def __init__(
        self,
        engine: Engine,
        streams: Streams,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
        *,
        stalls: Stalls | None = None,
        arrivals: Arrivals | None = None,
    ) -> None:
        self._engine = engine
        self.stalls = stalls or Stalls()
        self._room = arrivals or Arrivals(1 << 62)
        self.products = Products(engine, metrics or Metrics(), tracing)
        self.vector_port: VectorPort | None = None
        """The port that tickets are for; the server sets it."""
        self._workers = Threads(_WORKERS, "hvpd-product")
        self.streams = streams

    @streaming
    def CreatePoint(  # noqa: N802
        self, request_iterator: Iterator[Frame[curvature_pb2.CreatePointRequest]], call: GrpcCall
    ) -> Generator[Frame[curvature_pb2.CreatePointResponse], None, None]:
        request_iterator = self.stalls.watch(request_iterator, call)
        first, chunk = next(request_iterator, Frame(curvature_pb2.CreatePointRequest()))
        if not first.HasField("spec") or chunk:
            raise invalid("SPEC_MISSING", "the first message must have the point's spec")
        if not 0 <= first.pin_seconds <= protocol.MAX_PIN_SECONDS:
            raise invalid(
                "PIN_SECONDS", f"pin_seconds must be from 0 to {protocol.MAX_PIN_SECONDS}, got {first.pin_seconds}"
            )
        if not math.isfinite(first.move.alpha):
            raise invalid("MOVE", f"the move's alpha must be a finite number, got {first.move.alpha}")
        call.objective = first.spec.objective_digest
        place = self._engine.locate(first.spec, call.owner)
        point = self._engine.find_point(place, call.owner)
        # Room for x, the gradient and, for a step, its direction.
        vectors = 3 if first.HasField("move") else 2
        size_bytes = vectors * place.objective.n * place.objective.dtype.itemsize + first.ByteSize()
        with self._room.holding(call.tenant, size_bytes):
            if point is None:
                point = yield from self._new_point(place, first, request_iterator, call)
            if first.HasField("pin_seconds"):
                self._engine.pin(point, first.pin_seconds, call.owner)
            yield Frame(curvature_pb2.CreatePointResponse(point=point.message()))
            for chunk in codec.chunks(codec.payload(point.gradient)):
                yield Frame(curvature_pb2.CreatePointResponse(), chunk)

    def _new_point(
        self,
        place: Place,
        first: curvature_pb2.CreatePointRequest,
        messages: Iterator[Frame[curvature_pb2.CreatePointRequest]],
        call: GrpcCall,
    ) -> Generator[Frame[curvature_pb2.CreatePointResponse], None, Point]:
        """Make a point. x came with the request, or follows from another point by a
        step, or is requested now.
        """
        engine, objective, owner = self._engine, place.objective, call.owner
        cancellation = Cancellation.of(call)
        create = functools.partial(engine.create_point, deadline=call.deadline, on_wait=cancellation.on_queue)

        def vector(chunks: Iterable[codec.Buffer]) -> codec.Array:
            with call.reading():
                return whole(Vectors(1, objective.n, objective.dtype), chunks)

        if first.inline_x:
            return create(place, vector([first.inline_x]), owner)
        if first.HasField("move"):
            try:
                x = engine.moved(place, first.move, tenant=owner)
            except ServiceError as error:
                if error.reason != "DIRECTION_NOT_RESIDENT":
                    raise
                yield Frame(curvature_pb2.CreatePointResponse(direction_wanted=True))
                direction = vector(chunk for _, chunk in messages)
                engine.keep_direction(objective, first.move.direction_digest, direction, owner)
                x = engine.moved(place, first.move, direction, owner)
            if x is not None:
                try:
                    return create(place, x, owner)
                except ServiceError as error:
                    if error.reason != "DIGEST_MISMATCH":  # The client rounded the step differently.
                        raise
        yield Frame(curvature_pb2.CreatePointResponse(x_wanted=True))
        return create(place, vector(chunk for _, chunk in messages), owner)

    @unary
    def ComputeProduct(  # noqa: N802
        self, request: curvature_pb2.ComputeProductRequest, call: GrpcCall
    ) -> curvature_pb2.ComputeProductResponse:
        point = self._engine.resident(request.spec, call.owner)
        call.objective = point.objective.digest
        product = product_of(request.spec, point, self._room, call.tenant, request.ByteSize())
        vectors = product.vectors
        try:
            if not vectors.append(request.vectors):
                raise invalid("SIZE_MISMATCH", f"V has the wrong size: {vectors.progress}")
            cancellation = Cancellation.of(call)
            answer = self.products.compute(call, product, call.deadline, cancellation.on_queue)
            self.products.sent(call, product, answer)
            return curvature_pb2.ComputeProductResponse(vectors=bytes(codec.payload(answer.result)), info=answer.info)
        finally:
            vectors.release()

    @unary
    def CreateVectorTicket(  # noqa: N802
        self, request: curvature_pb2.CreateVectorTicketRequest, call: GrpcCall
    ) -> curvature_pb2.CreateVectorTicketResponse:
        if self.vector_port is None:
            raise ServiceError(
                Code.FAILED_PRECONDITION, "NO_VECTOR_PORT", "the server has no vector port: use StreamProducts"
            )
        ticket = self.vector_port.tickets.new(call.caller, call.tenant, call.peer, call.id)
        same_host = is_same_host(call.peer)
        return curvature_pb2.CreateVectorTicketResponse(
            port=self.vector_port.port,
            greeting=self.vector_port.greeting,
            id=ticket.id,
            server_proof=ticket.server_proof,
            client_proof=ticket.client_proof,
            valid_seconds=TICKET_SECONDS,
            unix_id=self.vector_port.unix_id if same_host else b"",
            segment_bytes=self.vector_port.segment_bytes if same_host else 0,
        )

    @streaming
    def ComputeFactors(  # noqa: N802
        self, request: curvature_pb2.ComputeFactorsRequest, call: GrpcCall
    ) -> Generator[Frame[curvature_pb2.ComputeFactorsResponse], None, None]:
        seed = request.seed if request.HasField("seed") else None
        cancellation = Cancellation.of(call)
        factors = self._engine.factors(
            request.point_id, seed, call.owner, deadline=call.deadline, on_wait=cancellation.on_queue
        )
        with self._room.holding(call.tenant, sum(factor.nbytes for factor in factors)):
            for factor in factors:
                for chunk in codec.chunks(codec.payload(factor)):
                    yield Frame(curvature_pb2.ComputeFactorsResponse(), chunk)

    @streaming
    def StreamProducts(  # noqa: N802
        self, request_iterator: Iterator[Frame[curvature_pb2.StreamProductsRequest]], call: GrpcCall
    ) -> Generator[Frame[curvature_pb2.StreamProductsResponse], None, None]:
        arriving = Arriving(self._engine, call.owner, call.tenant, self._room)
        messages = self.stalls.watch(request_iterator, call, lambda: bool(arriving))
        return ProductStream(call, arriving, self.products, self._workers).answers(messages, self.streams)
