"""An objective to register, and calls that admit or refuse its bundle."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from hvpd.v1 import objective_pb2, tensor_pb2
from hvpd_server.admission.vetting_process import BUNDLE, derive
from hvpd_server.bundle import (
    parse,
)
from hvpd_server.errors import Code, ServiceError
from hvpd_server.importer.refusals import Limits
from hvpd_server.importer.table import Refused

Spec = tensor_pb2.TreeSpec


class Pair(NamedTuple):
    first: Any
    second: Any


def _fun(x, data, rest):
    model = jnp.tanh(data["features"] @ x["w"]) @ x["b"] + jnp.mean(_CAPTURED * x["b"][0])
    return jnp.mean((model - data["labels"]) ** 2) + rest[0] * jnp.sum(x["w"] ** 2)


_CAPTURED = np.linspace(0, 1, 5000)  # Large enough to be lifted out of the program.


def copy(bundle):
    return objective_pb2.Bundle.FromString(bundle.SerializeToString())


def admit(bundle, made, replaced=None, platform="cpu"):
    """Check a bundle, and then read and differentiate its programs, as a registration
    does.

    Args:
        bundle: The bundle to admit.
        made: The export that has the programs.
        replaced: Other programs, by name.
        platform: Platform of the server's device.
    """
    parsed = parse(bundle.SerializeToString())
    parts = {name: bytes(made.blobs[program.digest]) for name, program in parsed.programs.items()} | (replaced or {})
    return derive({BUNDLE: bundle.SerializeToString(), **parts}, platform, Limits())


def refuse(bundle, code=Code.INVALID_ARGUMENT, reason="BUNDLE_INVALID"):
    """Return the message that refuses a bundle before its programs are read."""
    with pytest.raises(ServiceError) as refused:
        parse(bundle.SerializeToString())
    assert (refused.value.code, refused.value.reason) == (code, reason)
    return str(refused.value)


def refuse_programs(bundle, made, replaced=None, reason="BUNDLE_INVALID"):
    """Return the message that refuses a bundle whose programs do not fit it."""
    with pytest.raises(Refused) as refused:
        admit(bundle, made, replaced)
    assert refused.value.reason == reason
    return str(refused.value)


def text(arguments, results, body):
    return f"module {{ func.func public @main({arguments}) -> ({results}) {{ {body} }} }}".encode()
