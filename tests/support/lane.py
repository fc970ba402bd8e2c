"""Calls of an engine in the tests of its lanes."""

import jax.numpy as jnp
import numpy as np
import pytest

from hvpd._wire import codec
from hvpd.v1 import curvature_pb2
from hvpd_server.errors import Code, ServiceError

WAIT = 60
N, ROWS = 64, 200
SPEC = curvature_pb2.ProductSpec(operator=curvature_pb2.OPERATOR_HESSIAN)


def logistic(x, features, labels):
    return jnp.mean(jnp.logaddexp(0.0, -labels * (features @ x))) + 0.05 * jnp.sum(x**2)


def create_point(engine, example, x=None):
    x = example.x if x is None else x
    digest = codec.digest(codec.payload(x))
    spec = curvature_pb2.PointSpec(objective_digest=example.export.digest, x_digest=digest, default_data=True)
    return engine.create_point(engine.locate(spec), x)


def vectors(width, seed=0, n=N):
    return np.random.default_rng([seed, width]).standard_normal((width, n))


def multiply(engine, point, V, program="hvp"):
    return engine.multiply(point, program, V)[0]


def refused(call, *args):
    with pytest.raises(ServiceError) as error:
        call(*args)
    return error.value


def compile_now(point, *programs):
    for name, width in programs:
        point.source.kernels.request(name, width).result()


def out_of_memory(*args):
    raise ServiceError(Code.RESOURCE_EXHAUSTED, "DEVICE_MEMORY", "the device is out of memory: 123 bytes wanted")
