"""The store keeps what the vetter derived, and a registration checks it."""

import json

import jax
import numpy as np
import pytest

from hvpd.v1 import objective_pb2
from hvpd_server.errors import Code, ServiceError
from hvpd_server.importer import reader, refusals
from hvpd_server.rpc.call_context import GrpcCall
from hvpd_server.rpc.objectives import ObjectiveService
from tests.server.test_services import FakeContext
from tests.support.vetting import artifact

pytestmark = pytest.mark.slow  # Real programs, compiled and run.


@pytest.fixture
def counted(vetter, monkeypatch):
    """Return a list that gets the programs' names and the platform of each vetted
    bundle.
    """
    calls = []
    vet = vetter.vet
    monkeypatch.setattr(
        vetter,
        "vet",
        lambda programs, platform: (calls.append((sorted(programs), platform)), vet(programs, platform))[1],
    )
    return calls


def version():
    return f"{refusals.version()} cpu"


def test_a_derivation_is_made_again_only_for_a_new_version(open_engine, rosen, counted, monkeypatch):
    digest = rosen.export.digest
    engine = open_engine(rosen)
    assert counted == [(["bundle", "objective"], "cpu")]
    kept = engine.store.derivation(digest, version())
    assert kept == engine.objectives.load(digest).described == engine.objectives.derivation(digest)
    assert kept.mode == "forward_over_reverse"
    engine.registration.register(digest, "again")
    engine = open_engine()
    engine.objectives.warm_all()
    assert len(counted) == 1
    assert engine.objectives.derivation(digest) == kept
    monkeypatch.setattr(refusals, "version", lambda: "other code")
    engine = open_engine()
    assert engine.objectives.derivation(digest) is None
    engine.objectives.warm_all()
    assert len(counted) == 2
    assert engine.store.derivation(digest, "other code cpu") == kept


def test_a_client_gets_the_derivation_of_an_objective_of_another_version(open_engine, rosen, monkeypatch):
    name = "other/version"
    open_engine(rosen).registration.register(rosen.export.digest, name)
    monkeypatch.setattr(refusals, "version", lambda: "other code")
    engine = open_engine()
    call, request = GrpcCall(FakeContext()), objective_pb2.GetObjectiveRequest(name=name)
    found = ObjectiveService(engine).GetObjective(request, call).objective
    assert "hvp" in found.derivation.programs
    assert found.derivation == engine.objectives.derivation(rosen.export.digest)


def test_a_derivation_for_another_platform_is_made_again(open_engine, rosen, counted):
    engine = open_engine(rosen)
    derived = engine.objectives.derivation(rosen.export.digest)
    engine.store.add_derivation(rosen.export.digest, f"{refusals.version()} cuda", derived)
    engine = open_engine()
    engine.objectives.warm_all()
    assert len(counted) == 2
    assert engine.store.derivation(rosen.export.digest, version()) == derived


def test_the_version_is_that_of_the_code_and_of_jax():
    assert f"jax {jax.__version__}" in refusals.version()
    assert "jaxlib " in refusals.version()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 3}', b'{"version": "older", "derivation": {}}'])
def test_a_record_that_is_damaged_or_old_is_no_record(open_engine, rosen, counted, content):
    engine = open_engine(rosen)
    record = engine.store.root / "derived" / rosen.export.digest
    before = json.loads(record.read_bytes())
    assert before["version"] == version()
    record.write_bytes(content)
    engine = open_engine()
    engine.objectives.warm_all()
    assert len(counted) == 2
    assert json.loads(record.read_bytes()) == before


def changed(rosen, upload, store, program, **fields):
    """Upload the example with another program; return the digest of its bundle."""
    bundle = objective_pb2.Bundle.FromString(rosen.bundle.SerializeToString())
    described = {"digest": upload(store, program), "size_bytes": len(program)} | fields
    bundle.programs["objective"].CopyFrom(objective_pb2.Program(**described))
    for content in rosen.export.blobs.values():
        upload(store, content)
    return upload(store, bundle.SerializeToString(deterministic=True))


