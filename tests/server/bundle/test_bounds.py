"""Each text, list and map of a bundle has a bound."""

import itertools

import pytest
from google.protobuf import message_factory

from hvpd.v1 import objective_pb2
from hvpd_server import bundle as _admission
from hvpd_server.bundle import (
    parse,
)
from hvpd_server.errors import ServiceError
from tests.support.bundle import Spec, refuse


def _key(node):
    """Return a dict with one leaf, made of a tree."""
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
def test_each_part_of_a_bundle_has_a_bound(bundle, says, monkeypatch):
    monkeypatch.setattr(_admission, "MAX_BUNDLE_BYTES", 100 << 20)
    UNBOUNDED[says](bundle)
    message = refuse(bundle)
    assert message.startswith(says)
    assert len(message) < 400


def test_a_bundle_is_no_larger_than_a_message(bundle):
    bundle.jax_version = "x" * (6 << 20)
    assert refuse(bundle) == f"the bundle has {bundle.ByteSize()} bytes, 4194304 are allowed"


def test_texts_and_lists_of_new_fields_are_bounded_without_new_rules():
    """One check covers every text and list of a bundle. Here each field of each message
    has its turn.
    """
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
