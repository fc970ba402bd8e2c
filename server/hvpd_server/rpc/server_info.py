"""ServerService: facts about the server, and the usage of tenants."""

import hashlib
import socket
from collections.abc import Callable, Sequence

import hvpd
from hvpd._wire import protocol
from hvpd._wire.distribution import Distribution
from hvpd.v1 import server_pb2
from hvpd_server.engine.engine import Engine
from hvpd_server.rpc.call_context import GrpcCall
from hvpd_server.rpc.call_limits import Arrivals
from hvpd_server.rpc.methods import check_administers, unary


class ServerService:
    """Facts about the server.

    Args:
        engine: Knows the devices, and the usage of tenants.
        state: Returns "warming", "serving" or "draining".
        arrivals: Counts the bytes in transit.
        tenants: Returns all tenants; one without a name if the server asks for no
            tokens.
        port: The port that gRPC listens on.
        vector_port: The port of products past gRPC; 0 if there is none.
    """

    def __init__(
        self,
        engine: Engine,
        arrivals: Arrivals,
        state: Callable[[], str] = lambda: "serving",
        tenants: Callable[[], Sequence[str]] = lambda: [""],
        *,
        port: int = 0,
        vector_port: int = 0,
    ) -> None:
        self._engine = engine
        self._arrivals = arrivals
        self._state = state
        self._tenants = tenants
        device = engine.devices[0]
        self._response = server_pb2.GetServerResponse(
            version=hvpd.__version__,
            min_protocol=protocol.OLDEST,
            max_protocol=protocol.NEWEST,
            jax_version=device.jax_version,
            platform=device.platform,
            device_kind=device.kind,
            max_block_width=engine.limits.max_block_width,
            stablehlo_version=device.stablehlo_version,
            device_count=engine.device_count,
            port=port,
            vector_port=vector_port,
            krylov_runs=True,
            id=_server_id(port),
        )

    def GetServer(  # noqa: N802
        self, request: server_pb2.GetServerRequest, call: GrpcCall
    ) -> server_pb2.GetServerResponse:
        response = server_pb2.GetServerResponse()
        response.CopyFrom(self._response)
        response.time.GetCurrentTime()
        return response

    @unary
    def GetUsage(  # noqa: N802
        self, request: server_pb2.GetUsageRequest, call: GrpcCall
    ) -> server_pb2.GetUsageResponse:
        tenants = [call.owner]
        if request.all_tenants:
            check_administers(call, "The usage of other tenants")
            tenants = list(self._tenants())
        return server_pb2.GetUsageResponse(usages=map(self._usage, tenants))

    @unary
    def GetLoad(  # noqa: N802
        self, request: server_pb2.GetLoadRequest, call: GrpcCall
    ) -> server_pb2.GetLoadResponse:
        totals = self._engine.metrics.totals()
        live, calls, _ = self._engine.metrics.live()
        response = server_pb2.GetLoadResponse(
            state=self._state(),
            products=totals.products,
            vectors=totals.columns,
            failures=totals.failures,
            padding_vectors=totals.padding_columns,
            request_seconds=_histogram(totals.requests),
            queue_seconds=_histogram(totals.queue),
            launch_vectors=_histogram(totals.widths),
            pending_vectors=live.pending,
            pending_limit=live.pending_limit,
            in_flight_vectors=live.in_flight,
            resident_bytes=sum(live.resident_bytes.values()),
            points=live.resident_entries.get("point", 0),
            budget_bytes=live.budget_bytes,
            open_calls=calls,
            shares=[
                server_pb2.Share(
                    objective=objective,
                    tenant=tenant,
                    products=use.products,
                    vectors=use.columns,
                    device_seconds=use.device_seconds,
                )
                for (objective, tenant), use in totals.usage.items()
            ],
        )
        response.time.GetCurrentTime()
        return response

    def _usage(self, tenant: str) -> server_pb2.Usage:
        usage = self._engine.usage(tenant)
        usage.transit_bytes = self._arrivals.held().get(tenant, 0)
        return usage


def _server_id(port: int) -> str:
    """Return an id that states neither the host's name nor anything else."""
    return hashlib.sha256(f"{socket.gethostname()}:{port}".encode()).hexdigest()[:16]


def _histogram(found: Distribution) -> server_pb2.Histogram:
    return server_pb2.Histogram(bounds=found.bounds, counts=found.counts)
