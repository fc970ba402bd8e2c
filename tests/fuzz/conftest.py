"""How much is tried: little and always the same here, as much as one likes with $HVPD_FUZZ_EXAMPLES, and how much it was."""

import collections
import os

import pytest
from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("HVPD_FUZZ_EXAMPLES", "0"))

for name, few, cost in (("fuzz", 150, 1), ("fuzz-calls", 60, 10), ("fuzz-slow", 12, 200)):
    settings.register_profile(
        name,
        max_examples=max(EXAMPLES // cost, few),
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )

_tried: "collections.Counter[str]" = collections.Counter()


@pytest.fixture(scope="session")
def tried():
    """Counts inputs: tried("messages")."""
    return lambda what, count=1: _tried.update({what: count})


def pytest_terminal_summary(terminalreporter):
    if _tried:
        terminalreporter.section("inputs tried")
        for what, count in sorted(_tried.items()):
            terminalreporter.write_line(f"{count:>10,}  {what}")
