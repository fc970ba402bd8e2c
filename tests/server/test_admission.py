"""A bundle is complete, consistent and of programs that fit it, or it is refused: one field is wrong at a time here."""

import itertools
import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from google.protobuf import message_factory
from hypothesis import given, settings
from hypothesis import strategies as st

import hvpd
from hvpd._registration import export as _export
from hvpd.v1 import objective_pb2, tensor_pb2
from hvpd_server import _admission
from hvpd_server._admission import (
    block_size,
    check_data,
    check_leaves,
    check_name,
    factor_shapes,
    parse,
    references,
)
from hvpd_server._errors import Code, ServiceError
from hvpd_server._rules import Limits
from hvpd_server._vetter import BUNDLE, derive
from hvpd_server.importer.table import Refused

Spec = tensor_pb2.TreeSpec


class Pair(NamedTuple):
    first: Any
    second: Any


def _fun(x, data, rest):
    model = jnp.tanh(data["features"] @ x["w"]) @ x["b"] + jnp.mean(_CAPTURED * x["b"][0])
    return jnp.mean((model - data["labels"]) ** 2) + rest[0] * jnp.sum(x["w"] ** 2)


_CAPTURED = np.linspace(0, 1, 5000)  # Large enough to be lifted out of the program.


@pytest.fixture(scope="module")
def valid(export):
    """Named trees, data, captured arrays, and residuals of both kinds."""
    rng = np.random.default_rng(2)
    x = {"w": rng.standard_normal((3, 2)), "b": rng.standard_normal(2)}
    data = {"features": rng.standard_normal((5, 3)), "labels": rng.standard_normal(5)}
    return export(_fun, x, data, Pair(np.float64(0.1), np.arange(4)))


def copy(bundle):
    return objective_pb2.Bundle.FromString(bundle.SerializeToString())


@pytest.fixture
def bundle(valid):
    """A copy to change."""
    return copy(valid.bundle)


def admit(bundle, made, replaced=None, platform="cpu"):
    """Do what a registration does: check the bundle, then read and differentiate its programs.

    Args:
        bundle: To admit.
        made: Export that has the programs.
        replaced: Other programs, by name.
        platform: Of the server's device.
    """
    parsed = parse(bundle.SerializeToString())
    parts = {name: bytes(made.blobs[program.digest]) for name, program in parsed.programs.items()} | (replaced or {})
    return derive({BUNDLE: bundle.SerializeToString(), **parts}, platform, Limits())


def refuse(bundle, code=Code.INVALID_ARGUMENT, reason="BUNDLE_INVALID"):
    """Return the message of the refusal of a bundle whose programs are not even read."""
    with pytest.raises(ServiceError) as refused:
        parse(bundle.SerializeToString())
    assert (refused.value.code, refused.value.reason) == (code, reason)
    return str(refused.value)


def refuse_programs(bundle, made, replaced=None, reason="BUNDLE_INVALID"):
    """Return the message of the refusal of a bundle whose programs do not fit it."""
    with pytest.raises(Refused) as refused:
        admit(bundle, made, replaced)
    assert refused.value.reason == reason
    return str(refused.value)


def test_the_valid_bundle_is_admitted_and_has_everything_that_is_changed_below(bundle, valid):
    assert parse(bundle.SerializeToString()) == bundle
    derived = admit(bundle, valid)
    assert derived.mode == "forward_over_reverse"
    assert set(derived.programs) == {"value_and_grad", "hvp", "hvp_pairs", "prepare", "apply"}
    assert {residual.WhichOneof("source") for residual in derived.residuals} == {"result", "argument"}
    assert set(bundle.programs) == {"objective"}
    assert len(bundle.captured) == 1
    assert len(bundle.data) == 4


def test_a_mode_without_residuals_derives_neither_prepare_nor_apply(bundle, valid):
    bundle.mode = "reverse_over_forward"
    derived = admit(bundle, valid)
    assert set(derived.programs) == {"value_and_grad", "hvp", "hvp_pairs"}
    assert not derived.residuals


