"""Programs of a tenant without limits neither fill the server's memory nor its disk,
and push out no program of another tenant: a real server with tenants.
"""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from hvpd_server.tenancy import token_file

MIB = 1 << 20
MEMORY = 6 * MIB
CACHE = MIB // 2


def quartic(x, data):
    return jnp.sum(data * x**4) / 12


def scaled(factor):
    """Return a function that no other seed has: another objective with own programs."""
    return lambda x, data: factor * quartic(x, data)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens") / "tokens.json"


@pytest.fixture(scope="module")
def server(serve_module, tokens, tmp_path_factory):
    token_file.create(tokens, "ops", ["use", "publish", "administer"])
    flags = ["--tokens", str(tokens), "--program-memory", str(MEMORY), "--cache-size", str(CACHE)]
    return serve_module(*flags, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tenant(server, tokens):
    """Connect tenants: tenant(name, **limits)."""
    with contextlib.ExitStack() as stack:

        def connected(name, **limits):
            token = token_file.create(tokens, name, ["use", "publish"])[0]
            if limits:
                token_file.limit(tokens, name, limits)
            return stack.enter_context(hvpd.connect(server.address, token=token))

        yield connected


def register(client, factor):
    x, data = np.random.default_rng(1).uniform(1, 2, (2, 5))
    objective = client.register(scaled(factor), x, data)
    return objective, x, factor * data * x**2


def multiply(H, diagonal, width=1):
    V = np.ones((5, width))
    np.testing.assert_allclose(H @ V, diagonal[:, None] * V)


def files(server, *objectives):
    digests = {objective.digest for objective in objectives}
    return {path.name for path in (server.store / "cache").iterdir() if path.name[:64] in digests}


def test_programs_without_end_cost_the_neighbour_nothing(server, tenant):
    neighbour, attacker = tenant("calm"), tenant("programs")
    objective, x, diagonal = register(neighbour, 0.5)
    point = objective.at(x)
    H = point.hessian()
    multiply(H, diagonal)
    own = files(server, objective)
    assert own
    made, attacks = neighbour.usage(), []
    for index in range(200):
        attack = register(attacker, 2.0 + index)
        attacks.append(attack)
        multiply(attack[0].at(attack[1]).hessian(), attack[2])
        multiply(H, diagonal)
        assert server.metric("hvpd_program_bytes") <= 2 * MEMORY
        used = attacker.usage()
        if server.metric("hvpd_unloaded_objectives_total") > 3 and len(files(server, attacks[0][0])) == 0:
            break
    else:
        pytest.fail("no program left the memory, or none the cache")
    assert neighbour.usage().program_bytes >= made.program_bytes > 0
    assert neighbour.usage().cached_program_bytes >= made.cached_program_bytes > 0
    assert files(server, objective) >= own
    assert used.program_bytes <= 2 * MEMORY
    assert used.cached_program_bytes <= CACHE
    assert sum(path.stat().st_size for path in (server.store / "cache").iterdir()) <= CACHE
    assert server.metric("hvpd_points_remade_total") == 0  # The neighbour's point was resident all the time.
    # The attacker's first objective comes back, although memory and cache have lost it.
    multiply(attacks[0][0].at(attacks[0][1]).hessian(), attacks[0][2])


def test_a_tenant_over_its_limit_is_refused_by_its_reason_and_its_other_products_go_on(tokens, tenant):
    limited, neighbour = tenant("limited"), tenant("beside")
    objective, x, diagonal = register(limited, 0.25)
    other, y, others = register(neighbour, 0.125)
    H = objective.at(x).hessian()
    for _ in range(2):  # Both programs of the registration are loaded.
        multiply(H, diagonal)
    limit = limited.usage().program_bytes // 8
    token_file.limit(tokens, "limited", {"program_bytes": limit})
    while limited.usage().program_bytes_limit is None:
        pass
    with pytest.raises(hvpd.OverloadedError, match="Compiled programs of tenant limited take") as error:
        objective.at(x).hessian(precision="high") @ np.ones(5)
    assert error.value.reason == "TENANT_PROGRAMS"
    for width in (1, 2, 5, 16):  # In launches of the widths that are compiled.
        multiply(H, diagonal, width)
    for width in (1, 4, 16):
        multiply(other.at(y).hessian(), others, width)
    assert neighbour.usage().program_bytes_limit is None
    second, z, _ = register(limited, 0.75)  # It takes the place of the first.
    second.at(z)
    objective.at(x)
