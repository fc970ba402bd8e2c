"""UM-Bridge's own Python server and client, with ApplyHessian.

The protocol sends x with every vector, and all numbers as JSON. On the server's machine
the client can put x and the product into shared memory. The callers take the way that
is quicker here.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.peers._peer import About
from bench.peers._spec import MOST, Given, Multiply, Spec, as_vector, free_port, listening

ABOUT = About("UM-Bridge", "peer", "sent with every vector", installed=True)
_MODEL = "hessian"


@contextlib.contextmanager
def serving(spec: Spec) -> Iterator[str]:
    """Serve in this process, on loopback only, without the checks of each number."""
    from aiohttp import web
    from umbridge import um

    from bench.peers._kernel import Kernel

    kernel = Kernel(spec, most=1)

    class Model(um.Model):  # type: ignore[misc]  # the library has no types
        def get_input_sizes(self, config: Any = None) -> list[int]:
            return [spec.n]

        def get_output_sizes(self, config: Any = None) -> list[int]:
            return [1]

        def apply_hessian(
            self, out: int, in1: int, in2: int, parameters: Any, sens: Any, vec: Any, config: Any = None
        ) -> list[float]:
            x, v = (np.array(numbers, np.float32) for numbers in (parameters[0], vec))
            return (sens[0] * kernel.multiply(x, v)).tolist()  # type: ignore[no-any-return]  # of an array

        def supports_apply_hessian(self) -> bool:
            return True

    port = free_port()
    um.web.run_app = functools.partial(web.run_app, host="127.0.0.1", handle_signals=False, print=None)
    threading.Thread(
        target=um.serve_models,
        args=([Model(_MODEL)], port),
        kwargs={"max_workers": MOST, "error_checks": False},
        daemon=True,
    ).start()
    listening(port)
    yield f"127.0.0.1:{port}"


def connect(address: str, given: Given) -> Multiply:
    """Return ApplyHessian."""

    def seconds(multiply: Multiply) -> float:
        multiply(given.x)
        started = time.perf_counter()
        multiply(given.x)
        return time.perf_counter() - started

    return min((_way(address, given, shared=shared) for shared in (False, True)), key=seconds)


def connect_far(address: str, given: Given) -> Multiply:
    """Return ApplyHessian as it is between machines."""
    return _way(address, given, shared=False)


def _way(address: str, given: Given, *, shared: bool) -> Multiply:
    import umbridge

    x = [given.x.tolist()]
    model = umbridge.HTTPModel(f"http://{address}", _MODEL, use_shmem=shared)
    return lambda v: as_vector(model.apply_hessian(0, 0, 0, x, [1.0], v.tolist()))