@pytest.mark.parametrize("serialized", [b"\xff" * 9, b"\x0a\xff", "truncated"])
def test_bytes_that_are_no_bundle_are_refused(valid, serialized):
    if serialized == "truncated":
        serialized = valid.bundle.SerializeToString()[:-1]
    with pytest.raises(ServiceError, match="the blob is no bundle") as refused:
        parse(serialized)
    assert (refused.value.code, refused.value.reason) == (Code.INVALID_ARGUMENT, "BUNDLE_INVALID")


@pytest.mark.parametrize("format_", [3, 1 << 30])
def test_a_bundle_of_a_newer_format_needs_another_server(bundle, format_):
    bundle.format = format_
    says = refuse(bundle, Code.FAILED_PRECONDITION, "BUNDLE_INCOMPATIBLE")
    assert says == f"the bundle has format {format_}; this server reads format 2: upgrade the server"


@pytest.mark.parametrize("format_", [1, 0, -1])
def test_a_bundle_of_an_older_format_needs_another_client(bundle, format_):
    bundle.format = format_
    says = refuse(bundle, Code.FAILED_PRECONDITION, "BUNDLE_INCOMPATIBLE")
    assert says.startswith(f"the bundle has format {format_}, of derivative programs that the client made;")
    assert says.endswith("register the objective again with a newer client")


def test_the_client_writes_the_format_that_the_server_reads(valid):
    assert valid.bundle.format == _admission.FORMAT == 2


SCALARS = [
    (field, value)
    for field, values in {
        "dtype": ["", "float16", "bfloat16", "int32", "float32", "Float64"],
        "n": [0, -8, 7, 9, 1 << 62],
        "precision": ["", "highest ", "float32", "x" * 10_000],
        "mode": ["", "reverse", "hvp", "x" * 10_000],
        "x64": [False],
        "fixed_bucket": [-1, 3, 2048],
        "row_reduction": ["mean", "sum"],  # There are no leaves with rows.
        "jax_version": ["1" * 81, "é" * 81],
        "stablehlo_version": ["1." * 41],
    }.items()
    for value in values
]


@pytest.mark.parametrize(("field", "value"), SCALARS, ids=lambda value: str(value)[:20])
def test_a_field_that_does_not_fit_is_refused_in_few_words(bundle, field, value):
    setattr(bundle, field, value)
    assert len(refuse(bundle)) < 400


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("jax_version", ["", "1" * 80]),
        ("stablehlo_version", ["", "1.14.0"]),
        ("fixed_bucket", [0, 1, 1024]),
        ("precision", ["highest", "high", "default", "exported"]),
        ("mode", sorted(_admission.MODES)),
    ],
)
def test_a_field_at_its_limit_is_admitted(bundle, field, values):
    for value in values:
        setattr(bundle, field, value)
        parse(bundle.SerializeToString())


@pytest.mark.parametrize("field", ["programs", "x_leaves", "data", "x_tree", "data_tree", "mode", "precision"])
def test_what_is_missing_is_refused(bundle, field):
    bundle.ClearField(field)
    refuse(bundle)


def test_captured_arrays_that_are_missing_are_refused(bundle, valid):
    bundle.ClearField("captured")
    assert refuse_programs(bundle, valid).startswith("objective takes ")


@pytest.mark.parametrize(
    "names",
    [
        ["value_and_grad", "hvp"],
        ["objective", "hvp"],
        ["objective", "model"],
        ["objective", "model", "loss"],
        ["model"],
        ["loss"],
        ["Objective"],
        ["x" * 80],
    ],
)
def test_programs_of_other_names_are_refused_by_their_names(bundle, names):
    program = bundle.programs["objective"]
    bundle.ClearField("programs")
    for name in names:
        bundle.programs[name].CopyFrom(program)
    says = refuse(bundle)
    assert ", ".join(sorted(names))[:200] in says
    assert len(says) < 400


@pytest.mark.parametrize("field", ["x_leaves", "data"])
def test_what_is_listed_once_too_often_is_refused(bundle, field):
    listed = getattr(bundle, field)
    listed.append(listed[-1])
    refuse(bundle)


def test_a_captured_array_too_many_is_refused(bundle, valid):
    bundle.captured.append(bundle.captured[0])
    assert refuse_programs(bundle, valid).startswith("objective takes ")


