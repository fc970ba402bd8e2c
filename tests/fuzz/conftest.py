"""The number of tried examples: few and always the same ones here, or
$HVPD_FUZZ_EXAMPLES.
"""

import os

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
