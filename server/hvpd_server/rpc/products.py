"""One product from its vectors to its answer, whichever way it came.

`ComputeProduct`, `StreamProducts` and the vector port meet here. This module knows the
wire's messages, and no transport.
"""

import time
from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np

from hvpd._wire import codec
from hvpd.v1 import curvature_pb2
from hvpd_server.engine.engine import Engine
from hvpd_server.rpc.call_context import CallContext, GrpcCall
from hvpd_server.rpc.incoming import Product
from hvpd_server.telemetry import requests
from hvpd_server.telemetry.metrics import Metrics
from hvpd_server.telemetry.requests import Failed
from hvpd_server.telemetry.tracing import Tracing

METHOD = "StreamProducts"
"""The method's name in metrics, logs and traces for products of a stream, by gRPC or
the vector port.
"""

OnQueue = Callable[[Callable[[], None]], object]
"""Receives a function that cancels the product while it waits, and afterwards one that
does nothing.
"""


class Answer(NamedTuple):
    """A product that was computed."""

    result: codec.Array
    """HV[k,n], or v'Hv[k]."""
    info: curvature_pb2.ProductInfo
    """How the product was computed."""
    computed: float
    """When the result was ready, on time.monotonic's clock."""


class Cancellation:
    """Cancels the waiting product of a call when the client goes away."""

    def __init__(self) -> None:
        self._cancel = nothing
        self._gone = False

    @classmethod
    def of(cls, call: GrpcCall) -> Self:
        """Return the cancellation that follows a call."""
        found = cls()
        call.on_end(found.gone)
        return found

    def on_queue(self, cancel: Callable[[], None]) -> None:
        """Note how to cancel the product that waits now."""
        self._cancel = cancel
        if self._gone:
            cancel()

    def gone(self) -> None:
        """Cancel the waiting product and all later ones, because the client is gone."""
        self._gone = True
        self._cancel()


class Products:
    """Computes products.

    Args:
        engine: Computes.
        metrics: Counts the products of streams.
        tracing: Traces the products of streams, unless it is None.
    """

    def __init__(self, engine: Engine, metrics: Metrics, tracing: Tracing | None) -> None:
        self._engine = engine
        self._metrics = metrics
        self._tracing = tracing

    def compute(self, call: CallContext, product: Product, deadline: float, on_queue: OnQueue) -> Answer:
        """Compute a product. The caller sends it, and then calls `sent`.

        Args:
            call: The call that asks for the product.
            product: The product, all of whose vectors have come.
            deadline: When the client stops waiting, on time.monotonic's clock.
            on_queue: Receives a function that cancels the product.

        Raises:
            ServiceError: The product is refused, or was cancelled.
        """
        spec, point, program, vectors = product
        block = vectors.block
        try:
            result, info = self._engine.multiply(
                point,
                program,
                block,
                seed=spec.seed,
                tenant=call.tenant,
                priority=spec.priority,
                deadline=deadline,
                on_queue=on_queue,
            )
        finally:
            on_queue(nothing)
        if spec.quadratic_form:
            result = np.einsum("kn,kn->k", block, result)
        elif isinstance(result.base, np.ndarray) and result.base.nbytes > 2 * result.nbytes:
            result = result.copy()  # Otherwise this answer keeps all products of its launch in memory.
        return Answer(result, info, time.monotonic())

    def answer(
        self, call: CallContext, tag: int, product: Product, deadline: float, on_queue: OnQueue
    ) -> Answer | Failed:
        """Compute a product of a stream, as `compute` does. Return its failure if it
        fails.
        """
        try:
            return self.compute(call, product, deadline, on_queue)
        except Exception as error:  # noqa: BLE001 - one product's error, the stream goes on
            spec, point, _, vectors = product
            return self.refused(call, tag, error, vectors.arrived, spec, point.objective.digest)

    def sent(self, call: CallContext, product: Product, answer: Answer, tag: int | None = None) -> None:
        """Count and trace a product. Call this when the transport has taken the answer,
        or never will.

        Args:
            call: The call that asked for the product.
            product: The product.
            answer: Its answer.
            tag: The product's tag on its stream; None for a call of one product, which
                the observer counts.
        """
        now = time.monotonic()
        self._engine.record_deferred()
        spec, point, program, vectors = product
        if tag is None:
            if call.span is not None:
                n = point.objective.columns(program)
                call.span.made(answer.info, answer.computed, n=n, k=spec.k)
            return
        self._metrics.answered(METHOD, now - vectors.arrived, vectors.receiving, now - answer.computed)
        if self._tracing is not None:
            digest, n = point.objective.digest, point.objective.columns(program)
            self._tracing.product(
                call, tag, spec, vectors.arrived, digest=digest, n=n, info=answer.info, computed=answer.computed
            )

    def refused(
        self,
        call: CallContext,
        tag: int,
        error: Exception,
        arrived: float,
        spec: curvature_pb2.ProductSpec | None = None,
        digest: str = "",
    ) -> Failed:
        """Count, log and trace a product of a stream that failed, and return its
        failure.

        Args:
            call: The stream.
            tag: The product's tag.
            error: The reason of the failure.
            arrived: When the product began to come, on time.monotonic's clock.
            spec: The product that the client asked for, if it is known.
            digest: The digest of the objective, if that is known.
        """
        failed = requests.failed(call, error, tag=tag, started=arrived, objective=digest)
        self._metrics.failed(failed.status, call.method, call.owner)
        self._metrics.answered(METHOD, time.monotonic() - arrived)
        if self._tracing is not None and spec is not None:
            self._tracing.product(call, tag, spec, arrived, digest=digest, failed=failed)
        return failed


def nothing() -> None:
    """Cancel nothing: the product is not queued yet, or no longer."""
