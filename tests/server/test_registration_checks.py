"""The check after a registration keeps its verdicts, and disturbs nothing else."""

import json
import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvpd._wire import codec
from hvpd.v1 import curvature_pb2, objective_pb2
from hvpd_server.device import programs
from hvpd_server.engine.registration_checks import Checks
from hvpd_server.errors import Code, ServiceError
from hvpd_server.store.store import Store

WAIT = 60
DIGEST = "ab" * 32
PASSED, FAILED, UNDECIDED = (
    objective_pb2.Verdict.Value(f"VERDICT_{word}") for word in ("PASSED", "FAILED", "UNDECIDED")
)
PENDING, UNSPECIFIED = (objective_pb2.Verdict.Value(f"VERDICT_{word}") for word in ("PENDING", "UNSPECIFIED"))


# With points of closed form


class Quartic:
    """The sum of x^4, whose product is `off` times the right one."""

    def __init__(self, x, off=1.0):
        self.x, self.n, self.dtype, self.off = x, x.size, x.dtype, off
        self.value, self.gradient = float((x**4).sum()), 4 * x**3
        self.nonfinite = () if np.isfinite(x).all() else ("x", "value", "gradient")

    def multiply(self, block, operator=curvature_pb2.OPERATOR_HESSIAN, /):
        return self.off * 12 * self.x**2 * block


BUNDLE = objective_pb2.Bundle(
    n=3,
    dtype="float64",
    precision="highest",
    mode="forward_over_reverse",
    x_leaves=[{"dtype": "float64", "shape": [3]}],
    jax_version="0.10.2",
)
FOREIGN = objective_pb2.Bundle.FromString(BUNDLE.SerializeToString())
FOREIGN.ClearField("jax_version")


def right(turn):
    return Quartic


def wrong(turn):
    return lambda x: Quartic(x, 1.01)


class Setting:
    """Checks on a store, with their counts."""

    def __init__(self, store, upload, waiting=lambda: 0):
        self.store, self.upload = store, upload
        self.counted = []
        self.checks = Checks(store, waiting, self.counted.append)

    def start(self, points, *, x=(1.0, 2.0, 3.0), digest=DIGEST, label="team/quartic", bundle=BUNDLE, tenant=""):
        blob = self.upload(self.store, np.array(x).tobytes())
        self.checks.start(digest, bundle, blob, points, label, tenant=tenant)

    def found(self, digest=DIGEST):
        return self.checks.found(digest, BUNDLE)

    def finish(self):
        """Wait until all started checks have ended. Return the result."""
        self.checks._thread.submit(lambda: None).result(WAIT)
        return self.found()


@pytest.fixture
def setting(store, upload):
    made = Setting(store, upload)
    yield made
    made.checks.close()


def test_a_right_objective_passes(setting):
    setting.start(right)
    found = setting.finish()
    assert found.verdict == PASSED
    assert [(item.name, item.verdict) for item in found.items] == [
        (name, PASSED) for name in ("finite", "symmetry", "linearity", "difference")
    ]
    assert found.items[1].threshold == 1e-12
    assert found.reason == ""
    assert setting.counted == ["passed"]


@pytest.mark.parametrize(("off", "verdict"), [(1.0, PASSED), (1.01, FAILED)])
def test_a_foreign_objective_is_looked_at_beside_x_too(setting, off, verdict):
    """The rules at a foreign objective's kinks are presumed, and x may lie on a
    kink.
    """
    x = (1.0, 2.0, 3.0)
    setting.start(lambda turn: lambda at: Quartic(at, 1.0 if np.linalg.norm(at - x) < 1e-2 else off), bundle=FOREIGN)
    found = setting.finish()
    names = ("finite", "symmetry", "linearity", "difference")
    assert [item.name for item in found.items] == [*names, *(f"{name} beside x" for name in names)]
    assert all(item.verdict == PASSED for item in found.items[:4])
    assert (found.verdict, found.items[-1].verdict) == (verdict, verdict)


def test_a_wrong_objective_fails_and_the_log_names_it(setting, caplog):
    setting.start(wrong)
    found = setting.finish()
    assert found.verdict == FAILED
    difference = found.items[3]
    assert (difference.name, difference.verdict) == ("difference", FAILED)
    assert difference.measured == pytest.approx(0.01, rel=0.02)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    for part in ("team/quartic", DIGEST, "difference is 0.0"):
        assert part in record.getMessage()
    assert setting.counted == ["failed"]


