"""A bundle is complete, consistent and of programs that fit it, or it is refused: one field is wrong at a time here."""

import dataclasses
import string
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpd.v1 import objective_pb2, tensor_pb2
from hvpd_server._admission import check_data, check_name, check_signatures, parse, references
from hvpd_server._errors import Code, ServiceError
from hvpd_server._kernels import Programs, Signature

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


@pytest.fixture(scope="module")
def signatures(valid, device):
    return Programs(valid.bundle, device, lambda digest: bytes(valid.blobs[digest]), compiler=None).signatures()


@pytest.fixture
def bundle(valid):
    """A copy to change."""
    return objective_pb2.Bundle.FromString(valid.bundle.SerializeToString())


def admit(bundle, signatures):
    check_signatures(parse(bundle.SerializeToString()), signatures)


def refuse(bundle, signatures, code=Code.INVALID_ARGUMENT, reason="BUNDLE_INVALID"):
    """The refusal, which says that it is the bundle's fault."""
    with pytest.raises(ServiceError) as refused:
        admit(bundle, signatures)
    assert (refused.value.code, refused.value.reason) == (code, reason)
    return refused.value


def residual(bundle, kind, index=0):
    """One of the residuals of a kind."""
    return [each for each in bundle.residuals if each.WhichOneof("source") == kind][index]


def test_the_valid_bundle_is_admitted_and_has_everything_that_is_changed_below(bundle, signatures):
    assert parse(bundle.SerializeToString()) == bundle
    admit(bundle, signatures)
    assert set(signatures) == {"value_and_grad", "hvp", "prepare", "apply"}
    assert len(bundle.captured) == 1
    assert len(bundle.data) == 4
    assert residual(bundle, "result", 1)
    assert residual(bundle, "argument")


def test_a_bundle_without_prepare_and_apply_is_admitted(bundle, signatures):
    for name in ("prepare", "apply"):
        del bundle.programs[name]
    bundle.ClearField("residuals")
    admit(bundle, {name: signatures[name] for name in ("value_and_grad", "hvp")})


@pytest.mark.parametrize("serialized", [b"\xff" * 9, b"\x0a\xff", "truncated"])
def test_bytes_that_are_no_bundle_are_refused(valid, serialized):
    if serialized == "truncated":
        serialized = valid.bundle.SerializeToString()[:-1]
    with pytest.raises(ServiceError, match="the blob is no bundle") as refused:
        parse(serialized)
    assert (refused.value.code, refused.value.reason) == (Code.INVALID_ARGUMENT, "BUNDLE_INVALID")


@pytest.mark.parametrize("format_", [0, 2, -1])
def test_a_bundle_of_an_unknown_format_needs_another_server(bundle, format_):
    bundle.format = format_
    with pytest.raises(ServiceError, match=f"format {format_}, this server reads 1 to 1: upgrade") as refused:
        parse(bundle.SerializeToString())
    assert (refused.value.code, refused.value.reason) == (Code.FAILED_PRECONDITION, "BUNDLE_INCOMPATIBLE")


SCALARS = [
    (field, value)
    for field, values in {
        "dtype": ["", "float16", "bfloat16", "int32", "float32", "Float64"],
        "n": [0, -8, 7, 9, 1 << 62],
    }.items()
    for value in values
]


@pytest.mark.parametrize(("field", "value"), SCALARS)
def test_x_must_be_what_the_programs_take(bundle, signatures, field, value):
    setattr(bundle, field, value)
    refuse(bundle, signatures)


@pytest.mark.parametrize(
    "field",
    ["programs", "x_leaves", "data", "captured", "x_tree", "data_tree", "residuals", "mode"],
)
def test_what_is_missing_is_refused(bundle, signatures, field):
    bundle.ClearField(field)
    refuse(bundle, signatures)


@pytest.mark.parametrize("name", ["value_and_grad", "hvp", "prepare", "apply"])
def test_a_program_that_is_missing_is_refused(bundle, signatures, name):
    del bundle.programs[name]
    refuse(bundle, signatures)


def test_a_program_of_a_later_version_is_refused_by_its_name(bundle, signatures):
    bundle.programs["quantum"].CopyFrom(bundle.programs["hvp"])
    assert "quantum" in str(refuse(bundle, signatures, code=Code.FAILED_PRECONDITION, reason="BUNDLE_INCOMPATIBLE"))


@pytest.mark.parametrize("field", ["x_leaves", "data", "captured", "residuals"])
def test_what_is_listed_once_too_often_is_refused(bundle, signatures, field):
    listed = getattr(bundle, field)
    listed.append(listed[-1])
    refuse(bundle, signatures)


@pytest.mark.parametrize("field", ["x_leaves", "data", "captured"])
@pytest.mark.parametrize("dtype", ["", "O", "nonsense", "U3", "V8", "f8,i4", "f8, ,", "(-1,)f8", "__doc__"])
def test_an_array_of_no_known_dtype_is_refused(bundle, signatures, field, dtype):
    getattr(bundle, field)[0].dtype = dtype
    refuse(bundle, signatures)


