"""Gather and scatter against jax's own, with indices in and out of bounds."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hvpd_server.importer.table import Refused
from tests.importer import round_trip


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


FAR = np.array([0, 2, -1, 7, -9, 2])
"""Indices inside and outside of an axis of 4, one of them twice."""

MODES = ("clip", "fill", "promise_in_bounds")

GATHERS: dict[str, Callable[[jax.Array], Any]] = {
    "rows": lambda x: x[np.array([0, 2, 2])],
    "elements": lambda x: x[np.array([0, 2]), np.array([1, -1])],
    "of each row": lambda x: jnp.take_along_axis(x, np.array([[0, 1], [2, 2], [1, 0], [0, 0]]), 1),
    "columns": lambda x: x[:, np.array([2, 0])],
    "computed": lambda x: x[jnp.argsort(x[:, 0])],
    "batched": lambda x: jax.vmap(lambda row, index: row[index])(x, np.array([[0, 1], [2, 2], [1, 0], [0, 0]])),
    "diagonal": jnp.diagonal,
    "empty": lambda x: x[np.zeros(0, int)].sum() + x.sum(),
}


def test_gathers() -> None:
    round_trip.assert_same(GATHERS, _normal(4, 3))


@pytest.mark.parametrize("mode", MODES)
def test_gathers_out_of_bounds(mode: str) -> None:
    """jax promises nothing about derivatives of indices that were promised to be in
    bounds, so only values are compared.
    """

    def take(x: jax.Array) -> jax.Array:
        return jnp.nan_to_num(x.at[FAR].get(mode=mode, fill_value=0.5, wrap_negative_indices=False))

    round_trip.assert_same({mode: take}, _normal(4, 3), derivatives=mode != "promise_in_bounds")


PUTS = [(update, "drop") for update in ("set", "add", "subtract", "multiply", "min", "max")] + [
    # Native jax gives NaN as second derivatives of an extreme whose indices are
    # clipped.
    (update, "clip")
    for update in ("set", "add", "subtract", "multiply")
]


@pytest.mark.parametrize(("update", "mode"), PUTS)
def test_scatters(update: str, mode: str) -> None:
    """Each row is updated at most once, since native jax leaves the order of updates
    open.
    """
    flags = {"unique_indices": True} if update == "multiply" else {}

    def put(x: jax.Array) -> jax.Array:
        unique = np.array([1, 3, 9]) if mode == "drop" else np.array([1, 2, 9])
        return getattr(jnp.sin(x).at[unique], update)(x[:3] ** 2, mode=mode, **flags)

    round_trip.assert_same({update: put}, _normal(4, 3), tolerance=1e-11)


@pytest.mark.parametrize("update", ["add", "subtract", "min", "max"])
def test_scatters_of_duplicates(update: str) -> None:
    def put(x: jax.Array) -> jax.Array:
        return getattr(jnp.sin(x).at[np.array([1, 1, 0, 7])], update)(x[:4] ** 2, mode="drop")

    round_trip.assert_same({update: put}, _normal(4, 3), tolerance=1e-11)


@pytest.mark.parametrize("update", ["min", "max"])
def test_ties_share_their_derivative(update: str) -> None:
    def put(x: jax.Array) -> jax.Array:
        return getattr(x.at[np.array([0, 1, 1])], update)(x[np.array([0, 2, 2])])

    round_trip.assert_same({update: put}, np.array([1.0, 2.0, 2.0, 3.0]))


@pytest.mark.parametrize("update", ["set", "add", "max"])
def test_scatter_flags_and_batches(update: str) -> None:
    def put(x: jax.Array) -> jax.Array:
        rows = jax.vmap(lambda row, index, value: getattr(row.at[index], update)(value))(
            x, np.array([[0, 1], [2, 1], [1, 0], [0, 2]]), x[:, :2] ** 2
        )
        flags = {"indices_are_sorted": True, "unique_indices": True}
        return getattr(rows.at[np.array([0, 3])], update)(jnp.cos(x[:2]), **flags)

    round_trip.assert_same({update: put}, _normal(4, 3), tolerance=1e-11)


def test_scatter_of_booleans() -> None:
    def put(x: jax.Array) -> jax.Array:
        return (x > 0).at[np.array([0, 1, 1])].max(x[:3] > 1)

    round_trip.assert_same({"booleans": put}, _normal(4, 3), derivatives=False)


_GATHER = """
func.func @main(%x: tensor<4x3xf64>, %i: tensor<{indices}xi32>) -> tensor<5x3xf64> {{
  %y = "stablehlo.gather"(%x, %i) <{{dimension_numbers = #stablehlo.gather<offset_dims = [1],
    collapsed_slice_dims = [0], start_index_map = [0], index_vector_dim = {axis}>, slice_sizes = array<i64: 1, 3>}}>
    : (tensor<4x3xf64>, tensor<{indices}xi32>) -> tensor<5x3xf64>
  return %y : tensor<5x3xf64>
}}
"""


@pytest.mark.parametrize(("shape", "axis"), [((5,), 1), ((1, 5), 0), ((5, 1), 1)])
def test_axis_of_index_vectors(shape: tuple[int, ...], axis: int) -> None:
    x, indices = _normal(4, 3), np.array([0, 3, -2, 8, 1], np.int32)
    module = _GATHER.format(indices="x".join(map(str, shape)), axis=axis)
    (found,) = round_trip.text(module, x, indices.reshape(shape))
    np.testing.assert_array_equal(found, x[[0, 3, 0, 3, 1]])


_DYNAMIC = """
func.func @main(%x: tensor<4x3xf64>, %i: tensor<2x1xi32>, %s: tensor<2xi32>) -> tensor<2x?x3xf64> {
  %y = "stablehlo.dynamic_gather"(%x, %i, %s) <{dimension_numbers = #stablehlo.gather<offset_dims = [1, 2],
    start_index_map = [0], index_vector_dim = 1>}>
    : (tensor<4x3xf64>, tensor<2x1xi32>, tensor<2xi32>) -> tensor<2x?x3xf64>
  return %y : tensor<2x?x3xf64>
}
"""


def test_known_slice_sizes() -> None:
    x, indices = _normal(4, 3), np.array([[0], [3]], np.int32)
    (found,) = round_trip.text(_DYNAMIC, x, indices, np.array([2, 3], np.int32))
    np.testing.assert_array_equal(found, np.stack([x[:2], x[2:]]))
    with pytest.raises(Refused, match="slice sizes depends on x or on data"):
        round_trip.text(_DYNAMIC, x, indices, jnp.array([2, 3], jnp.int32))


_SCATTER = """
func.func @main(%x: tensor<4xf64>, %i: tensor<2x1xi32>, %u: tensor<2xf64>) -> tensor<4xf64> {{
  %y = "stablehlo.scatter"(%x, %i, %u) <{{scatter_dimension_numbers = #stablehlo.scatter<
    inserted_window_dims = [0], scatter_dims_to_operand_dims = [0], index_vector_dim = 1>}}> ({{
    ^bb0(%a: tensor<f64>, %b: tensor<f64>):
      {body}
  }}) : (tensor<4xf64>, tensor<2x1xi32>, tensor<2xf64>) -> tensor<4xf64>
  return %y : tensor<4xf64>
}}
"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("%c = stablehlo.add %b, %a : tensor<f64> stablehlo.return %c : tensor<f64>", [11.0, 2.0, 3.0, 4.0]),
        ("stablehlo.return %b : tensor<f64>", [10.0, 2.0, 3.0, 4.0]),
    ],
)
def test_bodies(body: str, expected: list[float]) -> None:
    """The second index is outside, so its update is dropped."""
    arguments = np.arange(1.0, 5), np.array([[0], [9]], np.int32), np.array([10.0, 20.0])
    (found,) = round_trip.text(_SCATTER.format(body=body), *arguments)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("%c = stablehlo.subtract %b, %a : tensor<f64> stablehlo.return %c : tensor<f64>", "stablehlo.subtract"),
        ("%c = stablehlo.power %a, %b : tensor<f64> stablehlo.return %c : tensor<f64>", "stablehlo.power"),
        ("%c = stablehlo.add %a, %a : tensor<f64> stablehlo.return %c : tensor<f64>", "stablehlo.add"),
        ("stablehlo.return %a : tensor<f64>", "no operation"),
    ],
)
def test_unknown_bodies_are_refused(body: str, named: str) -> None:
    arguments = np.arange(1.0, 5), np.array([[0], [9]], np.int32), np.array([10.0, 20.0])
    with pytest.raises(Refused, match=rf"stablehlo.scatter.*body is not recognised \({named}\)"):
        round_trip.text(_SCATTER.format(body=body), *arguments)