def test_an_x_that_is_not_finite_is_undecided(setting, caplog):
    setting.start(wrong, x=(np.nan, 1.0, 1.0))
    found = setting.finish()
    assert found.verdict == UNDECIDED
    assert "NaN or infinity in x" in found.items[0].meaning
    assert {item.verdict for item in found.items} == {UNDECIDED}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def _refuses(turn):
    raise ServiceError(Code.RESOURCE_EXHAUSTED, "DEVICE_MEMORY", "the device is out of memory")


def _breaks(turn):
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(
    ("points", "says"), [(_refuses, "the device is out of memory"), (_breaks, "ZeroDivisionError: a bug")]
)
def test_an_error_is_a_reason_and_the_next_objective_is_checked(setting, points, says):
    setting.start(points)
    setting.start(right, digest="cd" * 32)
    found = setting.finish()
    assert (found.verdict, found.reason, len(found.items)) == (UNDECIDED, says, 0)
    assert setting.found("cd" * 32).verdict == PASSED


@pytest.mark.parametrize("x", [(1.0, 2.0), (1.0, 2.0, 3.0, 4.0)])
def test_an_x_of_another_size_is_a_reason(setting, x):
    setting.start(right, x=x)
    assert "float64[3] takes 24 bytes" in setting.finish().reason


@pytest.mark.parametrize("digest", ["0" * 64, "../../lock", "x"])
def test_an_x_that_is_not_stored_is_a_reason(setting, digest):
    setting.checks.start(DIGEST, BUNDLE, digest, right)
    found = setting.finish()
    assert found.verdict == UNDECIDED
    assert "is not stored" in found.reason


def test_without_an_x_nothing_is_checked_and_the_reason_names_the_remedy(setting):
    assert setting.found().verdict == UNSPECIFIED
    assert "no x came" in setting.found().reason
    large = objective_pb2.Bundle(n=(8 << 20) + 1, dtype="float64")
    found = setting.checks.found(DIGEST, large)
    assert found.verdict == UNSPECIFIED
    for part in ("64 MiB", "objective.check(x)"):
        assert part in found.reason


def test_one_check_runs_at_a_time_and_others_are_pending(setting):
    begun, may_go = threading.Event(), threading.Event()

    def held(turn):
        begun.set()
        assert may_go.wait(WAIT)
        return Quartic

    setting.start(held)
    assert begun.wait(WAIT)
    setting.start(right, digest="cd" * 32)
    setting.start(right)  # Again, while it is under way: nothing new.
    assert [setting.found(digest).verdict for digest in (DIGEST, "cd" * 32)] == [PENDING] * 2
    assert setting.found().reason
    may_go.set()
    assert setting.finish().verdict == PASSED
    assert setting.found("cd" * 32).verdict == PASSED
    assert setting.counted == ["passed"] * 2


def test_undecided_objectives_are_checked_again_and_decided_ones_are_not(setting):
    setting.start(right)
    setting.finish()
    setting.start(wrong)
    assert setting.finish().verdict == PASSED
    for x, verdict in [((np.nan, 0.0, 0.0), UNDECIDED), ((1.0, 2.0, 3.0), FAILED), ((1.0, 2.0, 4.0), FAILED)]:
        setting.start(wrong if x[2] < 4 else right, x=x, digest="cd" * 32)
        setting.finish()
        assert setting.found("cd" * 32).verdict == verdict
    assert setting.counted == ["passed", "undecided", "failed"]


# On disk


def reopened(setting):
    """Return a new setting on the same store, as after a restart of the server."""
    setting.checks.close()
    setting.store.close()
    return Setting(Store(setting.store.root), setting.upload)


@pytest.mark.parametrize(
    ("points", "x"), [(right, (1.0, 2.0, 3.0)), (wrong, (1.0, 2.0, 3.0)), (right, (np.inf, 0.0, 0.0))]
)
def test_a_verdict_survives_a_restart(setting, points, x):
    setting.start(points, x=x)
    before = setting.finish()
    again = reopened(setting)
    assert str(again.found()) == str(before)  # NaN is not equal to itself.
    assert len(before.items) == 4
    again.checks.close()
    again.store.close()


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'"passed"', b'{"verdict": "VERDICT_PRISTINE"}', b'{"items": 5}', b'{"items": [5]}']
)
def test_a_damaged_record_is_as_none(setting, damage):
    setting.start(wrong)
    setting.finish()
    record = setting.store.root / "checks" / DIGEST
    assert json.loads(record.read_bytes())["verdict"] == "VERDICT_FAILED"
    record.write_bytes(damage)
    again = reopened(setting)
    assert again.found().verdict == UNSPECIFIED
    again.start(right)
    assert again.finish().verdict == PASSED
    again.checks.close()
    again.store.close()


