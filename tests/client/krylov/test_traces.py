"""Traces, diagonals and spectra against dense matrices, with honest errors."""

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
import scipy.stats

import hvpd
from hvpd import krylov
from hvpd._krylov import probes, quadrature
from hvpd._krylov.runner import Runner, runner

N = 80
Q = np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))[0]


def matrix(values, dtype=np.float64):
    basis = Q if len(values) == N else np.linalg.qr(np.random.default_rng(0).standard_normal((len(values),) * 2))[0]
    A = (basis * values) @ basis.T
    return ((A + A.T) / 2).astype(dtype)


SPECTRA = {
    "flat": 3 - 2 * np.arange(N) / N,
    "power": np.arange(1.0, N + 1) ** -2,
    "step": np.r_[np.ones(10), np.full(N - 10, 1e-3)],
    "indefinite": np.random.default_rng(1).standard_normal(N),
}


@pytest.mark.parametrize("method", ["xtrace", "hutch++", "hutchinson"])
@pytest.mark.parametrize("name", SPECTRA)
def test_a_trace_lies_within_two_errors_in_95_of_100_seeds(name, method):
    A = matrix(SPECTRA[name])
    found = [krylov.trace(A, method, products=30, seed=seed) for seed in range(100)]
    inside = [abs(each.value - np.trace(A)) <= 2 * each.standard_error for each in found]
    assert sum(inside) >= 95
    deviation = np.sqrt(np.mean([(each.value - np.trace(A)) ** 2 for each in found]))
    assert np.median([each.standard_error for each in found]) < 3 * deviation
    assert {each.products for each in found} == {30}


@pytest.mark.parametrize("method", ["xdiag", "hutchinson"])
def test_a_diagonal_lies_within_two_errors_in_95_of_100(method):
    A = matrix(SPECTRA["power"])
    found = [krylov.diagonal(A, method, products=30, seed=seed) for seed in range(100)]
    inside = [abs(each.values - np.diag(A)) <= 2 * each.standard_error for each in found]
    assert np.mean(inside) >= 0.95


def logdets(values, count, steps):
    """Return 100 estimates from the parts of one call, and their true errors."""
    A = matrix(values)
    many = runner(A).tridiagonals(seed=0, probes=100 * count, steps=steps, tick=lambda *_: None)

    class Part(Runner):
        def tridiagonals(self, *, seed, **_):
            rows = slice(seed * count, (seed + 1) * count)
            return probes.Tridiagonals(many.alphas[rows], many.betas[rows], many.sizes[rows], "full", finite=True)

    part = Part(lambda V: V @ A, len(A), A.dtype)
    found = [quadrature.trace_of(part, quadrature.log, count, steps, seed, "logdet") for seed in range(100)]
    return found, np.array([abs(each.value - np.log(values).sum()) for each in found])


ILL_CONDITIONED = {
    "four decades": np.logspace(-2, 2, 130),
    "eight decades": np.logspace(-8, 0, 130),
    "twelve decades": np.logspace(-12, 0, 130),
    "powers": np.arange(1.0, 131) ** -4,
    "outliers": np.r_[np.logspace(2, 5, 10), np.linspace(1e-3, 2e-3, 120)],
}


@pytest.mark.parametrize("steps", [6, 12])
@pytest.mark.parametrize("name", ILL_CONDITIONED)
def test_few_steps_count_as_error_of_a_logdet(name, steps):
    found, errors = logdets(ILL_CONDITIONED[name], 10, steps)
    assert sum(errors <= [2 * each.standard_error for each in found]) >= 95


def test_the_error_of_a_logdet_is_that_of_the_vectors_if_the_steps_are_enough():
    found, errors = logdets(np.linspace(0.5, 8, 130), 6, 20)
    stated = np.array([each.standard_error for each in found])
    assert sum(errors <= 2 * stated) >= 95
    assert np.median(stated) < 3 * np.sqrt(np.mean(errors**2))


def test_the_error_of_one_step_is_not_known():
    assert krylov.logdet(matrix(np.linspace(1, 2, 130)), probes=10, steps=1).standard_error == np.inf
    assert krylov.logdet(matrix(np.linspace(1, 2, 130))).products == 130


