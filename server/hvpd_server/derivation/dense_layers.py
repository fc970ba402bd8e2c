"""The dense layers of a model, found in its jaxpr, and their Kronecker factors.

A layer is y = a W + b: a `dot_general` of a leaf W of x with another operand a. A leaf
b may be added to the result. W and b must be used there only. a must have as many rows
as the model's output, or a multiple, and must depend on more than leaves of x: a value
that all examples share has no factors by rows. Layers inside a loop, a branch or a
function with its own derivative are not found.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from hvpd.v1 import objective_pb2
from hvpd_server.derivation.jaxprs import evaluate, inlined
from hvpd_server.derivation.layout import Layout
from hvpd_server.derivation.products import Stages, drawn_gradient, keys_of, loss_hessian, row_scale

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Dense:
    """A dense layer, y = a W + b."""

    message: objective_pb2.DenseLayer
    """Leaves of x in the layer."""
    equation: Any
    """The dot_general whose result is y."""
    operand: int
    """Position of a among the operands of the dot_general."""

    @property
    def contracted(self) -> int:
        """The axis of a that W multiplies."""
        axes: int = self.equation.params["dimension_numbers"][0][self.operand][0]
        return axes

    @property
    def channels(self) -> int:
        """The axis of y along which W's columns lie."""
        return -1 if self.operand == 0 else 0

    def rows_of_a(self, a: jax.Array, dtype: Any) -> jax.Array:
        """Return a[N,p], with a last column of ones if there is a bias.

        Its dtype is at least a given one, because half precision cannot hold sums.
        """
        rows = jnp.moveaxis(a, self.contracted, -1).reshape(-1, a.shape[self.contracted])
        rows = rows.astype(jnp.promote_types(rows.dtype, dtype))
        return jnp.pad(rows, ((0, 0), (0, 1)), constant_values=1) if self.message.HasField("bias") else rows

    def rows_of_y(self, y: jax.Array, dtype: Any) -> jax.Array:
        """Return y[N,q], with its rows in the order of a's and a dtype of at least a
        given one.
        """
        rows = jnp.moveaxis(y, self.channels, -1).reshape(-1, y.shape[self.channels])
        return rows.astype(jnp.promote_types(rows.dtype, dtype))


class _Uses:
    """The equations that read each variable of a jaxpr."""

    def __init__(self, jaxpr: Any) -> None:
        self._readers: dict[Any, list[Any]] = {}
        for equation in jaxpr.eqns:
            for atom in equation.invars:
                if not isinstance(atom, jex.Literal):
                    self._readers.setdefault(atom, []).append(equation)
        for atom in jaxpr.outvars:
            if not isinstance(atom, jex.Literal):
                self._readers.setdefault(atom, []).append(None)

    def only(self, variable: Any) -> Any:
        """Return the one equation that reads a variable; None if several do, or it is a
        result.
        """
        readers = self._readers.get(variable, ())
        return readers[0] if len(readers) == 1 else None

    def end(self, variable: Any, axes: tuple[int, ...]) -> tuple[Any, Any, tuple[int, ...]]:
        """Follow a variable through conversions, transpositions and broadcasts.

        Returns:
            The last variable, the equation that reads it, and the positions in it of
            `axes` of the first variable.
        """
        while (equation := self.only(variable)) is not None and (moved := _moved(equation, axes)) is not None:
            variable, axes = equation.outvars[0], moved
        return variable, equation, axes


