"""Every mode gives the same product, states its name, and refuses objectives that it
cannot serve.
"""

import dataclasses
import warnings

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from tests.support.waiting import until

MODES = [
    "forward_over_reverse",
    "reverse_over_forward",
    "reverse_over_reverse",
    "linearized",
    "auto",
    "finite_difference",
]


def softmax_regression(W, X, Y):
    """Return the mean cross-entropy of softmax(X W) with one-hot rows Y."""
    return -jnp.mean(jnp.sum(Y * jax.nn.log_softmax(X @ W), axis=1))


def softmax_hessian(W, X):
    """Return the closed form: the mean over rows of x x' (x) (diag(p) - p p'), in the
    order of W's raveling.
    """
    logits = X @ W
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    middle = np.einsum("ri,ij->rij", p, np.eye(p.shape[1])) - np.einsum("ri,rj->rij", p, p)
    size = W.size
    return np.einsum("ra,rij,rb->aibj", X, middle, X).reshape(size, size) / len(X)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    W, X = rng.normal(size=(6, 4)), rng.normal(size=(50, 6))
    return W, X, np.eye(4)[rng.integers(0, 4, 50)]


def relative(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_gives_the_closed_form(client, problem, mode, dtype):
    W, X, Y = (array.astype(dtype) for array in problem)
    objective = client.register(softmax_regression, W, X, Y, mode=mode, name=f"softmax/{mode}")
    assert objective.mode == client.objective(f"softmax/{mode}").mode == mode
    H = objective.at(W).hessian()
    dense = softmax_hessian(*problem[:2])
    tolerance = {np.float64: 1e-10, np.float32: 1e-5}[dtype]
    if mode == "finite_difference":  # The error is eps ** (2/3), times a factor of the third derivative.
        tolerance = 100 * np.finfo(dtype).eps ** (2 / 3)
    V = np.random.default_rng(1).normal(size=(24, 5)).astype(dtype)
    for _ in range(2):
        assert relative(H @ V, dense @ V) < tolerance
        for v in V.T:
            assert relative(H @ v, dense @ v) < tolerance
    assert np.array_equal(H @ np.zeros(24), np.zeros(24))


def test_the_plan_tells_the_choice_with_its_reason(serve, problem):
    server = serve()
    W, X, Y = problem
    with hvpd.connect(server.address) as client:
        auto = client.register(softmax_regression, W, X, Y, mode="auto")
        H = auto.at(W).hessian()
        tried = []

        def measured():
            H @ np.ones(24)
            (choice,) = auto.plan()
            tried.append(choice.reason)
            return choice.reason != "not yet measured" and choice

        choice = until(measured)  # Both programs are compiled in the background before both can be measured.
        assert "not yet measured" in tried
        worth = 1.1 * choice.apply_seconds < choice.hvp_seconds
        hardly = "apply is hardly faster, and takes memory"
        faster = "measured to be faster" if worth or choice.hvp_seconds <= choice.apply_seconds else hardly
        assert (choice.width, choice.program, choice.reason) == (1, "apply" if worth else "hvp", faster)
        fixed = client.register(softmax_regression, W, X, Y, mode="linearized")
        fixed.at(W).hessian() @ np.ones(24)
        assert [(c.width, c.program, c.reason) for c in fixed.plan()] == [(1, "apply", "mode linearized")]
        reverse = client.register(softmax_regression, W, X, Y, mode="reverse_over_reverse")
        reverse.at(W).hessian() @ np.ones(24)
        assert [(c.program, c.hvp_seconds is None) for c in reverse.plan()] == [("hvp", False)]


def test_linearized_uses_apply_for_every_product(serve, problem):
    server = serve()
    W, X, Y = problem
    with hvpd.connect(server.address) as client:
        H = client.register(softmax_regression, W, X, Y, mode="linearized").at(W).hessian()
        for _ in range(3):
            H @ np.eye(24)
            H @ np.ones(24)
    assert server.metric('hvpd_launches_total{program="apply"') > 0
    assert server.metric('hvpd_launches_total{program="hvp"') == 0


@jax.custom_vjp
def cubed(x):
    return jnp.sum(x**3)


cubed.defvjp(lambda x: (cubed(x), x), lambda x, g: (g * 3 * outer_square(x),))


@jax.custom_vjp
def outer_square(x):
    return x**2


outer_square.defvjp(lambda x: (outer_square(x), x), lambda x, g: (g * 2 * x,))


def test_a_custom_vjp_that_forbids_forward_mode_falls_back_and_says_so(client):
    x = np.arange(1.0, 4.0)
    with pytest.warns(UserWarning, match="custom_vjp inside: it is registered with mode 'reverse_over_reverse'"):
        objective = client.register(cubed, x)
    assert objective.mode == "reverse_over_reverse"
    assert np.allclose(objective.at(x).hessian() @ np.eye(3), np.diag(6 * x), rtol=1e-12)


@jax.custom_vjp
def tanh(x):
    return jnp.tanh(x)


tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))