def test_the_better_methods_are_better_where_they_should_be():
    A = matrix(SPECTRA["power"])

    def rms(method):
        return np.sqrt(np.mean([(krylov.trace(A, method, 40, seed).value - np.trace(A)) ** 2 for seed in range(20)]))

    xtrace, hutchpp, hutchinson = map(rms, ("xtrace", "hutch++", "hutchinson"))
    assert xtrace < hutchpp < 0.2 * hutchinson


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_low_rank_and_few_dimensions_are_exact(dtype):
    A = matrix(np.r_[np.ones(5), np.zeros(N - 5)], dtype)
    eps = np.finfo(dtype).eps
    for method in ("xtrace", "hutch++"):
        found = krylov.trace(A, method, products=40)
        assert abs(found.value - 5) < 100 * eps
        assert abs(found.value - 5) <= 2 * found.standard_error < 1000 * eps
    diagonal = krylov.diagonal(A, products=40)
    assert abs(diagonal.values - np.diag(A)).max() < 100 * eps
    for exact in (krylov.trace(A, products=N), krylov.diagonal(A, products=N)):
        assert (exact.method, exact.products) == ("exact", N)
    assert np.array_equal(krylov.diagonal(A, products=N).values, np.diag(A))
    assert krylov.trace(np.zeros((300, 300))).value == 0


def test_a_function_of_the_operator():
    values = np.linspace(0, 3, 500)
    A = matrix(values)
    exact = (values / (values + 0.1)).sum()
    found = krylov.trace_of(A, lambda values: values / (values + 0.1), probes=20, steps=24)
    assert abs(found.value - exact) < 2 * found.standard_error < 0.1 * exact
    assert (found.products, found.method) == (480, "trace_of")
    assert np.isclose(float(krylov.trace_of(A, np.ones_like, probes=2, steps=20)), 500)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_n_products_are_exact_if_an_estimate_takes_as_many(dtype):
    values = np.logspace(-3, 1, N)
    A = matrix(values, dtype)
    for found, exact in [
        (krylov.logdet(A), np.linalg.slogdet(A.astype(np.float64))[1]),
        (krylov.trace_of(A, np.sqrt), np.sqrt(np.linalg.eigvalsh(A.astype(np.float64))).sum()),
        (krylov.trace_of(A, np.exp, probes=2, steps=40), np.exp(scipy.linalg.eigvalsh(A.astype(np.float64))).sum()),
    ]:
        assert (found.method, found.products) == ("exact", N)
        assert abs(found.value - exact) <= 2 * found.standard_error < 1e5 * np.finfo(dtype).eps * abs(exact)
    assert krylov.trace_of(A, np.exp, probes=2, steps=39).products == 78
    assert krylov.logdet(np.eye(5)).value == 0
    assert krylov.trace_of(np.zeros((3, 3)), np.exp).value == 3
    large = scipy.sparse.diags(np.linspace(1, 2, 2049))
    assert krylov.logdet(large, probes=33, steps=63).products == 2079


def test_a_function_that_is_not_finite_gets_an_error_without_a_warning():
    for steps in (100, 10):  # n products, and quadrature.
        with pytest.raises(hvpd.InvalidArgumentError, match=r"not finite at -.*: pass a function .* or add a shift"):
            krylov.trace_of(matrix(np.linspace(-1, 1, N)), np.log, probes=2, steps=steps)


def test_density_is_within_1_percent_of_the_dense_spectrum():
    n = 2000
    eigenvalues = np.sort(np.random.default_rng(3).gamma(2.0, size=n))
    rotation = np.random.default_rng(4).standard_normal((n, 3))
    rotation /= np.linalg.norm(rotation, axis=0)

    def multiply(V):  # Three reflections make eigenvectors that are no unit vectors.
        for w in rotation.T:
            V = V - 2 * np.outer(w, w @ V)
        V = eigenvalues[:, None] * V
        for w in rotation.T[::-1]:
            V = V - 2 * np.outer(w, w @ V)
        return V

    A = scipy.sparse.linalg.LinearOperator(
        (n, n), matvec=lambda v: multiply(v.reshape(-1, 1))[:, 0], matmat=multiply, dtype=float
    )
    spectrum = krylov.spectrum(A, probes=40, steps=60)
    grid = np.linspace(-3, eigenvalues.max() + 3, 600)
    exact = scipy.stats.norm.pdf(grid[:, None], eigenvalues, 0.3).mean(axis=1)
    density = spectrum.density(grid, sigma=0.3)
    assert np.trapezoid(abs(density - exact), grid) < 0.01
    assert np.isclose(np.trapezoid(density, grid), 1, atol=1e-6)
    share = (spectrum.weights * (spectrum.nodes <= 1.0)).sum(axis=1).mean()
    assert abs(share - np.mean(eigenvalues <= 1.0)) < 2 * spectrum.standard_error < 0.05
    assert abs(spectrum.moments(2) - [eigenvalues.mean(), (eigenvalues**2).mean()]).max() < 0.1


