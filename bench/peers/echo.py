"""The wire alone: a bare gRPC stream that sends the vector back, in messages of 1 MiB.
It multiplies nothing.
"""

import contextlib
from collections.abc import Iterator

from bench.peers._peer import About
from bench.peers._spec import Given, Multiply, Spec, Vector

ABOUT = About("bare gRPC echo, no product", "floor", "not used")


@contextlib.contextmanager
def serving(spec: Spec) -> Iterator[str]:
    """Start the echo of `bench._floor`."""
    from bench import _floor

    with _floor.echoing() as echo:
        yield echo.address


def connect(address: str, given: Given) -> Multiply:
    """Return a round trip of x's bytes."""
    from bench import _floor

    echo = _floor.StreamEcho(_floor.channel(address), given.x.tobytes())

    def multiply(v: Vector) -> Vector:
        echo()
        return v

    return multiply
