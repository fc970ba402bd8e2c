"""One product from its vectors to its answer, whichever way it came: who asks is told, and so are metrics, log and traces. Knows the
wire's messages, and no transport.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hvpd import _codec
from hvpd.v1 import curvature_pb2
from hvpd_server import _requests
from hvpd_server._arriving import Product
from hvpd_server._engine import Engine
from hvpd_server._metrics import Metrics
from hvpd_server._objective import program_of
from hvpd_server._requests import Failed, Request
from hvpd_server._tracing import Tracing

METHOD = "StreamProducts"
"""What metrics, log and traces call products that came on a stream, gRPC's or the vector port's."""

OnQueue = Callable[[Callable[[], None]], object]
"""Given a function that cancels the product while it waits, and afterwards one that does nothing."""


class Answer(NamedTuple):
    """A product that was made."""

    result: _codec.Array
    """HV[k,n], or v'Hv[k]."""
    info: curvature_pb2.ProductInfo
    """How."""
    computed: float
    """When it was there, on time.monotonic's clock."""


class Products:
    """Makes the products of streams.

    Args:
        engine: What computes.
        metrics: Counts.
        tracing: Where products are traced, if they are.
    """

    def __init__(self, engine: Engine, metrics: Metrics, tracing: Tracing | None) -> None:
        self._engine = engine
        self._metrics = metrics
        self._tracing = tracing

    def multiply(
        self, request: Request, tag: int, product: Product, tenant: str, deadline: float, on_queue: OnQueue
    ) -> Answer | Failed:
        """Makes a product; what was made is to be sent, and then `sent` to be called.

        Args:
            request: The stream.
            tag: The product's.
            product: What is asked for.
            tenant: Who asks.
            deadline: When it is of no use any more, on time.monotonic's clock.
            on_queue: Told how to cancel it.
        """
        spec, point, vectors = product
        block = vectors.block
        try:
            result, info = self._engine.multiply(
                point,
                program_of(spec, point.objective.bundle),
                block,
                seed=spec.seed,
                tenant=tenant,
                priority=spec.priority,
                deadline=deadline,
                on_queue=on_queue,
            )
        except Exception as error:  # noqa: BLE001 - one product's error, the stream goes on
            return self.refused(request, tag, error, vectors.arrived, spec, point.objective.digest)
        finally:
            on_queue(nothing)
        if spec.quadratic_form:
            result = quadratic_form(block, result)
        return Answer(result, info, time.monotonic())

    def sent(self, request: Request, tag: int, product: Product, answer: Answer) -> None:
        """Counts a product whose answer the transport has taken, or never will."""
        spec, point, vectors = product
        now = time.monotonic()
        self._engine.settle()
        self._metrics.answered(METHOD, now - vectors.arrived, vectors.receiving, now - answer.computed)
        if self._tracing is not None:
            objective = point.objective
            digest, n = objective.digest, objective.columns(program_of(spec, objective.bundle))
            self._tracing.product(
                request, tag, spec, vectors.arrived, digest=digest, n=n, info=answer.info, computed=answer.computed
            )

    def refused(
        self,
        request: Request,
        tag: int,
        error: Exception,
        arrived: float,
        spec: curvature_pb2.ProductSpec | None = None,
        digest: str = "",
    ) -> Failed:
        """Why there is no product, which has been counted and logged.

        Args:
            request: The stream.
            tag: The product's.
            error: What happened.
            arrived: When the product began to come, on time.monotonic's clock.
            spec: What was asked for, where it is known.
            digest: Of the objective, likewise.
        """
        failed = _requests.failed(request, error, tag=tag, started=arrived, objective=digest)
        self._metrics.failed(failed.status, request.method, request.tenant)
        self._metrics.answered(METHOD, time.monotonic() - arrived)
        if self._tracing is not None and spec is not None:
            self._tracing.product(request, tag, spec, arrived, digest=digest, failed=failed)
        return failed


def quadratic_form(vectors: _codec.Array, products: _codec.Array) -> _codec.Array:
    """V[k,n], HV[k,n] -> v'Hv for each row."""
    form: _codec.Array = np.einsum("kn,kn->k", vectors, products)
    return form


def nothing() -> None:
    """Cancels what is not queued yet, or any more."""
