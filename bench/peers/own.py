"""hvpd as users have it by default: on the server's machine, vectors take a Unix
socket, and large ones shared memory.

`python -m bench.peers.own ADDRESS PART` registers a size and warms its widths. It is a
process that ends, so that the memory of its jax does not count as the server's.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from bench.peers._peer import About
from bench.peers._spec import MOST, SPECS, Given, Multiply, Spec

ABOUT = About("hvpd", "own", "on the server", batches=True)


@contextlib.contextmanager
def serving(spec: Spec, *flags: str) -> Iterator[str]:
    """Start a server, and register."""
    from bench import _processes

    with _processes.serving(None, *flags) as server:
        address = _processes.address(server)
        subprocess.run([sys.executable, "-m", "bench.peers.own", address, spec.part], check=True, timeout=300)
        yield address


def connect(address: str, given: Given) -> Multiply:
    """Return the product of SciPy's operator."""
    import hvpd

    H = hvpd.connect(address).objective(_name(given.spec)).at(given.x).hessian()
    return lambda v: H @ v


def _name(spec: Spec) -> str:
    return f"bench/peers/{spec.n}"


def _register(address: str, spec: Spec) -> None:
    import hvpd
    from bench import _warm
    from bench._objectives import mlp

    with hvpd.connect(address) as client:
        problem = mlp(spec.sizes, spec.rows)
        objective = _warm.registered(client, problem, name=_name(spec))
        H = objective.at(problem.x).hessian()
        _warm.vectors(objective, H)
        _warm.blocks(objective, H, MOST)


if __name__ == "__main__":
    _register(sys.argv[1], SPECS[sys.argv[2]])
