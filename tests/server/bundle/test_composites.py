"""Composites, principal blocks and dense layers must fit the leaves of x."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from hvpd._registration import export as _export
from hvpd.v1 import objective_pb2
from hvpd_server.bundle import block_size, check_leaves
from hvpd_server.errors import Code, ServiceError
from tests.support.bundle import admit, copy, refuse, refuse_programs, text


def _model(x, features):
    hidden = jnp.tanh(features @ x["w"] + x["b"]) * x["s"]
    return hidden @ x["v"].T + x["c"] + jnp.sum(x["z"])


def _cross_entropy(z, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1))


B, C, S, V, W, Z = range(6)
"""Positions of the leaves of x, of shapes (4,), (2,), (4,), (2, 4), (3, 4) and (0,)."""


@pytest.fixture(scope="module")
def valid_parts():
    """Return an export with the layers w, b and v (transposed), c; the blocks of b, and
    of v and w.
    """
    shapes = {"b": 4, "c": 2, "s": 4, "v": (2, 4), "w": (3, 4), "z": 0}
    x = {name: np.ones(shape) for name, shape in shapes.items()}
    composite = hvpd.composite(_model, _cross_entropy, distribution="categorical")
    data = (np.ones((5, 3)), np.zeros(5, int))
    return _export.export(composite, x, data, platforms=("cpu",), precision="highest", blocks=["b", ("w", "v")])


@pytest.fixture
def parts(valid_parts):
    """Return a copy to change."""
    return copy(valid_parts.bundle)


def test_the_unchanged_bundle_is_admitted(parts, valid_parts):
    assert set(parts.programs) == {"model", "loss"}
    assert [list(block.leaves) for block in parts.blocks] == [[B], [V, W]]
    assert [block_size(parts, block.leaves) for block in parts.blocks] == [4, 20]
    derived = admit(parts, valid_parts)
    layers = [(layer.kernel, layer.bias, layer.transposed) for layer in derived.dense_layers]
    assert layers == [(V, C, True), (W, B, False)]
    assert set(derived.programs) == {
        *("value_and_grad", "hvp", "hvp_pairs", "prepare", "apply", "kfac", "sampled_kfac"),
        *("ggn", "fisher", "empirical_fisher", "sampled_fisher"),
    }


def test_a_composite_without_a_distribution_has_no_fisher(parts, valid_parts):
    parts.composite.distribution = ""
    derived = admit(parts, valid_parts)
    assert "ggn" in derived.programs
    assert not {"fisher", "sampled_fisher", "sampled_kfac"} & set(derived.programs)


COMPOSITES = {
    "no composite": (lambda bundle: bundle.ClearField("composite"), "only a composite has them"),
    "no model": (
        lambda bundle: bundle.programs.pop("model"),
        "got loss",
    ),
    "no loss": (lambda bundle: bundle.programs.pop("loss"), "got model"),
    "a distribution that is unknown": (
        lambda bundle: setattr(bundle.composite, "distribution", "poisson"),
        "categorical, normal or empty, its reduction one of mean, sum; got 'poisson' and 'mean'",
    ),
    "a long distribution": (lambda bundle: setattr(bundle.composite, "distribution", "x" * 80), "got 'xxx"),
    "no reduction": (lambda bundle: bundle.composite.ClearField("reduction"), "got 'categorical' and ''"),
    "a reduction that is unknown": (lambda bundle: setattr(bundle.composite, "reduction", "max"), "and 'max'"),
    "no samples": (lambda bundle: bundle.composite.ClearField("samples"), "samples are 1 to 65536, got 0"),
    "negative samples": (lambda bundle: setattr(bundle.composite, "samples", -1), "samples are 1 to 65536, got -1"),
    "many samples": (lambda bundle: setattr(bundle.composite, "samples", 65537), "samples are 1 to 65536, got 65537"),
}


@pytest.mark.parametrize("change", COMPOSITES)
def test_a_composite_that_does_not_fit_is_refused(parts, change):
    alter, says = COMPOSITES[change]
    alter(parts)
    message = refuse(parts)
    assert says in message
    assert len(message) < 400


def test_an_objective_of_one_program_is_no_composite(bundle):
    bundle.composite.CopyFrom(objective_pb2.Composite(reduction="mean", samples=1))
    assert "only a composite has them" in refuse(bundle)


STAGES = {
    "a model of integers": (
        {
            "model": text(
                "",
                "tensor<5x2xi32>",
                "%y = stablehlo.constant dense<1> : tensor<5x2xi32>\n return %y : tensor<5x2xi32>",
            )
        },
        "model must return real floating arrays",
    ),
    "a model of nothing": ({"model": text("", "", "return")}, "model must return real floating arrays"),
    "a model of other rows": (
        {
            "model": text(
                "",
                "tensor<6x2xf64>",
                "%y = stablehlo.constant dense<1.0> : tensor<6x2xf64>\n return %y : tensor<6x2xf64>",
            )
        },
        "loss takes float64[5,2], float64[5,3], int64[5], and it gets float64[6,2]",
    ),
    "a loss of no scalar": (
        {
            "loss": text(
                "", "tensor<2xf64>", "%y = stablehlo.constant dense<1.0> : tensor<2xf64>\n return %y : tensor<2xf64>"
            )
        },
        "loss must return one real floating scalar",
    ),
    "no rows": (
        {
            "model": text(
                "", "tensor<f64>", "%y = stablehlo.constant dense<1.0> : tensor<f64>\n return %y : tensor<f64>"
            ),
            "loss": text(
                "", "tensor<f64>", "%y = stablehlo.constant dense<1.0> : tensor<f64>\n return %y : tensor<f64>"
            ),
        },
        "model of distribution categorical must return one array [rows, ...]",
    ),
}
TAKES = {
    "model": "%b: tensor<4xf64>, %c: tensor<2xf64>, %s: tensor<4xf64>, %v: tensor<2x4xf64>, %w: tensor<3x4xf64>, "
    "%z: tensor<0xf64>, %X: tensor<5x3xf64>, %l: tensor<5xi64>",
    "loss": "%y_: tensor<{}f64>, %X: tensor<5x3xf64>, %l: tensor<5xi64>",
}


@pytest.mark.parametrize("change", STAGES)
def test_stages_that_do_not_fit_each_other_are_refused_by_name(parts, valid_parts, change):
    changed, says = STAGES[change]
    takes = TAKES | {"loss": TAKES["loss"].format("" if len(changed) == 2 else "5x2x")}
    replaced = {
        name: program.replace(b"@main()", f"@main({takes[name]})".encode()) for name, program in changed.items()
    }
    assert refuse_programs(parts, valid_parts, replaced).startswith(says)


PARTS = {
    "a leaf beyond the last": lambda bundle: bundle.blocks[1].leaves.__setitem__(1, 6),
    "a negative leaf": lambda bundle: bundle.blocks[1].leaves.__setitem__(0, -1),
    "leaves that descend": lambda bundle: bundle.blocks[1].leaves.reverse(),
    "a leaf twice": lambda bundle: bundle.blocks[1].leaves.append(W),
    "no leaves": lambda bundle: bundle.blocks[1].ClearField("leaves"),
    "no elements": lambda bundle: bundle.blocks[1].leaves.__setitem__(slice(None), [Z]),
}


@pytest.mark.parametrize("change", PARTS)
def test_blocks_that_are_not_of_the_leaves_are_refused(parts, change):
    PARTS[change](parts)
    leaves = list(parts.blocks[1].leaves)
    says = refuse(parts, reason="UNKNOWN_BLOCK")
    assert says.startswith("blocks[1] must be of ascending positions of leaves of x, 0 to 5, that have elements")
    assert says.endswith(f"got {leaves}")


@pytest.mark.parametrize("leaves", [[], [6], [-1], [0, 0], [1, 0], [Z], [1 << 30], list(range(1000))])
def test_a_product_asks_for_a_block_of_leaves_that_there_are(parts, leaves):
    with pytest.raises(ServiceError, match=r"^a block must be of ascending positions") as refused:
        check_leaves(parts, leaves, "a block")
    assert (refused.value.code, refused.value.reason) == (Code.INVALID_ARGUMENT, "UNKNOWN_BLOCK")
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("leaves", [[B], [B, Z], [B, C, S, V, W, Z]])
def test_a_block_may_be_of_any_leaves_with_elements(parts, leaves):
    check_leaves(parts, leaves, "a block")