EVIL = """
    module { func.func public @main(%x: tensor<7xf64>) -> tensor<f64> {
      %y = stablehlo.custom_call @backdoor(%x) : (tensor<7xf64>) -> tensor<f64>
      return %y : tensor<f64>
    } }
"""


def test_a_refused_program_is_not_registered_nor_stored_nor_read_by_the_server(open_engine, rosen, upload, monkeypatch):
    engine = open_engine()
    digest = changed(rosen, upload, engine.store, artifact(EVIL))
    monkeypatch.setattr(reader, "read", None)
    for _ in range(2):
        with pytest.raises(ServiceError, match=r"the registration is refused: objective has .*backdoor") as error:
            engine.registration.register(digest, "evil")
        assert error.value.reason == refusals.OPERATION_REFUSED
    assert engine.store.objectives() == []
    assert not list((engine.store.root / "derived").iterdir())
    assert engine.objectives.derivation(digest) is None


def test_a_refusal_changes_nothing_for_neighbours(open_engine, rosen, logistic, upload, assert_product):
    engine = open_engine(logistic)
    before = (engine.store.root / "derived" / logistic.export.digest).read_bytes()
    digest = changed(rosen, upload, engine.store, artifact(EVIL))
    with pytest.raises(ServiceError):
        engine.registration.register(digest, "evil")
    engine.registration.register(logistic.export.digest, "")
    assert (engine.store.root / "derived" / logistic.export.digest).read_bytes() == before
    assert digest not in [known for _, known, _ in engine.store.objectives()]
    V = np.ones((2, 6))
    kernels = engine.objectives.load(logistic.export.digest).kernels
    assert_product(np.asarray(kernels.call("hvp", 2, logistic.x, V, *logistic.data)), logistic.hessian, V)


def test_one_that_a_newer_version_refuses_is_not_served_and_its_neighbours_are(
    open_engine, rosen, logistic, monkeypatch
):
    open_engine(rosen, logistic)
    monkeypatch.setattr(refusals, "version", lambda: "newer")
    engine = open_engine()
    vet = engine.objectives._vetting._vetter.vet
    evil = rosen.bundle.SerializeToString()

    def refuse(programs, platform):
        if programs["bundle"] == evil:
            raise ServiceError(Code.INVALID_ARGUMENT, refusals.OPERATION_REFUSED, "no more")
        return vet(programs, platform)

    monkeypatch.setattr(engine.objectives._vetting._vetter, "vet", refuse)
    engine.objectives.warm_all()
    with pytest.raises(ServiceError, match="no more"):
        engine.objectives.load(rosen.export.digest)
    assert engine.objectives.derivation(rosen.export.digest) is None
    assert engine.objectives.load(logistic.export.digest).kernels.ready("hvp", 1)


@pytest.mark.parametrize("claim", [0, 1 << 30, -1])
def test_programs_have_the_sizes_that_the_bundle_says(open_engine, rosen, upload, claim):
    engine = open_engine()
    program = rosen.read(rosen.bundle.programs["objective"].digest)
    digest = changed(rosen, upload, engine.store, program, size_bytes=claim)
    with pytest.raises(ServiceError, match=rf"objective has {len(program)} bytes, the bundle says {claim}") as error:
        engine.registration.register(digest, "")
    assert error.value.reason == refusals.BUNDLE_INVALID
    assert engine.store.objectives() == []


def test_programs_that_are_too_large_are_not_even_read(open_engine, rosen, upload):
    engine = open_engine()
    for content in rosen.export.blobs.values():
        upload(engine.store, content)
    program = rosen.bundle.programs["objective"].digest
    with (engine.store.root / "blobs" / program[:2] / program).open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(ServiceError, match="its programs have 1024 MiB, at most 512 MiB are allowed") as error:
        engine.registration.register(rosen.export.digest, "")
    assert error.value.reason == refusals.PROGRAM_TOO_LARGE
