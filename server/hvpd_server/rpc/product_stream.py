"""The products of one gRPC stream: computed one after the other, or beside each other.

A stream may be idle for hours. So no variable keeps anything large between two
messages.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Executor

from hvpd._wire import codec
from hvpd._wire.frames import Frame
from hvpd.v1 import curvature_pb2
from hvpd_server.rpc.call_context import GrpcCall, gone
from hvpd_server.rpc.incoming import Arriving, Product
from hvpd_server.rpc.pipeline import Pipeline, Task
from hvpd_server.rpc.products import Answer, Cancellation, OnQueue, Products, nothing
from hvpd_server.rpc.streams import Stream, Streams
from hvpd_server.telemetry.requests import Failed

_PIPELINED = 64
"""Most products of one stream that are computed beside each other."""

_PIPELINED_BYTES = 64 << 20
"""Most bytes of their vectors and answers. One product may have more."""

_Response = Frame[curvature_pb2.StreamProductsResponse]

_Arrival = tuple[int, Product | _Response | None]
"""A tag, and the outcome of a message: a whole product, a refusal, or nothing yet."""


class ProductStream:
    """Answers the products of one stream.

    Args:
        call: The stream's call.
        arriving: The products that have not come as a whole.
        products: Computes.
        workers: The threads that compute products beside each other.
    """

    def __init__(self, call: GrpcCall, arriving: Arriving, products: Products, workers: Executor) -> None:
        self._call = call
        self._arriving = arriving
        self._products = products
        self._workers = workers

    def answers(
        self, messages: Iterator[Frame[curvature_pb2.StreamProductsRequest]], streams: Streams
    ) -> Generator[_Response, None, None]:
        """Yield the answers to the products of the messages."""
        cancellation = Cancellation.of(self._call)
        with streams.opened(self._call) as stream:
            arrivals = self._arrivals(messages, stream)
            pipelined = False
            try:
                for tag, found in arrivals:
                    if isinstance(found, Frame):
                        yield found
                    elif found is not None and found.spec.pipelined:
                        pipelined, first = True, iter([(tag, found)])  # This iterator keeps nothing that it has given.
                        del found
                        yield from self._pipelined(first, arrivals, stream)
                        return
                    elif found is not None:
                        try:
                            for frame in self._answer(tag, found, cancellation.on_queue):
                                yield frame
                                _forget(frame)
                        finally:
                            found.vectors.release()
                    del found  # The next message may come much later.
                    if not self._arriving and stream.end():
                        return
            finally:
                if not pipelined:  # Otherwise the thread that reads closes them.
                    arrivals.close()

    def _arrivals(
        self, messages: Iterator[Frame[curvature_pb2.StreamProductsRequest]], stream: Stream
    ) -> Generator[_Arrival, None, None]:
        """Yield the outcome of each message.

        The caller releases the vectors of each product that it gets. This generator
        releases those of products that have not come as a whole.
        """
        arriving = self._arriving
        try:
            for message, chunk in messages:
                arrived = time.monotonic()
                stream.begin()
                found: Product | _Response | None
                try:
                    found = arriving.take(message, chunk)
                except Exception as error:  # noqa: BLE001 - one product's error, the stream goes on
                    spec = message.spec if message.HasField("spec") else None
                    found = self._refused(message.tag, error, arrived, spec)
                    del spec
                tag = message.tag
                del message, chunk  # The next message may come much later.
                yield tag, found
                found = None
            left = bool(arriving) and self._call.ends()
            for tag, early in arriving.unfinished():
                yield tag, self._refused(tag, gone(early) if left else early, time.monotonic())
        finally:
            arriving.close()

    def _refused(
        self, tag: int, error: Exception, arrived: float, spec: curvature_pb2.ProductSpec | None = None
    ) -> _Response:
        return _refusal(tag, self._products.refused(self._call, tag, error, arrived, spec))

    def _pipelined(
        self, first: Iterator[_Arrival], arrivals: Generator[_Arrival, None, None], stream: Stream
    ) -> Iterator[_Response]:
        """Answer products that are computed beside each other.

        Args:
            first: Gives the first product.
            arrivals: Gives the rest; the thread that reads closes it.
            stream: The stream.
        """
        pipeline: Pipeline[_Response] = Pipeline(self._workers, _PIPELINED, _PIPELINED_BYTES)

        def tasks() -> Generator[Task[_Response], None, None]:
            try:
                for tag, found in itertools.chain(first, arrivals):
                    if found is not None:
                        yield self._task(tag, found)
                    del found
            finally:
                arrivals.close()

        def stop() -> None:
            pipeline.stop()
            for cancel in list(self._arriving.computing.values()):
                cancel()

        if not self._call.on_end(stop):
            stop()  # The call has ended already.
        with contextlib.closing(pipeline.answers(tasks())) as answers:
            for frames in answers:
                for frame in frames:
                    yield frame
                    _forget(frame)
                del frames
                if pipeline.last and not self._arriving and stream.end():
                    return

    def _task(self, tag: int, found: Product | _Response) -> Task[_Response]:
        """Return the work for a product, or for one that was refused."""
        if isinstance(found, Frame):
            return Task(0, functools.partial(list, [found]), nothing)
        self._arriving.computing[tag] = nothing
        return Task(found.vectors.transit_bytes, functools.partial(self._computed, tag, found), found.vectors.release)

    def _computed(self, tag: int, product: Product) -> list[_Response]:
        """Return a whole answer at once, so that the time of its transport is not
        measured.
        """
        cancels = self._arriving.computing
        try:
            return list(self._answer(tag, product, functools.partial(cancels.__setitem__, tag)))
        finally:
            cancels.pop(tag, None)

    def _answer(self, tag: int, product: Product, on_queue: OnQueue) -> Iterator[_Response]:
        answer = self._products.answer(self._call, tag, product, self._call.deadline, on_queue)
        if not isinstance(answer, Answer):
            yield _refusal(tag, answer)
            return
        try:
            for index, chunk in enumerate(codec.chunks(codec.payload(answer.result))):
                yield Frame(curvature_pb2.StreamProductsResponse(tag=tag, info=None if index else answer.info), chunk)
        finally:  # The transport has the last chunk, or it takes no more.
            self._products.sent(self._call, product, answer, tag)


def _refusal(tag: int, failed: Failed) -> _Response:
    return Frame(curvature_pb2.StreamProductsResponse(tag=tag, error=failed.status))


def _forget(frame: _Response) -> None:
    """Release bytes that were sent: gRPC keeps a frame until it takes the next."""
    if isinstance(frame.chunk, memoryview):
        frame.chunk.release()
