"""Operators of PyTorch as jax functions with PyTorch's own derivatives. Needs jax.

torchax has a jax function for every operator. Some of these have other derivatives than
PyTorch: at a kink, at a tie, or where a formula computes with |x| instead of x. The
functions here have PyTorch's. They use `where`, whose derivative is that of the chosen
branch, and functions with rules that jax marks. These operators are not decomposed.

Source: derivatives.yaml and FunctionsManual.cpp of PyTorch. test_torch_rules.py
compares each function with PyTorch.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import torch

_aten: Final[Any] = torch.ops.aten
_MEAN, _SUM = 1, 2
"""PyTorch's numbers of the reductions of a loss."""

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def _addmm(bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    # Without factors of 1, so that the server finds dense layers for K-FAC.
    product = a @ b
    product = product if alpha == 1 else alpha * product
    return product + (bias if beta == 1 else beta * bias)


def _abs(x: Any) -> Any:
    # The derivative at zero is 0; jax's is 1.
    return jnp.abs(x) if jnp.iscomplexobj(x) else jnp.where(x > 0, x, jnp.where(x < 0, -x, 0))


def _elu(x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    # At zero, the slope is the negative side's, and the curvature is zero.
    below = jnp.where(x < 0, x, 0)
    negative = alpha * scale * jnp.expm1(below * input_scale)
    return jnp.where(x < 0, negative, jnp.where(x > 0, scale, alpha * scale * input_scale) * x)


def _clamp(x: Any, low: Any = None, high: Any = None) -> Any:
    # The derivative at a bound is 1, as inside.
    found = x if low is None else jnp.where(x >= low, x, low)
    return found if high is None else jnp.where(found <= high, found, high)


def _hardtanh(x: Any, low: float = -1.0, high: float = 1.0) -> Any:
    # The derivative at a bound is 0, as outside.
    return jnp.where((x > low) & (x < high), x, jax.lax.stop_gradient(jnp.clip(x, low, high)))


def _hardsigmoid(x: Any) -> Any:
    return _hardtanh(x, -3.0, 3.0) / 6 + 0.5


def _hardswish(x: Any) -> Any:
    return jnp.where(x <= -3, jnp.zeros_like(x), jnp.where(x < 3, x * (x + 3) / 6, x))


def _leaky_relu(x: Any, slope: float = 0.01) -> Any:
    return jnp.where(x > 0, x, x * slope)


def _softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    return jnp.where(x * beta > threshold, x, jax.nn.softplus(x * beta) / beta)


def _log_sigmoid(x: Any) -> Any:
    return jax.nn.log_sigmoid(x), jnp.zeros_like(x)


def _max_dim(x: Any, dim: int, keepdim: bool = False) -> Any:
    return _at_index(x, jnp.argmax(x, dim, keepdims=True) if x.ndim else None, dim, keepdim)


def _min_dim(x: Any, dim: int, keepdim: bool = False) -> Any:
    return _at_index(x, jnp.argmin(x, dim, keepdims=True) if x.ndim else None, dim, keepdim)


def _median(x: Any) -> Any:
    # Elements that are equal to the median share its derivative.
    flat = x.reshape(-1)
    middle = jnp.sort(jax.lax.stop_gradient(flat))[(flat.size - 1) // 2]
    return jnp.sum(jnp.where(flat == middle, flat, 0)) / jnp.sum(flat == middle)


def _at_index(x: Any, index: Any, dim: int, keepdim: bool) -> Any:
    """Return the elements at an index with their index: only they have a derivative."""
    if index is None:
        return x, jnp.zeros_like(x, jnp.int64)
    values = jnp.take_along_axis(x, index, dim)
    return (values, index) if keepdim else (values.squeeze(dim), index.squeeze(dim))


def _vector_norm(x: Any, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:  # noqa: A002 - torch's name
    # Its derivatives at zero are zero.
    axes = tuple(dim) if isinstance(dim, Sequence) and len(dim) else dim if isinstance(dim, int) else None
    if jnp.iscomplexobj(x):
        raise NotImplementedError("the norm of complex numbers")
    if ord == 0:
        return jnp.sum(x != 0, axes, keepdims=keepdim).astype(x.dtype)
    if ord in (float("inf"), -float("inf")):
        reduce = jnp.max if ord > 0 else jnp.min
        return reduce(_abs(x), axes, keepdims=keepdim)
    if ord == 1:
        return jnp.sum(_abs(x), axes, keepdims=keepdim)
    powers = x * x if ord == 2 else _power_of_magnitude(x, ord)
    total = jnp.sum(powers, axes, keepdims=keepdim)
    positive = jnp.where(total > 0, total, 1)
    root = jnp.sqrt(positive) if ord == 2 else positive ** (1 / ord)
    return jnp.where(total > 0, root, 0)


def _power_of_magnitude(x: Any, exponent: float) -> Any:
    return jnp.where(x == 0, 0, jnp.abs(jnp.where(x == 0, 1, x)) ** exponent)


def _std(x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    # The derivative of a standard deviation of zero is zero.
    axes = tuple(dim) if isinstance(dim, Sequence) and len(dim) else None
    variance = jnp.var(x, axes, ddof=1 if correction is None else correction, keepdims=keepdim)
    return jnp.where(variance == 0, 0, jnp.sqrt(jnp.where(variance == 0, 1, variance)))


def _reduced(loss: Any, reduction: int) -> Any:
    return jnp.mean(loss) if reduction == _MEAN else jnp.sum(loss) if reduction == _SUM else loss


def _smooth_l1(x: Any, target: Any, reduction: int = _MEAN, beta: float = 1.0) -> Any:
    z = x - target
    if beta == 0:
        return _reduced(_abs(z), reduction)
    return _reduced(jnp.where(jnp.abs(z) < beta, z * z / (2 * beta), _abs(z) - beta / 2), reduction)


def _huber(x: Any, target: Any, reduction: int = _MEAN, delta: float = 1.0) -> Any:
    z = x - target
    # At the bounds, the derivative is that of the straight line.
    return _reduced(jnp.where(jnp.abs(z) < delta, z * z / 2, delta * (_abs(z) - delta / 2)), reduction)


def _pow_scalar(x: Any, exponent: float) -> Any:
    if exponent == int(exponent) and abs(exponent) < 1 << 20:
        return jax.lax.integer_pow(x, int(exponent))
    return jnp.power(x, exponent)


def _max_pool(
    x: Any, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> tuple[Any, None]:
    # Without the indices, which would be computed for nothing.
    from torchax.ops import jaten

    sides = [
        list(each) * (len(kernel) // len(each)) if isinstance(each, Sequence) else each for each in (padding, dilation)
    ]
    return jaten.max_pool(x, kernel, stride, *sides, ceil), None


def _guarded(found: Any, inside: Any) -> Any:
    """Return elements that were read at indices, and NaN for an index outside, where
    PyTorch raises an error.

    The factor makes the derivatives NaN, too. An integer becomes the smallest of its
    dtype, so that it is outside again if it is used as an index.
    """
    if not jnp.issubdtype(found.dtype, jnp.inexact):
        return jnp.where(inside, found, np.iinfo(found.dtype).min) if found.dtype != bool else found
    return found * jnp.where(inside, 1, jnp.nan).astype(found.dtype)


def _embedding(weight: Any, indices: Any, padding: int = -1, scale: bool = False, sparse: bool = False) -> Any:
    if scale:
        raise NotImplementedError(
            "scale_grad_by_freq=True, which makes the gradient another function than the derivative"
        )
    if padding >= 0:  # This row has no gradient.
        row = jnp.arange(weight.shape[0])[:, None] == padding
        weight = jnp.where(row, jax.lax.stop_gradient(weight), weight)
    inside = (indices >= 0) & (indices < weight.shape[0])
    return _guarded(weight.at[jnp.maximum(indices, 0)].get(mode="clip"), inside[..., None])


def _solve(a: Any, b: Any, *, left: bool = True, check_errors: bool = False) -> tuple[Any, Any, Any, Any]:
    vector = b.ndim == a.ndim - 1
    if not left:
        a, b = a.mT, b if vector else b.mT
    found = jnp.linalg.solve(a, b[..., None])[..., 0] if vector else jnp.linalg.solve(a, b)
    return found if left or vector else found.mT, None, None, jnp.zeros(a.shape[:-2], jnp.int32)


def _norm_of_rows(x: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float) -> tuple[Any, Any, Any]:
    """Normalize each channel by its own statistics: instance norm."""
    axes = (0, *range(2, x.ndim))
    mean = jnp.mean(x, axes, keepdims=True)
    scale = jax.lax.rsqrt(jnp.var(x, axes, keepdims=True) + eps)
    shape = (1, -1, *[1] * (x.ndim - 2))
    found = (x - mean) * scale
    found = found if weight is None else found * weight.reshape(shape)
    return found if bias is None else found + bias.reshape(shape), mean.reshape(-1), scale.reshape(-1)


def _gather(x: Any, dim: int, index: Any) -> Any:
    if not x.ndim:
        return jnp.broadcast_to(x, index.shape)
    places = list(jnp.indices(index.shape, sparse=True))
    places[dim] = jnp.maximum(index, 0)
    return _guarded(x.at[tuple(places)].get(mode="clip"), (index >= 0) & (index < x.shape[dim]))


def _index_select(x: Any, dim: int, index: Any) -> Any:
    if not x.ndim:
        return x
    found = jnp.take(x, jnp.maximum(index, 0), dim, mode="clip")
    inside = (index >= 0) & (index < x.shape[dim])
    return _guarded(found, jnp.expand_dims(inside.reshape(-1), range(1, x.ndim - dim % x.ndim)))


def _inside(x: Any, indices: Sequence[Any]) -> Any:
    """Return where indices are in range; None if one of them is a mask."""
    inside: Any = jnp.array(True)
    for axis, index in enumerate(indices):
        if index is None:
            continue
        if index.dtype in (bool, jnp.uint8):
            return None
        inside &= (index >= -x.shape[axis]) & (index < x.shape[axis])
    return inside


def _index(x: Any, indices: Sequence[Any]) -> Any:
    used = [axis for axis, index in enumerate(indices) if index is not None]
    places = tuple(slice(None) if index is None else index for index in indices)
    inside = _inside(x, indices)
    if inside is None:
        return x[places]
    found = x.at[places].get(mode="clip")
    # As in NumPy, the indices' axes come first in the result, unless all are adjacent.
    first = used[0] if used[-1] - used[0] < len(used) else 0
    return _guarded(found, jnp.expand_dims(inside, range(inside.ndim, found.ndim - first)))


def _index_put(x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False) -> Any:
    from torchax.ops import jaten

    inside = _inside(x, indices)
    found = jaten._aten_index_put(x, indices, values, accumulate)  # noqa: SLF001 - an operator's name
    return found if inside is None else _guarded(found, jnp.all(inside))


def _scatter(name: str) -> Callable[..., Any]:
    """Return torchax's function of this name, with NaN everywhere for an index outside.

    jax would leave out what is written there.
    """

    def scatter(x: Any, dim: int, index: Any, *arguments: Any, **options: Any) -> Any:
        from torchax.ops import jaten

        found = getattr(jaten, name)(x, dim, index, *arguments, **options)
        return _guarded(found, jnp.all((index >= 0) & (index < x.shape[dim])))

    return scatter


RULES: Final[dict[Any, Callable[..., Any]]] = {
    _aten.abs.default: _abs,
    _aten.addmm.default: _addmm,
    _aten.gather.default: _gather,
    _aten.index.Tensor: _index,
    _aten.index_select.default: _index_select,
    _aten.index_put.default: _index_put,
    _aten.scatter.src: _scatter("_aten_scatter_src"),
    _aten.scatter.value: _scatter("_aten_scatter"),
    _aten.scatter_add.default: _scatter("_aten_scatter_add"),
    _aten.scatter_reduce.two: _scatter("_aten_scatter_reduce"),
    _aten.elu.default: _elu,
    _aten.celu.default: lambda x, alpha=1.0: _elu(x, alpha, 1.0, 1.0 / alpha),
    _aten.detach.default: jax.lax.stop_gradient,
    _aten._native_batch_norm_legit.no_stats: _norm_of_rows,  # noqa: SLF001 - an operator's name
    _aten.selu.default: lambda x: _elu(x, _SELU_ALPHA, _SELU_SCALE),
    _aten._linalg_solve_ex.default: _solve,  # noqa: SLF001 - an operator's name
    _aten.clamp.default: _clamp,
    _aten.clamp.Tensor: _clamp,
    _aten.clamp_min.default: _clamp,
    _aten.clamp_min.Tensor: _clamp,
    _aten.clamp_max.default: lambda x, high: _clamp(x, None, high),
    _aten.clamp_max.Tensor: lambda x, high: _clamp(x, None, high),
    _aten.hardtanh.default: _hardtanh,
    _aten.relu6.default: lambda x: _hardtanh(x, 0.0, 6.0),
    _aten.hardsigmoid.default: _hardsigmoid,
    _aten.hardswish.default: _hardswish,
    _aten.leaky_relu.default: _leaky_relu,
    _aten.softplus.default: _softplus,
    _aten.log_sigmoid_forward.default: _log_sigmoid,
    _aten.logaddexp.default: jnp.logaddexp,
    _aten.max.dim: _max_dim,
    _aten.min.dim: _min_dim,
    _aten.median.default: _median,
    _aten.linalg_vector_norm.default: _vector_norm,
    _aten.std.correction: _std,
    _aten.smooth_l1_loss.default: _smooth_l1,
    _aten.huber_loss.default: _huber,
    _aten.pow.Tensor_Scalar: _pow_scalar,
    _aten.embedding.default: _embedding,
}
"""Functions in place of torchax's, by operator."""

WINDOWS: Final[dict[Any, Callable[..., Any]]] = {
    _aten.max_pool2d_with_indices.default: _max_pool,
    _aten.max_pool3d_with_indices.default: _max_pool,
}
"""Functions for operators whose second result, indices, nothing uses."""

DECOMPOSED: Final = (
    _aten.upsample_bilinear2d.vec,
    _aten.upsample_linear1d.vec,
    _aten.upsample_trilinear3d.vec,
    _aten.upsample_nearest1d.vec,
    _aten.upsample_nearest2d.vec,
    _aten.upsample_nearest3d.vec,
)
"""Operators that are no core operators, have no function in torchax, and are written
with others by PyTorch.
"""