@pytest.mark.parametrize("field", ["x_leaves", "data", "captured"])
@pytest.mark.parametrize("dtype", ["", "O", "nonsense", "U3", "V8", "f8,i4", "f8, ,", "(-1,)f8", "__doc__"])
def test_an_array_of_no_known_dtype_is_refused(bundle, field, dtype):
    getattr(bundle, field)[0].dtype = dtype
    refuse(bundle)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex128", "float8_e4m3fn"])
def test_a_leaf_of_x_that_has_no_derivatives_is_refused(bundle, dtype):
    """Its gradient would be zero, or not real."""
    bundle.x_leaves[0].dtype = dtype
    assert f"a leaf of x is {dtype}" in refuse(bundle)


def test_x_is_as_precise_as_its_leaves(bundle):
    bundle.dtype = "float32"
    assert "x is float32" in refuse(bundle)


@pytest.mark.parametrize("shape", [[], [0], [-1], [1 << 62, 1 << 62], [10**6], [1, 1, 1]])
def test_a_leaf_of_x_of_another_shape_is_refused(bundle, shape):
    bundle.x_leaves[0].shape[:] = shape
    refuse(bundle)


@pytest.mark.parametrize("field", ["data", "captured"])
@pytest.mark.parametrize("shape", [[], [0], [10**6], [1, 1, 1], [1 << 62]])
def test_an_array_of_another_shape_is_refused(bundle, valid, field, shape):
    getattr(bundle, field)[0].shape[:] = shape
    assert refuse_programs(bundle, valid).startswith("objective takes ")


@pytest.mark.parametrize("field", ["x_leaves", "data", "captured"])
def test_an_array_of_another_dtype_is_refused(bundle, valid, field):
    getattr(bundle, field)[0].dtype = "float32"
    assert refuse_programs(bundle, valid).startswith("objective takes ")


@pytest.mark.parametrize("field", ["x_leaves", "data", "captured"])
def test_negative_extents_do_not_make_a_size(bundle, field):
    getattr(bundle, field)[0].shape[:] = [-3, -2]
    assert "negative extent: [-3, -2]" in refuse(bundle)


@pytest.mark.parametrize("field", ["data", "captured", "x_leaves"])
def test_leaves_have_a_largest_number(bundle, field, monkeypatch):
    listed = getattr(bundle, field)
    monkeypatch.setitem(_admission._MAX_ENTRIES, f"Bundle.{field}", len(listed))
    tree = {"data": bundle.data_tree, "x_leaves": bundle.x_tree}.get(field)
    if tree is not None:
        tree.CopyFrom(Spec(kind=Spec.KIND_LIST, children=[Spec(kind=Spec.KIND_LEAF)] * (len(listed) + 1)))
    listed.append(listed[0])
    assert refuse(bundle) == f"Bundle.{field} has {len(listed)} entries, {len(listed) - 1} are allowed"


TREES = {
    "a child too few": lambda tree: tree.children.pop(),
    "a child too many": lambda tree: tree.children.append(Spec(kind=Spec.KIND_LEAF)),
    "no kind": lambda tree: tree.ClearField("kind"),
    "a kind of the future": lambda tree: setattr(tree, "kind", 99),
    "a leaf": lambda tree: tree.CopyFrom(Spec(kind=Spec.KIND_LEAF)),
    "a leaf with children": lambda tree: setattr(tree, "kind", Spec.KIND_LEAF),
    "None": lambda tree: tree.CopyFrom(Spec(kind=Spec.KIND_NONE)),
}


@pytest.mark.parametrize("field", ["x_tree", "data_tree"])
@pytest.mark.parametrize("change", TREES)
def test_a_structure_that_does_not_hold_the_leaves_is_refused(bundle, field, change):
    TREES[change](getattr(bundle, field))
    refuse(bundle)


def test_a_mapping_without_its_keys_is_refused(bundle):
    """Otherwise a message that names a leaf would fail."""
    (first, *_) = bundle.data_tree.children
    assert first.kind == Spec.KIND_DICT
    del first.keys[1:]
    refuse(bundle)


# Rows

ROWS = {
    "a leaf beyond the last": [4],
    "a negative leaf": [-1],
    "a scalar": [2],
    "one of them": [0, 1, 99],
}


@pytest.mark.parametrize("leaves", ROWS.values(), ids=ROWS)
def test_rows_are_of_leaves_of_data_that_have_some(bundle, leaves):
    bundle.row_leaves[:] = leaves
    assert f"row_leaves {leaves} are not all leaves of data with rows" in refuse(bundle)


