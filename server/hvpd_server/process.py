"""The server's process: `run` starts the server, says when it is ready, and stops it on
SIGTERM or SIGINT without losing requests that have begun.
"""

import ctypes
import logging
import os
import select
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import NoReturn

from hvpd_server.admission.vetting import Vetter
from hvpd_server.app import App, http_server
from hvpd_server.config import Config, in_group
from hvpd_server.errors import ServiceError
from hvpd_server.liveness import Liveness
from hvpd_server.store.location import local_directory
from hvpd_server.telemetry import logs, tracing

_log = logging.getLogger(__name__)


def run(
    config: Config,
    vetter: Vetter,
    *,
    owner: int | None = None,
    ephemeral: bool = False,
    liveness: Liveness | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT, then end the process with 0. Return the exit code
    if the server cannot start.

    Args:
        config: The settings.
        vetter: Reads and compiles programs. The server closes it.
        owner: A file descriptor whose end of file, too, stops the server at once: the
            pipe of a process that embeds it.
        ephemeral: Whether the store is deleted when that owner is gone.
        liveness: Shows the supervisor that this process lives, and which work runs.
    """
    logs.configure(config.log_level, config.log_format)
    quiet()
    _keep_freed_memory()
    told = signalled(signal.SIGTERM, signal.SIGINT)
    if owner is not None:
        threading.Thread(
            target=die_with,
            args=(owner, local_directory(config) if ephemeral else None),
            name="hvpd-owner",
            daemon=True,
        ).start()
    formed = threading.Event()
    if in_group(config):
        threading.Thread(target=_stop_while_forming, args=(told, formed), name="hvpd-stop", daemon=True).start()
    try:
        spans = tracing.start()
        app = App(config, liveness, spans, vetter)
        http = None if config.metrics_port is None else http_server(config, config.metrics_port, app)
    except (ServiceError, ValueError, OSError) as error:
        logs.say(f"cannot start: {error}", logging.ERROR)
        vetter.close()
        if in_group(config):
            leave(1)  # An ordinary exit would wait for the other ranks.
        return 1
    formed.set()
    metrics_port = 0
    if http is not None:
        http.start()
        metrics_port = http.port
        logs.say(f"metrics on http://{http.address}/metrics", address=http.address)
        logs.say(f"status page on http://{http.address}/", address=http.address)
    if liveness is not None:
        threading.Thread(target=beat, args=(liveness, app.port, metrics_port), name="hvpd-beat", daemon=True).start()
    app.start()
    device = app.engine.devices[0]
    _log.info("computing on %s: %d x %s", device.platform, app.engine.device_count, device.kind)
    logs.say(f"serving on {app.address}", address=app.address)
    os.read(told, 1)
    logs.say("stopping")
    app.stop()
    if spans is not None:
        spans.close()
    logs.say("stopped")
    # An ordinary exit would wait for the thread of a product that never ends.
    logs.finish()
    os._exit(0)


def leave(code: int) -> NoReturn:
    """End the process at once, with an exit code."""
    logs.finish()
    os._exit(code)


def _stop_while_forming(told: int, formed: threading.Event) -> None:
    """End the process when a signal comes before its group is complete."""
    select.select([told], [], [])
    if not formed.is_set():
        logs.say("stopped")
        leave(0)


def quiet() -> None:
    """Keep what jax tells at INFO out of the log."""
    for chatty in ("jax", "jaxlib"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))


def signalled(*numbers: signal.Signals) -> int:
    """Return a descriptor from which a byte can be read once one of the signals has
    come.

    A handler in Python may never run. It runs in the main thread, between two
    instructions. If a signal comes just before that thread waits for a lock, the thread
    does not wake. The handler in C writes the byte, in any thread.
    """
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda number, frame: None)
    return ours


def _keep_freed_memory() -> None:
    """Make glibc's allocator keep up to 512 MiB of freed memory. See mallopt(3).

    By default the allocator returns buffers of a vector's size to the kernel, which
    clears every page again for the next vector. That is a third of the time of a
    product at n = 270,000.
    """
    trim_threshold, mmap_threshold, most = -1, -3, 32 << 20  # 32 MiB is the most that glibc takes.
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # Another libc.
        return
    mallopt(mmap_threshold, most)
    mallopt(trim_threshold, 512 << 20)


def die_with(owner: int, store: Path | None) -> None:
    """End this process when its owner is gone.

    Then the owner's end of the pipe closes. If a fork of the owner holds that end, this
    process gets another parent.
    """
    parent = os.getppid()
    while True:
        readable, _, _ = select.select([owner], [], [], 1.0)
        if os.getppid() != parent or (readable and not os.read(owner, 1)):
            if store is not None:
                shutil.rmtree(store, ignore_errors=True)
            os._exit(0)


def beat(liveness: Liveness, port: int, metrics_port: int) -> None:
    """Show the supervisor once a second that this process lives, and its ports."""
    while True:
        liveness.beat(port, metrics_port)
        time.sleep(1.0)
