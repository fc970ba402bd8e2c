"""Limits of tenants on a real server: solves go on, only slower. Impossible requests
are refused with the reason.
"""

import dataclasses
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.linalg import cg

import hvpd
from hvpd._cli import main
from hvpd_server.store.quarantine import Quarantine
from hvpd_server.tenancy import token_file
from tests.support.waiting import until

N = 40
WAIT = 60


def quartic(x, data):
    return jnp.sum(data * x**4) / 12


def hessian(x, data):
    return np.diag(data * x**2)


class Place:
    """A server with a tenant for each test and an operator. The tenants' tokens have
    all rights but `administer`.
    """

    def __init__(self, root, serve):
        self.tokens = root / "tokens.json"
        self.store = root / "store"
        self.operator = token_file.create(self.tokens, "ops", ["use", "administer"])[0]
        self.address = serve("--tokens", str(self.tokens), store=self.store).address

    def connect(self, tenant, rights=("use", "publish"), **limits):
        """Return a client of a tenant that has these limits."""
        token = token_file.create(self.tokens, tenant, rights)[0]
        if limits:
            token_file.limit(self.tokens, tenant, limits)
        return hvpd.connect(self.address, token=token)


@pytest.fixture(scope="module")
def place(tmp_path_factory, serve_module):
    return Place(tmp_path_factory.mktemp("limits"), serve_module)


@pytest.fixture
def tenant(request):
    return request.node.name.removeprefix("test_")[:60]


SEEDS = itertools.count()


def problem(n=N):
    rng = np.random.default_rng(next(SEEDS))
    return rng.uniform(1, 2, n), rng.uniform(1, 2, n)


def register(client, name="quartic", n=N):
    """Register an objective that no other tenant has."""
    x, data = problem(n)
    return client.register(quartic, x, data, name=name), x, data


def solves(objective, x, data):
    """Assert that CG finds the solution of a direct solve."""
    b = np.ones(x.size)
    found, code = cg(objective.at(x).hessian(), b, rtol=1e-10)
    assert code == 0
    np.testing.assert_allclose(found, np.linalg.solve(hessian(x, data), b), rtol=1e-8)


def refused(call, *arguments, **settings):
    with pytest.raises(hvpd.HvpdError) as error:
        call(*arguments, **settings)
    return error.value


def test_a_solve_that_asks_for_more_than_its_rate_is_slower_and_right(place, tenant):
    with place.connect(tenant, vectors_per_second=30) as client:
        objective, x, data = register(client)
        H = objective.at(x).hessian()
        for _ in range(2):
            solves(objective, x, data)
        while not client.statistics().retries:
            np.testing.assert_allclose(H @ np.ones((N, 4)), hessian(x, data) @ np.ones((N, 4)))


def test_an_impatient_client_gets_an_error_and_others_are_not_slower(place, tenant):
    with place.connect(tenant, vectors_per_second=0.001) as slow, place.connect(f"not-{tenant}"[:60]) as other:
        _, start, _ = register(slow)
        objective, x, data = register(other)
        H = objective.at(x).hessian()
        token = token_file.create(place.tokens, tenant, ["use"])[0]
        with hvpd.connect(place.address, token=token, retry_timeout=0.2) as impatient:
            objective = impatient.objective("quartic")
            objective.value(start)  # The last for a quarter of an hour.
            error = refused(objective.value, start + 1)
        assert (type(error), error.reason) == (hvpd.OverloadedError, "TENANT_RATE")
        assert f"tenant {tenant} may have 0.001 vectors a second" in str(error)
        for _ in range(20):
            np.testing.assert_allclose(H @ np.ones(N), hessian(x, data) @ np.ones(N))
        assert other.statistics().retries == 0


def test_vectors_in_flight_are_bounded_and_all_are_answered(place, tenant):
    with place.connect(tenant, vectors_in_flight=1) as client:
        objective, x, data = register(client)
        H, together = objective.at(x).hessian(), threading.Barrier(6)

        def caller(seed):
            v = np.random.default_rng(seed).standard_normal(N)
            together.wait(WAIT)
            for _ in range(10):
                np.testing.assert_allclose(H @ v, hessian(x, data) @ v)
            return True

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(caller, range(6)))
        assert client.usage().vectors_in_flight == 0
        assert client.usage().vectors_in_flight_limit == 1


def test_device_time_that_is_used_up_is_waited_for(place, tenant):
    with place.connect(tenant, device_share=0.002) as client:
        objective, x, data = register(client)
        H = objective.at(x).hessian()
        while not client.statistics().retries:
            np.testing.assert_allclose(H @ np.ones((N, 16)), hessian(x, data) @ np.ones((N, 16)))


def test_points_make_room_for_each_other_within_the_tenants_limit(place, tenant):
    vector = N * 8
    with place.connect(tenant, resident_bytes=vector + 3 * 2 * vector + 10) as client:  # Data, and three points.
        objective, x, data = register(client)
        points = [objective.at(x + step) for step in range(6)]
        for point, step in zip(points * 2, [*range(6)] * 2, strict=True):
            np.testing.assert_allclose(point.hessian() @ np.ones(N), hessian(x + step, data) @ np.ones(N))
            assert client.usage().resident_bytes <= client.usage().resident_bytes_limit
        large, *_ = register(client, "large", n=20 * N)
        error = refused(large.at, np.ones(20 * N))
        assert (type(error), error.reason) == (hvpd.OverloadedError, "TENANT_MEMORY")
        assert f"is more than tenant {tenant} may have on the device" in str(error)
        solves(objective, x, data)


