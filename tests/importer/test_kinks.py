"""The importer's derivatives at kinks and limits equal native jax's, for programs that
a client marked.

Each case is complete: a function is exported with marks, serialized as a
portable artifact of a stated version, read, evaluated, and differentiated. Values,
gradients and Hessians must be those of native jax, NaN at the same places.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
import pytest
from jax import lax, nn
from jax.scipy import special

from hvpd_server.importer import reader
from tests.importer.marked import artifact, imported

INF, NAN = np.inf, np.nan
POINTS = (-2.5, -1.0, -0.0, 0.0, 1e-3, 0.5, 1.0, 2.0, 7.0)
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""The compiler's options. The programs are small, so compiling them takes the time."""
ENDS = (-INF, -800.0, 0.0, 800.0, INF, NAN)


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of x and data, and the points at which its derivatives are
    compared.
    """

    fun: Callable[..., Any]
    x: Any
    data: tuple[Any, ...] = ()
    mode: str = "hessian"
    """"hessian": forward over reverse; "reverse": reverse over reverse; "forward":
    forward over forward; "gradient"; "value".
    """
    dtype: Any = np.float64
    rows: bool = True
    """Whether data is exported with symbolic rows as well."""
    tolerance: float = 1e-12


def each(fun, *points, **options):
    """Return a case of an elementwise function, at kinks and ends."""
    return Case(fun, points or POINTS + ENDS, **options)


def derivatives(fun, mode):
    """Return a function (x, *data) -> value, and the derivatives of the value's sum."""

    def total(x, *data):
        return jnp.sum(fun(x, *data))

    if mode == "value":
        return lambda x, *data: (fun(x, *data),)
    if mode == "gradient":
        return lambda x, *data: (fun(x, *data), jax.grad(total)(x, *data))
    if mode == "forward":

        def along(x, *data):
            return jax.jvp(lambda x: total(x, *data), (x,), (jnp.cos(jnp.arange(x.size, dtype=x.dtype)),))[1]

        return lambda x, *data: (fun(x, *data), along(x, *data), jax.jacfwd(along)(x, *data))
    second = jax.jacrev if mode == "reverse" else jax.jacfwd
    return lambda x, *data: (fun(x, *data), jax.grad(total)(x, *data), second(jax.grad(total))(x, *data))


def compare(found, expected, tolerance):
    for what, *both in zip(("value", "first derivative", "second derivative"), found, expected, strict=False):
        assert both[0].dtype == both[1].dtype, what
        wide = [np.asarray(each.astype(np.float64) if each.dtype == jnp.bfloat16 else each) for each in both]
        scale = np.max(np.abs(wide[1]), where=np.isfinite(wide[1]), initial=0)
        np.testing.assert_allclose(*wide, rtol=tolerance, atol=tolerance * scale, err_msg=what)


# Rules of the user's own.


@jax.custom_jvp
def clipped(x):
    return jnp.minimum(x, 1.0)


clipped.defjvps(lambda t, out, x: 2.0 * t * jnp.cos(x))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def scaled(scale, x, count):
    return scale(x) * count


@scaled.defjvp
def _(scale, primals, tangents):
    x, count = primals
    return scaled(scale, x, count), 3.0 * tangents[0] * clipped(x) * count


@jax.custom_jvp
def sparing(x, y):
    return x * y


