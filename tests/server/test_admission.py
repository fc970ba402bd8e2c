"""A bundle is complete, consistent and of programs that fit it, or it is refused: one field is wrong at a time here."""

import dataclasses
import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hvpd
from hvpd import _export
from hvpd.v1 import objective_pb2, tensor_pb2
from hvpd_server._admission import (
    block_size,
    check_data,
    check_name,
    check_signatures,
    factor_shapes,
    parse,
    references,
)
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
    assert set(signatures) == {"value_and_grad", "hvp", "hvp_pairs", "prepare", "apply"}
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


# Principal blocks and dense layers


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


@pytest.fixture(scope="module")
def part_signatures(valid_parts, device):
    read = lambda digest: bytes(valid_parts.blobs[digest])  # noqa: E731
    return Programs(valid_parts.bundle, device, read, compiler=None).signatures()


@pytest.fixture
def parts(valid_parts):
    """A copy to change."""
    return objective_pb2.Bundle.FromString(valid_parts.bundle.SerializeToString())


def test_the_valid_parts_are_admitted_and_are_what_is_changed_below(parts, part_signatures):
    admit(parts, part_signatures)
    assert [list(block.leaves) for block in parts.blocks] == [[B], [V, W]]
    assert [(layer.kernel, layer.bias, layer.transposed) for layer in parts.dense_layers] == [
        (V, C, True),
        (W, B, False),
    ]
    assert factor_shapes(parts) == [(5, 5), (2, 2), (4, 4), (4, 4)]
    assert [block_size(parts, block) for block in parts.blocks] == [4, 20]
    kinds = ("hvp", "ggn", "fisher", "empirical_fisher", "sampled_fisher")
    of_parts = {f"{name}[{index}]" for name in kinds for index in (0, 1)} | {"kfac", "sampled_kfac"}
    assert set(part_signatures) == {"value_and_grad", "hvp_pairs", "prepare", "apply", *kinds, *of_parts}


@pytest.mark.parametrize("name", ["sampled_kfac", "ggn[0]", "fisher[1]", "sampled_fisher[0]", "ggn"])
def test_parts_can_do_without_some_programs(parts, part_signatures, name):
    del parts.programs[name]
    admit(parts, {other: signature for other, signature in part_signatures.items() if other != name})


def _without(bundle, *names):
    for name in names:
        del bundle.programs[name]


PARTS = {
    "a leaf beyond the last": (lambda bundle: bundle.blocks[1].leaves.__setitem__(1, 6), r"blocks\[1\] .* ascending"),
    "a negative leaf": (lambda bundle: bundle.blocks[1].leaves.__setitem__(0, -1), r"blocks\[1\] .* ascending"),
    "leaves that descend": (lambda bundle: bundle.blocks[1].leaves.reverse(), r"blocks\[1\] .* ascending"),
    "a leaf twice": (lambda bundle: bundle.blocks[0].leaves.append(B), r"blocks\[0\] .* ascending"),
    "no leaves": (lambda bundle: bundle.blocks[0].ClearField("leaves"), r"blocks\[0\] .* ascending"),
    "no elements": (lambda bundle: bundle.blocks[0].leaves.__setitem__(0, Z), r"blocks\[0\] has .* no elements"),
    "no program for it": (lambda bundle: _without(bundle, "hvp[0]"), r"blocks\[0\] has no program hvp\[0\]"),
    "a block too many": (lambda bundle: bundle.blocks.add(leaves=[S]), r"blocks\[2\] has no program hvp\[2\]"),
    "kfac without layers": (lambda bundle: bundle.ClearField("dense_layers"), "dense layers and kfac go together"),
    "layers without kfac": (lambda bundle: _without(bundle, "kfac"), "dense layers and kfac go together"),
    "layers without either": (lambda bundle: _without(bundle, "kfac", "sampled_kfac"), "and kfac go together"),
    "sampled_kfac alone": (
        lambda bundle: (_without(bundle, "kfac"), bundle.ClearField("dense_layers")),
        "and kfac go together",
    ),
    "a kernel of one axis": (lambda bundle: setattr(bundle.dense_layers[0], "kernel", S), r"\[2, 1\].*\(4,\), \(2,\)"),
    "a kernel beyond the last leaf": (lambda bundle: setattr(bundle.dense_layers[0], "kernel", 6), r"leaves \[6, 1\]"),
    "a negative kernel": (lambda bundle: setattr(bundle.dense_layers[0], "kernel", -2), r"leaves \[-2, 1\]"),
    "a bias of another size": (lambda bundle: setattr(bundle.dense_layers[0], "bias", S), r"\(2, 4\), \(4,\)"),
    "a bias of two axes": (lambda bundle: setattr(bundle.dense_layers[0], "bias", W), r"\(2, 4\), \(3, 4\)"),
    "a bias beyond the last leaf": (lambda bundle: setattr(bundle.dense_layers[1], "bias", 6), r"leaves \[4, 6\]"),
    "a negative bias": (lambda bundle: setattr(bundle.dense_layers[1], "bias", -6), r"leaves \[4, -6\]"),
    "turned around": (lambda bundle: setattr(bundle.dense_layers[1], "transposed", True), r"\(3, 4\), \(4,\)"),
    "a layer twice": (lambda bundle: bundle.dense_layers.append(bundle.dense_layers[0]), "in one dense layer only"),
    "a kernel twice": (lambda bundle: bundle.dense_layers.add(kernel=W), r"one dense layer only.*\[3, 1, 4, 0, 4\]"),
}


