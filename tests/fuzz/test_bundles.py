"""Changed bundles are refused with a reason, or are still bundles. Programs are damaged
on every level.
"""

import contextlib
import gzip
import zlib

import grpc
import jax.numpy as jnp
import numpy as np
import pytest
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hvpd
from hvpd._registration import export as _export
from hvpd.v1 import blob_pb2, blob_pb2_grpc, objective_pb2, objective_pb2_grpc
from hvpd_server import bundle as _admission
from hvpd_server.admission import vetting
from hvpd_server.errors import Code, ServiceError
from hvpd_server.importer import refusals
from tests.fuzz import wire
from tests.fuzz.wire import send

X = np.arange(4.0)


def _model(x, a):
    return a @ x["w"] + x["b"]


def _loss(y):
    return jnp.sum(y**2) / 2


def _honest(composite=False):
    if composite:
        x = {"w": np.ones((2, 3)), "b": np.zeros(3)}
        made = hvpd.composite(_model, _loss)
        return _export.export(made, x, (np.ones((5, 2)),), platforms=("cpu",), precision="highest", blocks=["w"])
    return _export.export(
        lambda x, d: jnp.sum(d * x**4) / 12, X, (X,), platforms=("cpu",), precision="highest", any_rows=False
    )


HONEST = [_honest(), _honest(composite=True)]


@st.composite
def changed(draw):
    """Draw an honest bundle with some fields changed, at any depth, or some bytes."""
    made = objective_pb2.Bundle.FromString(draw(st.sampled_from(HONEST)).bundle.SerializeToString())
    for _ in range(draw(st.integers(1, 3))):
        at = made
        while True:
            inner = [
                child
                for field, value in at.ListFields()
                if field.message_type is not None and not field.message_type.GetOptions().map_entry
                for child in (value if hasattr(value, "extend") else [value])
            ]
            if not inner or draw(st.booleans()):
                break
            at = draw(st.sampled_from(inner))
        other = draw(wire.message(GetMessageClass(at.DESCRIPTOR)))
        if draw(st.booleans()):
            for field, _ in other.ListFields():
                at.ClearField(field.name)
        at.MergeFrom(other)
    if draw(st.booleans()):
        made.programs[draw(wire.NAMES)].digest = draw(wire.NAMES)
    if draw(st.booleans()) and made.programs:
        del made.programs[draw(st.sampled_from(sorted(made.programs)))]
    data = made.SerializeToString()
    return draw(wire.damaged(st.just(data))) if draw(st.booleans()) else data


def nested(depth):
    tree = objective_pb2.Bundle.FromString(HONEST[0].bundle.SerializeToString())
    at = tree.x_tree
    for _ in range(depth):
        at.kind = at.KIND_LIST
        del at.children[:]
        at = at.children.add()
    at.kind = at.KIND_LEAF
    return tree.SerializeToString()


@settings(settings.get_profile("fuzz"))
@given(data=changed())
@example(data=nested(90))
def test_a_bundle_is_taken_or_refused_with_a_reason(tried, data):
    """An accepted bundle has the programs and blocks that the server goes on with."""
    tried("bundles with something changed")
    try:
        bundle = _admission.parse(data)
    except ServiceError as error:
        assert error.code in (Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION)  # noqa: PT017 - either may be
        assert error.reason in ("BUNDLE_INVALID", "BUNDLE_INCOMPATIBLE", "UNKNOWN_BLOCK")  # noqa: PT017 - as above
        assert len(str(error)) < 2000  # noqa: PT017 - as above
        return
    list(_admission.references(bundle))
    assert set(bundle.programs) in ({"objective"}, {"model", "loss"})
    assert bundle.HasField("composite") == ("model" in bundle.programs)
    assert all(_admission.block_size(bundle, block.leaves) for block in bundle.blocks)


@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_data_fits_or_is_refused(tried, data):
    tried("data of points")
    bundle = data.draw(st.sampled_from(HONEST)).bundle
    kind = GetMessageClass(objective_pb2.Bundle.DESCRIPTOR.fields_by_name["data"].message_type)
    given_ = data.draw(st.lists(wire.message(kind), max_size=3))
    with contextlib.suppress(ServiceError):
        _admission.check_data(bundle, given_)
        assert [(t.dtype, list(t.shape)) for t in given_] == [(t.dtype, list(t.shape)) for t in bundle.data]


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.address) as opened:
        yield opened


