"""Custom calls that jax writes for a CPU and for a GPU are rebuilt with jax's own
derivatives. All others are refused.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
import pytest
from jax import export, lax

from hvpd_server.importer import evaluate, reader
from hvpd_server.importer.table import Refused, Report
from hvpd_server.importer.targets import TARGETS
from tests.importer import round_trip


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(autouse=True)
def _quick_compilation() -> Iterator[None]:
    """Compile without optimizing, because these programs are large and run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def _definite(x: jax.Array) -> jax.Array:
    return x @ x.T + jnp.eye(x.shape[0])


def _batch(x: jax.Array) -> jax.Array:
    return jnp.stack([_definite(x), _definite(jnp.sin(x))])


B = _normal(4, 2, seed=3)
SQUARE: dict[str, Callable[[jax.Array], Any]] = {
    "cholesky": lambda x: jnp.linalg.cholesky(_definite(x)),
    "cholesky, upper": lambda x: jnp.linalg.cholesky(_definite(x), upper=True),
    "lu": jax.scipy.linalg.lu,
    "solve": lambda x: jnp.linalg.solve(x, B),
    "solves": lambda x: jnp.linalg.solve(_batch(x), B),
    "inverse": jnp.linalg.inv,
    "logarithm of the determinant": lambda x: tuple(jnp.linalg.slogdet(x)),
    "definite solve": lambda x: jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(_definite(x)), B),
    "triangular": lambda x: jax.scipy.linalg.solve_triangular(_definite(x), B, lower=True),
    "triangular, transposed": lambda x: jax.scipy.linalg.solve_triangular(_definite(x), B, trans=1, unit_diagonal=True),
    "tridiagonal": lambda x: lax.linalg.tridiagonal_solve(
        jnp.zeros(4).at[1:].set(x[0, 1:]), 5 + jnp.sin(x[1]), jnp.zeros(4).at[:-1].set(x[2, 1:]), B
    ),
}
SPECTRAL: dict[str, Callable[[jax.Array], Any]] = {
    "symmetric eigenvalues": lambda x: jnp.linalg.eigvalsh(_definite(x)),
    "symmetric eigenvectors": lambda x: jnp.abs(jnp.linalg.eigh(_definite(x)).eigenvectors),
    "symmetric eigenvalues of batches": lambda x: jnp.linalg.eigh(_batch(x)).eigenvalues,
    "singular values": lambda x: jnp.linalg.svd(x, compute_uv=False),
    "singular vectors, tall": lambda x: jnp.abs(jnp.linalg.svd(x[:, :2], full_matrices=False).U),
    "singular vectors, wide": lambda x: jnp.abs(jnp.linalg.svd(x[:3], full_matrices=False).Vh),
    "singular values of batches": lambda x: jnp.linalg.svd(_batch(x)[..., :3], full_matrices=False).S,
    "pseudoinverse": lambda x: jnp.linalg.pinv(x[:, :3]),
    "complex": lambda x: jnp.linalg.svd(x + 1j * jnp.sin(x), compute_uv=False),
    "hermitian": lambda x: jnp.linalg.eigvalsh(_definite(x) + 1j * (x - x.T)),
}
QR: dict[str, Callable[[jax.Array], Any]] = {
    "square": lambda x: tuple(jnp.linalg.qr(x)),
    "tall": lambda x: tuple(jnp.linalg.qr(x[:, :3])),
    "tall, complete": lambda x: tuple(jnp.linalg.qr(x[:, :3], mode="complete")),
    "wide": lambda x: tuple(jnp.linalg.qr(x[:3])),
    "complex": lambda x: jnp.linalg.qr(x + 1j * jnp.sin(x)).R,
}


@pytest.mark.parametrize("functions", [SQUARE, SPECTRAL, QR], ids=["square", "spectral", "QR"])
def test_factorizations(functions: dict[str, Callable[[jax.Array], Any]]) -> None:
    round_trip.assert_same(functions, _normal(4, 4), tolerance=1e-9)


