"""jax, lineax, matfree and optimistix on operators and objectives of a real server,
against jax's own derivatives and NumPy's solutions.
"""

import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import lineax as lx
import matfree.decomp
import matfree.eig
import matfree.funm
import matfree.stochtrace
import numpy as np
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree

import hvpd
import hvpd.jax

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def loss(params, X):
    hidden = jnp.tanh(X @ params["w"] + params["b"])
    return jnp.mean(jnp.logaddexp(0.0, hidden @ params["out"])) + 0.05 * sum(
        jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)
    )


RNG = np.random.default_rng(0)
PARAMS = {"b": RNG.normal(size=3), "out": RNG.normal(size=3), "w": RNG.normal(size=(4, 3))}
X = RNG.normal(size=(20, 4))
FLAT = np.concatenate([PARAMS[name].reshape(-1) for name in sorted(PARAMS)])
N = len(FLAT)


def plain(x):
    """Return the loss at a flat x, by jax in this process."""
    return loss(ravel_pytree(PARAMS)[1](x), X)


@pytest.fixture(scope="module")
def objective(client):
    with jax.enable_x64(True):
        return client.register(loss, PARAMS, X, name="jax/mlp")


@pytest.fixture(scope="module")
def hessian():
    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.hessian(plain))(FLAT))


@pytest.fixture
def H(objective):
    return objective.at(PARAMS).hessian()


@pytest.fixture
def shift(hessian):
    """A shift that makes the Hessian positive definite."""
    return 0.1 - np.linalg.eigvalsh(hessian)[0]


def close(a, b, tolerance=1e-10):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# jax


def test_products_and_derivatives_equal_jaxs_own(objective, H, hessian):
    V = RNG.normal(size=(7, N))
    close(jax.jit(jax.vmap(H.as_jax()))(V), V @ hessian)
    f = objective.as_jax()
    close(jax.jit(jax.hessian(f))(FLAT), hessian)
    close(ravel_pytree(jax.jit(jax.grad(f))(PARAMS))[0], jax.grad(plain)(FLAT))
    shifted = np.stack([FLAT, FLAT + 0.1])
    close(jax.jit(jax.vmap(jax.hessian(f)))(shifted), jax.vmap(jax.hessian(plain))(shifted))


def test_a_vmapped_axis_of_10_000_is_split_into_blocks(client, H, hessian):
    V = RNG.normal(size=(10_000, N))
    before = client.statistics()
    close(jax.jit(jax.vmap(H.as_jax()))(V), V @ hessian, 1e-9)
    after = client.statistics()
    assert after.vectors - before.vectors == 10_000
    assert 10 <= after.products - before.products <= 10_000 / 16


def test_threads_with_large_vectors_do_not_wait_for_each_other_for_ever(client):
    """`jax.pure_callback` hangs here: its copies wait for threads that wait for it."""
    n = 300_000
    objective = client.register(lambda x: jnp.sum(jnp.cosh(x)), np.zeros(n), name="jax/wide")
    A, f = objective.at(np.zeros(n)).hessian().as_jax(), objective.as_jax()
    # The arithmetic around a product makes XLA use its threads.
    repeat = jax.jit(lambda v: jax.lax.scan(lambda v, _: (A(v * 1.5) / 1.5, None), v, None, length=10)[0])
    found = []

    def work(number):
        with jax.enable_x64(True):
            v = repeat(jnp.full(n, 1.0 + number))
            gradient = jax.jit(jax.grad(f))(jnp.full(n, 0.1 * number))
            found.append((number, float(v[0]), float(gradient[-1])))

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    close(sorted(found), [(number, 1.0 + number, np.sinh(0.1 * number)) for number in range(6)])