def test_a_scatter_of_two_arrays_is_refused() -> None:
    module = """
    func.func @main(%x: tensor<4xf64>, %i: tensor<2x1xi32>, %u: tensor<2xf64>) -> tensor<4xf64> {
      %y:2 = "stablehlo.scatter"(%x, %x, %i, %u, %u) <{scatter_dimension_numbers = #stablehlo.scatter<
        inserted_window_dims = [0], scatter_dims_to_operand_dims = [0], index_vector_dim = 1>}> ({
        ^bb0(%a: tensor<f64>, %b: tensor<f64>, %c: tensor<f64>, %d: tensor<f64>):
          stablehlo.return %c, %d : tensor<f64>, tensor<f64>
      }) : (tensor<4xf64>, tensor<4xf64>, tensor<2x1xi32>, tensor<2xf64>, tensor<2xf64>) -> (tensor<4xf64>, tensor<4xf64>)
      return %y#0 : tensor<4xf64>
    }
    """
    with pytest.raises(Refused, match="of 2 arrays at once: expected one array"):
        round_trip.text(module, np.arange(4.0), np.array([[0], [9]], np.int32), np.zeros(2))


def test_the_gather_is_jax_s_with_clamped_indices() -> None:
    again = round_trip.imported(lambda x: x[np.array([0, 2])], jnp.ones((4, 3)))
    (gather,) = [each for each in jax.make_jaxpr(again)(jnp.ones((4, 3))).eqns if each.primitive.name == "gather"]
    assert gather.params["mode"] == lax.GatherScatterMode.CLIP
