"""Calls of an engine, without a transport: points, products, refusals."""

import jax.numpy as jnp
import numpy as np
import pytest

from hvpd._wire import codec
from hvpd.v1 import curvature_pb2, objective_pb2
from hvpd_server.errors import Code, ServiceError

WAIT = 60
N, ROWS = 64, 200
HESSIAN = curvature_pb2.OPERATOR_HESSIAN
SPEC = curvature_pb2.ProductSpec(operator=HESSIAN)


def logistic(x, features, labels):
    return jnp.mean(jnp.logaddexp(0.0, -labels * (features @ x))) + 0.05 * jnp.sum(x**2)


def point_spec(example, x=None, data=None):
    """Return the spec of a point of an example: its own x or another, its own data or
    other tensors.
    """
    return curvature_pb2.PointSpec(
        objective_digest=example.export.digest,
        x_digest=codec.digest(codec.payload(example.x if x is None else x)),
        default_data=data is None,
        data=data or (),
    )


def create_point(engine, example, x=None, data=None):
    return engine.create_point(engine.locate(point_spec(example, x, data)), example.x if x is None else x)


def product_spec(point, k=1, operator=HESSIAN):
    return curvature_pb2.ProductSpec(point_id=point.id, operator=operator, k=k)


def vectors(width, seed=0, n=N):
    return np.random.default_rng([seed, width]).standard_normal((width, n))


def block(example, width, seed=0):
    """Return vectors of an example's size and dtype."""
    return vectors(width, seed, example.x.size).astype(example.x.dtype)


def multiply(engine, point, V, program="hvp", **settings):
    return engine.multiply(point, program, V, **settings)[0]


def launches(engine, program):
    return engine.metrics.registry.get_sample_value("hvpd_launches_total", {"program": program}) or 0


def refused(call, *args):
    with pytest.raises(ServiceError) as error:
        call(*args)
    return error.value


def refusal(code, reason, call, *args, **settings):
    """Return the error of a call that must be refused with a code and a reason."""
    with pytest.raises(ServiceError) as error:
        call(*args, **settings)
    assert (error.value.code, error.value.reason) == (code, reason)
    return error.value


def uploaded(engine, example, upload):
    """Upload all blobs of an example. Return the digest of its bundle."""
    for content in example.export.blobs.values():
        upload(engine.store, content)
    return example.export.digest


def upload_changed(engine, example, upload, program=None, **fields):
    """Upload an example with some fields of its bundle changed. Return the digest of
    the bundle.
    """
    bundle = objective_pb2.Bundle.FromString(example.bundle.SerializeToString())
    if program is not None:
        bundle.programs["objective"].CopyFrom(program)
    for name, value in fields.items():
        field = getattr(bundle, name)
        if hasattr(field, "CopyFrom"):
            field.CopyFrom(value)
        else:
            setattr(bundle, name, value)
    uploaded(engine, example, upload)
    return upload(engine.store, bundle.SerializeToString(deterministic=True))


def damage(store, digest):
    """Flip a bit of a blob on the disk."""
    path = store.root / "blobs" / digest[:2] / digest
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def compile_now(point, *programs):
    """Compile (program, width) now, so that the test knows the ready programs."""
    for name, width in programs:
        point.source.kernels.request(name, width).result()


def out_of_memory(*args):
    raise ServiceError(Code.RESOURCE_EXHAUSTED, "DEVICE_MEMORY", "the device is out of memory: 123 bytes wanted")