def test_a_record_of_a_newer_server_is_read_as_far_as_it_is_known(setting):
    setting.start(right)
    setting.finish()
    record = setting.store.root / "checks" / DIGEST
    record.write_text(json.dumps(json.loads(record.read_text()) | {"novelty": 1}))
    again = reopened(setting)
    assert again.found().verdict == PASSED
    again.checks.close()
    again.store.close()


def test_a_disk_that_keeps_nothing_does_not_hide_the_verdict(setting, monkeypatch, caplog):
    def full(digest, found, tenant):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(setting.store, "add_check", full)
    setting.start(wrong)
    assert setting.finish().verdict == FAILED
    assert "No space left" in caplog.text


# Several tenants


def test_each_tenant_has_a_check_of_its_own(setting):
    """Otherwise the verdict would show that another tenant has registered the same."""
    for tenant in "ab":
        setting.store.root.joinpath("owners", codec.digest(tenant.encode())).mkdir(parents=True)
    setting.start(wrong, tenant="a")
    setting.finish()
    assert setting.checks.found(DIGEST, BUNDLE, "a").verdict == FAILED
    assert setting.checks.found(DIGEST, BUNDLE, "b") == setting.found()
    assert setting.found().verdict == UNSPECIFIED
    setting.start(right, tenant="b")
    setting.finish()
    for known in (setting, reopened(setting)):
        assert [known.checks.found(DIGEST, BUNDLE, tenant).verdict for tenant in "ab"] == [FAILED, PASSED]
        assert known.checks.overall(DIGEST, BUNDLE).verdict == FAILED  # This is the operator's view.
    known.checks.close()
    known.store.close()


def test_a_check_that_runs_is_pending_for_its_tenant_alone(setting):
    begun, may_go = threading.Event(), threading.Event()

    def held(turn):
        begun.set()
        assert may_go.wait(WAIT)
        return Quartic

    setting.start(held, tenant="a")
    assert begun.wait(WAIT)
    assert [setting.checks.found(DIGEST, BUNDLE, tenant).verdict for tenant in "ab"] == [PENDING, UNSPECIFIED]
    assert setting.checks.overall(DIGEST, BUNDLE).verdict == PENDING
    may_go.set()
    setting.finish()


# Beside others


def test_products_that_wait_go_first(store, upload, monkeypatch):
    """The check makes its first launch when nothing else waits."""
    monkeypatch.setattr("hvpd_server.engine.registration_checks._YIELD_SECONDS", WAIT)
    waiting, seen, asked = [3], [], threading.Event()

    def pending():
        asked.set()
        return waiting[0]

    setting = Setting(store, upload, pending)

    def points(turn):
        turn()
        seen.append(waiting[0])
        return Quartic

    setting.start(points)
    assert asked.wait(WAIT)
    waiting[0] = 0
    assert setting.finish().verdict == PASSED
    assert seen == [0]
    setting.checks.close()


def test_it_is_not_put_off_for_ever(store, upload):
    setting = Setting(store, upload, lambda: 1)

    def points(turn):
        turn()
        return Quartic

    setting.start(points)
    assert setting.finish().verdict == PASSED
    setting.checks.close()


def test_closing_does_not_wait_and_a_running_check_ends_at_its_next_launch(setting):
    begun, may_go, launched = threading.Event(), threading.Event(), []

    def held(turn):
        begun.set()
        assert may_go.wait(WAIT)
        turn()
        launched.append(True)
        return Quartic

    setting.start(held)
    assert begun.wait(WAIT)
    setting.checks.close()
    setting.start(right, digest="cd" * 32)  # It comes too late, and raises no error.
    may_go.set()
    setting.checks._thread.shutdown(wait=True)
    assert launched == []
    assert setting.counted == []
    assert not list((setting.store.root / "checks").iterdir())


# On an engine


def register(engine, example, upload, x=None):
    x_digest = upload(engine.store, codec.payload(example.x if x is None else x))
    engine.registration.register(example.export.digest, "", x_digest)


def finished(engine, example):
    engine.checks._thread.submit(lambda: None).result(WAIT)
    return engine.checks.found(example.export.digest, example.bundle)


def sample(engine, name, **labels):
    return engine.metrics.registry.get_sample_value(name, labels or None)


@pytest.fixture
def uploaded(open_engine, upload):
    """Yield an engine with the blobs of examples, which are not registered yet."""

    def uploaded(*examples, **limits):
        engine = open_engine(**limits)
        for example in examples:
            for content in example.export.blobs.values():
                upload(engine.store, content)
        return engine

    return uploaded