@pytest.mark.parametrize("reduction", ["max", "x" * 10_000])
def test_rows_are_reduced_in_a_way_that_is_known(bundle, reduction):
    bundle.row_leaves[:] = [0, 1]
    bundle.row_reduction = reduction
    assert len(refuse(bundle)) < 400


@pytest.mark.parametrize("mode", ["linearized", "auto"])
@pytest.mark.parametrize("field", ["row_leaves", "sharded"])
def test_modes_that_keep_residuals_need_data_of_one_size_on_one_device(bundle, mode, field):
    bundle.MergeFrom(objective_pb2.Bundle(**{field: [0] if field == "row_leaves" else True}))
    parse(bundle.SerializeToString())
    bundle.mode = mode
    assert f"mode {mode} keeps residuals" in refuse(bundle)


def test_rows_that_the_program_fixes_are_no_rows(bundle, valid):
    """The registered rows fit, so the program is admitted. Other rows are refused when they are bound."""
    bundle.row_leaves[:] = [0, 1]
    assert "prepare" not in admit(bundle, valid).programs


# Programs that are not what the bundle says


@pytest.fixture(scope="module")
def quartic(export):
    """x -> sum(x^4) / 12 of float32[3]."""
    return export(lambda x: jnp.sum(x**4) / 12, np.arange(3, dtype=np.float32))


def text(arguments, results, body):
    return f"module {{ func.func public @main({arguments}) -> ({results}) {{ {body} }} }}".encode()


SCALAR = "%y = stablehlo.constant dense<1.0> : tensor<f32>\n"
PROGRAMS = {
    "an argument less": (text("", "tensor<f32>", SCALAR + "return %y : tensor<f32>"), "objective takes nothing, and"),
    "an argument more": (
        text("%x: tensor<3xf32>, %z: tensor<f32>", "tensor<f32>", SCALAR + "return %y : tensor<f32>"),
        "objective takes float32[3], float32[], and the bundle says that it takes float32[3]",
    ),
    "wider arguments": (
        text("%x: tensor<3xf64>", "tensor<f32>", SCALAR + "return %y : tensor<f32>"),
        "objective takes float64[3], and the bundle says that it takes float32[3]",
    ),
    "longer arguments": (
        text("%x: tensor<4xf32>", "tensor<f32>", SCALAR + "return %y : tensor<f32>"),
        "objective takes float32[4], and the bundle says that it takes float32[3]",
    ),
    "arguments of one more axis": (
        text("%x: tensor<?x?xf32>", "tensor<f32>", SCALAR + "return %y : tensor<f32>"),
        "objective takes float32[?,?], and the bundle says that it takes float32[3]",
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
    assert "cannot be differentiated twice" in says


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


# Composites, principal blocks and dense layers


def _model(x, features):
    hidden = jnp.tanh(features @ x["w"] + x["b"]) * x["s"]
    return hidden @ x["v"].T + x["c"] + jnp.sum(x["z"])


def _cross_entropy(z, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1))


B, C, S, V, W, Z = range(6)
"""Positions of the leaves of x, of shapes (4,), (2,), (4,), (2, 4), (3, 4) and (0,)."""


@pytest.fixture(scope="module")
def valid_parts():
    """The layers w, b and v (transposed), c; the blocks of b, and of v and w."""
    shapes = {"b": 4, "c": 2, "s": 4, "v": (2, 4), "w": (3, 4), "z": 0}
    x = {name: np.ones(shape) for name, shape in shapes.items()}
    composite = hvpd.composite(_model, _cross_entropy, distribution="categorical")
    data = (np.ones((5, 3)), np.zeros(5, int))
    return _export.export(composite, x, data, platforms=("cpu",), precision="highest", blocks=["b", ("w", "v")])


@pytest.fixture
def parts(valid_parts):
    """A copy to change."""
    return copy(valid_parts.bundle)


def test_the_valid_parts_are_admitted_and_are_what_is_changed_below(parts, valid_parts):
    assert set(parts.programs) == {"model", "loss"}
    assert [list(block.leaves) for block in parts.blocks] == [[B], [V, W]]
    assert [block_size(parts, block.leaves) for block in parts.blocks] == [4, 20]
    derived = admit(parts, valid_parts)
    layers = [(layer.kernel, layer.bias, layer.transposed) for layer in derived.dense_layers]
    assert layers == [(V, C, True), (W, B, False)]
    assert factor_shapes(parts, derived.dense_layers) == [(5, 5), (2, 2), (4, 4), (4, 4)]
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
        "has the program objective, or model and loss; it has loss",
    ),
    "no loss": (lambda bundle: bundle.programs.pop("loss"), "it has model"),
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
        "loss takes float64[5,2], float64[5,3], int64[5], and the bundle says that it takes float64[6,2]",
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


