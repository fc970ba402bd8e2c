"""Which server of a fleet holds an objective: weighted rendezvous hashing.

Each client computes the same order of servers for an objective, without a word between
clients. Pure code: no connections, no state.

Source: Thaler and Ravishankar, "Using name-based mappings to increase hit rates",
IEEE/ACM Transactions on Networking 6 (1998); the weights are those of Schindelhauer and
Schomaker, SPAA (2005).
"""

import hashlib
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Keys: TypeAlias = "npt.NDArray[np.uint64]"

_MULTIPLIERS = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)
"""Multipliers of splitmix64's finalizer (Steele, Lea and Flood, OOPSLA 2014)."""


def key(text: str) -> np.uint64:
    """Return the key of an objective's digest, or of a server's id."""
    return np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


def scores(objectives: Keys, servers: Keys, weights: "npt.NDArray[np.float64]") -> "npt.NDArray[np.float64]":
    """Return the score of each server for each objective, of shape (objectives,
    servers). An objective belongs to the server with the highest score.

    A server's score depends on no other server. So a server that joins or leaves moves
    only the objectives that it gets or had.

    Args:
        objectives: Keys of objectives.
        servers: Keys of servers.
        weights: Positive weights of the servers. A server's share of the objectives is
            its share of the weights.
    """
    mixed = objectives[:, None] ^ servers
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= multiplier
    mixed ^= mixed >> np.uint64(31)
    uniform = (mixed >> np.uint64(11)).astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-53  # In (0, 1), so that no logarithm is 0 or infinite.
    found: npt.NDArray[np.float64] = np.log(uniform, out=uniform)
    return np.divide(-weights, found, out=found)


def order(objective: str, servers: Keys, weights: "npt.NDArray[np.float64]") -> "npt.NDArray[Any]":
    """Return the positions of the servers for one objective, the best first.

    Args:
        objective: Digest of the objective.
        servers: Keys of servers.
        weights: Positive weights of the servers.
    """
    found = scores(np.array([key(objective)]), servers, weights)[0]
    return np.argsort(-found, kind="stable")
