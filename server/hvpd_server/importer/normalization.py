"""Batch normalization, by the formulas of StableHLO's specification."""

import jax.numpy as jnp
import numpy as np

from hvpd_server.importer.table import Call, Value, operation


def _batch_norm(call: Call, x: Value, scale: Value, offset: Value, mean: Value, variance: Value) -> Value:
    """Normalize the features of x, which lie along one axis."""
    axes = _others(call, x)
    scale, offset, mean, variance = (jnp.expand_dims(each, axes) for each in (scale, offset, mean, variance))
    epsilon = np.asarray(call.attributes["epsilon"], x.dtype)
    return scale * ((x - mean) / jnp.sqrt(variance + epsilon)) + offset


def _others(call: Call, x: Value) -> tuple[int, ...]:
    """Return the axes of x that are not that of the features."""
    feature = call.attributes["feature_index"]
    if not 0 <= feature < x.ndim:
        raise call.refuse(f"with the feature_index {feature} of {x.ndim} axes")
    return tuple(axis for axis in range(x.ndim) if axis != feature)


@operation("stablehlo.batch_norm_inference", attributes=["epsilon", "feature_index"])
def _inference(call: Call) -> Value:
    return _batch_norm(call, *map(jnp.asarray, call.operands))


@operation("stablehlo.batch_norm_training", attributes=["epsilon", "feature_index"])
def _training(call: Call) -> list[Value]:
    x, scale, offset = map(jnp.asarray, call.operands)
    axes = _others(call, x)
    mean = jnp.mean(x, axes)
    variance = jnp.mean((x - jnp.expand_dims(mean, axes)) ** 2, axes)
    return [_batch_norm(call, x, scale, offset, mean, variance), mean, variance]
