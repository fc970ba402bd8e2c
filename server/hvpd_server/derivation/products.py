"""The mathematics of the programs: products of a function's derivatives, in jax.

Each product is written for one vector. Its caller passes a way to batch it: `jax.vmap`,
or a loop for operations that cannot be vectorized.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from hvpd.v1 import objective_pb2, tensor_pb2

Function = Callable[..., Any]


def array_spec(array: Any) -> tensor_pb2.ArraySpec:
    """Shape and dtype, as on the wire."""
    return tensor_pb2.ArraySpec(dtype=np.dtype(array.dtype).name, shape=array.shape)


def hvp_of(fun: Function, mode: str) -> Callable[[Function], Function]:
    """Return hvp(x, V[k,n], *args) -> HV[k,n] in a mode, given a way to batch it."""
    one = _product_of(fun, mode)

    def batched(batch: Function) -> Function:
        def hvp(x: jax.Array, V: jax.Array, *args: jax.Array) -> Any:
            return batch(lambda v: one(x, v, *args))(V)

        return hvp

    return batched


def pairs_of(fun: Function, mode: str) -> Callable[[Function], Function]:
    """Return hvp_pairs(X[k,n], V[k,n], *args) -> H(x_i) v_i for each row.

    It multiplies at many points in one launch.
    """
    one = _product_of(fun, mode)

    def batched(batch: Function) -> Function:
        def hvp_pairs(X: jax.Array, V: jax.Array, *args: jax.Array) -> Any:
            return batch(lambda pair: one(*pair, *args))((X, V))

        return hvp_pairs

    return batched


def _product_of(fun: Function, mode: str) -> Function:
    """Return (x, v, *args) -> Hv in a mode."""

    def forward_over_reverse(x: jax.Array, v: jax.Array, *args: jax.Array) -> Any:
        # Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6
        # (1994).
        return jax.jvp(jax.grad(lambda x: fun(x, *args)), (x,), (v,))[1]

    def reverse_over_forward(x: jax.Array, v: jax.Array, *args: jax.Array) -> Any:
        return jax.grad(lambda x: jax.jvp(lambda x: fun(x, *args), (x,), (v,))[1].astype(x.dtype))(x)

    def reverse_over_reverse(x: jax.Array, v: jax.Array, *args: jax.Array) -> Any:
        return jax.grad(lambda x: jnp.vdot(jax.grad(lambda x: fun(x, *args))(x), v))(x)

    def finite_difference(x: jax.Array, v: jax.Array, *args: jax.Array) -> Any:
        # A central difference, whose step balances rounding and truncation: Nocedal and
        # Wright, Numerical Optimization (2006), section 8.1. Rounding of x + step u
        # decides how far the points really are apart; v = 0 needs some direction, and
        # gets H 0 = 0. v is first divided by its largest element, because squares of
        # small and of large elements leave the dtype's range.
        gradient = jax.grad(lambda x: fun(x, *args))
        largest = jnp.max(jnp.abs(v))
        scaled = v / jnp.where(largest > 0, largest, 1.0)
        size = jnp.linalg.norm(scaled)
        u = scaled / jnp.where(size > 0, size, 1.0)
        step = float(np.finfo(x.dtype).eps) ** (1 / 3) * (1 + jnp.linalg.norm(x))
        return (gradient(x + step * u) - gradient(x - step * u)) / (2 * step) * size * largest

    return {
        "reverse_over_forward": reverse_over_forward,
        "reverse_over_reverse": reverse_over_reverse,
        "finite_difference": finite_difference,
    }.get(mode, forward_over_reverse)


def linearized(
    fun: Function, specs: Sequence[jax.ShapeDtypeStruct]
) -> tuple[Function, Callable[[Function], Function], list[objective_pb2.Residual]]:
    """Split the product into a part that depends on x only and one that is linear in V.

    Returns:
        prepare(x, *args) -> (value, gradient, *results); apply(V, *residuals), given a
        way to batch; and the sources of apply's residuals. A residual that is an
        argument, such as a data matrix, is taken from there, so prepare need not copy
        it.
    """
    linear: list[Any] = []

    def prepare(x: jax.Array, *args: jax.Array) -> Any:
        def gradient_and_value(x: jax.Array) -> Any:
            value, gradient = jax.value_and_grad(fun)(x, *args)
            return gradient, value

        gradient, apply, value = jax.linearize(gradient_and_value, x, has_aux=True)
        residuals, treedef = jax.tree.flatten(apply)
        linear[:] = [treedef]
        return value, gradient, *residuals

    closed = jax.make_jaxpr(prepare)(*specs)
    inputs = {variable: position for position, variable in enumerate(closed.jaxpr.invars)}
    residuals = closed.jaxpr.outvars[2:]
    sources, kept = [], [0, 1]
    for output, variable in enumerate(residuals, start=2):
        position = None if isinstance(variable, jex.Literal) else inputs.get(variable)
        source = {"result": len(kept) - 2} if position is None else {"argument": position}
        sources.append(objective_pb2.Residual(spec=array_spec(variable.aval), **source))
        if position is None:
            kept.append(output)

    def prepare_shortened(x: jax.Array, *args: jax.Array) -> Any:
        outputs = jex.jaxpr_as_fun(closed)(x, *args)
        return tuple(outputs[output] for output in kept)

    prepare_shortened.__name__ = prepare_shortened.__qualname__ = "prepare"

    def apply_of(batch: Function) -> Function:
        def apply(V: jax.Array, *residuals: jax.Array) -> Any:
            return batch(jax.tree.unflatten(linear[0], residuals))(V)

        return apply

    return prepare_shortened, apply_of, sources


@dataclasses.dataclass(frozen=True)
class Stages:
    """A composite objective, traced: loss(model(x, *args), *args)."""

    model: Function
    """model(x, *args) -> z."""
    loss: Function
    """loss(z, *args) -> scalar."""
    arguments: int
    """Number of args."""
    rows: int | None
    """Rows of z if it is one array with a row for each example; else None."""
    reverse: bool = False
    """Whether only reverse mode is used, for functions in which jax forbids forward
    mode.
    """

    def whole(self, x: Any, *args: jax.Array) -> Any:
        """Return the value of the objective."""
        return self.loss(self.model(x, *args), *args)

    def through(self, view: Function, extra: int = 0) -> "Stages":
        """Return the stages as functions of another first argument.

        view(y, *args) -> (x, *args without the first `extra` ones).
        """
        return Stages(
            lambda y, *args: self.model(*view(y, *args)),
            lambda z, *args: self.loss(z, *args[extra:]),
            self.arguments + extra,
            self.rows,
            self.reverse,
        )


Middle = Callable[[Any, Any, Sequence[jax.Array]], Any]
"""A symmetric linear map in the space of model outputs: (z, J v, args) -> M J v."""


def curvatures_of(stages: Stages, composite: objective_pb2.Composite) -> dict[str, Callable[[Function], Function]]:
    """Return the Gauss-Newton and Fisher products of a composite, by program name.

    Each maps (x, V[k,n], *args) to [k,n], given how to batch.

    With z = model(x) and J its Jacobian, each is J' M J with a symmetric M in the space
    of z. For Gauss-Newton, M is the loss's Hessian in z. For the Fisher matrices, M is
    s E[g g'], row by row. Here g is the gradient of -log p, over the model's own
    distribution or at the targets. The factor s is 1 over the rows for a mean, else 1.

    Sources: Schraudolph, Fast curvature matrix-vector products, Neural Computation 14
    (2002); Martens, New insights and perspectives on the natural gradient method, JMLR
    21 (2020); Kunstner, Balles and Hennig, Limitations of the empirical Fisher
    approximation, NeurIPS (2019).
    """
    middles: dict[str, Middle] = {"ggn": loss_hessian(stages)}
    if stages.rows is not None:
        middles["empirical_fisher"] = _empirical(stages, composite)
    if composite.distribution:
        middles["fisher"] = _categorical(composite) if composite.distribution == "categorical" else _normal(composite)
        middles["sampled_fisher"] = _sampled(composite)
    return {name: _around(stages, middle) for name, middle in middles.items()}


def _around(stages: Stages, middle: Middle) -> Callable[[Function], Function]:
    """Return the program of J' middle J. A drawn middle takes its random key first."""

    def batched(batch: Function) -> Function:
        def multiply(x: jax.Array, V: jax.Array, *args: jax.Array) -> Any:
            own = args[len(args) - stages.arguments :]
            model: Function = lambda x: stages.model(x, *own)  # noqa: E731
            forward: Function
            backward: Function
            if stages.reverse:  # J v is the transpose of u -> J'u.
                z, backward = jax.vjp(model, x)
                transposed: Function = jax.linear_transpose(lambda u: backward(u)[0], z)
                forward = lambda v: transposed(v)[0]  # noqa: E731
            else:
                z, forward = jax.linearize(model, x)
                backward = jax.linear_transpose(forward, x)
            return batch(lambda v: backward(middle(z, forward(v), args))[0])(V)

        return multiply

    return batched


def loss_hessian(stages: Stages) -> Middle:
    """Multiply by the loss's Hessian in the model's output."""
    if stages.reverse:  # It is symmetric.
        return lambda z, Jv, args: jax.vjp(jax.grad(lambda z: stages.loss(z, *args)), z)[1](Jv)[0]
    return lambda z, Jv, args: jax.jvp(jax.grad(lambda z: stages.loss(z, *args)), (z,), (Jv,))[1]


def _outer(composite: objective_pb2.Composite, z: jax.Array, Jv: jax.Array, gradients: jax.Array) -> jax.Array:
    """Multiply row by row: s g (g . Jv)."""
    inner: jax.Array = jnp.sum(gradients * Jv, axis=tuple(range(1, z.ndim)), keepdims=True)
    return row_scale(composite, z.shape[0]) * gradients * inner


def _empirical(stages: Stages, composite: objective_pb2.Composite) -> Middle:
    def middle(z: jax.Array, Jv: jax.Array, args: Sequence[jax.Array]) -> jax.Array:
        gradients = jax.grad(lambda z: stages.loss(z, *args))(z) / row_scale(composite, z.shape[0])
        return _outer(composite, z, Jv, gradients)

    return middle


def _categorical(composite: objective_pb2.Composite) -> Middle:
    def middle(z: jax.Array, Jv: jax.Array, args: Sequence[jax.Array]) -> jax.Array:
        p: jax.Array = jax.nn.softmax(z, axis=-1)
        return row_scale(composite, z.shape[0]) * p * (Jv - jnp.sum(p * Jv, axis=-1, keepdims=True))

    return middle


def _normal(composite: objective_pb2.Composite) -> Middle:
    return lambda z, Jv, args: row_scale(composite, z.shape[0]) * Jv


def row_scale(composite: objective_pb2.Composite, rows: int) -> float:
    """Return the factor of each row's share in the loss: 1 over the rows for a mean,
    else 1.
    """
    return 1.0 / rows if composite.reduction == "mean" else 1.0


def keys_of(composite: objective_pb2.Composite, key: jax.Array) -> jax.Array:
    """Return one key for each sample, from the data of a threefry key."""
    return jax.random.split(jax.random.wrap_key_data(key, impl="threefry2x32"), composite.samples)


def drawn_gradient(composite: objective_pb2.Composite, z: jax.Array, key: jax.Array) -> jax.Array:
    """Return, row by row, the gradient of -log p in z at targets drawn from p.

    p is the model's own distribution.
    """
    if composite.distribution == "normal":
        return jax.random.normal(key, z.shape, z.dtype)
    labels = jax.random.categorical(key, z)
    return jax.nn.softmax(z) - jax.nn.one_hot(labels, z.shape[-1], dtype=z.dtype)


def _sampled(composite: objective_pb2.Composite) -> Middle:
    def middle(z: jax.Array, Jv: jax.Array, args: Sequence[jax.Array]) -> jax.Array:
        def draw(key: jax.Array) -> jax.Array:
            return _outer(composite, z, Jv, drawn_gradient(composite, z, key))

        return jnp.mean(jax.vmap(draw)(keys_of(composite, args[0])), axis=0)

    return middle
