"""The memory of programs on four devices that split x, or that hold it whole."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

_PROGRAM = r"""
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from hvpd._registration import export
from hvpd.v1 import objective_pb2
from hvpd_server.admission import vetting_process
from hvpd_server.derivation import compiling
from hvpd_server.importer.refusals import Limits

PROGRAMS = json.loads(sys.argv[1])
WIDTH, LAYERS = 96, 4
params = [{"w": np.ones((WIDTH, WIDTH)), "b": np.ones(WIDTH)} for _ in range(LAYERS)]

def loss(params, X):
    for layer in params:
        X = jnp.tanh(X @ layer["w"] + layer["b"])
    return jnp.mean(X**2)

found = {}
for sharded in (True, "parameters"):
    made = export.export(loss, params, (np.ones((16, WIDTH)),), platforms=("cpu",), precision="highest", sharded=sharded)
    bundle = objective_pb2.Bundle.FromString(bytes(made.blobs[made.digest]))
    parts = {name: bytes(made.blobs[program.digest]) for name, program in bundle.programs.items()}
    derivation = vetting_process.derivation_of({vetting_process.BUNDLE: bundle.SerializeToString(), **parts}, "cpu", Limits())
    target = compiling.Target(jax.devices())
    for name, width in PROGRAMS:
        compiled = compiling.compile_program(derivation.for_rows(0), name, width, target, 1, deterministic=False)
        memory = compiled.memory_analysis()
        size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        gathered = re.findall(r"= f64\[([0-9,]+)\]\S* all-gather\(", compiled.as_text())
        found[f"{name} {sharded}"] = [size / (8 * bundle.n), max(int(np.prod(list(map(int, each.split(","))))) for each in gathered or ["0"])]
"""


def measured(programs: Sequence[tuple[str, int]], more: str = "") -> dict[str, list[float]]:
    """Return figures of an objective's programs, by "NAME True" for a whole x and "NAME
    parameters" for a split one.

    The figures are the bytes of arguments, results and temporary arrays on each of four
    devices, over the bytes of x; and the elements of the largest array that is
    gathered.

    Args:
        programs: Names and widths of the programs.
        more: Code that runs afterwards, and may add to `found`.
    """
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    code = f"{_PROGRAM}\n{more}\nprint(json.dumps(found))"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(programs)],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found