def test_an_embedded_server_shares_the_cores():
    """A program of its own, because a hanging callback would never let go of it."""
    program = """
import jax, jax.numpy as jnp, numpy as np, hvpd
client = hvpd.local()
objective = client.register(lambda x: jnp.sum(jnp.cosh(x)), np.zeros(200_000, np.float32))
f = objective.as_jax()
step = jax.jit(lambda x: x - 0.5 * jax.grad(f)(x))
x = jax.lax.fori_loop(0, 20, lambda _, x: step(x), jnp.ones(200_000, jnp.float32))
print(float(jnp.max(jnp.abs(x))) < 1e-3)
client.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout == "True\n", done.stderr


def test_a_traced_operator_that_outlives_its_client_says_so(server):
    with hvpd.connect(server.address) as client:
        objective = client.register(loss, PARAMS, X, name="jax/mlp")
        A, f = jax.jit(objective.at(PARAMS).hessian().as_jax()), jax.jit(objective.as_jax())
        A(FLAT), f(FLAT)
    for call in (A, f):
        with (
            pytest.raises(
                hvpd.HvpdError,
                match=r"closed: connect again, and .* client\. A function that jax has traced still uses",
            ) as caught,
            hvpd.jax.errors(),
        ):
            jax.block_until_ready(call(FLAT + 1))
        assert caught.value.reason == "CLIENT_CLOSED"


def test_errors_of_the_server_arrive_in_loops_and_solvers(server):
    with hvpd.connect(server.address, retry_timeout=0.0) as client:
        objective = client.register(loss, PARAMS, X, name="jax/mlp")
        H = objective.at(PARAMS).hessian()
        A = H.as_jax()
        H.point._id = "0" * 64  # No point of the server.
        H.point._restore = lambda: None
        loop = jax.jit(lambda v: jax.lax.fori_loop(0, 3, lambda _, v: A(v), v))
        with pytest.raises(hvpd.OverloadedError) as caught:
            jax.block_until_ready(loop(FLAT))
        assert caught.value.reason == "POINT_NOT_RESIDENT"
        operator = hvpd.jax.lineax_operator(H, lx.positive_semidefinite_tag)
        with pytest.raises(hvpd.OverloadedError), hvpd.jax.errors():
            jax.block_until_ready(lx.linear_solve(operator, jnp.asarray(FLAT), lx.CG(1e-8, 1e-8)).value)


def test_solvers_of_jax(H, hessian, shift):
    A, b = H.shifted(shift).as_jax(), FLAT
    expected = np.linalg.solve(hessian + shift * np.eye(N), b)
    for solve in (jax.scipy.sparse.linalg.cg, jax.scipy.sparse.linalg.bicgstab):
        close(jax.jit(lambda b, solve=solve: solve(A, b, tol=1e-12)[0])(b), expected, 1e-8)
    gmres = jax.jit(lambda b: jax.scipy.sparse.linalg.gmres(H.as_jax(), b, tol=1e-12, atol=1e-12)[0])
    close(gmres(b), np.linalg.solve(hessian, b), 1e-7)


# lineax: the contract of AbstractLinearOperator


@pytest.fixture
def operator(H):
    return hvpd.jax.lineax_operator(H)


def test_lineax_knows_its_structure_and_its_tags(H, operator):
    structure = jax.ShapeDtypeStruct((N,), np.float64)
    assert isinstance(operator, lx.AbstractLinearOperator)
    assert operator.in_structure() == operator.out_structure() == structure
    assert operator.in_size() == operator.out_size() == N
    assert lx.is_symmetric(operator)
    for claim in (lx.is_diagonal, lx.is_tridiagonal, lx.is_positive_semidefinite, lx.is_negative_semidefinite):
        assert not claim(operator)
    with pytest.raises(hvpd.InvalidArgumentError, match=r"lineax_operator takes an operator of hvpd, .* got a method"):
        hvpd.jax.lineax_operator(H.as_jax)
    tagged = hvpd.jax.lineax_operator(H, lx.positive_semidefinite_tag)
    assert lx.is_symmetric(tagged)
    assert lx.is_positive_semidefinite(tagged)
    several = hvpd.jax.lineax_operator(H, [lx.negative_semidefinite_tag, lx.tridiagonal_tag])
    assert lx.is_negative_semidefinite(several)
    assert lx.is_tridiagonal(several)


def test_lineax_multiplies_and_materialises_it(operator, hessian):
    close(operator.mv(jnp.asarray(FLAT)), hessian @ FLAT)
    close(operator.as_matrix(), hessian)
    close(operator.T.as_matrix(), hessian.T)
    close(lx.materialise(operator).as_matrix(), hessian)
    close(lx.linearise(operator).mv(jnp.asarray(FLAT)), hessian @ FLAT)
    close(lx.diagonal(operator), np.diag(hessian))
    close(jax.jit(lambda v: operator.mv(v))(FLAT), hessian @ FLAT)
    close(jax.vmap(operator.mv)(np.eye(N)), hessian)
    close(jax.jvp(operator.mv, (jnp.asarray(FLAT),), (jnp.ones(N),))[1], hessian.sum(axis=1))
    close(jax.linear_transpose(operator.mv, FLAT)(jnp.ones(N))[0], hessian.sum(axis=0))


def test_lineax_combines_it(operator, hessian):
    other = lx.MatrixLinearOperator(jnp.asarray(RNG.normal(size=(N, N))))
    close((operator + other).as_matrix(), hessian + other.matrix)
    close((operator - other).as_matrix(), hessian - other.matrix)
    close((2 * operator).as_matrix(), 2 * hessian)
    close((operator / 2).as_matrix(), hessian / 2)
    close((-operator).as_matrix(), -hessian)
    close((operator @ other).as_matrix(), hessian @ other.matrix)
    close((other @ operator).mv(jnp.asarray(FLAT)), other.matrix @ (hessian @ FLAT))
    close(lx.TaggedLinearOperator(operator, lx.symmetric_tag).as_matrix(), hessian)


def test_lineax_solves_with_it(H, hessian, shift):
    definite = hvpd.jax.lineax_operator(H.shifted(shift), lx.positive_semidefinite_tag)
    matrix, b = hessian + shift * np.eye(N), jnp.asarray(FLAT)
    expected = np.linalg.solve(matrix, FLAT)
    tight = {"rtol": 1e-12, "atol": 1e-12}
    for solver in (
        lx.CG(**tight),
        lx.GMRES(**tight, restart=N),
        lx.Cholesky(),
        lx.LU(),
        lx.AutoLinearSolver(well_posed=True),
    ):
        close(jax.jit(lambda b, solver=solver: lx.linear_solve(definite, b, solver).value)(b), expected, 1e-8)
    cg = lx.CG(**tight)
    close(jax.jacrev(lambda b: lx.linear_solve(definite, b, cg).value)(b), np.linalg.inv(matrix), 1e-8)
    many = jnp.stack([b, 2 * b])
    close(jax.vmap(lambda b: lx.linear_solve(definite, b, cg).value)(many), np.stack([expected, 2 * expected]), 1e-8)


def test_lineax_refuses_cg_without_a_claim(operator):
    with pytest.raises(ValueError, match="positive or negative definite"):
        lx.linear_solve(operator, jnp.asarray(FLAT), lx.CG(1e-8, 1e-8))


# matfree: the contract of its decompositions and estimators


def test_matfree_decomposes_it(H, hessian):
    A, v = H.as_jax(), jnp.asarray(FLAT)
    for reortho in ("full", "none"):
        k = 6 if reortho == "none" else N
        found = matfree.decomp.tridiag_sym(k, reortho=reortho)(A, v)
        Q, T = np.asarray(found.Q_tall).T, np.asarray(found.J_small)  # Its rows are the basis.
        close(Q.T @ Q, np.eye(k), 1e-8)
        residual = np.outer(np.asarray(found.residual), np.eye(k)[-1])
        close(hessian @ Q, Q @ T + residual, 1e-8)
        close(found.init_length_inv, 1 / np.linalg.norm(FLAT))
    found = matfree.decomp.hessenberg(N, reortho="full")(A, v)
    Q = np.asarray(found.Q_tall).T
    close(hessian @ Q, Q @ found.J_small, 1e-8)


def test_matfree_finds_its_eigenvalues(H, hessian):
    eigh = matfree.eig.eigh_partial(matfree.decomp.tridiag_sym(N))
    values, vectors = jax.jit(eigh, static_argnums=0)(H.as_jax(), jnp.asarray(FLAT))
    close(np.sort(values), np.linalg.eigvalsh(hessian), 1e-8)
    for value, vector in zip(values, vectors, strict=True):
        close(hessian @ vector, value * vector, 1e-7)


def test_matfree_estimates_trace_and_diagonal(H, hessian):
    sampler = matfree.stochtrace.sampler_signs(jnp.ones(N), num=4000)
    key = jax.random.PRNGKey(0)
    trace = matfree.stochtrace.estimator_monte_carlo(matfree.stochtrace.monte_carlo_trace(), sampler)
    off = hessian - np.diag(np.diag(hessian))
    deviation = np.sqrt(2 * np.sum(off**2) / 4000)
    assert abs(float(trace(H.as_jax(), key)) - np.trace(hessian)) < 5 * deviation


def test_matfree_differentiates_through_its_functions(H, hessian):
    matrix_exp = matfree.funm.funm_lanczos_sym(
        matfree.funm.dense_funm_sym_eigh(jnp.exp), matfree.decomp.tridiag_sym(N, custom_vjp=False)
    )
    A = H.as_jax()
    values, vectors = np.linalg.eigh(hessian)
    exponential = (vectors * np.exp(values)) @ vectors.T
    close(matrix_exp(A, jnp.asarray(FLAT)), exponential @ FLAT, 1e-8)


# optimistix


def test_optimistix_minimises_with_it(objective, hessian):
    f = objective.as_jax()
    found = optx.minimise(lambda x, _: f(x), optx.BFGS(rtol=1e-10, atol=1e-10), jnp.asarray(FLAT), max_steps=500)
    assert np.linalg.norm(jax.grad(plain)(found.value)) < 1e-6
    tree = optx.minimise(lambda x, _: f(x), optx.BFGS(rtol=1e-10, atol=1e-10), PARAMS, max_steps=500)
    close(ravel_pytree(tree.value)[0], found.value, 1e-5)


def test_optimistix_newton_uses_products(client, objective):
    f = objective.as_jax()
    start = optx.minimise(lambda x, _: f(x), optx.BFGS(rtol=1e-3, atol=1e-3), jnp.asarray(FLAT)).value
    before = client.statistics().products
    newton = optx.Newton(rtol=1e-12, atol=1e-12, linear_solver=lx.GMRES(rtol=1e-12, atol=1e-12, restart=N))
    found = optx.root_find(lambda x, _: jax.grad(f)(x), newton, start)
    assert client.statistics().products > before
    assert np.linalg.norm(jax.grad(plain)(found.value)) < 1e-10


# The installation


def test_without_jax_the_error_names_the_extra(server):
    program = f"""
import sys
sys.modules["jax"] = None
import hvpd, numpy
with hvpd.connect({server.address!r}) as client:
    objective = client.objective("jax/mlp")
    for call in (objective.as_jax, objective.at(numpy.zeros(objective.n)).hessian().as_jax):
        try:
            call()
        except hvpd.MissingExtraError as error:
            print(error)
"""
    with hvpd.connect(server.address) as client:
        client.register(loss, PARAMS, X, name="jax/mlp")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.count("as_jax needs jax here: pip install 'hvpd[jax]'") == 2, done.stderr


def test_without_lineax_the_error_names_it(H, monkeypatch):
    monkeypatch.setitem(sys.modules, "lineax", None)
    with pytest.raises(hvpd.MissingExtraError, match="pip install lineax"):
        hvpd.jax.lineax_operator(H)
