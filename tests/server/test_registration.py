"""Registration in an engine: what is refused, and what happens if a caller gives up."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from hvpd.v1 import objective_pb2
from hvpd_server.errors import Code, ServiceError
from hvpd_server.scheduling import compile_queue
from tests.support.engine import WAIT, damage, refusal, upload_changed, uploaded

pytestmark = pytest.mark.slow  # Real programs, compiled and run.


def test_a_bundle_with_blobs_missing_is_refused_by_their_digests(open_engine, logistic, upload):
    engine = open_engine()
    missing = {logistic.bundle.programs["objective"].digest, logistic.bundle.data[0].digest}
    for digest, content in logistic.export.blobs.items():
        if digest not in missing:
            upload(engine.store, content)
    error = refusal(Code.FAILED_PRECONDITION, "BLOBS_MISSING", engine.registration.register, logistic.export.digest, "")
    assert set(error.metadata["digests"].split(",")) == missing
    assert engine.store.objectives() == []


@pytest.mark.parametrize("name", ["../x", ".", "a b", "f" * 64])
def test_an_objective_of_a_bad_name_is_not_registered(open_engine, rosen, upload, name):
    engine = open_engine()
    uploaded(engine, rosen, upload)
    refusal(Code.INVALID_ARGUMENT, "INVALID_NAME", engine.registration.register, rosen.export.digest, name)
    assert engine.store.objectives() == []


# Bundles that cannot be served


def test_a_program_that_is_corrupt_on_disk_is_refused_and_nothing_is_registered(open_engine, rosen, upload):
    engine = open_engine()
    digest = upload_changed(engine, rosen, upload)
    damage(engine.store, rosen.bundle.programs["objective"].digest)
    refusal(Code.DATA_LOSS, "BLOB_CORRUPT", engine.registration.register, digest, "rosen")
    assert engine.store.objectives() == []
    upload(engine.store, rosen.export.blobs[rosen.bundle.programs["objective"].digest])
    assert engine.registration.register(digest, "rosen").n == 7
    assert [(name, digest) for name, digest, _ in engine.store.objectives()] == [("rosen", digest)]


def test_a_blob_that_is_no_program_is_refused_and_nothing_is_registered(open_engine, rosen, upload):
    engine = open_engine()
    junk = upload(engine.store, b"not a program")
    digest = upload_changed(engine, rosen, upload, program=objective_pb2.Program(digest=junk, size_bytes=13))
    refusal(Code.INVALID_ARGUMENT, "BUNDLE_INCOMPATIBLE", engine.registration.register, digest, "junk")
    assert engine.store.objectives() == []


@pytest.mark.parametrize(
    ("format_", "says"), [(1, "register the objective again with a newer client"), (3, "upgrade the server")]
)
def test_a_bundle_of_another_format_is_refused_and_nothing_is_registered(open_engine, rosen, upload, format_, says):
    engine = open_engine()
    digest = upload_changed(engine, rosen, upload, format=format_)
    error = refusal(Code.FAILED_PRECONDITION, "BUNDLE_INCOMPATIBLE", engine.registration.register, digest, "other")
    assert f"the bundle has format {format_}" in str(error)
    assert "this server reads format 2" in str(error)
    assert says in str(error)
    assert engine.store.objectives() == []


def test_a_program_of_a_newer_stablehlo_is_refused_and_nothing_is_registered(open_engine, rosen, upload):
    engine = open_engine()
    artifact = rosen.read(rosen.bundle.programs["objective"].digest)
    assert artifact[4] & 1  # The version of the bytecode, in one byte.
    newer = artifact[:4] + bytes([99 * 2 + 1]) + artifact[5:]
    program = objective_pb2.Program(digest=upload(engine.store, newer), size_bytes=len(newer))
    digest = upload_changed(engine, rosen, upload, program=program, jax_version="9.9.9")
    error = refusal(Code.INVALID_ARGUMENT, "BUNDLE_INCOMPATIBLE", engine.registration.register, digest, "future")
    assert "objective " in str(error)
    assert "version 99 is newer" in str(error)
    assert engine.store.objectives() == []


def test_programs_of_another_objective_are_refused(open_engine, rosen, logistic, upload):
    engine = open_engine(logistic)
    digest = upload_changed(engine, rosen, upload, program=logistic.bundle.programs["objective"])
    refusal(Code.INVALID_ARGUMENT, "BUNDLE_INVALID", engine.registration.register, digest, "")
    assert [(name, digest) for name, digest, _ in engine.store.objectives()] == [("", logistic.export.digest)]


def test_registering_again_changes_nothing(open_engine, rosen):
    engine = open_engine(rosen)
    before = engine.objectives.load(rosen.export.digest)
    assert engine.registration.register(rosen.export.digest, "") is before
    assert engine.registration.register(rosen.export.digest, "digits/rosen") is before
    assert [(name, digest) for name, digest, _ in engine.store.objectives()] == [("digits/rosen", rosen.export.digest)]


# Callers that give up


class Turns:
    """Keeps both of a tenant's turns in the compile queue until it is closed."""

    def __init__(self, engine):
        self._open = threading.Event()
        self._engine = engine

    def __enter__(self):
        for _ in range(compile_queue.EACH):
            self._engine.objectives._compiles.submit("", "", lambda: self._open.wait(WAIT))

    def __exit__(self, *error):
        self._open.set()


def test_a_registration_that_was_given_up_leaves_the_queue(open_engine, rosen, upload, monkeypatch):
    engine = open_engine()
    digest = uploaded(engine, rosen, upload)
    read = []
    monkeypatch.setattr(engine.objectives._vetting, "known", lambda digest: None)
    monkeypatch.setattr(engine.objectives._vetting, "admit", lambda digest, bundle, part: read.append(digest))
    with Turns(engine), pytest.raises(ServiceError, match="gave up the registration") as error:
        engine.registration.register(digest, "", on_wait=lambda cancel: cancel())
    engine.objectives._compiles.close(wait=True)
    assert error.value.reason == "CANCELLED"
    assert read == []


def test_compiles_of_a_given_up_registration_leave_the_queue_and_can_be_repeated(open_engine, rosen, upload):
    engine = open_engine()
    digest = uploaded(engine, rosen, upload)
    engine.objectives._vetting.admit(digest, rosen.export.bundle, engine.store.read)
    with Turns(engine), pytest.raises(ServiceError, match="gave up the registration"):
        engine.registration.register(digest, "", on_wait=lambda cancel: cancel())
    assert not engine.store.registered(digest)
    assert engine.registration.register(digest, "").kernels.ready("value_and_grad")


def test_two_register_a_bundle_and_one_gives_up(open_engine, rosen, upload):
    engine = open_engine()
    digest = uploaded(engine, rosen, upload)
    engine.objectives._vetting.admit(digest, rosen.export.bundle, engine.store.read)
    staying, leaving = queue.SimpleQueue(), queue.SimpleQueue()
    with ThreadPoolExecutor(2) as pool:
        with Turns(engine):
            stays = pool.submit(engine.registration.register, digest, "", on_wait=staying.put)
            leaves = pool.submit(engine.registration.register, digest, "", on_wait=leaving.put)
            staying.get(timeout=WAIT)
            leaving.get(timeout=WAIT)()
        with pytest.raises(ServiceError, match="gave up the registration"):
            leaves.result(WAIT)
        assert stays.result(WAIT).digest == digest