@pytest.mark.parametrize("field", ["x_leaves", "data", "captured"])
@pytest.mark.parametrize("shape", [[], [0], [-1], [1 << 62, 1 << 62], [10**6], [1, 1, 1]])
def test_an_array_of_another_shape_is_refused(bundle, signatures, field, shape):
    getattr(bundle, field)[0].shape[:] = shape
    refuse(bundle, signatures)


def test_negative_extents_do_not_make_a_size(bundle, signatures):
    (leaf,) = [leaf for leaf in bundle.x_leaves if list(leaf.shape) == [3, 2]]
    leaf.shape[:] = [-3, -2]
    assert "negative extent: [-3, -2]" in str(refuse(bundle, signatures))


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
def test_a_structure_that_does_not_hold_the_leaves_is_refused(bundle, signatures, field, change):
    TREES[change](getattr(bundle, field))
    refuse(bundle, signatures)


def test_a_mapping_without_its_keys_is_refused(bundle, signatures):
    """Whoever names a leaf in a message would stumble over it."""
    (first, *_) = bundle.data_tree.children
    assert first.kind == Spec.KIND_DICT
    del first.keys[1:]
    refuse(bundle, signatures)


RESIDUALS = {
    "results out of order": lambda bundle: setattr(residual(bundle, "result"), "result", 1),
    "a negative result": lambda bundle: setattr(residual(bundle, "result"), "result", -1),
    "an argument that is none": lambda bundle: setattr(residual(bundle, "argument"), "argument", 99),
    "a negative argument": lambda bundle: setattr(residual(bundle, "argument"), "argument", -1),
    "another argument": lambda bundle: setattr(residual(bundle, "argument"), "argument", 0),
    "no source": lambda bundle: residual(bundle, "argument").ClearField("source"),
    "another shape": lambda bundle: residual(bundle, "result").spec.shape.append(1),
    "another dtype": lambda bundle: setattr(residual(bundle, "result").spec, "dtype", "float32"),
}


@pytest.mark.parametrize("change", RESIDUALS)
def test_residuals_that_apply_would_not_find_are_refused(bundle, signatures, change):
    RESIDUALS[change](bundle)
    refuse(bundle, signatures)


@pytest.mark.parametrize("dtype", ["float64", "nonsense"])
def test_residuals_of_a_bundle_without_apply_are_refused(bundle, signatures, dtype):
    kept = residual(bundle, "result")
    kept.spec.dtype = dtype
    for name in ("prepare", "apply"):
        del bundle.programs[name]
    bundle.ClearField("residuals")
    bundle.residuals.append(objective_pb2.Residual(result=0, spec=kept.spec))
    refuse(bundle, {name: signatures[name] for name in ("value_and_grad", "hvp")})


def _narrow(specs):
    return tuple((shape, "float32") for shape, _ in specs)


def _fixed(specs):
    return tuple((tuple(4 if size == "k" else size for size in shape), dtype) for shape, dtype in specs)


PROGRAMS = {
    "one argument less": lambda s: dataclasses.replace(s, arguments=s.arguments[:-1]),
    "one argument more": lambda s: dataclasses.replace(s, arguments=(*s.arguments, ((), "float64"))),
    "one result less": lambda s: dataclasses.replace(s, results=s.results[:-1]),
    "one result more": lambda s: dataclasses.replace(s, results=(*s.results, ((), "float64"))),
    "narrower arguments": lambda s: dataclasses.replace(s, arguments=_narrow(s.arguments)),
    "narrower results": lambda s: dataclasses.replace(s, results=_narrow(s.results[1:])),
    "no results": lambda s: dataclasses.replace(s, results=()),
}


@pytest.mark.parametrize("name", ["value_and_grad", "hvp", "prepare", "apply"])
@pytest.mark.parametrize("change", PROGRAMS)
def test_a_program_of_another_signature_is_refused(bundle, signatures, name, change):
    assert name in str(refuse(bundle, {**signatures, name: PROGRAMS[change](signatures[name])}))


@pytest.mark.parametrize("name", ["hvp", "apply"])
def test_a_program_for_one_width_only_is_refused(bundle, signatures, name):
    fixed = Signature(_fixed(signatures[name].arguments), _fixed(signatures[name].results))
    refuse(bundle, {**signatures, name: fixed})


def test_a_value_that_is_no_scalar_is_refused(bundle, signatures):
    vector = dataclasses.replace(signatures["value_and_grad"], results=signatures["value_and_grad"].results[1:])
    assert "must return a scalar first" in str(refuse(bundle, {**signatures, "value_and_grad": vector}))


def test_references_are_all_blobs_but_the_bundle_itself(valid):
    assert set(references(valid.bundle)) == set(valid.blobs) - {valid.digest}


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
