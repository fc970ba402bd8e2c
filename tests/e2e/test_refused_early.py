"""Registrations that the server would refuse: the client says so before it traces."""

import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from hvpd._submission import check_may_register
from hvpd_server.tenancy import token_file
from tests.support.waiting import until


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens") / "tokens.json"


@pytest.fixture(scope="module")
def address(serve_module, tokens):
    token_file.create(tokens, "ops", ["administer"])
    return serve_module("--tokens", str(tokens)).address


@pytest.fixture
def joined(address, tokens):
    """Connect as a tenant: joined(tenant, rights)."""
    clients = []

    def join(tenant, rights=("use", "publish")):
        token = token_file.create(tokens, tenant, rights)[0]
        clients.append(hvpd.connect(address, token=token))
        return clients[-1]

    yield join
    for client in clients:
        client.close()


def never(x, *data):
    raise AssertionError("the function was traced")


def test_a_missing_right(joined):
    with pytest.raises(hvpd.AccessError, match="publish"):
        joined("reader", ["use"]).register(never, np.ones(3))


@pytest.mark.parametrize("name", ["", "a b", "/a", "a" * 201, "ab" * 32, 7])
def test_a_bad_name(joined, name):
    with pytest.raises(hvpd.InvalidArgumentError, match=r"name must|name is empty"):
        joined("namer").register(never, np.ones(3), name=name)


def test_the_name_of_another_tenants_objective(joined):
    owner, other = joined("owner"), joined("other")
    for shared, name in [(True, "open"), (False, "secret")]:
        owner.register(lambda x, a: jnp.sum(a * x**2), np.ones(3), float(shared), name=name, shared=shared)
    with pytest.raises(hvpd.AccessError, match="'owner/open' belongs to tenant owner") as error:
        other.register(never, np.ones(3), name="owner/open")
    assert error.value.reason == "NOT_YOURS"
    # The answer does not reveal an objective that is not shared.
    assert other.register(lambda x: jnp.sum(x**4), np.ones(3), name="owner/secret").name == "other/owner/secret"


@pytest.fixture
def small(joined, tokens):
    """A client of a tenant that may store 1 MiB."""
    client = joined("small")
    token_file.limit(tokens, "small", {"stored_bytes": 1 << 20})
    until(lambda: client.usage().stored_bytes_limit == 1 << 20)
    return client


def test_data_beyond_the_quota_are_refused_before_tracing(small):
    before = small.usage().stored_bytes
    data = [np.full(60_000, float(value)) for value in range(3)]  # The first two have room.
    with pytest.raises(hvpd.OverloadedError, match="exceed its limit") as error:
        small.register(never, np.ones(3), *data)
    assert error.value.reason == "TENANT_STORAGE"
    assert small.usage().stored_bytes == before
    # Without data there is room.
    assert small.register(lambda x: jnp.sum(x**2), np.ones(3)).value(np.ones(3)) == 3


def test_closed_over_arrays_beyond_the_quota_are_refused_before_the_first_upload(small):
    before = small.usage().stored_bytes
    data = [np.full(60_000, float(value)) for value in range(3)]
    with pytest.raises(hvpd.OverloadedError, match="exceed its limit"):
        small.register(lambda x: jnp.sum(x) * sum(jnp.sum(a) for a in map(jnp.asarray, data)), np.ones(3))
    assert small.usage().stored_bytes == before


def test_data_that_the_server_has_need_no_room(small):
    data = np.full(80_000, 7.0)
    for power in (2, 4):  # The second time, twice the data would exceed the limit.
        small.register(lambda x, a, power=power: jnp.sum(x**power) + a.sum(), np.ones(3), data)


def test_sizes_below_zero_are_refused(address, joined):
    client = joined("negative")
    with pytest.raises(hvpd.InvalidArgumentError, match="must be 0 or more bytes, got -1"):
        check_may_register(client._transport, None, [5, -1])
