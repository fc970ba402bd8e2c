"""The one interface of all peers."""

import dataclasses
import importlib
from contextlib import AbstractContextManager
from typing import Literal, Protocol, cast

from bench.peers._spec import Given, Multiply, Spec

NAMES = (
    "own",
    "own_grpc",
    "um_bridge",
    "tesseract",
    "triton",
    "ray_serve",
    "bento",
    "curvlinops",
    "bare_grpc",
    "echo",
    "in_process",
)
"""The modules of the contenders, in the order of the tables."""


@dataclasses.dataclass(frozen=True)
class About:
    """The facts of a contender that need none of its libraries."""

    label: str
    kind: Literal["own", "peer", "floor"]
    x: Literal["on the server", "sent with every vector", "in process", "not used"]
    """Where x is. The data are in the process that computes."""
    batches: bool = False
    """Whether vectors of several callers share a launch."""
    installed: bool = False
    """Whether it has an environment of its own, with the packages of its text file."""
    system_python: bool = False
    """Whether that environment has the system's interpreter."""

    @property
    def in_process(self) -> bool:
        """Return whether there is no server."""
        return self.x == "in process"


class Peer(Protocol):
    """A module of this folder. Its libraries are imported in its functions only."""

    ABOUT: About

    def serving(self, spec: Spec) -> AbstractContextManager[str]:
        """Serve the product on a free port, and yield HOST:PORT. The server is warm."""

    def connect(self, address: str, given: Given) -> Multiply:
        """Return a function of one caller. It multiplies at x, by the server.

        In process there is no address, and vectors come as rows of shape (k, n). If it
        works otherwise between machines, the module also has `connect_far`.
        """


def peer(name: str) -> Peer:
    """Return a contender by its module's name."""
    return cast(Peer, importlib.import_module(f"bench.peers.{name}"))