def test_a_tenants_stored_bytes_are_bounded_and_deleting_makes_room(place, tenant):
    with place.connect(tenant) as client:
        register(client, "first")
        used = client.usage().stored_bytes
        token_file.limit(place.tokens, tenant, {"stored_bytes": used + 79_000})
        until(lambda: client.usage().stored_bytes_limit is not None)  # The file is read again within a second or so.
        error = refused(register, client, "second", n=10_000)
        assert (type(error), error.reason) == (hvpd.OverloadedError, "TENANT_STORAGE")
        assert "`hvpd delete`" in str(error)
        assert client.usage().stored_bytes < used + 79_000  # Its programs may have come, and its data not.
        third, x, data = register(client, "third")
        solves(third, x, data)
        assert client.delete("first")
        assert client.prune() == 0  # The rest of the second objective is younger than an hour.
        assert client.usage().stored_bytes < used + 79_000


def test_a_deleted_objective_is_gone_and_can_be_registered_again(place, tenant):
    with place.connect(tenant) as client:
        objective, x, _ = register(client)
        H = objective.at(x).hessian()
        H @ np.ones(N)
        assert client.delete("quartic")
        for gone in (lambda: client.objective("quartic"), lambda: client.delete("quartic"), lambda: H @ np.ones(N)):
            assert isinstance(refused(gone), hvpd.NotFoundError)
        assert client.objectives() == []
        solves(*register(client))


def test_a_teammates_objective_is_deleted_by_its_owner_and_by_the_operator(place, tenant):
    with place.connect(tenant) as owner, place.connect(f"{tenant[:50]}-mate") as mate:
        x, data = problem()
        owner.register(quartic, x, data, name="shared", shared=True)
        error = refused(mate.delete, f"{tenant}/shared")
        assert (type(error), error.reason) == (hvpd.AccessError, "NOT_YOURS")
        error = refused(mate.rename, f"{tenant}/shared", "mine")
        assert (type(error), error.reason) == (hvpd.AccessError, "NOT_YOURS")
        assert (
            f"objective '{tenant}/shared' is not tenant {tenant[:50]}-mate's own: only its owner can rename it"
            in str(error)
        )
        assert [each.name for each in mate.objectives()] == [f"{tenant}/shared"]
        solves(mate.objective(f"{tenant}/shared"), x, data)
        token = token_file.create(place.tokens, "ops", ["use", "publish", "administer"])[0]
        with hvpd.connect(place.address, token=token) as operator:
            assert operator.delete(f"{tenant}/shared")
        assert isinstance(refused(owner.objective, "shared"), hvpd.NotFoundError)


def test_a_tenant_sees_its_own_use_and_an_operator_that_of_all(place, tenant):
    with place.connect(tenant, stored_bytes=10**9) as client:
        register(client)
        own = client.usage()
        assert (own.tenant, own.stored_bytes_limit, own.vectors_per_second_limit) == (tenant, 10**9, None)
        assert own.stored_bytes > N * 8
        assert refused(client.usages).reason == "RIGHT_MISSING"
        assert isinstance(refused(client.release, "quartic"), hvpd.AccessError)
    with hvpd.connect(place.address, token=place.operator) as operator:
        found = {usage.tenant: usage for usage in operator.usages()}
    changing = {"resident_bytes": 0, "program_bytes": 0, "cached_program_bytes": 0}  # Its compiles go on.
    assert dataclasses.replace(found[tenant], **changing) == dataclasses.replace(own, **changing)
    assert found["ops"].stored_bytes == 0


def test_a_quarantined_objective_is_served_again_once_it_is_released(tmp_path, serve):
    serving = serve(store=tmp_path / "store")
    with hvpd.connect(serving.address) as client:
        objective, x, data = register(client)
        serving.kill()
        for _ in range(3):
            Quarantine(serving.store, 3).strike(objective.digest, "it ended the server")
        serving.start()
        error = refused(client.objective("quartic").at, x)
        assert error.reason == "QUARANTINED"
        assert f"`hvpd release {objective.digest[:12]}`" in str(error)
        assert client.release(objective.digest[:12]) == 3
        solves(client.objective("quartic"), x, data)
        assert client.release("quartic") == 0


def test_the_commands_do_the_same(place, tenant, capsys, monkeypatch):
    monkeypatch.setenv("HVPD_ADDRESS", place.address)
    with place.connect(tenant, vectors_per_second=1e6) as client:
        register(client)
    monkeypatch.setenv("HVPD_TOKEN", token_file.create(place.tokens, tenant, ["use", "publish"])[0])
    assert main.main(["usage"]) == 0
    titles, row = capsys.readouterr().out.splitlines()
    assert titles.split()[0] == "TENANT"
    assert row.split()[:4] == [tenant, "1", "of", "1e+06"]
    assert main.main(["usage", "--all"]) == 1
    assert "'administer'" in capsys.readouterr().err
    assert main.main(["prune"]) == 0
    assert capsys.readouterr().out == "gave up 0 B; blobs younger than an hour stay\n"
    assert main.main(["prune", "--tenant", "ops"]) == 1
    assert "'administer'" in capsys.readouterr().err
    assert [main.main(["delete", "quartic"]), capsys.readouterr().out] == [0, "deleted\n"]
    assert main.main(["delete", "quartic"]) == 1
    assert "no objective of name 'quartic'" in capsys.readouterr().err
    monkeypatch.setenv("HVPD_TOKEN", place.operator)
    assert main.main(["usage", "--all", "--json"]) == 0
    assert '"tenant": "ops"' in capsys.readouterr().out