@pytest.mark.parametrize("change", PARTS)
def test_parts_that_are_not_of_the_leaves_or_lack_their_programs_are_refused(parts, part_signatures, change):
    alter, says = PARTS[change]
    alter(parts)
    with pytest.raises(ServiceError, match=says) as refused:
        parse(parts.SerializeToString())
    assert (refused.value.code, refused.value.reason) == (Code.INVALID_ARGUMENT, "BUNDLE_INVALID")


@pytest.mark.parametrize(
    "name", ["hvp[2]", "hvp[7]", "hvp[-1]", "hvp[01]", "hvp[]", "kfac[0]", "apply[0]", "hvp[0][0]"]
)
def test_programs_of_blocks_that_there_are_not_are_unknown(parts, part_signatures, name):
    parts.programs[name].CopyFrom(parts.programs["hvp[0]"])
    assert name in str(refuse(parts, part_signatures, code=Code.FAILED_PRECONDITION, reason="BUNDLE_INCOMPATIBLE"))


def test_blocks_that_are_missing_leave_their_programs_unknown(parts, part_signatures):
    parts.ClearField("blocks")
    assert "hvp[0]" in str(refuse(parts, part_signatures, code=Code.FAILED_PRECONDITION, reason="BUNDLE_INCOMPATIBLE"))


def _shape(specs, index, shape):
    return tuple((shape, dtype) if position == index else (old, dtype) for position, (old, dtype) in enumerate(specs))


PART_PROGRAMS = {
    "a block of another size": ("hvp[0]", lambda s: dataclasses.replace(s, arguments=_shape(s.arguments, 1, ("k", 5)))),
    "the whole for a block": (
        "ggn[1]",
        lambda s: Signature(_shape(s.arguments, 1, ("k", 30)), ((("k", 30), "float64"),)),
    ),
    "the whole in return": ("fisher[0]", lambda s: dataclasses.replace(s, results=((("k", 30), "float64"),))),
    "one width only": ("hvp[1]", lambda s: Signature(_fixed(s.arguments), _fixed(s.results))),
    "no key": ("sampled_fisher[1]", lambda s: dataclasses.replace(s, arguments=s.arguments[:2] + s.arguments[3:])),
    "a key where none is": ("hvp[1]", lambda s: dataclasses.replace(s, arguments=(*s.arguments, ((2,), "uint32")))),
    "a factor of another shape": ("kfac", lambda s: dataclasses.replace(s, results=_shape(s.results, 2, (3, 3)))),
    "a factor that is not square": ("kfac", lambda s: dataclasses.replace(s, results=_shape(s.results, 0, (5, 4)))),
    "a factor less": ("kfac", lambda s: dataclasses.replace(s, results=s.results[:-1])),
    "factors in another order": ("kfac", lambda s: dataclasses.replace(s, results=s.results[::-1])),
    "narrower factors": ("sampled_kfac", lambda s: dataclasses.replace(s, results=_narrow(s.results))),
    "factors without a key": (
        "sampled_kfac",
        lambda s: dataclasses.replace(s, arguments=s.arguments[:1] + s.arguments[2:]),
    ),
}


@pytest.mark.parametrize("change", PART_PROGRAMS)
def test_a_parts_program_of_another_signature_is_refused(parts, part_signatures, change):
    name, alter = PART_PROGRAMS[change]
    assert str(refuse(parts, {**part_signatures, name: alter(part_signatures[name])})).startswith(f"{name} is ")


def test_layers_of_which_the_factors_are_not_are_refused(parts, part_signatures):
    """Each alone could be: in another order, without its bias, of another kernel's shape."""
    first, second = parts.dense_layers
    for layers in ([second, first], [first, objective_pb2.DenseLayer(kernel=W)], [first]):
        changed = objective_pb2.Bundle.FromString(parts.SerializeToString())
        changed.ClearField("dense_layers")
        changed.dense_layers.extend(layers)
        assert "kfac is " in str(refuse(changed, part_signatures))


def test_a_block_of_other_leaves_than_its_programs_is_refused(parts, part_signatures):
    parts.blocks[1].leaves[:] = [V]
    assert "[1] is " in str(refuse(parts, part_signatures))


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