@pytest.mark.parametrize("inside", [jnp.tanh, tanh])
def test_a_custom_vjp_inside_of_grad_of_jvp_falls_back(client, inside):
    x, told = np.linspace(-1.0, 1.0, 4), inside is tanh
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        objective = client.register(lambda x: jnp.sum(inside(x) ** 3), x, mode="reverse_over_forward")
    assert [warning.category for warning in caught] == [UserWarning] * told
    assert objective.mode == ("reverse_over_reverse" if told else "reverse_over_forward")
    t = np.tanh(x)
    expected = 6 * t * (1 - t**2) ** 2 - 6 * t**3 * (1 - t**2)
    assert np.allclose(objective.hessp(x, np.ones(4)), expected, rtol=1e-12)


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_forward", "reverse_over_reverse", "linearized"])
def test_a_composite_with_a_custom_vjp_has_all_its_operators(client, mode):
    rng = np.random.default_rng(0)
    W, X, Y = rng.normal(size=(4, 3)), rng.normal(size=(6, 4)), rng.normal(size=(6, 3))

    def point(act):
        def half_a_square(z, Y):
            return jnp.mean(jnp.sum((z - Y) ** 2, axis=1)) / 2

        composite = hvpd.composite(lambda W, X: act(X @ W), half_a_square, distribution="normal")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return client.register(composite, W, X, Y, mode=mode, blocks=[""]).at(W)

    found, expected = point(tanh), point(jnp.tanh)
    for name in ("hessian", "ggn", "fisher", "empirical_fisher", "kfac"):
        dense = [getattr(each, name)() @ np.eye(12) for each in (found, expected)]
        assert relative(*dense) < 1e-12, name


@pytest.mark.parametrize(("dtype", "sizes"), [("float32", [1e-30, 1e-20, 1e20]), ("float64", [1e-200, 1e-160, 1e200])])
def test_differences_with_vectors_whose_squares_the_dtype_cannot_hold(client, dtype, sizes):
    x = np.linspace(-1, 1, 5, dtype=dtype)
    objective = client.register(lambda x: jnp.sum(jnp.cos(x)), x, mode="finite_difference")
    for size in sizes:
        product = objective.hessp(x, np.full(5, size, dtype)) / np.dtype(dtype).type(size)
        assert np.allclose(product, -np.cos(x), rtol=0, atol=1e-3 if dtype == "float32" else 1e-8)


