"""Figures of an accelerator: the networks have the sizes that their names say, and each
part runs without an accelerator, on small sizes.
"""

import contextlib
import types

import jax
import numpy as np
import pytest

from bench import _processes, gpu
from bench._networks import NETWORKS
from bench._programs import Programs
from bench.gpu import cross_entropy, networks

_SMALL = ("MLP", "ResNet-50-like", "GPT 1 M")


def test_the_networks_have_the_published_numbers_of_parameters():
    sizes = {name: NETWORKS[name].full().n for name in NETWORKS if name != "GPT 124 M"}
    assert sizes["ResNet-50-like"] == pytest.approx(25.5e6, rel=0.01)
    assert sizes["GPT 1 M"] == pytest.approx(1e6, rel=0.1)
    assert sizes["GPT 10 M"] == pytest.approx(10e6, rel=0.1)


def test_every_network_has_predictions():
    assert networks.PREDICTED.keys() == NETWORKS.keys()
    assert {label for label, _ in networks.GOALS} <= NETWORKS.keys()


@pytest.mark.parametrize("name", _SMALL)
def test_products_of_a_small_network_are_those_of_jax(name):
    problem = NETWORKS[name].small()
    programs = Programs(problem)
    x, unravel = jax.flatten_util.ravel_pytree(problem.x)
    v = np.random.default_rng(0).standard_normal((1, problem.n)).astype(np.float32)
    gradient = jax.grad(lambda x: problem.fun(unravel(x), *problem.data))
    expected = np.asarray(jax.jit(lambda x, v: jax.jvp(gradient, (x,), (v,))[1])(x, v[0]))
    found = programs.multiply("hvp")(v)[0]
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


def test_a_run_on_a_cpu_measures_a_small_network_and_says_so():
    figures = list(gpu.run(quick=True, part="MLP"))
    by_name = {(each.figure, each.k): each for each in figures}
    for name, k in [("value_and_grad", None), ("hvp", 64), ("apply", 1), ("ggn", 16), ("kfac", None)]:
        figure = by_name[f"MLP: {name}", k]
        assert figure.unit == "ms"
        assert figure.value > 0
        assert figure.note == "a small size, on a CPU: no figure"
        assert by_name[f"MLP: {name}, share of the matmul rate", k].value > 0
    assert by_name["MLP: hvp, for each vector over the gradient", 16].value > 0
    assert all(each.predicted is None and each.goal is None for each in figures)


def test_a_block_that_does_not_fit_is_named(monkeypatch):
    real = networks._call

    def call(programs, name, k):
        if k == 64:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand more")
        return real(programs, name, k)

    monkeypatch.setattr(networks, "_call", call)
    (skipped,) = [each for each in gpu.run(quick=True, part="MLP") if each.value is None]
    assert (skipped.figure, skipped.note) == ("MLP: hvp 64", "skipped: RESOURCE_EXHAUSTED: Out of memory")


@pytest.mark.parametrize("part", ["copies", "precision", "cross-entropy"])
def test_each_part_in_process_runs_on_a_cpu_without_predictions(part):
    figures = list(gpu.run(quick=True, part=part))
    assert any(each.value for each in figures)
    assert all(each.predicted is None and each.goal is None for each in figures)
    assert {each.figure.split(":")[0] for each in figures} <= {part, "overlap"}


@pytest.mark.parametrize(("part", "unit"), [("product", "ms"), ("memory", "")])
def test_each_part_with_one_client_runs_on_a_cpu(part, unit, server, monkeypatch):
    child = types.SimpleNamespace(ready=("", server.address))
    monkeypatch.setattr(_processes, "serving", lambda *flags: contextlib.nullcontext(child))
    monkeypatch.setattr(_processes, "metric", lambda server, name: 0.0)
    figures = list(gpu.run(quick=True, part=part))
    assert unit in {each.unit for each in figures}
    assert all(each.predicted is None and each.goal is None for each in figures)


def test_a_product_of_the_last_layer_never_holds_the_square_of_the_vocabulary():
    tokens, vocabulary = 64, 2048
    taken = cross_entropy.peak_bytes(Programs(cross_entropy.problem(tokens, vocabulary, 16)))
    assert taken < 10 * 4 * tokens * vocabulary  # Ten arrays of the logits' size.
    assert 10 * 4 * tokens * vocabulary < 4 * vocabulary**2


def test_a_product_of_the_last_layer_is_that_of_jax():
    layer = cross_entropy.problem(*cross_entropy.SMALL)
    v = np.random.default_rng(0).standard_normal(layer.x.shape, np.float32)
    h, labels = layer.data
    # The cross-entropy is convex in a linear layer, so Gauss-Newton's is the Hessian.
    gradient = jax.grad(lambda W: layer.fun(W, h, labels))
    expected = np.asarray(jax.jvp(gradient, (layer.x,), (v,))[1]).ravel()
    programs = Programs(layer)
    x, data = programs.arguments
    found = np.asarray(programs.compiled("ggn", 1)(x, v.reshape(1, -1), *data))[0]
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
