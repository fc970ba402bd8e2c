"""Vectors that are split by leaf, and what a device holds of them."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from hvpd_server.derivation.spread import cut
from hvpd_server.device.leaves import LeafProgram, Leaves

SHAPES = [(2, 3), (), (4,)]


@pytest.mark.parametrize("front", [(), (5,)])
def test_leaves_are_cut_and_joined_again(front):
    array = np.arange(11.0 * 5)[: 11 * (front or (1,))[0]].reshape(*front, 11)
    parts = cut(array, SHAPES)
    assert [part.shape for part in parts] == [(*front, *shape) for shape in SHAPES]
    assert all(np.shares_memory(part, array) for part in parts)
    joined = Leaves(list(map(jax.numpy.asarray, parts)), len(front)).block_until_ready()
    np.testing.assert_array_equal(np.asarray(joined), array)


def test_a_program_takes_and_returns_vectors_by_leaf():
    x, V, data = np.arange(11.0), np.arange(22.0).reshape(2, 11), np.ones(1)
    seen = []

    def compiled(*args):
        seen.append(args)
        return args[1] if len(args) == 3 else (np.float64(7), args[0])

    leaves = Leaves(cut(x, SHAPES), 0)
    np.testing.assert_array_equal(np.asarray(LeafProgram(compiled, SHAPES, 2)(leaves, V, data)), V)
    value, gradient = LeafProgram(compiled, SHAPES, 0)(leaves, data)
    assert value == 7
    np.testing.assert_array_equal(np.asarray(gradient), x)
    assert [args[-1] is data for args in seen] == [True, True]


MEASURE = """
import json
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from hvpd._registration import export
from hvpd.v1 import objective_pb2
from hvpd_server.admission import vetting_process
from hvpd_server.derivation import compiling
from hvpd_server.importer.refusals import Limits

WIDTH, LAYERS = 128, 6
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
    for name, width in (("value_and_grad", 0), ("hvp", 2)):
        compiled = compiling.compile_program(derivation.for_rows(0), name, width, target, 1, deterministic=False)
        memory = compiled.memory_analysis()
        size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        found[f"{name} {sharded}"] = size / (8 * bundle.n)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_device_holds_a_part_of_x_and_of_vectors():
    """The figures are bytes of arguments, results and temporary arrays on each of four
    devices, over the bytes of x.
    """
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["value_and_grad parameters"] < found["value_and_grad True"] / 3
    assert found["hvp parameters"] < found["hvp True"] / 3
