"""Functions of jax arrays whose products are NumPy's, against jax's own derivatives."""

import collections
import contextlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import hvpd
import hvpd.jax
from hvpd._jax import errors
from hvpd._jax.functions import Linear, function
from hvpd._operators.curvature import HessianOperator
from hvpd._operators.low_rank import LowRankOperator
from hvpd._registration import trees

pytestmark = pytest.mark.slow

N = 6


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.fixture
def matrix(spectrum):
    return spectrum(np.linspace(-1, 3, N))[0]


@pytest.fixture
def point(dense_point, matrix):
    found = dense_point(matrix)
    found.objective = Objective({"b": np.zeros(2), "w": np.zeros((2, 2))})
    found.objective.slices = lambda: {"": slice(0, N)}
    return found


@pytest.fixture
def A(point):
    return HessianOperator(point).as_jax()


def energy(x):
    """Return a function that couples all of its arguments."""
    return jnp.sum(jnp.cosh(x)) + jnp.sin(x[0] * x[1]) * jnp.sum(x[2:] ** 3)


def _derivatives(x):
    """Return value, gradient and Hessian of `energy` by their formulas, in NumPy.

    Callbacks must not use jax.
    """
    a, b, rest = x[0], x[1], x[2:]
    cubes, sine, cosine = np.sum(rest**3), np.sin(a * b), np.cos(a * b)
    gradient, hessian = np.sinh(x), np.diag(np.cosh(x))
    gradient[:2] += cosine * cubes * np.array([b, a])
    gradient[2:] += 3 * sine * rest**2
    mixed = cosine - sine * a * b
    hessian[:2, :2] += cubes * np.array([[-sine * b**2, mixed], [mixed, -sine * a**2]])
    hessian[:2, 2:] = 3 * cosine * np.outer([b, a], rest**2)
    hessian[2:, :2] = hessian[:2, 2:].T
    hessian[2:, 2:] += np.diag(6 * sine * rest)
    return np.sum(np.cosh(x)) + sine * cubes, gradient, hessian


class Objective:
    """An objective in this process: as much of `hvpd.Objective` as is used here."""

    def __init__(self, tree, fail=None):
        self.spec, leaves = trees.flatten(tree)
        flat = {f"leaf{place}": np.shape(leaf) for place, leaf in enumerate(leaves)}
        self.names = list(tree) if isinstance(tree, dict) else list(flat) if len(leaves) > 1 else [""]
        self.shapes = list(flat.values())
        self.n, self.dtype, self.label = sum(np.size(leaf) for leaf in leaves), np.dtype(np.float64), "local"
        self.visited, self.products, self.fail = [], [], fail

    def _leaf_structure(self):
        return self.spec, self.names, self.shapes

    def at(self, x, *data):
        if self.fail:
            raise self.fail
        self.visited.append(np.asarray(x))
        scale = data[0] if data else 1.0
        value, gradient, hessian = (scale * found for found in _derivatives(x))

        def multiply(V):
            self.products.append(V.shape)
            return hessian @ V

        operator = SimpleNamespace(matvec=multiply, matmat=multiply)
        return SimpleNamespace(value=float(value), gradient=gradient, hessian=lambda: operator)


@pytest.fixture
def vectors():
    return np.random.default_rng(1).normal(size=(5, N))


COMPILED = pytest.mark.parametrize("compiled", [lambda function: function, jax.jit], ids=["plain", "jit"])


# Operators


@COMPILED
def test_a_product_is_the_matrix_times_the_vector(A, matrix, vectors, compiled):
    product = compiled(A)(vectors[0])
    close(product, matrix @ vectors[0])
    assert product.dtype == np.float64


@COMPILED
def test_a_vmapped_axis_is_one_block(A, point, matrix, vectors, compiled):
    close(compiled(jax.vmap(A))(vectors), vectors @ matrix)
    close(compiled(jax.vmap(A, in_axes=1, out_axes=1))(vectors.T), matrix @ vectors.T)
    close(compiled(jax.vmap(jax.vmap(A)))(np.stack([vectors, 2 * vectors])), [vectors @ matrix, 2 * vectors @ matrix])
    assert point.products == [5, 5, 10]