def test_eigenvalues() -> None:
    """Eigenvalues have a first derivative in jax; eigenvectors have none."""
    x = jnp.asarray(_normal(4, 4))
    again = round_trip.imported(jnp.linalg.eigvals, x)
    for derivative in (lambda f: f, jax.grad):
        found, expected = (
            derivative(lambda x, each=each: jnp.sum(jnp.abs(each(x)) ** 2))(x) for each in (again, jnp.linalg.eigvals)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-11)
    again = round_trip.imported(lambda x: jnp.abs(jnp.linalg.eig(x)[1]).sum(), jnp.eye(4))
    with pytest.raises(Refused, match="Derivatives of non-symmetric eigenvectors"):
        jax.grad(again)(jnp.asarray(_normal(4, 4)))


@pytest.mark.parametrize("shape", [(1030, 2), (2, 1030)])
def test_large_singular_values_on_a_gpu(shape: tuple[int, int]) -> None:
    """jax calls another routine for large matrices; it gives a wide matrix to the
    routine as its transpose.
    """

    def function(x: jax.Array) -> Any:
        u, s, v = jnp.linalg.svd(x, full_matrices=False)
        return s, (u * s) @ jnp.sin(v), jnp.linalg.svd(x, compute_uv=False)

    report = Report()
    round_trip.imported(function, jnp.ones(shape), platform="cuda", report=report)(jnp.asarray(_normal(*shape)))
    assert report.recognised["singular values (cusolver_gesvd_ffi)"] == 2
    round_trip.assert_same({"svd": function}, _normal(*shape), platforms=["cuda"], tolerance=1e-8)


