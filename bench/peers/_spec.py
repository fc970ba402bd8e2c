"""What all peers serve: perceptrons on synthetic digits, by the part's name. This file
needs only NumPy, so that each peer's environment can import it.
"""

import dataclasses
import itertools
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Vector: TypeAlias = npt.NDArray[np.float32]
Multiply: TypeAlias = Callable[[Vector], Vector]
"""Multiplies a vector of shape (n,) with the Hessian; in process, also rows (k, n)."""

PART = "BENCH_PART"
"""Variable that names the size, for a peer's own processes."""

MOST = 16
"""Most callers, and the widest block of a peer that batches."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """A perceptron with tanh and cross entropy, as `bench._objectives.mlp` makes it."""

    part: str
    sizes: tuple[int, ...]
    rows: int

    @property
    def n(self) -> int:
        """Return the number of parameters."""
        return sum(a * b + b for a, b in itertools.pairwise(self.sizes))


SPECS = {
    spec.part: spec
    for spec in (
        Spec("6 k", (64, 82, 10), 500),
        Spec("270 k", (784, 256, 256, 10), 250),
        Spec("1.9 M", (784, 1024, 1024, 10), 100),
    )
}


@dataclasses.dataclass(frozen=True)
class Given:
    """A size with its numbers, as a caller gets them."""

    spec: Spec
    x: Vector
    """The point, of shape (n,)."""
    X: Vector
    labels: npt.NDArray[np.int32]


_FILE = "given.npz"


def give(folder: Path, x: Vector, X: Vector, labels: npt.NDArray[np.int32]) -> None:
    """Leave the numbers of a size in a folder."""
    np.savez(folder / _FILE, x=x, X=X, labels=labels)


def given(folder: Path, spec: Spec) -> Given:
    """Return the numbers that were left in a folder."""
    with np.load(folder / _FILE) as found:
        return Given(spec, found["x"], found["X"], found["labels"])


def vector(n: int, seed: int) -> Vector:
    """Return a vector of shape (n,), the same on each call."""
    return np.random.default_rng(1000 + seed).standard_normal(n, np.float32)


def as_vector(numbers: Any) -> Vector:
    """Return a peer's answer as an array of shape (n,)."""
    return np.asarray(numbers, np.float32).reshape(-1)


def free_port() -> int:
    """Return a port that is free now, for servers that cannot choose one themselves."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def listening(port: int, seconds: float = 60.0) -> None:
    """Wait until a port of this machine accepts connections.

    Raises:
        TimeoutError: It does not within so many seconds.
    """
    ends = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 5).close()
        except OSError:
            if time.monotonic() > ends:
                raise TimeoutError(f"nothing listens on port {port} after {seconds:g} s") from None
            time.sleep(0.05)
        else:
            return
