"""The process of a rank of a group that is not the leader. It has no port for clients,
and executes the orders of the leader until the group ends.
"""

import logging
import os
import signal
import threading
from typing import NoReturn

from hvpd_server import process
from hvpd_server.config import Config
from hvpd_server.device import forming
from hvpd_server.errors import ServiceError
from hvpd_server.group.follower import RefusedError
from hvpd_server.group.replay import Replay
from hvpd_server.liveness import Liveness
from hvpd_server.store.location import objects_of
from hvpd_server.store.store import Store
from hvpd_server.telemetry import logs


def run(config: Config, *, owner: int | None = None, liveness: Liveness | None = None) -> NoReturn:
    """Serve as a rank until SIGTERM or SIGINT, or until the group ends. The exit code
    is 1 if the rank cannot join.

    Args:
        config: The settings.
        owner: A file descriptor whose end of file stops the process.
        liveness: Shows the supervisor that this process lives.
    """
    logs.configure(config.log_level, config.log_format)
    process.quiet()
    signalled = process.signalled(signal.SIGTERM, signal.SIGINT)
    threading.Thread(target=_stop, args=(signalled,), name="hvpd-stop", daemon=True).start()
    if owner is not None:
        threading.Thread(target=process.die_with, args=(owner, None), name="hvpd-owner", daemon=True).start()
    if liveness is not None:
        threading.Thread(target=process.beat, args=(liveness, 0, 0), name="hvpd-beat", daemon=True).start()
    try:
        store = Store(objects_of(config))
        follower, mesh = forming.follow(config, store)
    except (RefusedError, ServiceError, ValueError, OSError) as error:
        logs.say(f"cannot start: {error}", logging.ERROR)
        process.leave(1)  # An ordinary exit would wait for the other ranks.
    logs.say(f"rank {config.rank} of {config.size} is ready")
    follower.serve(Replay(mesh))


def _stop(signalled: int) -> None:
    """End the process when a signal comes: its main thread may be waiting for other
    ranks.
    """
    os.read(signalled, 1)
    logs.say("stopped")
    process.leave(0)
