"""Two servers on one store: what is registered at one is solved at the other."""

import concurrent.futures
import json
import os
import secrets
import signal

import boto3
import numpy as np
import pytest

import hvpd
from hvpd_server.tenancy import token_file
from tests.support.object_server import BUCKET, ObjectServer
from tests.support.waiting import until

N = 7
TARGET = np.linspace(-1, 1, N)


def quadratic(scale):
    def f(x, target):
        return 0.5 * scale * ((x - target) ** 2).sum()

    return f


@pytest.fixture(params=["directory", "s3"])
def replicas(request, serve, tmp_path):
    if request.param == "s3":
        server = request.getfixturevalue("object_server")
        settings = {"store": server.url, "environment": server.environment}
        return tuple(serve("--store-cache", str(tmp_path / name), **settings) for name in "ab")
    one = serve(store=tmp_path / "store")
    return one, serve(store=one.store)


@pytest.fixture
def object_server():
    server = ObjectServer(secrets.token_hex(4))
    boto3.client(
        "s3",
        endpoint_url=server.environment["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    ).create_bucket(Bucket=BUCKET)
    yield server
    server.close()


def test_register_at_one_and_solve_at_the_other(replicas):
    one, two = replicas
    with hvpd.connect(one.address) as first, hvpd.connect(two.address) as second:
        registered = first.register(quadratic(3.0), np.zeros(N), TARGET, name="team/quadratic")
        found = second.objective("team/quadratic")
        assert found.digest == registered.digest
        np.testing.assert_allclose(found.at(np.ones(N)).hessian() @ np.arange(N), 3.0 * np.arange(N), rtol=1e-12)
        assert [each.name for each in second.objectives()] == ["team/quadratic"]
        until(lambda: [each.check for each in second.objectives()] == ["passed"])

        second.register(quadratic(5.0), np.zeros(N), TARGET, name="team/quadratic")
        np.testing.assert_allclose(
            first.objective("team/quadratic").at(np.ones(N)).hessian() @ np.ones(N), 5.0 * np.ones(N), rtol=1e-12
        )
        first.delete("team/quadratic")
        with pytest.raises(hvpd.HvpdError, match="no objective of name"):
            second.objective("team/quadratic")


def test_a_deleted_objective_serves_no_new_point_at_the_other(replicas):
    one, two = replicas
    with hvpd.connect(one.address) as first, hvpd.connect(two.address) as second:
        first.register(quadratic(3.0), np.zeros(N), TARGET, name="q")
        found = second.objective("q")
        found.at(np.ones(N)).hessian() @ np.ones(N)
        first.delete("q")
        until(lambda: refused(found))


def refused(objective):
    """Return whether a new point is refused."""
    try:
        objective.at(np.random.default_rng().standard_normal(N)).hessian() @ np.ones(N)
    except hvpd.NotFoundError:
        return True
    return False


def test_of_two_registrations_of_one_name_at_once_one_wins_and_both_are_told(replicas):
    refused = []
    clients = [hvpd.connect(each.address) for each in replicas]

    def register(index):
        try:
            return clients[index % 2].register(quadratic(2.0 + index), np.zeros(N), TARGET, name="race").digest
        except hvpd.HvpdError as error:
            refused.append(error.reason)
            return None

    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            won = [digest for digest in pool.map(register, range(4)) if digest is not None]
        assert won
        assert set(refused) <= {"NAME_CHANGED"}
        for each in clients:
            assert each.objective("race").digest in won
            listed = [found.digest for found in each.objectives()]
            assert sorted(listed) == sorted(won)
    finally:
        for each in clients:
            each.close()


def test_tenants_and_their_limits_hold_at_both(serve, tmp_path):
    path = tmp_path / "tokens.json"
    tokens = {tenant: token_file.create(path, tenant, ["use", "publish"])[0] for tenant in ("a", "b")}
    token_file.limit(path, "a", {"stored_bytes": 60_000})
    one = serve("--tokens", str(path), store=tmp_path / "store")
    two = serve("--tokens", str(path), store=one.store)
    with (
        hvpd.connect(one.address, token=tokens["a"]) as first,
        hvpd.connect(two.address, token=tokens["a"]) as second,
        hvpd.connect(two.address, token=tokens["b"]) as other,
    ):
        first.register(quadratic(1.0), np.zeros(N), TARGET, name="mine")
        assert [each.name for each in second.objectives()] == ["a/mine"]
        assert second.usage().stored_bytes == first.usage().stored_bytes > 0
        assert other.objectives() == []
        with pytest.raises(hvpd.HvpdError, match="no objective"):
            other.objective("a/mine")
        with pytest.raises(hvpd.HvpdError, match="exceed its limit"):
            second.register(quadratic(2.0), np.zeros(8000), np.zeros(8000), name="large")


def test_a_killed_server_keeps_nothing_from_the_other(replicas):
    one, two = replicas
    with hvpd.connect(two.address) as second:
        with hvpd.connect(one.address) as first:
            first.register(quadratic(3.0), np.zeros(N), TARGET, name="q")
        os.kill(one.process.pid, signal.SIGKILL)
        one.process.wait()
        found = second.register(quadratic(4.0), np.zeros(N), TARGET, name="r")
        np.testing.assert_allclose(found.at(np.ones(N)).hessian() @ np.ones(N), 4.0 * np.ones(N), rtol=1e-12)
        assert {each.name for each in second.objectives()} == {"q", "r"}


def test_a_quarantine_holds_at_both(serve, tmp_path):
    one = serve(store=tmp_path / "store")
    two = serve(store=one.store)
    with hvpd.connect(one.address) as first, hvpd.connect(two.address) as second:
        digest = first.register(quadratic(3.0), np.zeros(N), TARGET, name="q").digest
        found = second.objective("q")
        found.at(np.ones(N)).hessian() @ np.ones(N)
        record = {"strikes": 3, "reason": "it did this", "time": "2026-01-01T00:00:00+00:00"}
        (one.store / "quarantine").mkdir(exist_ok=True)
        (one.store / "quarantine" / digest).write_text(json.dumps(record))
        with pytest.raises(hvpd.HvpdError, match="not served any more: it did this"):
            found.at(np.zeros(N)).hessian() @ np.ones(N)
        first.release("q")
        until(lambda: np.allclose(found.at(np.zeros(N)).hessian() @ np.ones(N), 3.0))