def test_an_objective_passes_and_its_points_and_products_are_not_seen(uploaded, upload, objective_example):
    engine = uploaded(objective_example)
    register(engine, objective_example, upload)
    found = finished(engine, objective_example)
    assert found.verdict == PASSED, found
    assert sample(engine, "hvpd_registration_checks_total", verdict="passed") == 1
    assert sample(engine, "hvpd_products_total") == sample(engine, "hvpd_points_total") == 0
    assert sample(engine, "hvpd_launches_total", program="hvp") == 0
    assert sample(engine, "hvpd_compile_seconds_count") == 2
    data = sum(array.nbytes for array in objective_example.data)
    assert sum(engine.lanes[0].residency.used_bytes().values()) == data


def test_without_x_an_engine_checks_nothing(open_engine, rosen):
    engine = open_engine(rosen)
    assert finished(engine, rosen).verdict == UNSPECIFIED
    assert engine.lanes[0].residency.used_bytes() == {}


@jax.custom_jvp
def _quartic(x):
    return jnp.sum(x**4)


@jax.custom_jvp
def _cubed(x):
    return 4 * x**3


_quartic.defjvp(lambda primals, tangents: (_quartic(*primals), jnp.vdot(_cubed(*primals), tangents[0])))
_cubed.defjvp(lambda primals, tangents: (_cubed(*primals), 12 * 1.001 * primals[0] ** 2 * tangents[0]))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_wrong_derivative_rule_fails(uploaded, upload, make_example, dtype):
    example = make_example(_quartic, np.linspace(0.5, 2.0, 6, dtype=dtype))
    engine = uploaded(example)
    register(engine, example, upload)
    found = finished(engine, example)
    assert [item.verdict for item in found.items] == [PASSED, PASSED, PASSED, FAILED]
    assert found.items[3].measured == pytest.approx(1e-3, rel=0.05)


def test_a_check_without_room_evicts_nothing(uploaded, upload, rosen, logistic):
    """The point of another objective fills the budget."""
    budget = max(sum(array.nbytes for array in logistic.data) + 8 * logistic.x.nbytes, 2 * rosen.x.nbytes)
    engine = uploaded(rosen, logistic, memory_budget_bytes=budget)
    engine.registration.register(rosen.export.digest, "")
    spec = curvature_pb2.PointSpec(
        objective_digest=rosen.export.digest, x_digest=codec.digest(codec.payload(rosen.x)), default_data=True
    )
    point = engine.create_point(engine.locate(spec), rosen.x)
    engine.lanes[0].residency.put("other", "data", "O", budget - 2 * rosen.x.nbytes)
    register(engine, logistic, upload)
    found = finished(engine, logistic)
    assert found.verdict == UNDECIDED
    assert "beside the resident values" in found.reason
    assert engine.lanes[0].residency.get(point.id) is point
    assert engine.lanes[0].residency.get("other") == "O"
    engine.lanes[0].residency.drop("other")
    engine.lanes[0].residency.drop(point.id)
    register(engine, logistic, upload)  # Registered again, it is checked again.
    assert finished(engine, logistic).verdict == PASSED


def test_a_program_that_cannot_be_compiled_is_a_reason(uploaded, upload, rosen, monkeypatch):
    """The first program compiles. Otherwise nothing is registered."""
    engine, compile_ = uploaded(rosen), programs.Kernels._compile

    def refuse(self, name, width):
        if name == "value_and_grad":
            return compile_(self, name, width)
        raise ServiceError(Code.INVALID_ARGUMENT, "COMPILE_FAILED", f"the server cannot compile {name}")

    monkeypatch.setattr("hvpd_server.device.programs.Kernels._compile", refuse)
    register(engine, rosen, upload)
    found = finished(engine, rosen)
    assert (found.verdict, found.reason) == (UNDECIDED, "the server cannot compile hvp")


def test_data_that_is_corrupt_is_a_reason_and_left_for_the_user_to_find(uploaded, upload, logistic):
    engine = uploaded(logistic)
    digest = logistic.bundle.data[0].digest
    path = engine.store.root / "blobs" / digest[:2] / digest
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    register(engine, logistic, upload)
    found = finished(engine, logistic)
    assert found.verdict == UNDECIDED
    assert "corrupt on the server's disk" in found.reason
    assert path.exists()
    spec = curvature_pb2.PointSpec(
        objective_digest=logistic.export.digest, x_digest=codec.digest(codec.payload(logistic.x)), default_data=True
    )
    with pytest.raises(ServiceError, match="set aside"):
        engine.create_point(engine.locate(spec), logistic.x)
    assert not path.exists()