def test_a_wide_vmapped_axis_is_cut_into_blocks(A, point, matrix):
    V = np.random.default_rng(0).normal(size=(10_000, N))
    close(jax.jit(jax.vmap(A))(V), V @ matrix)
    assert sum(point.products) == len(V)
    assert max(point.products) <= 1024


def test_an_empty_vmapped_axis_asks_for_nothing(A, point):
    assert jax.vmap(A)(np.empty((0, N))).shape == (0, N)
    assert point.products == []


@COMPILED
def test_derivatives_are_products(A, matrix, vectors, compiled):
    v, w, *_ = vectors
    close(compiled(lambda v, w: jax.jvp(A, (v,), (w,))[1])(v, w), matrix @ w)
    close(compiled(lambda v, w: jax.vjp(A, v)[1](w)[0])(v, w), matrix @ w)
    close(compiled(lambda v: jax.linear_transpose(A, v)(v)[0])(v), matrix @ v)
    close(compiled(jax.jacfwd(A))(v), matrix)
    close(compiled(jax.jacrev(A))(v), matrix)
    close(compiled(jax.hessian(lambda v: v @ A(v) / 2))(v), matrix)


def test_a_jacobian_is_one_product_and_one_block(A, point, vectors):
    jax.jacfwd(A)(vectors[0])
    assert point.products == [1, N]


def test_loops_take_products(A, matrix, vectors):
    expected = np.linalg.matrix_power(matrix, 3) @ vectors[0]
    v = jnp.asarray(vectors[0])
    close(jax.lax.scan(lambda v, _: (A(v), None), v, None, length=3)[0], expected)
    close(jax.lax.fori_loop(0, 3, lambda _, v: A(v), v), expected)
    close(jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, A(s[1])), (0, v))[1], expected)
    through = jax.jit(jax.grad(lambda v: jax.lax.scan(lambda v, _: (A(v), None), v, None, length=3)[0].sum()))
    close(through(v), np.linalg.matrix_power(matrix, 3).sum(axis=1))


def test_solvers_of_jax_take_it(A, matrix, vectors):
    b = vectors[0]
    found, _ = jax.jit(lambda b: jax.scipy.sparse.linalg.cg(lambda v: A(A(v)) + v, b, tol=1e-12))(b)
    close(found, np.linalg.solve(matrix @ matrix + np.eye(N), b))
    derivative = jax.jacrev(lambda b: jax.scipy.sparse.linalg.gmres(A, b, tol=1e-12, atol=1e-12)[0])(b)
    np.testing.assert_allclose(derivative, np.linalg.inv(matrix), rtol=1e-8, atol=1e-8)


def test_other_real_dtypes_are_converted(A, matrix):
    assert A(np.ones(N, np.float32)).dtype == np.float64
    close(A(np.arange(N)), matrix @ np.arange(N))
    gradient = jax.grad(lambda v: A(v).sum())(jnp.ones(N, jnp.float32))
    assert gradient.dtype == np.float32