def _moved(equation: Any, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the positions of axes after an operation that only moves elements, else
    None.
    """
    before, after = equation.invars[0].aval, equation.outvars[0].aval
    match equation.primitive.name:
        case "copy":
            moved = axes
        case "convert_element_type" if jnp.issubdtype(after.dtype, jnp.floating):
            moved = axes
        case "transpose":
            moved = tuple(equation.params["permutation"].index(axis) for axis in axes)
        case "broadcast_in_dim":
            moved = tuple(equation.params["broadcast_dimensions"][axis] for axis in axes)
        case "squeeze":
            kept = [axis for axis in range(before.ndim) if axis not in equation.params["dimensions"]]
            moved = tuple(kept.index(axis) for axis in axes if axis in kept)
        case "reshape" if equation.params["dimensions"] is None:
            moved = tuple(place for axis in axes for place in _reshaped(before.shape, after.shape, axis))
        case _:
            return None
    # Splitting or squeezing loses an axis; an axis of one element can be broadcast.
    same = [before.shape[axis] for axis in axes] == [after.shape[axis] for axis in moved]
    return moved if same else None


def _reshaped(before: Sequence[Any], after: Sequence[Any], axis: int) -> list[int]:
    """Return the position of an axis after a reshape; nothing if the axis is gone.

    The axis stays if it has as many elements in front of it as before.
    """
    front = math.prod(before[:axis])
    places = [place for place, size in enumerate(after) if size == before[axis]]
    return [place for place in places if math.prod(after[:place]) == front][-1:]


def layers_of(closed: Any, count: int) -> list[Dense]:
    """Return the dense layers of a traced model without nested jits, by their kernels.

    The model's first `count` arguments are the leaves of x.
    """
    leaves, z = closed.jaxpr.invars[:count], closed.out_avals[0]
    if 0 in z.shape:
        return []
    uses, given = _Uses(closed.jaxpr), _given(closed.jaxpr, count)
    biases = {}
    for position, leaf in enumerate(leaves):
        if leaf.aval.ndim == 1:
            end, equation, axes = uses.end(leaf, (0,))
            if equation is not None:
                biases[end, axes] = position
    found = []
    for position, leaf in enumerate(leaves):
        layer = _layer(uses, given, leaf, z.shape[0])
        if layer is None:
            continue
        layer.message.kernel = position
        bias = _bias(uses, layer, biases)
        if bias is not None:
            layer.message.bias = bias
        found.append(layer)
    return found


def _layer(uses: _Uses, given: set[Any], leaf: Any, rows: Any) -> Dense | None:
    """Return the layer of a kernel, without its leaves' positions.

    None if the kernel makes no layer of as many rows as the output, or a multiple.
    """
    if leaf.aval.ndim != 2 or not leaf.aval.size:
        return None
    kernel, equation, axes = uses.end(leaf, (0, 1))
    if equation is None or equation.primitive.name != "dot_general" or kernel.aval.ndim != 2:
        return None
    contracted, batched = equation.params["dimension_numbers"]
    operand = 1 - equation.invars.index(kernel)
    a, y = equation.invars[operand], equation.outvars[0]
    if any(batched) or len(contracted[0]) != 1 or a not in given or not jnp.issubdtype(y.aval.dtype, jnp.floating):
        return None
    own = math.prod(size for axis, size in enumerate(a.aval.shape) if axis != contracted[operand][0])
    if own % rows != 0:
        return None
    transposed = axes[0] != contracted[1 - operand][0]
    return Dense(objective_pb2.DenseLayer(transposed=transposed), equation, operand)


def _given(jaxpr: Any, count: int) -> set[Any]:
    """Return the variables that depend on more than the first `count` arguments."""
    found = {*jaxpr.constvars, *jaxpr.invars[count:]}
    for equation in jaxpr.eqns:
        if any(not isinstance(atom, jex.Literal) and atom in found for atom in equation.invars):
            found.update(equation.outvars)
    return found


def _bias(uses: _Uses, layer: Dense, biases: dict[tuple[Any, tuple[int, ...]], int]) -> int | None:
    """Return the position of the leaf that is added to y along its channels."""
    axes: tuple[int, ...]
    result, axes = layer.equation.outvars[0], (layer.channels % layer.equation.outvars[0].aval.ndim,)
    while True:  # Other additions on the way, as in residual layers, change nothing.
        result, equation, axes = uses.end(result, axes)
        if equation is None or equation.primitive.name != "add":
            return None
        other, total = equation.invars[1 - equation.invars.index(result)], equation.outvars[0]
        bias = None if isinstance(other, jex.Literal) else biases.get((other, axes))
        if bias is not None:
            return bias if other.aval.shape[axes[0]] == result.aval.shape[axes[0]] else None
        if total.aval.shape != result.aval.shape:
            return None
        result = total


@dataclasses.dataclass(frozen=True)
class Factors:
    """The Kronecker factors of a composite's dense layers, as functions to compile.

    A layer has A = mean over rows of a'a, and G = sum over rows of J'MJ, with J the
    derivative of the model's output in y. M is the loss's Hessian in that output. Or M
    comes from targets that are drawn from the model's distribution, and G belongs to
    the Fisher matrix. Sources: Martens and Grosse, Optimizing neural networks with
    Kronecker-factored approximate curvature, ICML (2015); for layers with more rows
    than examples, the expanding one of Eschenhagen and others, NeurIPS (2023).
    """

    stages: Stages
    """Composite in the leaves of x. Its model's output is one array with a row for each
    example.
    """
    layout: Layout
    """Specs of the leaves of x."""
    composite: objective_pb2.Composite
    """Message of the composite, with its distribution."""
    closed: Any
    """The model, traced, without nested jits."""
    layers: Sequence[Dense]
    """Layers of the model."""

    @classmethod
    def of(cls, stages: Stages, layout: Layout, args: Sequence[Any], composite: objective_pb2.Composite) -> "Factors":
        """Trace the model for arguments of these shapes and dtypes."""
        count = len(layout.leaves)
        closed = inlined(
            jax.make_jaxpr(lambda *inputs: stages.model(inputs[:count], *inputs[count:]))(*layout.leaves, *args)
        )
        return cls(stages, layout, composite, closed, layers_of(closed, count))

    def programs(self) -> dict[str, Function]:
        """Return the programs by name; none if there is no dense layer."""
        if not self.layers:
            return {}
        if not self.composite.distribution:
            return {"kfac": self.kfac}
        return {"kfac": self.kfac, "sampled_kfac": self.sampled_kfac}

    def kfac(self, x: jax.Array, *args: jax.Array) -> tuple[jax.Array, ...]:
        """Return A and G of each layer, from the loss's Hessian."""
        z, backward, rows = self._linearized(x, args)
        outputs, hessian = math.prod(z.shape[1:]), loss_hessian(self.stages)

        def column(output: jax.Array) -> list[jax.Array]:
            # One output of every row at once, because rows are independent.
            unit = jnp.broadcast_to(jnp.arange(outputs) == output, (z.shape[0], outputs)).reshape(z.shape)
            left, right = backward(unit.astype(z.dtype)), backward(hessian(z, unit.astype(z.dtype), args))
            return [u.T @ w for u, w in zip(left, right, strict=True)]

        return _interleaved(x.dtype, rows, [(G + G.T) / 2 for G in _sum(column, jnp.arange(outputs))])

    def sampled_kfac(self, x: jax.Array, key: jax.Array, *args: jax.Array) -> tuple[jax.Array, ...]:
        """Return A and G of each layer, from drawn targets."""
        z, backward, rows = self._linearized(x, args)
        weight = row_scale(self.composite, z.shape[0]) / self.composite.samples

        def draw(key: jax.Array) -> list[jax.Array]:
            return [weight * g.T @ g for g in backward(drawn_gradient(self.composite, z, key))]

        return _interleaved(x.dtype, rows, _sum(draw, keys_of(self.composite, key)))

    def _linearized(self, x: jax.Array, args: Sequence[jax.Array]) -> tuple[Any, Function, list[jax.Array]]:
        """Return z, the function u -> rows of J'u of each layer, and the rows of a."""
        by_equation = {id(layer.equation): index for index, layer in enumerate(self.layers)}

        def forward(nudges: Sequence[jax.Array]) -> Any:
            rows: list[Any] = [None] * len(self.layers)

            def tap(equation: Any, operands: Sequence[Any], outputs: list[Any]) -> list[Any]:
                index = by_equation.get(id(equation))
                if index is None:
                    return outputs
                rows[index] = self.layers[index].rows_of_a(operands[self.layers[index].operand], x.dtype)
                return [outputs[0] + nudges[index]]

            (z,) = evaluate(self.closed, [*self.layout.split(x), *args], tap=tap)
            return z, rows

        results = (layer.equation.outvars[0].aval for layer in self.layers)
        z, backward, rows = jax.vjp(forward, [jnp.zeros(y.shape, y.dtype) for y in results], has_aux=True)

        def backward_rows(u: jax.Array) -> list[jax.Array]:
            return [layer.rows_of_y(g, x.dtype) for layer, g in zip(self.layers, backward(u)[0], strict=True)]

        return z, backward_rows, rows


def _interleaved(dtype: Any, rows: Sequence[jax.Array], Gs: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Return A_0, G_0, A_1, ..."""
    As = [a.T @ a / a.shape[0] for a in rows]
    return tuple(factor.astype(dtype) for pair in zip(As, Gs, strict=True) for factor in pair)


def _sum(function: Callable[[jax.Array], list[jax.Array]], over: jax.Array) -> list[jax.Array]:
    """Return the sums of the results of `function` for each element, one after the
    other.
    """

    def add(sums: list[jax.Array], element: jax.Array) -> tuple[list[jax.Array], None]:
        return [total + more for total, more in zip(sums, function(element), strict=True)], None

    zeros = [jnp.zeros(result.shape, result.dtype) for result in jax.eval_shape(function, over[0])]
    sums: list[jax.Array] = jax.lax.scan(add, zeros, over)[0]
    return sums