@settings(settings.get_profile("fuzz-calls"))
@given(data=changed())
def test_a_bundle_that_was_changed_is_registered_or_refused_by_a_server(server, channel, tried, data):
    tried("bundles with something changed, registered")
    for export in HONEST:
        missing = blob_pb2_grpc.BlobServiceStub(channel).FindMissingBlobs(
            blob_pb2.FindMissingBlobsRequest(digests=list(export.blobs))
        )
        for digest in missing.missing_digests:
            send(channel, bytes(export.blobs[digest]))
    objectives = objective_pb2_grpc.ObjectiveServiceStub(channel)
    try:
        objectives.CreateObjective(objective_pb2.CreateObjectiveRequest(digest=send(channel, data)), timeout=120)
    except grpc.RpcError as error:
        assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION), error  # noqa: PT017
        info = error_details_pb2.ErrorInfo()
        assert any(detail.Unpack(info) for detail in rpc_status.from_call(error).details)  # noqa: PT017
        assert info.reason
    assert server.process.poll() is None


# Programs


@pytest.fixture(scope="module")
def vetter():
    with contextlib.closing(vetting.Vetter()) as started:
        yield started


BUNDLE = HONEST[0].bundle.SerializeToString()
PROGRAM = bytes(HONEST[0].blobs[HONEST[0].bundle.programs["objective"].digest])
OTHER = bytes(HONEST[1].blobs[HONEST[1].bundle.programs["model"].digest])


@st.composite
def damaged_programs(draw):
    """Draw a program whose header, sections or whole is damaged: bytes changed, runs of
    them, pieces of another program, cut, packed.
    """
    blob = bytearray(PROGRAM)
    low, high = draw(st.sampled_from([(0, 40), (40, 240), (len(blob) // 2, len(blob)), (0, len(blob))]))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(low, high - 1))
        run = draw(st.sampled_from([1, 1, 1, 4, 8, 64]))
        how = draw(st.sampled_from(["set", "fill", "splice", "cut", "insert", "swap"]))
        if how == "set":
            blob[at : at + run] = draw(st.binary(min_size=run, max_size=run))
        elif how == "fill":
            blob[at : at + run] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80"])) * run
        elif how == "splice":
            other = draw(st.integers(0, len(OTHER) - run))
            blob[at : at + run] = OTHER[other : other + run]
        elif how == "cut":
            del blob[at : at + run]
        elif how == "insert":
            blob[at:at] = draw(st.binary(min_size=run, max_size=run))
        else:
            blob[at : at + run] = bytes(reversed(blob[at : at + run]))
    return bytes(blob)


@settings(settings.get_profile("fuzz-calls"))
@given(blob=damaged_programs())
@example(blob=gzip.compress(PROGRAM))
@example(blob=zlib.compress(PROGRAM))
@example(blob=PROGRAM + PROGRAM)
@example(blob=gzip.compress(bytes(8 << 20)))
def test_a_damaged_program_is_a_program_or_refused_and_the_next_is_read(vetter, tried, blob):
    tried("damaged programs")
    try:
        vetter.vet({"bundle": BUNDLE, "objective": blob})
    except ServiceError as error:
        assert error.code is Code.INVALID_ARGUMENT  # noqa: PT017 - some are still programs
        assert error.reason in refusals.REASONS  # noqa: PT017 - as above
    assert "hvp" in vetter.vet({"bundle": BUNDLE, "objective": PROGRAM}).programs


@settings(settings.get_profile("fuzz-slow"))
@given(blob=damaged_programs())
def test_a_server_survives_damaged_programs_and_serves_honest_ones(server, channel, tried, blob):
    """Programs that pass are compiled, too."""
    tried("damaged programs, registered")
    export = HONEST[0]
    for content in export.blobs.values():
        send(channel, bytes(content))
    bundle = objective_pb2.Bundle.FromString(export.bundle.SerializeToString())
    bundle.programs["objective"].digest = send(channel, blob)
    bundle.programs["objective"].size_bytes = len(blob)
    objectives = objective_pb2_grpc.ObjectiveServiceStub(channel)
    request = objective_pb2.CreateObjectiveRequest(digest=send(channel, bundle.SerializeToString()))
    with contextlib.suppress(grpc.RpcError):
        objectives.CreateObjective(request, timeout=120)
    assert server.process.poll() is None
    with hvpd.connect(server.address) as client:
        honest = client.register(lambda x: jnp.sum(x**4) / 12, X, platforms=("cpu",))
        assert np.allclose(honest.hessp(X, np.ones(4)), X**2)