@pytest.mark.parametrize("shape", [(5, 2), (2, 5)])
def test_the_complement_of_singular_vectors(shape: tuple[int, int]) -> None:
    """For a GPU, jax computes all singular vectors. Those beyond the thin ones have a
    derivative that jax lacks.
    """

    def projector(x: jax.Array) -> jax.Array:
        u, _, v = jnp.linalg.svd(x)
        rest = u[:, 2:] if shape[0] == 5 else v[2:].T
        return rest @ rest.T

    def native(x: jax.Array) -> jax.Array:
        u, _, v = jnp.linalg.svd(x, full_matrices=False)
        thin = u if shape[0] == 5 else v.T
        return jnp.eye(5) - thin @ thin.T

    x = jnp.asarray(_normal(*shape))
    again = round_trip.imported(projector, x, platform="cuda")
    weights = _normal(5, 5, seed=2)
    for derivative in (lambda f: f, jax.grad, jax.hessian):
        found, expected = (
            jax.jit(derivative(lambda x, each=each: jnp.sum(weights * each(x))))(x) for each in (again, native)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("platform", round_trip.PLATFORMS)
def test_failed_factorizations_are_nan(platform: str) -> None:
    a = jnp.stack([jnp.eye(3), -jnp.eye(3), jnp.full((3, 3), jnp.nan)])
    functions = {
        "cholesky": jnp.linalg.cholesky,
        "solve": lambda a: jnp.linalg.solve(a.at[1].set(0.0), jnp.ones((3, 1))),
        "eigh": lambda a: jnp.linalg.eigh(a).eigenvalues,
    }
    for name, function in functions.items():
        round_trip.assert_equal(round_trip.imported(function, a, platform=platform)(a), function(a), name=name)


@pytest.mark.parametrize("platform", round_trip.PLATFORMS)
def test_symbolic_batches(platform: str) -> None:
    """The sizes of results are operands of their own."""

    def function(x: jax.Array) -> Any:
        a = x @ x.swapaxes(-1, -2) + jnp.eye(3)
        return (
            jnp.linalg.cholesky(a),
            jnp.linalg.solve(a, x[..., :1]),
            jnp.linalg.eigh(a).eigenvalues,
            jnp.linalg.qr(x).R,
            jnp.linalg.qr(x[..., :2, :]).Q,
            jnp.linalg.qr(x[..., :2], mode="complete").Q,
            jnp.linalg.svd(x[..., :2], full_matrices=False).S,
        )

    spec = jax.ShapeDtypeStruct((*export.symbolic_shape("n"), 3, 3), jnp.float64)
    again = round_trip.imported(function, spec, platform=platform)
    x = jnp.asarray(_normal(2, 3, 3))
    round_trip.assert_equal(jax.jit(again)(x), jax.jit(function)(x), tolerance=1e-12)


@pytest.mark.parametrize("platform", round_trip.PLATFORMS)
def test_the_report_names_the_routines(platform: str) -> None:
    report = Report()
    round_trip.imported(lambda x: jnp.linalg.cholesky(x), jnp.eye(3), platform=platform, report=report)(jnp.eye(3))
    routine = {"cpu": "lapack_dpotrf_ffi", "cuda": "cusolver_potrf_ffi"}[platform]
    assert report.recognised == {f"Cholesky factorization ({routine})": 1}


@pytest.mark.parametrize("platform", round_trip.PLATFORMS)
def test_random_bits(platform: str) -> None:
    def draw(key: jax.Array) -> jax.Array:
        return jax.random.bits(jax.random.wrap_key_data(key), (7,))

    key = jax.random.key_data(jax.random.key(3))
    round_trip.assert_equal(round_trip.imported(draw, key, platform=platform)(key), draw(key))


@pytest.mark.parametrize("function", [lax.approx_max_k, lax.approx_min_k])
def test_approximate_top_k(function: Callable[..., Any]) -> None:
    def weighed(x: jax.Array) -> Any:
        values, indices = function(x, 3, reduction_dimension=0)
        return values**2, indices

    round_trip.assert_same({"top k": weighed}, _normal(8, 2))


def test_symbolic_sizes_of_top_k_and_windows() -> None:
    def function(x: jax.Array) -> Any:
        n = x.shape[0]
        return lax.top_k(x, n - 1), lax.reduce_window(x, 0.0, lax.add, (n - 1,), (1,), "VALID"), jnp.cumsum(x)

    spec = jax.ShapeDtypeStruct(export.symbolic_shape("n", constraints=["n >= 2"]), jnp.float64)
    x = jnp.asarray(_normal(5))
    round_trip.assert_equal(round_trip.imported(function, spec)(x), function(x), tolerance=1e-14)


# Calls as text.


def _call(
    target: str, settings: str, operands: str = "tensor<3x3xf64>", results: str = "tensor<3x3xf64>, tensor<i32>"
) -> str:
    types = re.findall(r"tensor<[^>]*>", operands)
    made = re.findall(r"tensor<[^>]*>", results)
    names = ", ".join(f"%{index}" for index in range(len(types)))
    arguments = ", ".join(f"%{index}: {type_}" for index, type_ in enumerate(types))
    call = f"stablehlo.custom_call @{target}({names}) {{{settings}}} : ({operands}) -> ({results})"
    body = f"%r:{len(made)} = {call} return %r#0 : {made[0]}" if made else f"{call} return %0 : {types[0]}"
    return f"func.func @main({arguments}) -> {made[0] if made else types[0]} {{ {body} }}"


_LAYOUTS = (
    "operand_layouts = [dense<[0, 1]> : tensor<2xindex>], "
    "result_layouts = [dense<[0, 1]> : tensor<2xindex>, dense<> : tensor<0xindex>]"
)
_UPLO = "mhlo.backend_config = {uplo = 76 : ui8}"

REFUSED = {
    "unknown": (_call("exec_shell", ""), "of exec_shell, which is not served: the importer does not know this routine"),
    "Schur": (_call("lapack_dgees_ffi", ""), "lapack_dgees_ffi, which is not served: jax has no derivative of a Schur"),
    "tridiagonal form": (_call("cusolver_sytrd_ffi", ""), "jax has no derivative of a tridiagonal form"),
    "option that is missing": (_call("lapack_dpotrf_ffi", _LAYOUTS), "with the options none: expected uplo"),
    "option that is unknown": (
        _call("lapack_dpotrf_ffi", f"{_LAYOUTS}, mhlo.backend_config = {{uplo = 76 : ui8, path = 1 : i32}}"),
        "with the options path, uplo: expected uplo",
    ),
    "value of an option": (
        _call("lapack_dpotrf_ffi", f"{_LAYOUTS}, mhlo.backend_config = {{uplo = 77 : ui8}}"),
        "with the option uplo = 77: expected one of 76, 85",
    ),
    "no layouts": (_call("lapack_dpotrf_ffi", _UPLO), r"with operand_layouts none: expected \[\[0, 1\]\]"),
    "rows first": (
        _call("lapack_dpotrf_ffi", f"{_UPLO}, {_LAYOUTS.replace('[0, 1]', '[1, 0]')}"),
        r"with operand_layouts \[\[1, 0\]\]: expected \[\[0, 1\]\]",
    ),
    "dtype": (_call("lapack_spotrf_ffi", f"{_UPLO}, {_LAYOUTS}"), "of float64: expected float32"),
    "operands": (
        _call(
            "lapack_dpotrf_ffi",
            f"{_UPLO}, {_LAYOUTS}".replace(
                "operand_layouts = [", "operand_layouts = [dense<[0, 1]> : tensor<2xindex>, "
            ),
            "tensor<3x3xf64>, tensor<3x3xf64>",
        ),
        "with 2 operands: expected 1",
    ),
    "results": (
        _call("lapack_dpotrf_ffi", f"{_UPLO}, {_LAYOUTS}", results="tensor<3x3xf64>, tensor<f64>"),
        r"whose result is int32\[\], the program says float64\[\]",
    ),
    "attribute": (
        _call("lapack_dpotrf_ffi", f'{_UPLO}, {_LAYOUTS}, error_message = "x"'),
        "with the attribute error_message",
    ),
    "reflectors of nothing": (
        _call(
            "lapack_dorgqr_ffi",
            "mhlo.backend_config = {}, operand_layouts = [dense<[0, 1]> : tensor<2xindex>, dense<0> : tensor<1xindex>], "
            "result_layouts = [dense<[0, 1]> : tensor<2xindex>]",
            "tensor<3x3xf64>, tensor<3xf64>",
            "tensor<3x3xf64>",
        ),
        "not that of a QR factorization",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    module, message = REFUSED[name]
    read = reader.read(module)
    arguments = [jnp.ones(type_.shape) for type_ in read.main.types]
    with pytest.raises(Refused, match=rf"stablehlo\.custom_call.*{message}"):
        evaluate.function(read)(*arguments)


def test_a_call_as_text_is_served() -> None:
    """The refusals differ from this call in one place each."""
    (found,) = round_trip.text(_call("lapack_dpotrf_ffi", f"{_UPLO}, {_LAYOUTS}"), 4.0 * np.eye(3))
    np.testing.assert_array_equal(found, 2.0 * np.eye(3))


def test_reflectors_cannot_be_used_in_another_way() -> None:
    """jax has no derivative of reflectors, so they are NaN rather than silently
    constant.
    """
    x = jnp.asarray(_normal(3, 3))
    reflectors, scales = round_trip.imported(lambda x: tuple(jnp.linalg.qr(x, mode="raw")), x)(x)
    assert np.all(np.isnan(scales))
    assert np.all(np.isnan(reflectors.T[np.tril_indices(3, -1)]))


def test_reflectors_from_another_corner_are_refused() -> None:
    def function(x: jax.Array) -> jax.Array:
        packed, scales = jax._src.lax.linalg.geqrf(x)
        return lax.linalg.householder_product(packed[1:, :3], scales[:3])

    x = jnp.asarray(_normal(4, 3))
    with pytest.raises(Refused, match="orgqr"):
        round_trip.imported(function, x)(x)


@pytest.mark.parametrize("target", ["Sharding", "annotate_device_placement"])
def test_annotations_change_nothing(target: str) -> None:
    (found,) = round_trip.text(_call(target, "", results="tensor<3x3xf64>"), np.eye(3))
    np.testing.assert_array_equal(found, np.eye(3))


def test_shape_assertions() -> None:
    text = "size {0}, {1} and {7}; {0.__class__}"
    module = _call(
        "shape_assertion",
        f'error_message = "{text}", has_side_effect = true',
        "tensor<i1>, tensor<i64>, tensor<i64>",
        "",
    )
    sizes = np.array(3), np.array(5)
    assert round_trip.text(module, np.array(True), *sizes) == [np.array(True)]
    with pytest.raises(Refused, match=r"size 3, 5 and \?; \{0\.__class__\}$"):
        round_trip.text(module, np.array(False), *sizes)
    with pytest.raises(Refused, match="condition depends on x or on data"):
        round_trip.text(module, jnp.array(True), *sizes)


_TOP_K = """
func.func @order(%a: tensor<f64>, %b: tensor<f64>, %c: tensor<i32>, %d: tensor<i32>) -> tensor<i1> {{
  %0 = stablehlo.compare {direction}, %a, {second} : (tensor<f64>, tensor<f64>) -> tensor<i1>
  return %0 : tensor<i1>
}}
func.func @main(%x: tensor<4xf64>, %start: tensor<f64>, %none: tensor<i32>) -> tensor<2xf64> {{
  %i = {indices}
  %r:2 = stablehlo.custom_call @ApproxTopK(%x, %i, %start, %none) {{called_computations = [@order],
    mhlo.backend_config = {{aggregate_to_topk = true, is_fallback = true, recall_target = 0.95 : f32,
      reduction_dim = 0 : i64, reduction_input_size_override = -1 : i64, top_k = 2 : i64}}}}
    : (tensor<4xf64>, tensor<4xi32>, tensor<f64>, tensor<i32>) -> (tensor<2xf64>, tensor<2xi32>)
  return %r#0 : tensor<2xf64>
}}
"""
_IOTA = "stablehlo.iota dim = 0 : tensor<4xi32>"


@pytest.mark.parametrize(
    ("direction", "second", "indices", "message"),
    [
        (
            "GT",
            "%b",
            "stablehlo.constant dense<0> : tensor<4xi32>",
            "indices are not a stablehlo.iota along the axis 0",
        ),
        ("EQ", "%b", _IOTA, "comparator is not a single stablehlo.compare"),
        ("GT", "%a", _IOTA, "comparator is not a single stablehlo.compare"),
    ],
)
def test_other_top_ks_are_refused(direction: str, second: str, indices: str, message: str) -> None:
    arguments = np.arange(4.0), np.array(-np.inf), np.array(-1, np.int32)
    with pytest.raises(Refused, match=message):
        round_trip.text(_TOP_K.format(direction=direction, second=second, indices=indices), *arguments)
    (found,) = round_trip.text(_TOP_K.format(direction="GT", second="%b", indices=_IOTA), *arguments)
    np.testing.assert_array_equal(found, [3.0, 2.0])


def test_targets_cover_those_that_jax_promises_to_keep() -> None:
    """A new target in jax's list needs a rule, or a place here with the reason for its
    absence.
    """
    without = {
        *(f"lapack_{each}{name}_ffi" for each in "sd" for name in ("sytrd", "gehrd", "gees")),  # No jax derivative.
        *(f"lapack_{each}{name}_ffi" for each in "cz" for name in ("hetrd", "gehrd", "gees")),
        "cusolver_sytrd_ffi",
        "hipsolver_sytrd_ffi",
        *("Eigh", "Qr", "ProductOfElementaryHouseholderReflectors", "LuDecomposition"),  # For TPUs.
        *("tpu_custom_call", "mosaic_gpu_v2"),  # These are kernels.
        "tf.call_tf_function",  # It calls a function that is not in the program.
        "AllocateBuffer",  # It returns memory that is not initialised.
        *("SPMDFullToShardShape", "SPMDShardToFullShape"),  # For several devices.
    }
    promised = export._export._CUSTOM_CALL_TARGETS_GUARANTEED_STABLE if hasattr(export, "_export") else None
    if promised is None:
        promised = jax._src.export._export._CUSTOM_CALL_TARGETS_GUARANTEED_STABLE
    assert set(promised) - TARGETS.keys() - without == set()
