"""Programs of networks on an accelerator: the networks have the sizes that their names
say, and the command runs without an accelerator, on small networks.
"""

import jax
import numpy as np
import pytest

from bench import gpu
from bench._networks import NETWORKS
from bench._programs import Programs

_SMALL = ("MLP", "ResNet-50-like", "GPT 1 M")


def test_the_networks_have_the_published_numbers_of_parameters():
    sizes = {name: NETWORKS[name].full().n for name in NETWORKS if name != "GPT 124 M"}
    assert sizes["ResNet-50-like"] == pytest.approx(25.5e6, rel=0.01)
    assert sizes["GPT 1 M"] == pytest.approx(1e6, rel=0.1)
    assert sizes["GPT 10 M"] == pytest.approx(10e6, rel=0.1)


def test_every_network_has_predictions():
    assert gpu.PREDICTED.keys() == NETWORKS.keys()
    assert {label for label, _ in gpu.GOALS} <= NETWORKS.keys()


@pytest.mark.parametrize("name", _SMALL)
def test_products_of_a_small_network_are_those_of_jax(name):
    problem = NETWORKS[name].small()
    programs = Programs(problem)
    x, unravel = jax.flatten_util.ravel_pytree(problem.x)
    v = np.random.default_rng(0).standard_normal((1, problem.n)).astype(np.float32)
    gradient = jax.grad(lambda x: problem.fun(unravel(x), *problem.data))
    expected = np.asarray(jax.jvp(gradient, (x,), (v[0],))[1])
    found = programs.multiply("hvp")(v)[0]
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


def test_a_run_on_a_cpu_measures_a_small_network_and_says_so():
    figures = list(gpu.run(quick=True, part="MLP"))
    by_name = {(each.figure, each.k): each for each in figures}
    for name, k in [("value_and_grad", None), ("hvp", 64), ("apply", 1), ("ggn", 16), ("kfac", None)]:
        figure = by_name[f"MLP: {name}", k]
        assert figure.unit == "ms"
        assert figure.value > 0
        assert figure.note == "a small network, on a CPU: no figure"
        assert by_name[f"MLP: {name}, share of the matmul rate", k].value > 0
    assert by_name["MLP: hvp, for each vector over the gradient", 16].value > 0
    assert all(each.predicted is None and each.goal is None for each in figures)


def test_a_block_that_does_not_fit_is_named(monkeypatch):
    real = gpu._call

    def call(programs, name, k):
        if k == 64:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand more")
        return real(programs, name, k)

    monkeypatch.setattr(gpu, "_call", call)
    (skipped,) = [each for each in gpu.run(quick=True, part="MLP") if each.value is None]
    assert (skipped.figure, skipped.note) == ("MLP: hvp 64", "skipped: RESOURCE_EXHAUSTED: Out of memory")
