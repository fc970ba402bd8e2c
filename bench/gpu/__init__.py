"""Figures of an accelerator: the programs of networks, copies, products through a
server, callers, precision, memory, the cross-entropy of a large vocabulary, the same
host, and restarts.

On a machine without an accelerator the command runs small sizes. That shows that it
works. Its times are no figures then.
"""

from collections.abc import Iterator, Mapping

import jax

from bench._networks import NETWORKS
from bench._report import Figure
from bench.gpu import _others, copies, cross_entropy, networks, precision, served
from bench.gpu._scale import Part, Scale

_OF_PARTS: Mapping[str, Part] = {
    "copies": copies.run,
    "product": served.products,
    "callers": served.callers,
    "memory": served.memory,
    "precision": precision.run,
    "cross-entropy": cross_entropy.run,
    "samehost": _others.samehost,
    "restart": _others.restart,
}

PARTS = (*NETWORKS, *_OF_PARTS)
"""Parts that can run alone: the networks, then the others."""


def run(*, quick: bool, part: str | None = None) -> Iterator[Figure]:
    """Yield the figures of the networks and of the other parts, or of one part."""
    scale = Scale(small=jax.default_backend() == "cpu", quick=quick)
    if part is None or part in NETWORKS:
        yield from networks.run(scale, [part] if part else list(NETWORKS))
    for name, figures in _OF_PARTS.items():
        if part in (None, name):
            yield from figures(scale)
