"""Copies between the host and the device, with pinned memory and without, and two
launches in flight.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import _timing
from bench._networks import perceptron
from bench._objectives import normal
from bench._programs import Programs
from bench._report import Figure
from bench.gpu._scale import Scale

PREDICTED = {
    "to the device, pageable": 10.0,
    "to the device, pinned": 45.0,
    "from the device, pageable": 10.0,
    "from the device, pinned": 45.0,
    "one after the other over two launches in flight": 1.2,
}
"""GB/s over PCIe 5 with 16 lanes, and a ratio. A pageable copy goes through the
driver's own pinned buffer. Two launches overlap one's copies with the other's
computation, which takes most of the time at this size.
"""


def run(scale: Scale) -> Iterator[Figure]:
    """Yield the rates of copies, and the gain of two launches in flight."""
    yield from _copies(scale)
    yield from _overlap(scale)


def _copies(scale: Scale) -> Iterator[Figure]:
    count = scale.of(64 << 20, 1 << 20) // 4
    host = normal(0, count)
    device = jax.devices()[0]
    on_device = jax.sharding.SingleDeviceSharding(device)
    array = jax.block_until_ready(jax.device_put(host, on_device))
    # jax keeps the host's copy of an array that it has read, so each read takes a new
    # array.
    changed = jax.jit(lambda array: array + 1)
    calls: dict[str, _timing.Call] = {
        "computing a new array": lambda: jax.block_until_ready(changed(array)),
        "to the device, pageable": lambda: jax.block_until_ready(jax.device_put(host, on_device)),
        "from the device, pageable": lambda: np.asarray(changed(array)),
    }
    if any(memory.kind == "pinned_host" for memory in device.addressable_memories()):
        on_host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        pinned = jax.block_until_ready(jax.device_put(array, on_host))
        calls["to the device, pinned"] = lambda: jax.block_until_ready(jax.device_put(pinned, on_device))
        calls["from the device, pinned"] = lambda: jax.block_until_ready(jax.device_put(array, on_host))
    times = {name: np.array(t) for name, t in _timing.interleave(calls, **_rounds(scale)).items()}
    computing = times.pop("computing a new array")
    times["from the device, pageable"] = np.maximum(times["from the device, pageable"] - computing, 1e-9)
    for name, predicted in PREDICTED.items():
        if name in times:
            rate = 4e-9 * count / times[name]
            yield scale.measured(f"copies: {name}", "GB/s", rate, n=count, predicted=predicted)
        elif "pinned" in name:
            yield scale.skipped(f"copies: {name}", "GB/s", "this device names no pinned memory", n=count)


def _overlap(scale: Scale) -> Iterator[Figure]:
    problem = scale.of(lambda: perceptron((784, 2048, 4096, 10), 1024), lambda: perceptron((64, 32, 10), 100))()
    programs = Programs(problem)
    product, vectors = programs.compiled("hvp", 1), [normal(seed, 1, problem.n) for seed in (5, 6)]
    x, arguments = programs.arguments

    def launched(v: Any) -> Any:
        result = product(x, jnp.asarray(v), *arguments)
        result.copy_to_host_async()
        return result

    def in_turn() -> object:
        return [np.asarray(launched(v)) for v in vectors]

    def in_flight() -> object:
        return [np.asarray(result) for result in [launched(v) for v in vectors]]

    times = _timing.interleave({"in turn": in_turn, "in flight": in_flight}, **_rounds(scale))
    ratio = np.array(times["in turn"]) / np.array(times["in flight"])
    name = "one after the other over two launches in flight"
    yield scale.measured(f"overlap: {name}", "", ratio, n=problem.n, predicted=PREDICTED[name])


def _rounds(scale: Scale) -> dict[str, Any]:
    return {"rounds": scale.rounds, "seconds": scale.seconds}