# Other data


def test_other_data_of_the_same_shapes_can_be_bound(bundle):
    check_data(bundle, bundle.data)
    for tensor in bundle.data:
        tensor.digest = "0" * 64
    check_data(bundle, bundle.data)


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "float32"), ("shape", [5, 4]), ("shape", [3, 5]), ("shape", [])]
)
def test_data_that_does_not_fit_is_refused_by_its_place(bundle, field, value):
    data = [tensor_pb2.Tensor.FromString(tensor.SerializeToString()) for tensor in bundle.data]
    if field == "dtype":
        data[0].dtype = value
    else:
        data[0].shape[:] = value
    with pytest.raises(
        ServiceError, match=r"data\[0\]\['features'\] is .*, the objective takes float64\[5, 3\]"
    ) as refused:
        check_data(bundle, data)
    assert (refused.value.code, refused.value.reason) == (Code.INVALID_ARGUMENT, "DATA_MISMATCH")


@pytest.mark.parametrize("count", [0, 3])
def test_data_with_leaves_missing_is_refused(bundle, count):
    with pytest.raises(ServiceError, match=f"data has {count} leaves, the objective takes 4"):
        check_data(bundle, bundle.data[:count])


# Names

_LETTERS = string.ascii_letters + string.digits + "_"


def _is_name(text):
    """The rule, said again in other words."""
    parts = text.split("/")
    digest = len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
    return (
        len(text) <= 200
        and not digest
        and all(part and part[0] in _LETTERS and set(part) <= set(_LETTERS + ".-") for part in parts)
    )


@settings(deadline=None)
@given(
    text=st.text(max_size=20)
    | st.text("ab0./_-é\n %", max_size=20)
    | st.text("0123456789abcdef", min_size=63, max_size=65)
)
def test_names_follow_the_rule(text):
    if _is_name(text):
        check_name(text)
        return
    with pytest.raises(ServiceError) as refused:
        check_name(text)
    assert (refused.value.code, refused.value.reason) == (Code.INVALID_ARGUMENT, "INVALID_NAME")


@pytest.mark.parametrize("name", ["a", "digits/mlp", "team_1/x.y-z/v2", "A" * 200, "0" * 63, "0" * 65])
def test_names_that_are_allowed(name):
    check_name(name)


@pytest.mark.parametrize(
    "name", ["", "/", "a/", "/a", ".a", "-a", "a/.b", "a/-b", "a\n", "a b", "a" * 201, "f" * 64, "é"]
)
def test_names_that_are_not(name):
    with pytest.raises(ServiceError, match="a name is made of letters"):
        check_name(name)


# Every text, list and map is bounded


def _key(node):
    """A dict with one leaf, made of a tree."""
    node.CopyFrom(Spec(kind=Spec.KIND_DICT, children=[Spec(kind=Spec.KIND_LEAF)], keys=[Spec.Key(text="x" * 1001)]))


