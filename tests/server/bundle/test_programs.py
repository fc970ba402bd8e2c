"""Programs that do not fit their bundle are refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvpd_server.bundle import (
    parse,
    references,
)
from tests.support.bundle import admit, refuse, refuse_programs, text


@pytest.fixture(scope="module")
def quartic(export):
    """Return a program of x -> sum(x^4) / 12 of float32[3]."""
    return export(lambda x: jnp.sum(x**4) / 12, np.arange(3, dtype=np.float32))


SCALAR = "%y = stablehlo.constant dense<1.0> : tensor<f32>\n"
PROGRAMS = {
    "an argument less": (text("", "tensor<f32>", SCALAR + "return %y : tensor<f32>"), "objective takes nothing, and"),
    "an argument more": (
        text("%x: tensor<3xf32>, %z: tensor<f32>", "tensor<f32>", SCALAR + "return %y : tensor<f32>"),
        "objective takes float32[3], float32[], and x and data are float32[3]",
    ),
    "wider arguments": (
        text("%x: tensor<3xf64>", "tensor<f32>", SCALAR + "return %y : tensor<f32>"),
        "objective takes float64[3], and x and data are float32[3]",
    ),
    "longer arguments": (
        text("%x: tensor<4xf32>", "tensor<f32>", SCALAR + "return %y : tensor<f32>"),
        "objective takes float32[4], and x and data are float32[3]",
    ),
    "arguments of one more axis": (
        text("%x: tensor<?x?xf32>", "tensor<f32>", SCALAR + "return %y : tensor<f32>"),
        "objective takes float32[?,?], and x and data are float32[3]",
    ),
    "no result": (text("%x: tensor<3xf32>", "", "return"), "objective must return one real floating scalar"),
    "two results": (
        text("%x: tensor<3xf32>", "tensor<f32>, tensor<f32>", SCALAR + "return %y, %y : tensor<f32>, tensor<f32>"),
        "objective must return one real floating scalar",
    ),
    "a vector": (
        text("%x: tensor<3xf32>", "tensor<3xf32>", "return %x : tensor<3xf32>"),
        "objective must return one real floating scalar",
    ),
    "an integer": (
        text(
            "%x: tensor<3xf32>",
            "tensor<i32>",
            "%y = stablehlo.constant dense<1> : tensor<i32>\n return %y : tensor<i32>",
        ),
        "objective must return one real floating scalar",
    ),
}


@pytest.mark.parametrize("change", PROGRAMS)
def test_a_program_of_another_signature_is_refused(quartic, change):
    program, says = PROGRAMS[change]
    assert refuse_programs(quartic.bundle, quartic, {"objective": program}).startswith(says)


def test_a_program_that_leaves_sizes_open_fits(quartic):
    program = text("%x: tensor<?xf32>", "tensor<f32>", SCALAR + "return %y : tensor<f32>")
    assert "hvp" in admit(quartic.bundle, quartic, {"objective": program}).programs


def test_an_operation_that_is_refused_is_named_with_its_program(quartic):
    body = "%y = stablehlo.custom_call @backdoor(%x) : (tensor<3xf32>) -> tensor<f32>\n return %y : tensor<f32>"
    program = text("%x: tensor<3xf32>", "tensor<f32>", body)
    says = refuse_programs(quartic.bundle, quartic, {"objective": program}, "OPERATION_REFUSED")
    assert says.startswith("objective has a stablehlo.custom_call")
    assert "backdoor" in says


def test_an_objective_without_second_derivatives_is_refused(quartic, export):
    endless = export(
        lambda x: jnp.sum(jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x * 2, x)), np.ones(3, np.float32)
    )
    says = refuse_programs(endless.bundle, endless, reason="NOT_DIFFERENTIABLE")
    assert "cannot differentiate it even once" in says


# Platforms


@pytest.mark.parametrize("platforms", [["cpu"], ["tpu", "rocm", "cuda", "cpu"]])
def test_platforms_that_are_known_are_admitted(bundle, platforms):
    bundle.platforms[:] = platforms
    parse(bundle.SerializeToString())


@pytest.mark.parametrize("platforms", [["gpu"], ["cpu", "cpu"], [""], ["cpu", "CUDA"]])
def test_platforms_that_are_unknown_or_listed_twice_are_refused(bundle, platforms):
    bundle.platforms[:] = platforms
    assert "platforms must be of cpu, cuda, rocm, tpu, each once" in refuse(bundle)


def test_a_program_without_a_branch_for_the_device_is_refused(bundle, valid):
    bundle.platforms[:] = ["cuda", "tpu"]
    says = refuse_programs(bundle, valid, reason="BUNDLE_INCOMPATIBLE")
    assert "branches for cuda, tpu" in says
    assert "register with platforms=('cpu', ...)" in says


def test_a_program_that_does_not_take_the_platform_is_not_one_with_branches(bundle, valid):
    bundle.platforms[:] = ["cuda", "cpu"]
    assert refuse_programs(bundle, valid).startswith("objective takes ")


def test_references_are_all_blobs_but_the_bundle_itself(valid):
    assert set(references(valid.bundle)) == set(valid.blobs) - {valid.digest}
