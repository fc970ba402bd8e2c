"""Builds the server, starts it and ends it.

docs/architecture/overview.md shows a request's way through it.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import hvpd
from hvpd.v1 import blob_pb2, curvature_pb2, krylov_pb2, objective_pb2, server_pb2
from hvpd_server import config as _config
from hvpd_server.admission.vetting import Vetter
from hvpd_server.config import Config
from hvpd_server.device import memory_budget
from hvpd_server.device.device import devices
from hvpd_server.device.forming import lead
from hvpd_server.engine.engine import Engine
from hvpd_server.errors import ServiceError
from hvpd_server.importer import refusals
from hvpd_server.liveness import Liveness
from hvpd_server.rpc import tls, vector_port
from hvpd_server.rpc.blobs import BlobService
from hvpd_server.rpc.call_limits import Arrivals, Calls, Segments, Stalls
from hvpd_server.rpc.curvature import CurvatureService
from hvpd_server.rpc.first_message import MOST_OPEN, FirstMessages
from hvpd_server.rpc.gate import Gate
from hvpd_server.rpc.krylov import KrylovService
from hvpd_server.rpc.methods import add_to_server
from hvpd_server.rpc.objectives import ObjectiveService
from hvpd_server.rpc.observer import Observer
from hvpd_server.rpc.server_info import ServerService
from hvpd_server.rpc.streams import Streams
from hvpd_server.rpc.vector_port import VectorPort
from hvpd_server.scheduling import compile_queue
from hvpd_server.scheduling.threads import Threads
from hvpd_server.status_page.history import History
from hvpd_server.status_page.http_server import HttpServer, metrics_page
from hvpd_server.status_page.objectives import Catalogue
from hvpd_server.status_page.page import Status
from hvpd_server.store.location import objects_of
from hvpd_server.store.store import Store
from hvpd_server.telemetry.metrics import Metrics
from hvpd_server.telemetry.tracing import Tracing
from hvpd_server.tenancy.limits import Limits, equal_weights, no_limits
from hvpd_server.tenancy.tokens import Tokens

_log = logging.getLogger(__name__)

_SWEEP_SECONDS = 1.0
"""Seconds between two looks at tokens, stalled calls and idle processes. Streams of a
revoked token must end within two seconds.
"""

_FOLLOW_SECONDS = 2.0
"""Seconds between two looks at what other servers have changed in the store. A request
for a name, and each list, looks by itself.
"""

_TRIM_SECONDS = 600.0
"""Seconds between two looks at the size of the cache of compiled programs."""

_CERTIFICATE_SECONDS = 86_400.0
"""Seconds between two looks at the end of the certificate."""

_SPARE_CALLS = 2 * MOST_OPEN
"""Calls beyond the limit, for the open methods and for refusals: the server answers
probes while all other calls are taken.
"""

_OPTIONS = [
    ("grpc.so_reuseport", 0),  # Otherwise two servers could share the port without an error.
    ("grpc.max_send_message_length", 4 << 20),
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.bdp_probe", 0),  # gRPC's own windows grow up to 1 GiB for each stream.
    ("grpc.http2.lookahead_bytes", 16 << 20),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]


class App:
    """A server: bound to its address from construction on, SERVING when `start`
    returns.

    Args:
        config: The settings.
        liveness: Shows the supervisor which work runs.
        tracing: Makes spans, unless it is None.
        vetter: Reads and compiles programs; by default the server makes one.

    Raises:
        ServiceError: The store is in use.
        ValueError: The tokens or the certificates cannot be used.
        OSError: The address cannot be listened on.
    """

    def __init__(
        self,
        config: Config,
        liveness: Liveness | None = None,
        tracing: Tracing | None = None,
        vetter: Vetter | None = None,
    ) -> None:
        self.config = config
        tokens = None if config.tokens is None else Tokens(config.tokens)
        self._certificates = certificates = _certificates(config)
        credentials = certificates.credentials() if certificates is not None else None
        store = Store(objects_of(config))
        # A group forms before jax finds its devices, and before the address is bound.
        found, group = lead(config, store) if _config.in_group(config) else (devices(store.cache), None)
        device = found[0]
        self.metrics = Metrics()
        self.metrics.build({"version": hvpd.__version__, "jax": device.jax_version, "platform": device.platform})
        limits = Limits(
            memory_budget.budget(config.memory_budget, device),
            config.max_block_width,
            config.max_pending,
            config.max_queue_delay,
            config.max_launches,
            tokens.limits if tokens is not None else no_limits,
            program_bytes=config.program_memory or memory_budget.host_bytes() // 4,
            cache_bytes=config.cache_size,
            weights=tokens.weight if tokens is not None else equal_weights,
        )
        vetter = vetter or Vetter()
        vetter.limits = _program_limits(config)
        self.engine = Engine(
            store,
            found,
            limits,
            self.metrics,
            liveness=liveness,
            quarantine_after=config.quarantine_after,
            vetter=vetter,
            group=group,
        )
        streams = Streams(max(config.max_calls * 3 // 4, 1))
        self._stalls = Stalls()
        self._gate = Gate(tokens, Calls(config.max_calls, streams.end_idle), FirstMessages(self._stalls))
        host_bytes = memory_budget.host_bytes()
        arrivals = Arrivals(host_bytes // 8, lambda tenant: limits.tenants(tenant).transit_bytes)
        segments = Segments(host_bytes // 8, lambda tenant: limits.tenants(tenant).transit_bytes)
        tenants = (lambda: [""]) if tokens is None else tokens.tenants
        self._stopping = threading.Event()
        self.state = "warming"
        """"warming", "serving" or "draining"."""
        self._server = grpc.server(
            Threads(config.max_calls + _SPARE_CALLS, "hvpd-call"),
            interceptors=[Observer(self.metrics, tracing), self._gate],
            options=_OPTIONS,
            maximum_concurrent_rpcs=config.max_calls + _SPARE_CALLS,
        )
        self._curvature = CurvatureService(
            self.engine, streams, self.metrics, tracing, stalls=self._stalls, arrivals=arrivals
        )
        self.metrics.observe_certificate(lambda: certificates.expires if certificates is not None else None)
        self.metrics.observe_streams(lambda: streams.count)
        host = f"[{config.host}]" if ":" in config.host.strip("[]") and not config.host.startswith("[") else config.host
        try:
            listen = f"{host}:{config.port}"
            if credentials is None:
                self.port = self._server.add_insecure_port(listen)
            else:
                self.port = self._server.add_secure_port(listen, credentials)
            self.address = f"{host}:{self.port}"
        except RuntimeError as error:
            raise OSError(f"cannot listen on {host}:{config.port}: is another server there? ({error})") from None
        self._vector_port = self._curvature.vector_port = self._vectors(config, arrivals, segments)
        ports = {"port": self.port, "vector_port": self._vector_port.port if self._vector_port is not None else 0}
        add_to_server(self._server, blob_pb2, BlobService(self.engine, self._stalls))
        add_to_server(self._server, objective_pb2, ObjectiveService(self.engine))
        add_to_server(self._server, curvature_pb2, self._curvature)
        krylov = KrylovService(self.engine, self.metrics, stalls=self._stalls, arrivals=arrivals)
        add_to_server(self._server, krylov_pb2, krylov)
        add_to_server(
            self._server, server_pb2, ServerService(self.engine, arrivals, lambda: self.state, tenants, **ports)
        )
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        files = (blob_pb2, objective_pb2, curvature_pb2, krylov_pb2, server_pb2, health_pb2)
        self._names = [service.full_name for file in files for service in file.DESCRIPTOR.services_by_name.values()]
        reflection.enable_server_reflection([*self._names, reflection.SERVICE_NAME], self._server)

    def _vectors(self, config: Config, arrivals: Arrivals, segments: Segments) -> VectorPort | None:
        """Return the vector port, or None if the settings or the system have none.

        Raises:
            OSError: Its address cannot be listened on.
        """
        port = _config.vector_port(config)
        if port is None or not vector_port.available():
            return None
        certificates = _certificates(config)
        try:
            return VectorPort(
                config.host,
                port,
                gate=self._gate,
                engine=self.engine,
                products=self._curvature.products,
                streams=self._curvature.streams,
                arrivals=arrivals,
                metrics=self.metrics,
                encryption=certificates.context if certificates is not None else None,
                segments=segments,
            )
        except OSError as error:
            raise OSError(f"cannot listen on {config.host}:{port} for vectors ({error})") from None

    def start(self) -> None:
        """Listen, warm the stored objectives, then answer."""
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._server.start()
        if self._vector_port is not None:
            self._vector_port.start()
        for name, seconds, look in (
            ("hvpd-gate", _SWEEP_SECONDS, self._gate.sweep),
            ("hvpd-stalls", _SWEEP_SECONDS, self._stalls.sweep),
            ("hvpd-idle", _SWEEP_SECONDS, self.engine.vetter.sweep),
            ("hvpd-store", _FOLLOW_SECONDS, self.engine.registration.follow),
            ("hvpd-given-up", _SWEEP_SECONDS, self.engine.registration.sweep),
            ("hvpd-cache", _TRIM_SECONDS, self._trim),
            *([("hvpd-certificate", _CERTIFICATE_SECONDS, self._certificates.warn)] if self._certificates else []),
        ):
            threading.Thread(target=_repeat, args=(self._stopping, seconds, look), name=name, daemon=True).start()
        self.engine.objectives.warm_all()
        self._gate.open = True
        self.state = "serving"
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        try:
            self.engine.vetter.start()  # Now, so that no client waits for it.
        except (OSError, ServiceError) as error:
            _log.warning("the process that reads programs cannot be started yet: %s", error)

    def stop(self) -> None:
        """Refuse new calls, let running products finish within the drain time, then
        close.
        """
        self.state = "draining"
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._stopping.set()
        stopped = self._server.stop(self.config.drain)
        self._curvature.streams.drain()
        ends = time.monotonic() + self.config.drain + 5
        if self._vector_port is not None:
            self._vector_port.stop(self.config.drain)
        stopped.wait(max(ends - time.monotonic(), 0))
        self.engine.close()
        self.engine.vetter.close()
        self.engine.store.close()

    def _trim(self) -> None:
        gone = self.engine.objectives.cache.trim()
        if gone:
            _log.info(
                "%d compiled programs were dropped from the cache, which may have %d bytes",
                gone,
                self.config.cache_size,
            )

    def _set_health(self, status: int) -> None:
        for name in ("", *self._names):
            self._health.set(name, status)


def _repeat(stopping: threading.Event, seconds: float, look: Callable[[], None]) -> None:
    """Call a function now, and every so many seconds until the server stops.

    Each function has a thread, so that none waits for the disk or the locks of another.
    """
    while True:
        try:
            look()
        except Exception as error:  # noqa: BLE001 - the next look must happen all the same
            _log.error("%s failed; it tries again in %g s", threading.current_thread().name, seconds, exc_info=error)
        if stopping.wait(seconds):
            return


def _program_limits(config: Config) -> refusals.Limits:
    """Return the limits of reading and compiling programs on this machine.

    So many run at once that together they fit into its memory.
    """
    defaults = refusals.Limits()
    share = memory_budget.host_bytes() // compile_queue.THREADS
    return dataclasses.replace(
        defaults,
        memory_bytes=min(defaults.memory_bytes, share),
        compile_seconds=config.compile_timeout,
        compile_memory_bytes=share,
    )


def _certificates(config: Config) -> tls.Certificates | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    return tls.Certificates(tls.Files(config.tls_cert, config.tls_key, config.tls_client_ca))


def http_server(config: Config, port: int, app: App) -> HttpServer:
    """Return the HTTP server of the metrics and the status page.

    Raises:
        OSError: Its address cannot be listened on.
    """
    engine, device = app.engine, app.engine.devices[0]
    history = History(app.metrics)
    facts = {
        "version": hvpd.__version__,
        "jax": device.jax_version,
        "platform": device.platform,
        "device": device.kind,
        "devices": str(engine.device_count),
        "address": app.address,
    }
    catalogue = Catalogue(engine.store, engine.checks, engine.quarantine, engine.objectives.derivation)
    status = Status(facts, lambda: app.state, app.metrics, history, catalogue)
    try:
        server = HttpServer(
            config.metrics_host, port, {"/metrics": metrics_page(app.metrics.registry), **status.pages()}
        )
    except OSError as error:
        raise OSError(f"cannot listen on {config.metrics_host}:{port} for metrics ({error})") from None
    history.start()
    return server
