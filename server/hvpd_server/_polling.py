"""Which threads of gRPC's wait for its sockets: those that serve. Knows nothing but gRPC's own setting for that.

From 1.80 on, gRPC in Python waits in threads of its "event engine", which hand what arrives to those that serve: one wake-up more
each way. As before 1.80, without it, a bare stream echo of 24 KiB takes 0.31 ms in place of 0.40 on two cores.
"""

import importlib.metadata
from collections.abc import Mapping

VARIABLE = "GRPC_EXPERIMENTS"
"""Read by gRPC when it is imported."""

_WITHOUT_EVENT_ENGINE = "-event_engine_client,-event_engine_listener"

_FIRST, _LAST = (1, 80), (1, 85)
"""Of the versions of gRPC that have an event engine and can do without, as was tried: others are left as they are."""


def settings(environment: Mapping[str, str], version: str = "") -> dict[str, str]:
    """What to put into the environment of a server before gRPC is imported; nothing where the operator said something else.

    Args:
        environment: As it is.
        version: Of gRPC; the installed one's without.
    """
    if VARIABLE in environment or not _FIRST <= _numbers(version or importlib.metadata.version("grpcio")) <= _LAST:
        return {}
    return {VARIABLE: _WITHOUT_EVENT_ENGINE}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
