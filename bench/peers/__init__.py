"""The same products by other ways to serve them: UM-Bridge, Tesseract, PyTriton, Ray
Serve, BentoML, and curvlinops in process; with bare gRPC and jax in process as floors.

Each peer is one file with the interface of `_peer.Peer`. Its server and its callers run
in an environment of its own, which `_environments` makes. `_run` measures all of them
in turns.
"""

from collections.abc import Iterator

from bench._report import Figure
from bench.peers._spec import SPECS

BENCH = "peers"
INSTALL = "install"
PARTS = (INSTALL, *SPECS)
"""Parts that can run alone: the installations, which measure nothing, and the sizes."""


def run(*, quick: bool, part: str | None = None) -> Iterator[Figure]:
    """Yield the figures of each size."""
    from bench.peers import _run  # Peers import this package in environments without hvpd.

    if part == INSTALL:
        _run.install()
        return
    yield from _run.run(quick=quick, part=part)
