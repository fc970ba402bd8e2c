"""Matrix products, Cholesky factors and triangular systems of StableHLO against jax's
own.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from hvpd_server.importer import evaluate, reader
from hvpd_server.importer.table import Refused
from tests.importer import round_trip


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


PRODUCTS = {
    "matrices": lambda x: x @ _normal(3, 4),
    "vectors": lambda x: jnp.tanh(x[0]) @ x[1],
    "squares": lambda x: x.T @ jnp.sin(x),
    "batches": lambda x: jnp.einsum("bij,bjk->bik", jnp.stack([x, x**2]), _normal(2, 3, 5)),
    "batch in the middle": lambda x: jnp.einsum("ibj,kbj->bik", jnp.stack([x, jnp.cos(x)], 1), _normal(4, 2, 3)),
    "outer": lambda x: jnp.einsum("ij,kl->ijkl", x, x),
    "wider result": lambda x: lax.dot_general(
        x.astype(jnp.float32), x.astype(jnp.float32), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float64
    ),
}


def test_products() -> None:
    round_trip.assert_same(PRODUCTS, _normal(2, 3))


def test_product_of_integers() -> None:
    round_trip.assert_same({"product": lambda x: x @ x.T}, np.arange(6).reshape(2, 3), derivatives=False)


@pytest.mark.parametrize(
    ("stated", "asked", "expected"),
    [
        (None, "highest", ("HIGHEST", "HIGHEST")),
        (None, "default", ("DEFAULT", "DEFAULT")),
        (None, "high", ("HIGH", "HIGH")),
        ("high", "highest", ("HIGH", "HIGH")),
        (("highest", "default"), "high", ("HIGHEST", "HIGH")),
    ],
)
def test_precision(stated: str, asked: str, expected: tuple[str, str]) -> None:
    """The program's own precision counts. DEFAULT is replaced by the precision that the
    registration requests.
    """

    def product(x: jax.Array) -> jax.Array:
        return lax.dot(x, x, precision=stated)

    spec = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    module = reader.read(bytes(export.export(jax.jit(product))(spec).serialize()))
    jaxpr = jax.make_jaxpr(evaluate.function(module, precision=asked))(jnp.ones((2, 2), jnp.float32))
    (found,) = {equation.params["precision"] for equation in jaxpr.eqns if equation.primitive.name == "dot_general"}
    assert tuple(str(each) for each in found) == expected


def test_an_unknown_precision_is_a_mistake_of_the_caller() -> None:
    spec = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    module = reader.read(bytes(export.export(jax.jit(lambda x: x @ x))(spec).serialize()))
    with pytest.raises(Refused, match="precision is 'bf16': expected one of default, high, highest"):
        evaluate.function(module, precision="bf16")(jnp.ones((2, 2), jnp.float32))


def test_an_algorithm_is_refused() -> None:
    def product(x: jax.Array) -> jax.Array:
        return lax.dot(x, x, precision="F32_F32_F32")

    with pytest.raises(Refused, match=r"dot_general.*with an algorithm: expected a precision_config"):
        round_trip.imported(product, jnp.ones((2, 2), jnp.float32))(jnp.ones((2, 2), jnp.float32))


def test_older_form_of_a_product() -> None:
    x, y = _normal(2, 3), _normal(3, seed=1)
    (found,) = round_trip.text(
        "func.func @main(%0: tensor<2x3xf64>, %1: tensor<3xf64>) -> tensor<2xf64> {"
        "%2 = stablehlo.dot %0, %1 : (tensor<2x3xf64>, tensor<3xf64>) -> tensor<2xf64> return %2 : tensor<2xf64>}",
        x,
        y,
    )
    np.testing.assert_allclose(found, x @ y, rtol=1e-15)


def _cholesky(*, lower: bool) -> str:
    return (
        "func.func @main(%0: tensor<2x3x3xf64>) -> tensor<2x3x3xf64> {"
        f"%1 = stablehlo.cholesky %0, lower = {str(lower).lower()} : tensor<2x3x3xf64> "
        "return %1 : tensor<2x3x3xf64>}"
    )


@pytest.mark.parametrize("lower", [True, False])
def test_cholesky_reads_one_triangle(lower: bool) -> None:
    root = _normal(2, 3, 3)
    a = root @ root.swapaxes(-1, -2) + np.eye(3)
    (found,) = round_trip.text(_cholesky(lower=lower), np.tril(a) if lower else np.triu(a))
    factor = np.linalg.cholesky(a)
    np.testing.assert_allclose(found, factor if lower else factor.swapaxes(-1, -2), rtol=1e-12, atol=1e-14)


def _definite(x: jax.Array) -> jax.Array:
    return x @ x.T + 3 * jnp.eye(x.shape[0])


@pytest.mark.parametrize("lower", [True, False])
def test_cholesky_derivatives(lower: bool) -> None:
    run = evaluate.function(reader.read(_cholesky(lower=lower)))

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(run(jnp.stack([_definite(x), 2 * _definite(x)]))[0]))

    def native(x: jax.Array) -> jax.Array:
        factor = jnp.linalg.cholesky(jnp.stack([_definite(x), 2 * _definite(x)]))
        return jnp.sum(jnp.sin(factor if lower else factor.swapaxes(-1, -2)))

    x = jnp.asarray(_normal(3, 3))
    for derivative in (jax.grad, jax.hessian):
        found, expected = jax.jit(derivative(loss))(x), jax.jit(derivative(native))(x)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("left_side", "transpose", "unit"),
    [(True, "none", False), (False, "none", True), (True, "transpose", True), (False, "adjoint", False)],
)
def test_triangular_systems(left_side: bool, transpose: str, unit: bool) -> None:
    """cuda's lowering is the operation of StableHLO; the CPU's is a routine of
    LAPACK.
    """

    def solve(x: jax.Array) -> jax.Array:
        a = (_definite(x) + 1j * jnp.sin(x)) if transpose == "adjoint" else _definite(x)
        return jnp.abs(
            lax.linalg.triangular_solve(
                a,
                jnp.cos(x).astype(a.dtype),
                left_side=left_side,
                lower=unit,
                transpose_a=transpose != "none",
                conjugate_a=transpose == "adjoint",
                unit_diagonal=unit,
            )
        )

    round_trip.assert_same({"solve": solve}, _normal(3, 3), tolerance=1e-10)