def test_pytrees_give_pytrees(A, matrix, vectors):
    tree = {"b": vectors[0, :2], "w": vectors[0, 2:].reshape(2, 2)}
    found = A(tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    close(ravel_pytree(found)[0], matrix @ vectors[0])
    close(ravel_pytree(jax.grad(lambda t: A(t)["w"].sum())(tree))[0], matrix[:, 2:].sum(axis=1))


def test_updates_and_blocks_are_part_of_it(point, matrix, vectors):
    U = vectors[:2].T
    H = (2 * HessianOperator(point, 0.5)).updated(U)
    close(jax.jit(H.as_jax())(vectors[0]), (2 * (matrix + 0.5 * np.eye(N)) + U @ U.T) @ vectors[0])
    point.objective.slices = lambda: {"a": slice(0, 2), "b": slice(2, N)}
    block = HessianOperator(point).block("b").as_jax()
    assert (block.shape, block.dtype) == ((N - 2, N - 2), np.float64)
    close(jax.vmap(block)(vectors[:, 2:]), vectors[:, 2:] @ matrix[2:, 2:])


def test_operators_without_a_point_have_it_too(spectrum, vectors):
    matrix, Q = spectrum([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    low = LowRankOperator(np.arange(1.0, 7.0), Q, np.zeros(N), 0.0)
    close(jax.jit(low.as_jax())(vectors[0]), matrix @ vectors[0])
    with pytest.raises(hvpd.InvalidArgumentError, match=r"v must be a vector of shape \(6,\), got a dict"):
        low.as_jax()({"b": vectors[0, :2], "w": vectors[0, 2:].reshape(2, 2)})


def test_equal_functions_share_a_compiled_program(point):
    H = HessianOperator(point)
    assert H.as_jax() == H.as_jax()
    assert len({H.as_jax(), H.as_jax(), HessianOperator(point).as_jax()}) == 2
    f, data = Objective(np.zeros(N)), np.ones(1)
    assert function(f, ())._source == function(f, ())._source
    assert function(f, (data,))._source == function(f, (data,))._source
    assert function(f, (data,))._source != function(f, ())._source
    assert repr(H.as_jax()).startswith("<jax function of <HessianOperator")


@pytest.mark.parametrize(
    ("v", "said"),
    [
        (np.ones(5), r"v must be a vector of shape \(6,\), or .* got shape \(5,\)"),
        (np.ones((2, N)), r"got shape \(2, 6\)"),
        ({"b": np.ones(2)}, r"a dict with the keys \{b, w\} as local was registered, got a dict with the keys \{b\}"),
        ({"b": np.ones(3), "w": np.ones((2, 2))}, r"the leaf 'b' of v must have the shape \(2,\), got \(3,\)"),
        (np.ones(N, complex), "v must have real elements, got dtype complex128"),
        ("abc", "v must consist of arrays of jax or NumPy, got a str"),
        (None, r"got None"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(A, v, said):
    with pytest.raises(hvpd.InvalidArgumentError, match=said):
        A(v)


@pytest.mark.parametrize(
    ("shape", "said"),
    [((3,), r"shape \(3,\), got \(4,\)"), ((3, 1), r"\(3,\) or an array of shape \(3, 1\), got \(4,\)")],
)
def test_an_x_without_leaf_names_that_does_not_fit_is_refused(shape, said):
    with pytest.raises(hvpd.InvalidArgumentError, match=f"^x must be a vector of .*{said}$"):
        function(Objective(np.zeros(shape)), ())(jnp.ones(4))


def test_derivatives_by_the_data_are_refused():
    def called(data):
        return function(Objective(np.zeros(3)), ({"a": data},))(jnp.ones(3))

    for transformed in (jax.grad(called), jax.jit(called), jax.vmap(called)):
        with pytest.raises(
            hvpd.InvalidArgumentError, match=r"differentiates f by x only: pass arrays .* as a part of x"
        ):
            transformed(jnp.ones(3))


def test_64_bits_need_jax_to_have_them(A):
    with jax.enable_x64(False), pytest.raises(hvpd.InvalidArgumentError, match="jax_enable_x64"):
        A(np.ones(N))


def test_32_bits_need_no_setting(dense_point, matrix):
    A = HessianOperator(dense_point(matrix.astype(np.float32))).as_jax()
    with jax.enable_x64(False):
        product = jax.jit(A)(np.ones(N, np.float32))
    assert product.dtype == np.float32
    np.testing.assert_allclose(product, matrix.sum(axis=1), rtol=1e-5, atol=1e-5)


# Objectives


@COMPILED
def test_f_has_the_derivatives_of_jax(vectors, compiled):
    f, x, v = function(Objective(np.zeros(N)), ()), vectors[0], vectors[1]
    value, gradient, hessian = _derivatives(x)
    close(compiled(f)(x), value)
    close(compiled(jax.grad(f))(x), gradient)
    close(compiled(jax.value_and_grad(f))(x)[1], gradient)
    close(compiled(lambda x, v: jax.jvp(f, (x,), (v,))[1])(x, v), gradient @ v)
    close(compiled(lambda x, v: jax.jvp(jax.grad(f), (x,), (v,))[1])(x, v), hessian @ v)
    for outer in (jax.jacfwd, jax.jacrev):
        for inner in (jax.jacfwd, jax.jacrev):
            close(compiled(outer(inner(f)))(x), hessian)
    close(compiled(jax.grad(lambda x: f(2 * x) ** 2))(x), jax.jit(jax.grad(lambda x: energy(2 * x) ** 2))(x))
    close(compiled(jax.hessian(lambda x: f(x) ** 2))(x), jax.jit(jax.hessian(lambda x: energy(x) ** 2))(x))


@COMPILED
def test_each_order_of_vmaps_is_right(vectors, compiled):
    f, X, V = function(Objective(np.zeros(N)), ()), jnp.asarray(vectors[:3]), jnp.asarray(vectors)

    def all_of(h, X, V):
        def hvp(x, v):
            return jax.jvp(jax.grad(h), (x,), (v,))[1]

        return (
            jax.vmap(h)(X),
            jax.vmap(jax.grad(h))(X),
            jax.vmap(hvp)(X, V[:3]),
            jax.vmap(hvp, (0, None))(X, V[0]),
            jax.vmap(hvp, (None, 0))(X[0], V),
            jax.vmap(jax.vmap(hvp, (None, 0)), (0, None))(X, V),
            jax.vmap(jax.vmap(hvp, (0, None)), (None, 0))(X, V),
            jax.vmap(jax.vmap(hvp, (0, None)), (0, None))(jnp.stack([X, -X]), V[0]),
            jax.vmap(jax.hessian(h))(X),
        )

    for mine, theirs in zip(
        compiled(lambda X, V: all_of(f, X, V))(X, V), jax.jit(lambda X, V: all_of(energy, X, V))(X, V), strict=True
    ):
        close(mine, theirs)


def test_directions_at_one_x_are_one_block(vectors):
    objective = Objective(np.zeros(N))

    def hvp(x, v):
        return jax.jvp(jax.grad(function(objective, ())), (x,), (v,))[1]

    jax.vmap(jax.vmap(hvp, (None, 0)), (0, None))(vectors[:3], vectors)
    assert objective.products == [(N, 5)] * 3


def test_a_gradient_takes_no_product(vectors):
    objective = Objective(np.zeros(N))
    jax.value_and_grad(function(objective, ()))(vectors[0])
    jax.jvp(function(objective, ()), (vectors[0],), (vectors[1],))
    assert objective.products == []


def test_f_takes_pytrees_and_names(vectors):
    f, x = function(Objective({"b": np.zeros(2), "w": np.zeros((2, 2))}), ()), vectors[0]
    tree = {"b": x[:2], "w": x[2:].reshape(2, 2)}
    close(f(tree), energy(x))
    close(ravel_pytree(jax.grad(f)(tree))[0], _derivatives(x)[1])
    Pair = collections.namedtuple("Pair", "first second")
    nested = Pair(x[:2], x[2:].reshape(2, 2))
    objective = Objective(nested)
    objective.names = ["second", "first"][::-1]
    f = function(objective, ())
    close(f(nested), energy(x))
    by_name = {"second": nested.second, "first": nested.first}
    close(f(by_name), energy(x))
    close(jax.grad(f)(by_name)["second"].reshape(-1), _derivatives(x)[1][2:])


def test_names_are_put_in_the_order_of_x(vectors):
    x = vectors[0]
    objective = Objective((x[:2], x[2:]))
    objective.names = ["z", "a"]
    close(function(objective, ())({"a": x[2:], "z": x[:2]}), energy(x))


def test_other_data_is_used(vectors):
    f = function(Objective(np.zeros(N)), (3.0,))
    close(jax.hessian(f)(vectors[0]), 3 * _derivatives(vectors[0])[2])


@COMPILED
def test_a_third_derivative_is_refused(vectors, compiled):
    f = function(Objective(np.zeros(N)), ())
    with pytest.raises(hvpd.InvalidArgumentError, match="third derivative"):
        compiled(jax.jacfwd(jax.hessian(f)))(vectors[0])


def test_a_product_at_a_fixed_x_can_be_differentiated_by_its_direction(vectors):
    f, x = function(Objective(np.zeros(N)), ()), vectors[0]

    def curvature(v):
        return v @ jax.jvp(jax.grad(f), (x,), (v,))[1] / 2

    close(jax.hessian(curvature)(vectors[1]), _derivatives(x)[2])


# Errors


class Failing:
    """An operator whose products fail."""

    shape, dtype = (N, N), np.dtype(np.float64)

    def __init__(self, error):
        self.error = error

    def matvec(self, x):
        raise self.error


ERRORS = [
    hvpd.HvpdError("no", reason="CLIENT_FORKED"),
    hvpd.InvalidArgumentError("the vector is wrong"),
    hvpd.UnavailableError("gone", request_id="abc"),
    hvpd.DeadlineError("late"),
    hvpd.AccessError("refused"),
    hvpd.NotFoundError("nothing"),
    hvpd.OverloadedError("full"),
    hvpd.IncompatibleError("old"),
    hvpd.MissingExtraError("missing"),
]


@COMPILED
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_error_of_a_callback_is_hvpds_own(error, compiled):
    call = compiled(Linear(Failing(error)))
    with pytest.raises(type(error)) as caught:
        jax.block_until_ready(call(jnp.ones(N)))
    assert str(caught.value) == str(error)
    assert (caught.value.reason, caught.value.request_id) == (error.reason, error.request_id)


@pytest.mark.parametrize("error", [*ERRORS, KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_each_call_raises_it_inside_of_errors(error):
    """From the second call on, jax itself raises a ValueError."""
    operator = Failing(None)
    operator.matvec = lambda x: x
    call = jax.jit(Linear(operator))
    call(jnp.ones(N))
    operator.matvec = lambda x: Failing(error).matvec(x)
    for _ in range(2):
        with pytest.raises(type(error)) as caught, hvpd.jax.errors():
            jax.block_until_ready(call(jnp.ones(N)))
        assert caught.value is error
    with pytest.raises(type(error)) as caught, hvpd.jax.errors():
        jax.block_until_ready(jax.jit(Linear(Failing(error)))(jnp.ones(N)))
    assert caught.value is error


def test_errors_leaves_other_errors_alone():
    for error in (ValueError("x"), jax.errors.JaxRuntimeError("y"), KeyError("z")):
        with pytest.raises(type(error)) as caught, hvpd.jax.errors():
            raise error
        assert caught.value is error


def test_in_a_compiled_program_it_is_also_jaxs_own():
    error = hvpd.UnavailableError("gone")
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(jax.jit(Linear(Failing(error)))(jnp.ones(N)))
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, ConnectionError)
    assert type(caught.value).__name__ == "UnavailableError"


def test_an_interrupt_stays_an_interrupt():
    with pytest.raises(KeyboardInterrupt):
        jax.block_until_ready(jax.jit(Linear(Failing(KeyboardInterrupt())))(jnp.ones(N)))


def test_errors_of_others_are_left_alone():
    def fails(v):
        raise OSError("of another [hvpd callback 999999]")

    def call(v):
        return jax.pure_callback(fails, jax.ShapeDtypeStruct(v.shape, v.dtype), v)

    with pytest.raises(jax.errors.JaxRuntimeError, match="of another") as caught:
        jax.block_until_ready(jax.jit(call)(jnp.ones(N)))
    assert not isinstance(caught.value, hvpd.HvpdError)
    assert str(jax.errors.JaxRuntimeError("text")) == "text"


def test_few_errors_are_kept():
    texts = [str(errors.marked(hvpd.HvpdError(f"number {number}"))) for number in range(65)]
    with contextlib.suppress(RuntimeError):
        raise jax.errors.JaxRuntimeError(texts[0])
    assert str(jax.errors.JaxRuntimeError(texts[-1])) == "number 64"
    assert texts[0] in str(jax.errors.JaxRuntimeError(texts[0]))


def test_the_constructor_is_replaced_once():
    before = vars(jax.errors.JaxRuntimeError)["__new__"]
    errors.install()
    assert vars(jax.errors.JaxRuntimeError)["__new__"] is before


def test_a_function_that_outlives_its_client_says_so():
    closed = hvpd.HvpdError("this client of a:1 is closed", reason="CLIENT_CLOSED")
    for call in (jax.jit(Linear(Failing(closed))), jax.jit(function(Objective(np.zeros(N), closed), ()))):
        with pytest.raises(
            hvpd.HvpdError, match=r"a:1 is closed\. A function that jax has traced still uses"
        ) as caught:
            jax.block_until_ready(call(jnp.ones(N)))
        assert caught.value.reason == "CLIENT_CLOSED"
