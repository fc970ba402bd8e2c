"""The server as a whole, in the order in which a request meets it:

    gRPC -> _service (decode, validate) -> _engine (which objective, which point)
         -> _store (bytes by digest) -> _residency (what is on the device) -> _kernels (value and gradient)     a point's way
         -> _batcher (queue, coalesce) -> _kernels (compiled programs)                                          a product's way

`run` starts it, says when it is ready, and stops it on SIGTERM or SIGINT without losing what has begun.
"""

import ctypes
import dataclasses
import logging
import os
import select
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import hvpd
from hvpd.v1 import blob_pb2, curvature_pb2, objective_pb2, server_pb2
from hvpd_server import _config, _logs, _memory_budget, _rules, _service, _tls, _tracing, _vector_port
from hvpd_server._auth import Tokens
from hvpd_server._board import Board
from hvpd_server._calls import Arrivals, Calls, Stalls
from hvpd_server._catalogue import Catalogue
from hvpd_server._config import Config
from hvpd_server._engine import Engine
from hvpd_server._errors import ServiceError
from hvpd_server._gate import Gate
from hvpd_server._history import History
from hvpd_server._kernels import devices
from hvpd_server._limits import Limits, equal_weights, no_limits
from hvpd_server._metrics import Metrics
from hvpd_server._observer import Observer
from hvpd_server._quarantine import Quarantine
from hvpd_server._status import Status
from hvpd_server._store import Store
from hvpd_server._tracing import Tracing
from hvpd_server._vector_port import VectorPort
from hvpd_server._vetting import Vetter
from hvpd_server._web import Door, metrics_page

_log = logging.getLogger(__name__)

_TRIM_SECONDS = 600.0

_SPARE_CALLS = 16
"""For what everybody may call: probes are answered while all others are taken."""

_OPTIONS = [
    ("grpc.so_reuseport", 0),  # A second server on the port is an error, not a coin toss.
    ("grpc.max_send_message_length", 4 << 20),
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]


