"""Fields of a bundle that do not fit are refused in few words."""

import pytest

from hvpd._wire.protocol import MODES
from hvpd.v1 import objective_pb2
from hvpd_server import bundle as _admission
from hvpd_server.bundle import (
    parse,
)
from hvpd_server.errors import Code, ServiceError
from tests.support.bundle import Spec, admit, refuse, refuse_programs


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
        ("mode", sorted(MODES)),
    ],
)
def test_a_field_at_its_limit_is_admitted(bundle, field, values):
    for value in values:
        setattr(bundle, field, value)
        parse(bundle.SerializeToString())


@pytest.mark.parametrize("field", ["programs", "x_leaves", "data", "x_tree", "data_tree", "mode", "precision"])
def test_a_bundle_without_a_field_is_refused(bundle, field):
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
def test_a_bundle_with_a_repeated_entry_is_refused(bundle, field):
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


@pytest.mark.parametrize(
    "fields",
    [{"sharded": False}, {"row_leaves": [0]}, {"blocks": [{"leaves": [0]}]}, {"mode": "reverse_over_reverse"}],
    ids=str,
)
def test_x_that_is_split_needs_a_whole_objective_in_forward_mode(bundle, fields):
    bundle.MergeFrom(objective_pb2.Bundle(sharded=True, sharded_parameters=True))
    bundle.ClearField("blocks")
    parse(bundle.SerializeToString())
    bundle.MergeFrom(objective_pb2.Bundle(**fields))
    if "sharded" in fields:
        bundle.sharded = False
    assert "x that is split over devices needs sharded data" in refuse(bundle)


def test_rows_that_the_program_fixes_are_no_rows(bundle, valid):
    """The registered rows fit, so the program is admitted. Other rows are refused when
    they are bound.
    """
    bundle.row_leaves[:] = [0, 1]
    assert "prepare" not in admit(bundle, valid).programs