UNBOUNDED = {
    "Bundle.jax_version has 6291456 characters, 80": lambda bundle: setattr(bundle, "jax_version", "x" * (6 << 20)),
    "Bundle.stablehlo_version has 81 characters, 80": lambda bundle: setattr(bundle, "stablehlo_version", "x" * 81),
    "Bundle.mode has 81 characters, 80": lambda bundle: setattr(bundle, "mode", "x" * 81),
    "Bundle.programs has 81 characters, 80": lambda bundle: bundle.programs["x" * 81].MergeFrom(
        objective_pb2.Program()
    ),
    "Program.digest has 81 characters, 80": lambda bundle: setattr(bundle.programs["objective"], "digest", "a" * 81),
    "Tensor.digest has 81 characters, 80": lambda bundle: setattr(bundle.data[0], "digest", "a" * 81),
    "Tensor.dtype has 81 characters, 80": lambda bundle: setattr(bundle.captured[0], "dtype", "a" * 81),
    "ArraySpec.dtype has 81 characters, 80": lambda bundle: setattr(bundle.x_leaves[0], "dtype", "a" * 81),
    "Tensor.shape has 65 entries, 64": lambda bundle: bundle.data[0].shape.__setitem__(slice(None), [1] * 65),
    "ArraySpec.shape has 65 entries, 64": lambda bundle: bundle.x_leaves[0].shape.__setitem__(slice(None), [1] * 65),
    "Bundle.platforms has 65537 entries, 65536": lambda bundle: bundle.platforms.extend(["cpu"] * 65537),
    "Bundle.row_leaves has 65537 entries, 65536": lambda bundle: bundle.row_leaves.extend([0] * 65537),
    "row_leaves has 3 entries, and only 2 leaves": lambda bundle: bundle.row_leaves.extend([0, 1, 0]),
    "Bundle.blocks has 257 entries, 256": lambda bundle: bundle.blocks.extend([objective_pb2.Block(leaves=[0])] * 257),
    "Block.leaves has 65537 entries, 65536": lambda bundle: bundle.blocks.add(leaves=[0] * 65537),
    "TreeSpec.Key.text has 1001 characters, 1000": lambda bundle: _key(bundle.x_tree),
    "TreeSpec.type_name has 1001 characters, 1000": lambda bundle: setattr(bundle.data_tree, "type_name", "x" * 1001),
    "the bundle has more than 262144 nodes": lambda bundle: bundle.data_tree.children.extend(
        [Spec(kind=Spec.KIND_LIST, children=[Spec(kind=Spec.KIND_NONE)] * 60_000)] * 5
    ),
}


@pytest.mark.parametrize("says", UNBOUNDED)
def test_whatever_a_bundle_could_be_filled_with_is_bounded(bundle, says, monkeypatch):
    monkeypatch.setattr(_admission, "MAX_BUNDLE_BYTES", 100 << 20)
    UNBOUNDED[says](bundle)
    message = refuse(bundle)
    assert message.startswith(says)
    assert len(message) < 400


def test_a_bundle_is_no_larger_than_a_message(bundle):
    bundle.jax_version = "x" * (6 << 20)
    assert refuse(bundle) == f"the bundle has {bundle.ByteSize()} bytes, 4194304 are allowed"


def test_texts_and_lists_of_fields_that_come_later_are_bounded_without_a_rule_of_their_own():
    """Every text and list that a bundle can have goes through one check: here each field of each message in turn."""
    seen = set()

    def fill(descriptor):
        if descriptor.full_name in seen:
            return
        seen.add(descriptor.full_name)
        for field in descriptor.fields:
            name = field.full_name.removeprefix("hvpd.v1.")
            message = message_factory.GetMessageClass(descriptor)()
            if field.message_type is not None:
                if field.message_type.GetOptions().map_entry:
                    fill(field.message_type.fields_by_name["value"].message_type)
                    continue
                fill(field.message_type)
                value = message_factory.GetMessageClass(field.message_type)()
                many = [value] * 70_000
            else:
                many = ["x"] * 70_000 if field.type == field.TYPE_STRING else [1] * 70_000
            try:
                getattr(message, field.name).extend(many)
            except AttributeError:  # It is no list.
                if field.type != field.TYPE_STRING:
                    continue
                setattr(message, field.name, "x" * 70_000)
            with pytest.raises(ServiceError, match=f"^{name} has 70000 "):
                _admission._check_bounds(message, itertools.count(1))

    fill(objective_pb2.Bundle.DESCRIPTOR)
    assert {f"hvpd.v1.{name}" for name in ("Bundle", "TreeSpec", "TreeSpec.Key", "Tensor", "Block", "Program")} < seen


def test_fields_that_this_server_does_not_know_are_not_kept(bundle):
    serialized = bundle.SerializeToString() + b"\xfa\x7f\x80\x08" + bytes(1024)
    assert objective_pb2.Bundle.FromString(serialized).ByteSize() > bundle.ByteSize() + 1000
    assert parse(serialized).SerializeToString(deterministic=True) == bundle.SerializeToString(deterministic=True)
