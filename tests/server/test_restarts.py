"""The objectives of a store after a restart: warm, and served beside broken ones."""

import pytest

from hvpd_server.errors import Code, ServiceError
from tests.support.engine import block, create_point, damage, multiply, refusal, upload_changed, uploaded

pytestmark = pytest.mark.slow  # Real programs, compiled and run.


def test_after_a_restart_all_is_warm_and_right_without_registering(open_engine, rosen, logistic, assert_product):
    open_engine(rosen, logistic)
    engine = open_engine()
    engine.objectives.warm_all()
    for example in (rosen, logistic):
        kernels = engine.objectives.load(example.export.digest).kernels
        assert kernels.ready("value_and_grad")
        assert kernels.ready("hvp", 1)
        V = block(example, 3)
        assert_product(multiply(engine, create_point(engine, example), V), example.hessian, V)


def _corrupt_bundle(engine, example):
    damage(engine.store, example.export.digest)


def uncached(engine):
    """Drop the compiled programs, so that the next start needs the objectives' own."""
    engine.objectives._compiles.close(wait=True)
    engine.vetter.sweep(-1.0)
    for path in engine.store.cache.iterdir():
        path.unlink()


def _corrupt_program(engine, example):
    damage(engine.store, example.bundle.programs["objective"].digest)


def _lost_program(engine, example):
    digest = example.bundle.programs["objective"].digest
    (engine.store.root / "blobs" / digest[:2] / digest).unlink()


def _unreadable_program(engine, example):
    """Make reads of the program fail with another OSError than FileNotFoundError, like
    a failing disk.
    """
    _lost_program(engine, example)
    digest = example.bundle.programs["objective"].digest
    (engine.store.root / "blobs" / digest[:2] / digest).mkdir()


@pytest.mark.parametrize("break_", [_corrupt_bundle, _corrupt_program, _lost_program, _unreadable_program])
def test_a_store_with_a_broken_objective_serves_the_rest(open_engine, rosen, logistic, assert_product, caplog, break_):
    broken = open_engine(rosen, logistic)
    break_(broken, rosen)
    uncached(broken)
    engine = open_engine()
    engine.objectives.warm_all()
    assert rosen.export.digest[:12] in caplog.text
    V = block(logistic, 2)
    assert_product(multiply(engine, create_point(engine, logistic), V), logistic.hessian, V)
    with pytest.raises((ServiceError, OSError)):
        create_point(engine, rosen)


@pytest.mark.parametrize("break_", [_corrupt_bundle, _corrupt_program, _lost_program])
def test_a_broken_objective_is_served_once_it_is_registered_again(open_engine, rosen, upload, assert_product, break_):
    """It is served at once, although failed compiles are not repeated for a while."""
    broken = open_engine(rosen)
    break_(broken, rosen)
    uncached(broken)
    engine = open_engine()
    engine.objectives.warm_all()
    refusal(Code.DATA_LOSS, "BLOB_CORRUPT", create_point, engine, rosen)
    uploaded(engine, rosen, upload)
    engine.registration.register(rosen.export.digest, "")
    V = block(rosen, 2)
    assert_product(multiply(engine, create_point(engine, rosen), V), rosen.hessian, V)


def test_a_bundle_of_a_newer_server_does_not_stop_this_one(
    open_engine, rosen, logistic, upload, caplog, assert_product
):
    engine = open_engine(logistic)
    newer = upload_changed(engine, rosen, upload, format=3)
    engine.store.add_objective(newer, "newer")
    engine = open_engine()
    engine.objectives.warm_all()
    assert newer in caplog.text
    V = block(logistic, 2)
    assert_product(multiply(engine, create_point(engine, logistic), V), logistic.hessian, V)