class App:
    """A server: bound to its address from construction on, SERVING when `start` returns.

    Args:
        config: Its settings.
        board: Where others see what runs.
        tracing: Makes spans of what it does; None: there are none.

    Raises:
        ServiceError: The store is in use.
        ValueError: The tokens or the certificates cannot be used.
        OSError: The address cannot be listened on.
    """

    def __init__(self, config: Config, board: Board | None = None, tracing: Tracing | None = None) -> None:
        self.config = config
        tokens = None if config.tokens is None else Tokens(config.tokens)
        certificates = _certificates(config)
        credentials = certificates.credentials() if certificates is not None else None
        store = Store(config.store)
        found = devices(store.cache)
        device = found[0]
        self.metrics = Metrics()
        self.metrics.build({"version": hvpd.__version__, "jax": device.jax_version, "platform": device.platform})
        limits = Limits(
            _memory_budget.budget(config.memory_budget, device),
            config.max_block_width,
            config.max_pending,
            config.max_queue_delay,
            config.max_launches,
            tokens.limits if tokens is not None else no_limits,
            tokens.weight if tokens is not None else equal_weights,
        )
        allowed = dataclasses.replace(
            _rules.Limits(),
            compile_seconds=config.compile_timeout,
            compile_memory_bytes=_memory_budget.host_bytes() // 2,
        )
        vetter = Vetter(allowed)
        self.engine = Engine(
            store, found, limits, self.metrics, board=board, quarantine_after=config.quarantine_after, vetter=vetter
        )
        self._gate = Gate(tokens, Calls(config.max_calls))
        self._stalls = Stalls()
        arrivals = Arrivals(_memory_budget.host_bytes() // 8)
        tenants = (lambda: [""]) if tokens is None else tokens.tenants
        self._stopping = threading.Event()
        self.state = "warming"
        """"warming", "serving" or "draining"."""
        self._server = grpc.server(
            ThreadPoolExecutor(config.max_calls + _SPARE_CALLS, thread_name_prefix="hvpd-call"),
            interceptors=[Observer(self.metrics, tracing), self._gate],
            options=_OPTIONS,
            maximum_concurrent_rpcs=config.max_calls + _SPARE_CALLS,
        )
        most_streams = max(config.max_calls * 3 // 4, 1)
        self._curvature = _service.CurvatureService(
            self.engine, most_streams, self.metrics, tracing, stalls=self._stalls, arrivals=arrivals
        )
        self.metrics.observe_streams(lambda: self._curvature.streams.count)
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
        self._vector_port = self._curvature.vector_port = self._vectors(config, arrivals)
        ports = {"port": self.port, "vector_port": self._vector_port.port if self._vector_port is not None else 0}
        _service.add_to_server(self._server, blob_pb2, _service.BlobService(self.engine, self._stalls))
        _service.add_to_server(self._server, objective_pb2, _service.ObjectiveService(self.engine))
        _service.add_to_server(self._server, curvature_pb2, self._curvature)
        _service.add_to_server(self._server, server_pb2, _service.ServerService(self.engine, tenants, **ports))
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        files = (blob_pb2, objective_pb2, curvature_pb2, server_pb2, health_pb2)
        self._names = [service.full_name for file in files for service in file.DESCRIPTOR.services_by_name.values()]
        reflection.enable_server_reflection([*self._names, reflection.SERVICE_NAME], self._server)

    def _vectors(self, config: Config, arrivals: Arrivals) -> VectorPort | None:
        """The vector port, where there is to be one.

        Raises:
            OSError: It cannot be listened on.
        """
        port = _config.vector_port(config)
        if port is None or not _vector_port.available():
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
            )
        except OSError as error:
            raise OSError(f"cannot listen on {config.host}:{port} for vectors ({error})") from None

    def start(self) -> None:
        """Listens, warms the stored objectives, then answers."""
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._server.start()
        if self._vector_port is not None:
            self._vector_port.start()
        threading.Thread(target=self._sweep, name="hvpd-gate", daemon=True).start()
        self.engine.warm_all()
        self._gate.open = True
        self.state = "serving"
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        try:
            self.engine.vetter.start()  # While nobody waits for it.
        except (OSError, ServiceError) as error:
            _log.warning("the process that reads programs cannot be started yet: %s", error)

    def stop(self) -> None:
        """Refuses new calls, lets running products finish within the drain time, then closes."""
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

    def _sweep(self) -> None:
        """Once a second, ends what was begun with tokens that are not good any more, or does not go on. Now and then trims the cache."""
        trimmed = float("-inf")
        while not self._stopping.wait(1.0):
            self._stalls.sweep()
            self.engine.vetter.sweep()
            if time.monotonic() - trimmed > _TRIM_SECONDS:
                trimmed = time.monotonic()
                self._trim()
            try:
                self._gate.sweep()
            except Exception as error:  # noqa: BLE001 - who is revoked next must be shut out all the same
                _log.error("tokens cannot be looked at", exc_info=error)

    def _trim(self) -> None:
        try:
            gone = self.engine.store.trim_cache(self.config.cache_size)
        except OSError as error:
            _log.warning("the cache of compiled programs cannot be trimmed: %s", error)
        else:
            if gone:
                _log.info(
                    "%d compiled programs were dropped from the cache, which may have %d bytes",
                    gone,
                    self.config.cache_size,
                )

    def _set_health(self, status: int) -> None:
        for name in ("", *self._names):
            self._health.set(name, status)


def _certificates(config: Config) -> _tls.Certificates | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    return _tls.Certificates(_tls.Files(config.tls_cert, config.tls_key, config.tls_client_ca))


def _door(config: Config, port: int, app: App) -> Door:
    """Where people and Prometheus look at a server.

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
        "devices": str(len(engine.devices)),
        "address": app.address,
    }
    catalogue = Catalogue(engine.store, engine.checks, Quarantine(engine.store.root, config.quarantine_after))
    status = Status(facts, lambda: app.state, app.metrics, history, catalogue)
    try:
        door = Door(config.metrics_host, port, {"/metrics": metrics_page(app.metrics.registry), **status.pages()})
    except OSError as error:
        raise OSError(f"cannot listen on {config.metrics_host}:{port} for metrics ({error})") from None
    history.start()
    return door


def run(config: Config, *, owner: int | None = None, ephemeral: bool = False, board: Board | None = None) -> int:
    """Serves until SIGTERM or SIGINT, then ends the process with 0; returns the exit code where it cannot start.

    Args:
        config: The settings.
        owner: A file descriptor whose end of file, too, stops the server at once: the pipe of a process that embeds it.
        ephemeral: Whether the store is of no use to anybody without that owner.
        board: Where a supervisor sees that this process lives, and what it does.
    """
    _logs.configure(config.log_level, config.log_format)
    for chatty in ("jax", "jaxlib"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))
    _keep_freed_memory()
    signalled = _signalled(signal.SIGTERM, signal.SIGINT)
    if owner is not None:
        threading.Thread(
            target=_die_with, args=(owner, config.store if ephemeral else None), name="hvpd-owner", daemon=True
        ).start()
    try:
        tracing = _tracing.start()
        app = App(config, board, tracing)
        door = None if config.metrics_port is None else _door(config, config.metrics_port, app)
    except (ServiceError, ValueError, OSError) as error:
        _logs.say(f"cannot start: {error}", logging.ERROR)
        return 1
    metrics_port = 0
    if door is not None:
        door.start()
        metrics_port = door.port
        _logs.say(f"metrics on http://{door.address}/metrics", address=door.address)
        _logs.say(f"status page on http://{door.address}/", address=door.address)
    if board is not None:
        threading.Thread(target=_beat, args=(board, app.port, metrics_port), name="hvpd-beat", daemon=True).start()
    app.start()
    device = app.engine.devices[0]
    _log.info("computing on %s: %d x %s", device.platform, len(app.engine.devices), device.kind)
    _logs.say(f"serving on {app.address}", address=app.address)
    os.read(signalled, 1)
    _logs.say("stopping")
    app.stop()
    if tracing is not None:
        tracing.close()
    _logs.say("stopped")
    # A product that never ends holds a thread that nothing can end, and an ordinary exit would wait for it.
    _logs.finish()
    os._exit(0)


def _signalled(*numbers: signal.Signals) -> int:
    """A descriptor from which a byte can be read once one of the signals came.

    What a handler in Python does may never happen: it runs in the main thread between two instructions, and a signal that comes just
    before that thread waits for a lock does not wake it. The byte is written by the handler in C, in whatever thread that runs.
    """
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda number, frame: None)
    return ours


def _keep_freed_memory() -> None:
    """Has the allocator keep what is freed, up to 512 MiB, where it is glibc's.

    As it comes, it returns buffers of a vector's size to the kernel, which clears every page again for the next vector: a third of
    the time of a product at n = 270,000. mallopt(3).
    """
    trim_threshold, mmap_threshold, most = -1, -3, 32 << 20  # 32 MiB is the most that glibc takes.
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # Another libc.
        return
    mallopt(mmap_threshold, most)
    mallopt(trim_threshold, 512 << 20)


def _die_with(owner: int, store: Path | None) -> None:
    """Ends this process when its owner is gone: its end of the pipe closes, or, where a fork of it holds that, it is re-parented."""
    parent = os.getppid()
    while True:
        readable, _, _ = select.select([owner], [], [], 1.0)
        if os.getppid() != parent or (readable and not os.read(owner, 1)):
            if store is not None:
                shutil.rmtree(store, ignore_errors=True)
            os._exit(0)


def _beat(board: Board, port: int, metrics_port: int) -> None:
    while True:
        board.beat(port, metrics_port)
        time.sleep(1.0)