def test_a_custom_vjp_that_forward_mode_can_take_stays_as_it_is(client):
    @jax.custom_vjp
    def fourth(x):
        return jnp.sum(x**4)

    fourth.defvjp(lambda x: (jnp.sum(x**4), x), lambda x, g: (g * 4 * x**3,))
    x = np.arange(1.0, 4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective = client.register(fourth, x)
    assert objective.mode == "forward_over_reverse"
    assert np.allclose(objective.hessp(x, np.ones(3)), 12 * x**2, rtol=1e-12)


def test_a_function_with_no_second_derivative_can_be_differenced(client):
    """Its backward pass leaves jax, so there are gradients and nothing more."""

    @jax.custom_vjp
    def fourth(x):
        return jnp.sum(x**4)

    @jax.custom_jvp
    def cube(x):
        return x**3

    @cube.defjvp
    def no(primals, tangents):
        raise NotImplementedError("no derivative of the derivative")

    fourth.defvjp(lambda x: (fourth(x), x), lambda x, g: (g * 4 * cube(x),))
    x = np.arange(1.0, 4.0)
    with pytest.raises(hvpd.InvalidArgumentError, match="whose rule is differentiated again"):
        client.register(fourth, x)
    objective = client.register(fourth, x, mode="finite_difference")
    assert np.allclose(objective.hessp(x, np.ones(3)), 12 * x**2, rtol=1e-8)


def test_finite_differences_do_not_depend_on_the_scale_of_the_vector(client):
    x = np.linspace(-1, 1, 10)
    H = client.register(lambda x: jnp.sum(jnp.exp(x)), x, mode="finite_difference").at(x).hessian()
    for scale in (1e-30, 1.0, 1e30):
        assert np.allclose(H @ np.full(10, scale), np.exp(x) * scale, rtol=1e-8)


def test_an_unknown_mode_lists_the_known_ones(client):
    with pytest.raises(hvpd.InvalidArgumentError, match=rf"mode must be one of {', '.join(MODES[:3])}.*got 'forward'"):
        client.register(lambda x: jnp.sum(x), np.ones(2), mode="forward")


# Foreign bundles


def exported(vjp_order=2, **options):
    """Return a foreign export of a quartic plus a quadratic form, whose Hessian is
    diag(12 x^2) + (A + A') / 2.
    """

    def form(x, A):
        return jnp.sum(x**4) + 0.5 * x @ A @ x

    spec = jax.ShapeDtypeStruct
    with jax.enable_x64(True):
        made = jax.export.export(jax.jit(form), **options)(spec((5,), np.float64), spec((5, 5), np.float64))
        return made.serialize(vjp_order=vjp_order)


def test_a_foreign_blob(client):
    rng = np.random.default_rng(0)
    x, A, V = rng.normal(size=5), rng.normal(size=(5, 5)), rng.normal(size=(5, 7))
    objective = client.register_exported(exported(), A, name="foreign")
    assert (objective.n, objective.dtype, objective.mode) == (5, np.float64, "reverse_over_reverse")
    dense = np.diag(12 * x**2) + (A + A.T) / 2
    H = client.objective("foreign").at(x).hessian()
    assert relative(H @ V, dense @ V) < 1e-10
    assert relative(H @ V[:, 0], dense @ V[:, 0]) < 1e-10
    assert objective.value(x) == pytest.approx(np.sum(x**4) + 0.5 * x @ A @ x, rel=1e-12)


@pytest.mark.parametrize("order", [0, 1])
def test_a_foreign_blob_without_both_derivatives(client, order):
    with pytest.raises(hvpd.InvalidArgumentError, match=rf"form was serialized with vjp_order={order}.*vjp_order=2"):
        client.register_exported(exported(vjp_order=order), np.ones((5, 5)))


@pytest.mark.parametrize("blob", [b"", b"\0" * 100, bytes(exported()[:-200]), b"not a program"])
def test_bytes_that_are_no_exported_function(client, blob):
    with pytest.raises(hvpd.InvalidArgumentError, match=r"not the bytes of a jax\.export\.Exported"):
        client.register_exported(blob)


def test_an_exported_function_must_be_given_as_its_bytes(client):
    with pytest.raises(
        hvpd.InvalidArgumentError, match=r"takes the bytes of Exported.serialize\(vjp_order=2\), got 3$"
    ):
        client.register_exported(3)


@pytest.mark.parametrize("version", [1, 99])
def test_a_foreign_blob_of_another_calling_convention_is_refused_with_both_versions(client, version):
    made = jax.export.deserialize(bytearray(exported()))
    blob = dataclasses.replace(made, calling_convention_version=version).serialize(vjp_order=2)
    with pytest.raises(
        hvpd.InvalidArgumentError, match=rf"jax {jax.__version__} .*it has calling convention {version}; export it"
    ):
        client.register_exported(blob, np.ones((5, 5)))


def test_the_precision_of_a_foreign_blob_is_its_own(client):
    objective = client.register_exported(exported(), np.eye(5), name="foreign/precision")
    assert objective.precision == "exported"
    assert next(each for each in client.objectives() if each.name == "foreign/precision").precision == "exported"


def test_a_foreign_blob_for_another_platform_and_with_other_data(client):
    with pytest.raises(hvpd.IncompatibleError, match=r"computes on cpu.*branches for tpu"):
        client.register_exported(exported(platforms=("tpu",)), np.ones((5, 5)))
    with pytest.raises(hvpd.InvalidArgumentError, match="jax cannot trace"):
        client.register_exported(exported(), np.ones((4, 4)))
    with pytest.raises(hvpd.InvalidArgumentError, match="jax cannot trace"):
        client.register_exported(exported())


# Modes and precisions of a product


def test_a_product_can_have_another_mode_than_the_objective(server, client, problem_of_modes):
    objective, x, expected = problem_of_modes
    for mode in ("forward_over_reverse", "reverse_over_forward", "reverse_over_reverse", "linearized"):
        H = objective.at(x).hessian(mode=mode)
        assert H.mode == mode
        np.testing.assert_allclose(H @ np.eye(len(x)), expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(H @ np.ones(len(x)), expected @ np.ones(len(x)), rtol=1e-10, atol=1e-12)
    H = objective.at(x).hessian(mode="finite_difference")
    np.testing.assert_allclose(H @ np.eye(len(x)), expected, rtol=1e-6, atol=1e-8)
    assert server.metric('hvpd_launches_total{program="hvp@reverse_over_forward"') > 0
    assert server.metric('hvpd_launches_total{program="apply"') > 0


@pytest.fixture(scope="module")
def problem_of_modes(client):
    x = np.linspace(-1.0, 1.0, 5)
    X = np.random.default_rng(3).normal(size=(20, 5))

    def fun(x, X):
        return jnp.sum(jnp.tanh(X @ x) ** 2) + jnp.sum(x**4)

    with jax.enable_x64(True):
        expected = np.asarray(jax.hessian(fun)(jnp.asarray(x), jnp.asarray(X)))
    return client.register(fun, x, X), x, expected


def test_a_block_can_have_a_mode_and_a_precision(client):
    x = {"a": np.arange(1.0, 3.0), "b": np.arange(3.0, 6.0)}
    X = np.random.default_rng(3).normal(size=(20, 3))
    objective = client.register(lambda x, X: jnp.sum((X @ x["b"]) ** 2) * jnp.sum(x["a"]), x, X)
    point = objective.at(x)
    expected = 2 * np.sum(x["a"]) * X.T @ X
    for mode, precision in [("reverse_over_reverse", ""), ("", "default"), ("reverse_over_forward", "high")]:
        H = point.hessian(mode=mode, precision=precision).block("b")
        np.testing.assert_allclose(H @ np.eye(3), expected, rtol=1e-10)
    assert "hvp@reverse_over_forward~high[1]" in {compile_.program for compile_ in objective.compiles()}


def test_operators_of_different_modes_stay_apart(problem_of_modes):
    objective, x, expected = problem_of_modes
    point = objective.at(x)
    both = point.hessian() + point.hessian(mode="reverse_over_reverse")
    np.testing.assert_allclose(both @ np.eye(5), 2 * expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "sideways"}, "a product's mode is one of forward_over_reverse"),
        ({"mode": "auto"}, "a product's mode is one of forward_over_reverse"),
        ({"precision": "exact"}, "a product's precision is one of highest"),
        ({"mode": "linearized", "precision": "high"}, "mode linearized keeps residuals"),
    ],
)
def test_the_server_refuses_modes_and_precisions_that_are_none(problem_of_modes, options, says):
    objective, x, _ = problem_of_modes
    with pytest.raises(hvpd.InvalidArgumentError, match=says):
        objective.at(x).multiply(np.ones((1, 5)), **options)


def test_only_hessians_have_modes(client):
    from hvpd.v1 import curvature_pb2

    stages = hvpd.composite(lambda w, X: X @ w, lambda z, y: jnp.mean((z - y) ** 2))
    point = client.register(stages, np.ones(3), np.ones((4, 3)), np.ones(4)).at(np.ones(3))
    expected = point.ggn() @ np.ones(3)
    np.testing.assert_allclose(point.ggn(precision="default") @ np.ones(3), expected, rtol=1e-12)
    with pytest.raises(hvpd.InvalidArgumentError, match="only products of the Hessian have a mode"):
        point.multiply(np.ones((1, 3)), curvature_pb2.OPERATOR_GGN, mode="reverse_over_reverse")