def test_an_exhausted_space_is_exact():
    A = np.diag(np.repeat([1.0, 2.0, 5.0], 20))
    spectrum = krylov.spectrum(A, probes=4, steps=30)
    assert spectrum.sizes.tolist() == [3] * 4
    assert np.allclose(spectrum.nodes[:, :3], [1, 2, 5])
    assert np.allclose(spectrum.weights[:, :3], 1 / 3)  # Random signs weigh unit vectors alike.
    assert np.isclose(krylov.logdet(A).value, 20 * np.log(10))


def test_a_spectrum_of_one_point_has_a_density():
    zero = krylov.spectrum(np.zeros((5, 5)))
    assert np.allclose(zero.density([0.0, 1.0]), scipy.stats.norm.pdf([0.0, 1.0]))
    one = krylov.spectrum(np.eye(5))
    assert np.isclose(np.trapezoid(one.density(one.grid()), one.grid()), 1, atol=1e-3)


@pytest.mark.parametrize("sigma", [None, 0.05, 1.0, 30.0])
def test_the_density_on_its_grid_integrates_to_1(sigma):
    spectrum = krylov.spectrum(matrix(np.linspace(0, 3, N)), 4, 20)
    grid = spectrum.grid(sigma=sigma)
    assert abs(np.trapezoid(spectrum.density(grid, sigma), grid) - 1) < 1e-4
    assert np.array_equal(spectrum.density(sigma=sigma), spectrum.density(grid, sigma))
    with pytest.raises(hvpd.InvalidArgumentError, match="points must be"):
        spectrum.grid(0)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_bases_that_do_not_fit_are_left_out_and_said(dtype):
    A = matrix(np.r_[np.linspace(0, 1, N - 1), 20], dtype)
    full, none = (krylov.spectrum(A, 6, 60, reorthogonalize=each) for each in ("full", "none"))
    assert (full.reorthogonalize, none.reorthogonalize) == ("full", "none")
    grid = np.linspace(-2, 22, 200)
    assert abs(full.density(grid, 0.5) - none.density(grid, 0.5)).max() < 1e-3
    tick = lambda done, residual: None  # noqa: E731
    small = {"seed": 0, "probes": 6, "steps": 60, "tick": tick}
    grouped = probes.tridiagonals(lambda V: V @ A, N, A.dtype, **small, basis_bytes=2 * 60 * N * A.itemsize)
    assert grouped.reorthogonalize == "full"
    whole = probes.tridiagonals(lambda V: V @ A, N, A.dtype, **small)
    assert np.allclose(grouped.alphas[:, :10], whole.alphas[:, :10], rtol=1e-4)


def test_an_indefinite_operator_has_no_logdet():
    with pytest.raises(
        hvpd.InvalidArgumentError, match=r"not positive definite: it has an eigenvalue of at most -[\d.]+; add a shift"
    ):
        krylov.logdet(matrix(np.linspace(-1, 1, N)))


