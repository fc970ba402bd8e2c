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
    """Return ApplyHessian, by the quicker way on this machine."""
    x = _numbers(given)
    if address not in _SHARED:
        _SHARED[address] = _seconds(address, x, shared=True) < _seconds(address, x, shared=False)
    return _way(address, x, shared=_SHARED[address])


def connect_far(address: str, given: Given) -> Multiply:
    """Return ApplyHessian as it is between machines."""
    return _way(address, _numbers(given), shared=False)


_SHARED: dict[str, bool] = {}
"""Whether shared memory is quicker, by the server's address."""

_X: dict[int, list[float]] = {}
"""x as the library takes it, by n: a list, which all callers of a process share."""

_LONG = 0.5
"""If the first product takes longer than so many seconds, it is not repeated."""


def _numbers(given: Given) -> list[float]:
    n = len(given.x)
    if n not in _X:
        _X[n] = given.x.tolist()
    return _X[n]


def _seconds(address: str, x: list[float], *, shared: bool) -> float:
    multiply, v, taken = _way(address, x, shared=shared), np.array(x, np.float32), _LONG
    for _ in range(2):
        started = time.perf_counter()
        multiply(v)
        taken = time.perf_counter() - started
        if taken > _LONG:
            break
    return taken


def _way(address: str, x: list[float], *, shared: bool) -> Multiply:
    import umbridge

    model = umbridge.HTTPModel(f"http://{address}", _MODEL, use_shmem=shared)
    return lambda v: as_vector(model.apply_hessian(0, 0, 0, [x], [1.0], v.tolist()))