@functools.partial(sparing.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    out = x * y
    slope = jnp.zeros_like(out)
    if type(dx) is not jax.custom_derivatives.SymbolicZero:
        slope = slope + 5.0 * dx * y
    if type(dy) is not jax.custom_derivatives.SymbolicZero:
        slope = slope + 7.0 * dy * x * jnp.sin(y)
    return out, slope


@jax.custom_vjp
def reversed_gradient(x, count):
    return jnp.sin(x) * count


reversed_gradient.defvjp(
    lambda x, count: (reversed_gradient(x, count), (x, count)),
    lambda kept, ct: (-ct * jnp.cos(kept[0]) * kept[1] ** 2, None),
)


@jax.custom_vjp
def outer_rule(x):
    return x**3


outer_rule.defvjp(
    lambda x: (outer_rule(x), x), lambda x, ct: (ct * 3 * jnp.sum(reversed_gradient(x, 2.0)) * clipped(x),)
)


@jax.custom_jvp
def two_results(x, index):
    return x * 2, index + 1


@two_results.defjvp
def _(primals, tangents):
    out = two_results(*primals)
    return out, (tangents[0] * jnp.exp(primals[0]), np.zeros((), jax.dtypes.float0))


def straight_through(x):
    return x + lax.stop_gradient(jnp.round(x) - x)


def matrix(x):
    """Return a well-conditioned matrix that depends on x."""
    n = x.shape[0]
    return jnp.diag(x**2 + 2.0) + 0.3 * jnp.outer(x, jnp.cos(x)) + jnp.arange(n * n).reshape(n, n) / n**3


def definite(x):
    a = matrix(x)
    return a @ a.T


def norm_without_nan(x):
    square = jnp.sum(x**2)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def recurrent(x, rows):
    weights = x[:4].reshape(2, 2)

    def step(state, row):
        state = nn.relu(weights @ state + row[:2])
        return state, jnp.sum(state)

    state, sums = lax.scan(step, x[4:6], rows)
    return jnp.sum(state) + jnp.sum(sums**2)


def image_model(x, images):
    kernel = x.reshape(2, 1, 2, 2)
    found = lax.conv_general_dilated(images[:, None], kernel, (1, 1), "SAME")
    pooled = lax.reduce_window(nn.relu(found), -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    average = lax.reduce_window(found, 0.0, lax.add, (1, 1, 2, 2), (1, 1, 1, 1), "SAME")
    return jnp.sum(pooled**2) + jnp.sum(jnp.tanh(average))


def root(x):
    return lax.custom_root(
        lambda y: y**3 + x[0] * y - x[1],
        x[1],
        lambda f, start: lax.fori_loop(0, 40, lambda _, y: y - f(y) / jax.grad(f)(y), start),
        lambda g, y: y / g(jnp.ones_like(y)),
    )


@jax.custom_jvp
def steep_root(x):
    return root(x)


steep_root.defjvp(lambda primals, tangents: (steep_root(*primals), 7 * jnp.sum(tangents[0]) * root(*primals)))


def roots_of_a_system(x):
    a = jnp.array([[3.0, 1.0], [1.0, 2.0]])
    return lax.custom_root(
        lambda y: a @ y + 0.1 * y**3 - x,
        x,
        lambda f, start: lax.fori_loop(0, 60, lambda _, y: y - 0.2 * f(y), start),
        lambda g, y: jnp.linalg.solve(jax.jacobian(g)(y), y),
    )


def krylov(x):
    a = definite(x)
    return jnp.sum(jsp.sparse.linalg.cg(lambda v: a @ v, jnp.sin(x), tol=1e-14)[0] ** 2)


def data_loop(x):
    return jnp.sum(lax.while_loop(lambda y: jnp.sum(y) < 100.0, lambda y: y * 1.5 + 1, x))


ROWS = np.linspace(-1, 1, 12).reshape(4, 3)
LABELS = np.array([0, 2, 2, 1])
KEY = np.array([7, 11], np.uint32)
VECTOR = (0.3, -0.7, 1.1)
TIES = (1.0, 3.0, 3.0, -2.0, 3.0, 0.0)

CASES = {
    # Activations.
    "relu": each(nn.relu),
    "relu6": each(nn.relu6, -1.0, 0.0, 3.0, 6.0, 8.0),
    "leaky_relu": each(nn.leaky_relu),
    "elu": each(nn.elu),
    "selu": each(nn.selu),
    "celu": each(nn.celu),
    "gelu": each(lambda x: nn.gelu(x, approximate=False)),
    "gelu_tanh": each(nn.gelu),
    "silu": each(nn.silu),
    "softplus": each(nn.softplus),
    "softplus_f32": each(nn.softplus, dtype=np.float32, tolerance=1e-6),
    "log_sigmoid": each(nn.log_sigmoid),
    "hard_tanh": each(nn.hard_tanh, -1.0, 0.0, 1.0, 2.0),
    "mish": each(nn.mish),
    "squareplus": each(nn.squareplus),
    "sparse_plus": each(nn.sparse_plus, -1.0, 0.0, 1.0, 2.0),
    # Logarithms of sums.
    "logaddexp": each(lambda x: jnp.logaddexp(0.0, -x)),
    "logaddexp_both": each(lambda x: jnp.logaddexp(x, x)),
    "logaddexp2": each(lambda x: jnp.logaddexp2(0.0, -x)),
    "logsumexp_ties": Case(special.logsumexp, TIES),
    "logsumexp_infinite": Case(special.logsumexp, (-INF, 0.0, 1.0)),
    "logsumexp_nothing": Case(special.logsumexp, (-INF, -INF)),
    "softmax": Case(lambda x: nn.softmax(x) ** 2, (1.0, 1.0, -INF, 30.0)),
    "log_softmax": Case(lambda x: nn.log_softmax(x)[:2], TIES),
    "cross_entropy": Case(
        lambda x, rows, labels: -jnp.mean(nn.log_softmax(rows @ x.reshape(3, 3))[jnp.arange(labels.shape[0]), labels]),
        np.linspace(-1, 1, 9),
        (ROWS, LABELS),
    ),
    # Choices.
    "max_ties": Case(jnp.max, TIES),
    "min_ties": Case(lambda x: jnp.min(x.reshape(2, 3), axis=1), TIES),
    "maximum_ties": each(lambda x: jnp.maximum(x, 1.0) * jnp.minimum(x, 0.0)),
    "minimum_self": each(lambda x: jnp.minimum(x, x) ** 2),
    "abs": each(jnp.abs),
    "sign": each(lambda x: jnp.sign(x) * x),
    "clip": each(lambda x: jnp.clip(x, -1.0, 1.0) ** 2),
    "lax_clamp": each(lambda x: lax.clamp(-1.0, x, 1.0) ** 2),
    "where_unsafe": each(lambda x: jnp.where(x > 0, jnp.log(x), 0.0)),
    "where_safe_sqrt": each(lambda x: jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)),
    "select": each(lambda x: jnp.select([x < -1, x < 1], [x**2, x**3], jnp.sin(x))),
    "piecewise": each(lambda x: jnp.piecewise(x, [x < 0, x >= 1], [lambda x: -x, lambda x: x**2, 0.5])),
    "heaviside": each(lambda x: jnp.heaviside(x, 0.5) * x),
    # Roots, powers and norms.
    "sqrt": each(jnp.sqrt),
    "cbrt": each(jnp.cbrt),
    "square": each(jnp.square),
    "power_2": each(lambda x: x**2),
    "power_0": each(lambda x: x**0 * x),
    "power_minus_2": each(lambda x: x**-2),
    "power_float": each(lambda x: x**2.5),
    "power_float_integral": each(lambda x: x ** jnp.asarray(2.0, x.dtype)),
    "power_of_0": each(lambda x: jnp.power(0.0, x), -1.0, 0.0, 1.0, 2.0),
    "power_traced": each(lambda x: jnp.power(x, jnp.arange(x.size)), *POINTS),
    "power_self": each(lambda x: x**x, 0.0, 0.5, 1.0),
    "norm": Case(jnp.linalg.norm, (0.0, 0.0)),
    "norm_1": Case(lambda x: jnp.linalg.norm(x, 1), (0.0, -2.0, 1.0)),
    "norm_inf": Case(lambda x: jnp.linalg.norm(x, jnp.inf), (2.0, -2.0, 1.0)),
    "norm_3": Case(lambda x: jnp.linalg.norm(x, 3), (0.5, -2.0, 1.0)),
    "norm_nuclear": Case(lambda x: jnp.linalg.norm(matrix(x), "nuc"), VECTOR, tolerance=1e-11),
    "norm_without_nan": Case(norm_without_nan, (0.0, 0.0)),
    "hypot": Case(lambda x: jnp.hypot(x, 0.0), (0.0, 1.0)),
    "exp2": each(jnp.exp2),
    "exp_overflow": each(lambda x: jnp.exp(x) / (1 + jnp.exp(x))),
    "expm1_log1p": each(lambda x: jnp.expm1(x) + jnp.log1p(jnp.abs(x))),
    "trigonometric": each(lambda x: jnp.sin(x) * jnp.tan(x) + jnp.arctan2(x, 1.0)),
    "arcs": each(lambda x: jnp.arcsin(x) + jnp.arccos(x) * jnp.arctan(x), -1.0, -0.5, 0.0, 1.0, 2.0),
    "hyperbolic": each(lambda x: jnp.sinh(x) * jnp.cosh(x) + jnp.tanh(x)),
    "hyperbolic_arcs": each(lambda x: jnp.arcsinh(x) * jnp.arctanh(x / 8) + jnp.arccosh(x)),
    "remainder": each(lambda x: jnp.remainder(x, 0.7) * x + jnp.fmod(x, 0.3), *POINTS),
    "round_floor": each(lambda x: jnp.round(x) * x + jnp.floor(x) + jnp.ceil(x) * x, *POINTS),
    # Special functions.
    "xlogy": each(lambda x: special.xlogy(x, x)),
    "xlogy_0": each(lambda x: special.xlogy(0.0, x)),
    "xlog1py": each(lambda x: special.xlog1py(x, -1.0 + jnp.abs(x))),
    "entr": each(special.entr),
    "kl_div": each(lambda x: special.kl_div(x, jnp.abs(x) + 0.1)),
    "rel_entr": each(lambda x: special.rel_entr(0.5, x)),
    "sinc": each(jnp.sinc),
    "log2": each(jnp.log2),
    "log2_complex": each(lambda x: jnp.abs(jnp.log2(x + 2j)) ** 2, *POINTS),
    "tanh_slope": each(jax.vmap(jax.grad(jnp.tanh))),
    "tanh_slope_tiny": each(jax.vmap(jax.grad(jnp.tanh)), 1e-300, -1e-20, 1e-9),
    "erf": each(special.erf),
    "erfc": each(special.erfc),
    "erf_inv": each(special.erfinv, -1.0, -0.5, 0.0, 0.3, 1.0, 1.5),
    "erf_f32": each(lambda x: special.erf(x) + special.erfinv(x / 9), dtype=np.float32, tolerance=1e-6),
    "ndtri": each(special.ndtri, 0.0, 0.1, 0.5, 1.0),
    "log_ndtr": each(special.log_ndtr, *POINTS, -40.0, 40.0),
    "gammaln": each(special.gammaln),
    "digamma": each(special.digamma),
    "polygamma": each(lambda x: special.polygamma(1, x), *POINTS),
    "gammainc": each(lambda x: special.gammainc(jnp.abs(x) + 0.5, x), 0.0, 0.5, 3.0, tolerance=1e-11, mode="value"),
    "gammaincc": each(lambda x: special.gammaincc(1.5, x), 0.0, 0.5, 3.0),
    "betainc": each(lambda x: special.betainc(1.5, 2.5, x), 0.0, 0.5, 1.0),
    "betaln": each(lambda x: special.betaln(x, 0.5), 0.5, 3.0),
    "zeta": each(lambda x: special.zeta(2.0, x), 0.5, 3.0),
    "bessel": each(lambda x: special.i0e(x) + special.i0(x / 9) * special.i1e(x) + special.i1(x), *POINTS),
    "expit_logit": each(lambda x: special.expit(x) + special.logit(x), -1.0, 0.0, 0.5, 1.0, 800.0),
    "log_normal_cdf": each(lambda x: jsp.stats.norm.logcdf(x), *POINTS),
    "gamma_density": each(lambda x: jsp.stats.gamma.logpdf(x, 1.5), 0.0, 0.5, 3.0),
    # Rules of the user's own.
    "stop_gradient": each(lambda x: lax.stop_gradient(x) ** 2 * x, *POINTS),
    "straight_through": each(straight_through, *POINTS),
    "stop_gradient_in_scan": Case(
        lambda x: lax.scan(lambda c, a: (c * a + lax.stop_gradient(c), c), x[0], x)[0], VECTOR
    ),
    "custom_jvp": each(clipped),
    "custom_jvp_nondiff": each(lambda x: scaled(jnp.tanh, x, 3), *POINTS),
    "custom_jvp_symbolic": each(lambda x: sparing(x, 2.0) + sparing(3.0, x) + sparing(x, x), *POINTS),
    "custom_jvp_two_results": each(lambda x: jax.vmap(lambda x: two_results(x, 3)[0])(x), *POINTS),
    "custom_jvp_vmap": each(lambda x: jnp.sum(jax.vmap(clipped)(jnp.outer(x, x)), axis=1), *POINTS),
    "custom_jvp_in_cond": Case(
        lambda x: lax.cond(x[0] > 0, lambda x: jnp.sum(clipped(x)), lambda x: jnp.sum(nn.relu(x)), x), VECTOR
    ),
    "custom_jvp_in_while": Case(
        lambda x: jnp.sum(lax.while_loop(lambda y: y[0] < 5.0, lambda y: clipped(y) + y + 1, x)), VECTOR, mode="forward"
    ),
    "custom_vjp": Case(lambda x: reversed_gradient(x, 3.0), POINTS, mode="reverse"),
    "custom_vjp_nested": Case(outer_rule, VECTOR, mode="reverse"),
    "custom_vjp_in_scan": Case(
        lambda x: lax.scan(lambda c, a: (reversed_gradient(c * a, 2.0), None), x[0], x)[0], VECTOR, mode="reverse"
    ),
    "custom_vjp_vmap": Case(lambda x: jax.vmap(lambda x: reversed_gradient(x, 2.0))(x), VECTOR, mode="reverse"),
    "checkpoint": Case(jax.checkpoint(lambda x: jnp.sum(nn.softplus(jnp.sin(x) @ matrix(x)))), VECTOR),
    "checkpoint_dots": Case(
        jax.checkpoint(lambda x: jnp.sum(jnp.sin(matrix(x) @ x)), policy=jax.checkpoint_policies.dots_saveable), VECTOR
    ),
    "custom_root": Case(root, (2.0, 3.0), tolerance=1e-11),
    "custom_root_in_scan": Case(
        lambda x: lax.scan(lambda c, a: (root(jnp.stack([c, a])), c), x[0], x)[0], (2.0, 3.0), tolerance=1e-11
    ),
    "custom_root_in_rule": Case(steep_root, (2.0, 3.0), tolerance=1e-11),
    "custom_root_of_gradients": Case(jax.grad(root), (2.0, 3.0), tolerance=1e-11),
    "custom_root_of_vectors": Case(roots_of_a_system, (2.0, 3.0), tolerance=1e-11),
    "conjugate_gradients": Case(krylov, VECTOR, tolerance=1e-9),
    # Linear algebra.
    "solve": Case(lambda x: jnp.linalg.solve(matrix(x), jnp.sin(x)), VECTOR),
    "solve_triangular": Case(lambda x: jsp.linalg.solve_triangular(matrix(x), x, lower=True, trans=1), VECTOR),
    "inv": Case(lambda x: jnp.linalg.inv(matrix(x)), VECTOR),
    "lu": Case(lambda x: jsp.linalg.lu(matrix(x))[2], VECTOR),
    "slogdet": Case(lambda x: jnp.linalg.slogdet(matrix(x))[1], VECTOR),
    "det": Case(lambda x: jnp.linalg.det(matrix(x)), VECTOR),
    "det_singular": Case(lambda x: jnp.linalg.det(jnp.outer(x, x)), VECTOR),
    "cholesky": Case(lambda x: jnp.linalg.cholesky(definite(x)), VECTOR),
    "cho_solve": Case(lambda x: jsp.linalg.cho_solve(jsp.linalg.cho_factor(definite(x)), x), VECTOR),
    "eigh": Case(lambda x: jnp.sin(jnp.linalg.eigh(definite(x))[0]), VECTOR),
    # Weighted, because rows and columns sum to 1 at each x.
    "eigh_vectors": Case(
        lambda x: jnp.linalg.eigh(definite(x))[1] ** 2 * jnp.arange(9.0).reshape(3, 3) ** 2, VECTOR, tolerance=1e-10
    ),
    "svd": Case(lambda x: jnp.linalg.svd(matrix(x)[:, :2], full_matrices=False)[1], VECTOR),
    "qr": Case(lambda x: jnp.linalg.qr(matrix(x))[1] ** 2, VECTOR),
    "pinv": Case(lambda x: jnp.linalg.pinv(matrix(x)), VECTOR, tolerance=1e-10),
    "expm": Case(lambda x: jsp.linalg.expm(matrix(x) / 3), VECTOR),
    "tridiagonal_solve": Case(lambda x: lax.linalg.tridiagonal_solve(x * 0.1, x + 3, x * 0.2, jnp.eye(3)), VECTOR),
    "gaussian_process": Case(
        lambda x, rows: jsp.stats.multivariate_normal.logpdf(
            rows[:, 0],
            jnp.zeros(rows.shape[0]),
            jnp.exp(-(((rows[:, None, 1] - rows[None, :, 1]) / x[0]) ** 2)) + x[1] ** 2 * jnp.eye(rows.shape[0]),
        ),
        (0.7, 0.4),
        (ROWS,),
    ),
    # Order.
    "sort_ties": Case(lambda x: jnp.sort(x) * jnp.arange(6.0), TIES),
    "sort_descending": Case(lambda x: jnp.sort(x, descending=True)[:3] ** 2, TIES),
    "argsort": Case(lambda x: x[jnp.argsort(x)] * jnp.arange(6.0), TIES),
    "median_ties": Case(lambda x: jnp.median(x) ** 2, TIES),
    "quantile": Case(lambda x: jnp.quantile(x, jnp.array([0.2, 0.55])) ** 2, TIES),
    "argmax": Case(lambda x: x[jnp.argmax(x)] ** 2 + x[jnp.argmin(x)], TIES),
    "top_k": Case(lambda x: lax.top_k(x, 3)[0] ** 2 * jnp.arange(3.0), TIES),
    "approx_max_k": Case(lambda x: lax.approx_max_k(x, 2)[0] ** 2, TIES),
    "searchsorted": Case(lambda x: jnp.interp(0.3, jnp.array([0.0, 0.3, 1.0]), x[:3]) ** 2, TIES),
    "interp": each(lambda x: jnp.interp(x, jnp.array([0.0, 0.5, 2.0]), jnp.array([1.0, 3.0, -1.0])) ** 2, *POINTS),
    # Cumulative and other reductions.
    "cumsum": Case(lambda x: jnp.cumsum(x) ** 2, TIES),
    "cumprod_zeros": Case(lambda x: jnp.cumprod(x), TIES),
    "cummax_ties": Case(lambda x: lax.cummax(x) ** 2 + lax.cummin(x, reverse=True), TIES),
    "cumlogsumexp": Case(lambda x: lax.cumlogsumexp(x), TIES),
    "prod_zeros": Case(jnp.prod, (0.0, 2.0, 0.0, 3.0)),
    "prod_one_zero": Case(jnp.prod, (0.0, 2.0, 3.0)),
    "variance": Case(lambda x: jnp.std(x) + jnp.var(x), (1.0, 1.0)),
    "nansum": Case(lambda x: jnp.nansum(x**2), (NAN, 1.0, 2.0)),
    "associative_scan": Case(lambda x: lax.associative_scan(jnp.logaddexp, x), TIES),
    # Indices.
    "gather_out_of_bounds": Case(lambda x: x[jnp.array([0, 5, -1, -9, 17])] ** 2 * jnp.arange(5.0), TIES),
    "take_fill": Case(lambda x: jnp.take(x, jnp.array([1, 8]), mode="fill", fill_value=3.0) ** 2, TIES),
    "take_clip": Case(lambda x: jnp.take(x, jnp.array([1, 8, -3]), mode="clip") ** 2, TIES),
    "dynamic_slice": Case(lambda x: lax.dynamic_slice(x, (jnp.argmax(x),), (4,)) ** 2, TIES),
    "dynamic_update": Case(lambda x: lax.dynamic_update_slice(x**2, x[:2], (jnp.argmax(x) + 3,)), TIES),
    "scatter_duplicates": Case(lambda x: jnp.zeros(3).at[jnp.array([0, 0, 2, 9])].add(x[:4] ** 2) ** 2, TIES),
    "scatter_set": Case(lambda x: (x**2).at[jnp.array([0, 4])].set(x[:2]) ** 2, TIES),
    "scatter_max": Case(lambda x: jnp.zeros(3).at[jnp.array([0, 0, 2, 1])].max(x[:4]) ** 2, TIES),
    "scatter_multiply": Case(
        lambda x: jnp.ones(3).at[jnp.array([0, 1, 2])].multiply(x[:3], unique_indices=True) ** 2, TIES
    ),
    "segment_sum": Case(lambda x, labels: jax.ops.segment_sum(x[labels], labels, 3) ** 2, VECTOR, (LABELS,)),
    "segment_max": Case(lambda x: jax.ops.segment_max(x, jnp.array([0, 0, 1, 1, 0, 1]), 2) ** 2, TIES),
    "embedding": Case(lambda x, labels: jnp.sum(jnp.tanh(x.reshape(3, 2)[labels]) ** 2), TIES, (LABELS,)),
    # Loops and branches.
    "recurrent": Case(recurrent, (0.5, -0.3, 0.2, 0.9, 0.1, 0.0), (ROWS,)),
    "scan_reverse_unrolled": Case(
        lambda x: lax.scan(lambda c, a: (jnp.sin(c) * a, c), x[0], x, reverse=True, unroll=2)[1], TIES
    ),
    "map": Case(lambda x: lax.map(lambda a: nn.softplus(a) ** 2, x), TIES),
    "fori_loop": Case(lambda x: lax.fori_loop(0, 4, lambda i, y: jnp.sin(y) * x + i, x), VECTOR),
    "cond": Case(lambda x: lax.cond(x[0] > 0.3, jnp.sin, jnp.cos, x), VECTOR),
    "switch": Case(lambda x: lax.switch(jnp.argmax(x), [jnp.sin, jnp.cos, lambda x: x**3], x), VECTOR),
    "while": Case(data_loop, VECTOR, mode="forward"),
    "while_vmap": Case(
        lambda x: jax.vmap(lambda a: lax.while_loop(lambda y: y < 9.0, lambda y: y * y + 1.5, a))(x),
        VECTOR,
        mode="forward",
    ),
    # Models.
    "conv_max_pool": Case(image_model, np.linspace(-1, 1, 8), (np.round(np.sin(np.arange(32.0)), 1).reshape(2, 4, 4),)),
    "conv_ties": Case(image_model, np.zeros(8), (np.ones((1, 4, 4)),), rows=False),
    "perceptron": Case(
        lambda x, rows, labels: jnp.mean((jnp.tanh(rows @ x[:6].reshape(3, 2)) @ x[6:] - labels) ** 2),
        np.linspace(-1, 1, 8),
        (ROWS, LABELS),
    ),
    "perceptron_f32": Case(
        lambda x, rows, labels: jnp.mean((nn.gelu(rows @ x[:6].reshape(3, 2)) @ x[6:] - labels) ** 2),
        np.linspace(-1, 1, 8),
        (ROWS.astype(np.float32), LABELS.astype(np.int32)),
        dtype=np.float32,
        tolerance=1e-6,
    ),
    "perceptron_bf16": Case(
        lambda x, rows: jnp.mean(nn.relu(rows.astype(jnp.bfloat16) @ x[:6].reshape(3, 2)) @ x[6:]),
        np.linspace(-1, 1, 8),
        (ROWS,),
        dtype=jnp.bfloat16,
        tolerance=1e-2,
    ),
    "bf16_softplus": each(nn.softplus, *POINTS, dtype=jnp.bfloat16, tolerance=0.0),
    "attention": Case(
        lambda x, rows: nn.dot_product_attention(
            (rows * x[0])[None, :, None], (rows * x[1])[None, :, None], (rows + x[2])[None, :, None]
        ),
        VECTOR,
        (ROWS,),
        tolerance=1e-6,  # It computes the softmax in single precision.
    ),
    "vmap_psum": Case(jax.vmap(lambda a: a / lax.psum(a**2, "i"), axis_name="i"), VECTOR),
    "vmap_pmean": Case(jax.vmap(lambda a: (a - lax.pmean(jnp.sin(a), "i")) ** 2, axis_name="i"), VECTOR),
    "vmap_psum_nested": Case(
        lambda x: jax.vmap(jax.vmap(lambda a: a**3 / lax.psum(a**2, ("i", "j")), axis_name="i"), axis_name="j")(
            jnp.outer(x, x)
        ),
        VECTOR,
    ),
    "reduce_logaddexp": Case(lambda x: lax.reduce(x, -INF, jnp.logaddexp, (0,)), TIES),
    "reduce_some_axes": Case(
        lambda x: lax.reduce(jnp.outer(x, jnp.arange(8.0)).reshape(-1, 4, 2), -INF, jnp.logaddexp, (2, 0)) ** 2, VECTOR
    ),
    "reduce_own_body": Case(lambda x: lax.reduce(x**3, 0.0, lambda a, b: a + b * 1.0, (0,)), VECTOR),
    "reduce_pairs": Case(
        lambda x: lax.reduce((x, x**2), (0.0, 0.0), lambda a, b: (a[0] + b[0], a[1] + b[1] + a[0] * b[0]), (0,))[1],
        TIES,
    ),
    "reduce_nothing": Case(lambda x: x + lax.reduce(x[:0], 0.5, jnp.logaddexp, (0,)), VECTOR),
    "ragged_dot": Case(
        lambda x: lax.ragged_dot(jnp.outer(x, jnp.cos(x)), jnp.ones((2, 3, 2)) * x[0], jnp.array([1, 2])) ** 2,
        VECTOR,
        mode="gradient",  # jax has no batching rule for more.
    ),
    "expi": each(special.expi, -2.0, -0.5, 0.0, 0.5, 1.0),
    "exp1": each(special.exp1, 0.5, 1.0, 2.0, mode="gradient"),
    "expn": each(lambda x: special.expn(2, x), 0.5, 1.0, 2.0, mode="gradient"),
    "fft": Case(lambda x: jnp.abs(jnp.fft.rfft(x**2)) ** 2, TIES),
    "ifft": Case(lambda x: jnp.real(jnp.fft.ifft(jnp.fft.fft(x) * jnp.exp(1j * x))), TIES),
    "complex": Case(lambda x: jnp.abs(jnp.exp(1j * x) + x) + jnp.angle(x + 2j), TIES),
    "random_normal": Case(
        lambda x, key: jax.random.normal(jax.random.wrap_key_data(key), (3,)) @ x**2, VECTOR, (KEY,), rows=False
    ),
    "random_dropout": Case(
        lambda x, key: jnp.where(jax.random.bernoulli(jax.random.split(key)[1], 0.5, (3,)), x**2, 0.0),
        VECTOR,
        (KEY,),
        rows=False,
    ),
    "random_gamma": Case(
        lambda x, key: jax.random.gamma(key, jnp.abs(x) + 0.5), VECTOR, (KEY,), rows=False, mode="gradient"
    ),
    "random_choice": Case(lambda x, key: x[jax.random.permutation(key, 3)[:2]] ** 2, VECTOR, (KEY,), rows=False),
}


@pytest.fixture(autouse=True)
def _wide():
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("name", CASES)
def test_derivatives_equal_native_jax(name):
    case = CASES[name]
    x = jnp.asarray(np.asarray(case.x, case.dtype))  # By NumPy, because jax would compile the conversion.
    data = [jnp.asarray(array) for array in case.data]
    specs = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (x, *data)]
    programs = {"native": jax.make_jaxpr(derivatives(case.fun, case.mode))(x, *data)}

    def add(fun):
        program = jax.make_jaxpr(derivatives(fun, case.mode))(x, *data)
        programs[str(program)] = program  # Most programs are the same for all platforms.

    for platform in ("cpu", "cuda"):
        add(imported(reader.read(artifact(case.fun, specs, (platform,)))))
    if data and case.rows:
        scope = jax.export.SymbolicScope()
        symbolic = [
            jax.ShapeDtypeStruct(jax.export.symbolic_shape("m, ...", like=array.shape, scope=scope), array.dtype)
            for array in data
        ]
        module = reader.read(artifact(case.fun, [specs[0], *symbolic], ("cpu", "cuda")))
        for index in (0, 1):
            add(imported(module, index))

    def run(*args):
        return [jax.core.eval_jaxpr(program.jaxpr, program.consts, *args) for program in programs.values()]

    # One compilation of all, because starting a compilation takes most of the time.
    native, *found = jax.jit(run).lower(x, *data).compile(QUICKLY)(x, *data)
    assert found
    for each in found:
        compare(each, native, case.tolerance)