def test_products_that_are_not_finite():
    A = np.full((300, 300), np.nan)
    for call in (krylov.trace, krylov.diagonal, krylov.spectrum, krylov.logdet):
        with pytest.raises(hvpd.HvpdError, match="hold NaN or infinity, usually because x") as raised:
            call(A)
        assert raised.value.reason == "NOT_FINITE"
    B, count = matrix(SPECTRA["flat"]), iter(range(1000))
    broken = scipy.sparse.linalg.LinearOperator(
        (N, N), matvec=None, matmat=lambda V: B @ V * (np.nan if next(count) == 12 else 1), dtype=float
    )
    late = krylov.spectrum(broken, probes=3, steps=40)
    assert late.sizes.tolist() == [12] * 3
    assert "NaN" in late.reason


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda A: krylov.trace(A, "na"), "method must be one of xtrace"),
        (lambda A: krylov.trace(A, products=3), "products must be an integer of at least 4"),
        (lambda A: krylov.diagonal(A, products=1), "products must be an integer of at least 4"),
        (lambda A: krylov.spectrum(A, probes=1), "probes must be an integer of at least 2"),
        (lambda A: krylov.spectrum(A, steps=0), "steps must be an integer of at least 1"),
        (lambda A: krylov.spectrum(A, reorthogonalize="half"), "reorthogonalize must be"),
        (lambda A: krylov.spectrum(A).density(sigma=0.0), "sigma must be positive"),
        (lambda A: krylov.trace_of(A, lambda v: v / 0), "trace_of is not finite at"),
        (
            lambda A: krylov.trace_of(A, lambda v: v[:1]),
            r"an array of shape \(\d+,\), and returned float64 of shape \(1,\)",
        ),
        (lambda A: krylov.trace_of(A, lambda v: v * 1j), "and returned complex128"),
        (lambda A: krylov.trace_of(A, 3), "function must be a function of an array of eigenvalues.*got 3"),
        (
            lambda A: krylov.spectrum(A, probes=10**7),
            r"10000000 probes of 80 steps are 800000000 products, and one call takes at most 1048576: take fewer probes",
        ),
        (
            lambda A: krylov.trace(scipy.sparse.eye_array(1 << 21), products=1 << 21),
            "products must be at most 1048576, got 2097152",
        ),
        (lambda A: krylov.logdet(A, probes=1), "probes must be an integer of at least 2"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(hvpd.InvalidArgumentError, match=message), np.errstate(all="ignore"):
        call(matrix(SPECTRA["flat"]))


def test_a_picture():
    pytest.importorskip("matplotlib")
    axes = krylov.spectrum(matrix(SPECTRA["flat"]), steps=20).plot()
    (line,) = axes.get_lines()
    assert (line.get_ydata() > 0).all()
    assert axes.get_yscale() == "log"


def test_the_error_of_the_steps_bounds_that_of_the_shares():
    """All vectors of signs give the same measure, so that the probes have no error."""
    values = np.linspace(1, 3, 3000)
    found = krylov.spectrum(scipy.sparse.diags_array(values), probes=3, steps=60)
    assert found.standard_error < 1e-12
    thresholds = np.linspace(1.1, 2.9, 19)
    shares = np.array([(found.weights * (found.nodes < each)).sum() / 3 for each in thresholds])
    wrong = abs(shares - [(values < each).mean() for each in thresholds])
    bounds = quadrature.steps_error(found.nodes, found.weights, found.sizes, found.n, thresholds)
    assert wrong.max() > 1e-3
    assert (wrong <= bounds + 1e-12).all()
    assert bounds.max() < 0.05
    few = krylov.spectrum(scipy.sparse.diags_array(np.repeat([1.0, 2.0], 50)), probes=3, steps=60)
    assert not quadrature.steps_error(few.nodes, few.weights, few.sizes, few.n, np.array([1.5])).any()


@pytest.mark.parametrize(("dtype", "size"), [("float64", 1e-154), ("float64", 1e160), ("float32", 1e-36)], ids=str)
@pytest.mark.parametrize("call", ["eigsh", "lanczos", "spectrum", "trace_of", "trace", "hutch++", "diagonal"])
def test_operators_beyond_the_range_of_squares_are_refused(dtype, size, call):
    A = scipy.sparse.diags_array((np.linspace(1, 3, 3000) * size).astype(dtype))
    calls = {
        "eigsh": lambda: krylov.eigsh(A, 2),
        "lanczos": lambda: krylov.lanczos(A, 20),
        "spectrum": lambda: krylov.spectrum(A, 3, 20),
        "trace": lambda: krylov.trace(A),
        "hutch++": lambda: krylov.trace(A, "hutch++"),
        "diagonal": lambda: krylov.diagonal(A),
        "trace_of": lambda: krylov.trace_of(A, np.sqrt, 3, 20),
    }
    with np.errstate(all="ignore"), pytest.raises(hvpd.HvpdError, match="multiply the operator by a factor") as raised:
        calls[call]()
    assert raised.value.reason == "SCALE"
    assert "nan" not in str(raised.value)


@pytest.mark.parametrize("size", [1e-130, 1e130])
def test_operators_within_the_range_are_right(size):
    values = krylov.eigsh(scipy.sparse.diags_array(np.linspace(1, 3, 300) * size), 2).values
    np.testing.assert_allclose(values / size, np.linspace(1, 3, 300)[-2:], rtol=1e-9)


@pytest.mark.parametrize("method", ["cg", "minres"])
@pytest.mark.parametrize("size", [1e-160, 1e160])
def test_solves_beyond_the_range_of_squares_do_not_blame_others(method, size):
    values = np.linspace(1, 3, 30) * size
    with np.errstate(all="ignore"):
        found = krylov.solve(scipy.sparse.diags_array(values), np.ones(30), tol=1e-8, method=method)
    assert found.converged == bool(np.linalg.norm(values * found.x - 1) <= 1e-8 * 30**0.5)
    assert found.converged or "positive definite" not in found.reason
