"""The environment variables of hvpd. Finds misspelled ones."""

import difflib
import re
from collections.abc import Iterable

CLIENT = ("HVPD_ADDRESS", "HVPD_TOKEN", "HVPD_CA", "HVPD_CERT", "HVPD_KEY", "HVPD_PROFILE", "HVPD_PROFILES")
"""Variables that `connect` and the commands read."""

SERVER = tuple(
    f"HVPD_{name}"
    for name in (
        *(
            "HOST",
            "PORT",
            "METRICS_HOST",
            "METRICS_PORT",
            "VECTOR_PORT",
            "STORE",
            "STORE_CACHE",
            "STORE_CACHE_SIZE",
            "MEMORY_BUDGET",
            "CACHE_SIZE",
            "PROGRAM_MEMORY",
        ),
        *("MAX_BLOCK_WIDTH", "MAX_PENDING", "MAX_QUEUE_DELAY", "MAX_LAUNCHES", "MAX_CALLS", "DRAIN"),
        *("LAUNCH_TIMEOUT", "COMPILE_TIMEOUT", "QUARANTINE_AFTER", "LOG_LEVEL", "LOG_FORMAT"),
        *("TLS_CERT", "TLS_KEY", "TLS_CLIENT_CA", "TOKENS", "INSECURE", "CONFIG"),
        *("GROUP", "LEADER", "RANK", "SIZE"),
    )
)
"""Variables that `hvpd serve` reads: one for each setting, and one for their file."""

_OTHERS = re.compile(
    # Between hvpd's own processes; of its tests; of Kubernetes for a service "hvpd".
    "HVPD_(?:OWNED|SUPERVISOR|LIVENESS|FUZZ_EXAMPLES|FUZZ_COUNTS|LEAK_PRODUCTS|LONG|IMAGE_TEST|CRDS|(?:[A-Z0-9_]*_)?SERVICE_.*|PORT_.*)"
)


def unknown(names: Iterable[str]) -> list[str]:
    """Return a line for each variable that looks like one of hvpd's and is none."""
    known = (*CLIENT, *SERVER)
    lines = []
    for name in sorted(names):
        if not name.startswith("HVPD_") or name in known or _OTHERS.fullmatch(name):
            continue
        similar = difflib.get_close_matches(name, known, 1, 0.8)
        hint = f"did you mean ${similar[0]}?" if similar else "unset it, or correct its name"
        lines.append(f"hvpd does not know the environment variable ${name}: {hint}")
    return lines
