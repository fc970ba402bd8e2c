"""The server serves objectives that clients with other versions of jax registered, and
their products are right.
"""

import base64
import json
from pathlib import Path

import numpy as np
import pytest

import hvpd
from hvpd.v1 import objective_pb2

FILES = sorted(Path(__file__).parent.glob("objective-jax-*.json"))


def test_both_ends_of_the_range_of_jax_are_here():
    assert {path.stem.removeprefix("objective-jax-").rpartition(".")[0] for path in FILES} >= {"0.10", "0.11"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_objective_of_another_jax_is_served(client, path):
    kept = json.loads(path.read_text())
    blobs = {digest: base64.b64decode(blob) for digest, blob in kept["blobs"].items()}
    for digest in client._transport.missing(list(blobs)):
        client._transport.upload(digest, blobs[digest])
    request = objective_pb2.CreateObjectiveRequest(digest=kept["digest"], name=f"compat/{path.stem.replace('.', '-')}")
    client._transport.unary(client._transport.channel.objectives.CreateObjective, request)
    objective = client.objective(kept["digest"])
    assert isinstance(objective, hvpd.Objective)
    found = objective.at(np.array(kept["x"])).hessian() @ np.eye(3)
    np.testing.assert_allclose(found, np.array(kept["hessian"]), rtol=1e-10, atol=1e-12)
