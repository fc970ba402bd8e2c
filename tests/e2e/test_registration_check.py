"""A server's check at the x of a registration, as users see it: in the listing, on the
command line, in log and metrics.
"""

import json
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

import hvpd
from tests.support.objectives import quadratic
from tests.support.waiting import until


@jax.custom_jvp
def off(x):
    """Return the sum of x^4, whose second derivative is written down 0.1 % too
    large.
    """
    return jnp.sum(x**4)


@jax.custom_jvp
def cubed(x):
    return 4 * x**3


off.defjvp(lambda primals, tangents: (off(*primals), jnp.vdot(cubed(*primals), tangents[0])))
cubed.defjvp(lambda primals, tangents: (cubed(*primals), 12 * 1.001 * primals[0] ** 2 * tangents[0]))


@jax.custom_jvp
def on(x):
    """Return the sum of x^4, with the right second derivative."""
    return jnp.sum(x**4)


on.defjvp(lambda primals, tangents: (on(*primals), jnp.vdot(4 * primals[0] ** 3, tangents[0])))


def checked(objective):
    """Return the server's check when it has one."""
    until(lambda: objective.registration_check().verdict != "pending")
    return objective.registration_check()


def listed(client, objective):
    (verdict,) = {listing.check for listing in client.objectives() if listing.digest == objective.digest}
    return verdict


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_right_rule_passes(client, dtype):
    objective = client.register(on, np.linspace(0.5, 2.0, 6, dtype=dtype))
    found = checked(objective)
    assert (found.verdict, found.reason) == ("passed", "")
    assert [(item.name, item.verdict) for item in found.items] == [
        (name, "passed") for name in ("finite", "symmetry", "linearity", "difference")
    ]
    assert found.items[3].measured <= found.items[3].threshold < {np.float64: 1e-7, np.float32: 1e-3}[dtype]
    assert listed(client, objective) == "passed"
    with pytest.raises(AttributeError):
        found.verdict = "failed"


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_wrong_rule_fails_at_registration_and_by_check(serve, dtype):
    server = serve()
    x = np.linspace(0.5, 2.0, 6, dtype=dtype)
    with hvpd.connect(server.address) as client:
        objective = client.register(off, x, name="team/off")
        found = checked(objective)
        assert found.verdict == "failed"
        difference = found.items[3]
        assert (difference.name, difference.passed) == ("difference", False)
        assert difference.measured == pytest.approx(1e-3, rel=0.05)
        assert listed(client, objective) == "failed"
        assert not objective.check(x).passed
        # The check fails, and the server still serves it.
        assert np.allclose(objective.hessp(x, np.ones(6)), 12 * 1.001 * x**2, rtol=1e-5)
    (line,) = [line for line in server.lines if " WARNING " in line]
    for part in ("team/off", objective.digest, "difference"):
        assert part in line
    assert server.metric('hvpd_registration_checks_total{verdict="failed"') == 1
    assert server.metric("hvpd_registration_checks_total") == 1


def test_an_objective_that_is_not_finite_at_x_is_undecided_until_another_x_comes(client):
    fun = lambda x: jnp.sum(jnp.log(x) * x**2)  # noqa: E731
    objective = client.register(fun, np.zeros(3))
    found = checked(objective)
    assert found.verdict == "undecided"
    assert found.items[0].verdict == "undecided"
    assert "NaN or infinity" in found.items[0].meaning
    assert found.reason.endswith("check it at another x")
    again = client.register(fun, np.ones(3))
    assert again.digest == objective.digest
    assert checked(again).verdict == "passed"


def test_a_derivative_that_is_not_finite_fails_as_in_a_certificate(client):
    fun = lambda x: jnp.sum(jnp.sqrt(x))  # noqa: E731
    objective = client.register(fun, np.zeros(3))
    found = checked(objective)
    assert found.verdict == "failed"
    assert found.reason == ("NaN or infinity in gradient, products at the x of the registration: check it at another x")
    assert not objective.check(np.zeros(3)).passed
    assert checked(client.register(fun, np.ones(3))).verdict == "passed"


def test_a_failed_check_warns_each_client_once_at_the_users_line(serve):
    server = serve()
    x = np.linspace(0.5, 2.0, 6)
    with hvpd.connect(server.address) as client:
        objective = client.register(off, x, name="team/off")
        objective.watch._next = float("inf")  # The point does not ask.
        H = objective.at(x).hessian()
        checked(objective)
        with pytest.warns(hvpd.CurvatureWarning, match="objective team/off are wrong .* difference is") as caught:
            scipy.sparse.linalg.cg(H, x, maxiter=2)
        assert [each.filename for each in caught] == [__file__]
        assert "check=failed" in repr(client.objective("team/off"))
        client.objective("team/off").at(2 * x)  # No second warning.
    with hvpd.connect(server.address) as other, pytest.warns(hvpd.CurvatureWarning, match="difference"):
        other.objective("team/off").value(x)


def test_a_verdict_that_comes_late_warns_when_the_client_closes(serve):
    server = serve()
    x = np.linspace(0.5, 2.0, 6)
    with hvpd.connect(server.address) as client:
        objective = client.register(off, x)
        objective.watch._next = float("inf")  # Products do not ask.
        objective.value(x)
        checked(objective)
        with pytest.warns(hvpd.CurvatureWarning):
            client.close()


def test_a_restart_keeps_the_verdict(serve):
    server = serve()
    with hvpd.connect(server.address) as client:
        objectives = [client.register(fun, np.linspace(0.5, 2.0, 6)) for fun in (on, off)]
        before = [checked(objective) for objective in objectives]
        assert [found.verdict for found in before] == ["passed", "failed"]
        server.kill()
        server.start()
        assert [objective.registration_check() for objective in objectives] == before
        assert checked(client.register(off, np.linspace(0.5, 2.0, 6))) == before[1]
    assert server.metric("hvpd_registration_checks_total") == 0


def test_a_check_counts_for_no_tenant_and_leaves_no_point(serve):
    server = serve()
    with hvpd.connect(server.address) as client:
        assert checked(client.register(quadratic, np.ones(5), np.eye(5))).verdict == "passed"
    for name in ("products_total", "columns_total", "points_total", "launches_total"):
        assert server.metric(f"hvpd_{name}") == 0
    assert server.metric('hvpd_resident_bytes{kind="data"') == 5 * 5 * 8
    assert server.metric("hvpd_resident_bytes") == 5 * 5 * 8


@pytest.mark.parametrize(
    "mode", ["reverse_over_forward", "reverse_over_reverse", "linearized", "finite_difference", "auto"]
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_every_mode(client, mode, dtype):
    A = np.random.default_rng(0).normal(size=(8, 8)).astype(dtype)
    fun = lambda x, A: jnp.sum(jnp.cosh(A @ x / 4)) + jnp.sum(x**4)  # noqa: E731
    objective = client.register(fun, np.linspace(0.5, 2.0, 8, dtype=dtype), A, mode=mode)
    assert checked(objective).verdict == "passed", checked(objective)


def test_linearized_products_are_those_that_are_checked(serve):
    """If `apply` makes all products, no `hvp` is compiled for a check."""
    server = serve()
    with hvpd.connect(server.address) as client:
        objective = client.register(lambda x: jnp.sum(jnp.cosh(x)), np.ones(5), mode="linearized")
        assert checked(objective).verdict == "passed"
    assert server.metric("hvpd_compile_seconds_count") == 3  # value_and_grad, prepare, apply


def test_data_of_any_number_of_rows(client):
    X = np.random.default_rng(0).normal(size=(7, 3))
    objective = client.register(lambda x, X: jnp.mean(jnp.cosh(X @ x)), np.ones(3), X, any_rows=True)
    assert checked(objective).verdict == "passed"


def test_trees_and_half_precision(client):
    tree = {"h": jnp.ones(2, jnp.bfloat16), "f": [np.full(2, 0.5, np.float32), np.float32(2.0)]}
    fun = lambda t: jnp.sum(t["h"].astype(jnp.float32) ** 2) + jnp.sum(t["f"][0] ** 4) * t["f"][1] ** 2  # noqa: E731
    objective = client.register(fun, tree)
    found = checked(objective)
    assert found.verdict in ("passed", "undecided")  # bfloat16 sees little
    assert found.items[0].passed is True
    assert found.items[1].passed is not False


def test_an_exported_objective_brings_no_x(client):
    with jax.enable_x64(True):
        exported = jax.export.export(jax.jit(lambda x: (x**4).sum()))(np.zeros(3))
    objective = client.register_exported(exported.serialize(vjp_order=2))
    found = objective.registration_check()
    assert (found.verdict, found.items) == ("", ())
    assert "no x came with the registration" in found.reason
    assert listed(client, objective) == ""


def test_an_x_that_is_too_large_is_not_sent(serve):
    server = serve()
    with hvpd.connect(server.address) as client:
        objective = client.register(lambda x: jnp.sum(x**2), np.zeros((8 << 20) + 1))
        found = objective.registration_check()
    assert found.verdict == ""
    assert re.search(r"x of 64 MiB is not sent.*run objective\.check\(x\)", found.reason)
    assert not [
        path for path in (server.store / "blobs").rglob("*") if path.is_file() and path.stat().st_size > 1 << 20
    ]


def test_the_same_again_sends_and_checks_nothing(serve):
    server = serve()
    with hvpd.connect(server.address) as client:
        first = checked(client.register(quadratic, np.ones(5), np.eye(5)))
        stored = server.metric("hvpd_blobs_stored_total")
        assert checked(client.register(quadratic, np.ones(5), np.eye(5))) == first
    assert server.metric("hvpd_blobs_stored_total") == stored
    assert server.metric("hvpd_registration_checks_total") == 1


def test_a_server_that_has_no_room_for_x_registers_all_the_same(client, monkeypatch):
    upload = client._transport.upload
    x = np.linspace(0.5, 1.5, 1234)

    def full(digest, content, stage):
        if memoryview(content).nbytes == x.nbytes:
            raise hvpd.OverloadedError("the server's store has no room")
        upload(digest, content, stage)

    monkeypatch.setattr(client._transport, "upload", full)
    objective = client.register(lambda x: jnp.sum(x**2), x)
    assert objective.registration_check().verdict == ""
    assert objective.value(x) == pytest.approx(np.sum(x**2))


def test_the_command_line(serve, tmp_path, command):
    server = serve()
    source = tmp_path / "model.py"
    source.write_text(
        textwrap.dedent("""
        import jax.numpy as jnp, numpy as np
        def objective():
            return lambda x: jnp.sum(x**4), np.ones(3)
        """)
    )
    done = command("register", f"{source}:objective", "--name", "from/cli", "--address", server.address)
    assert re.search(r" forward_over_reverse check=(pending|passed)$", done.stdout.strip()), done
    with hvpd.connect(server.address) as client:
        assert checked(client.objective("from/cli")).verdict == "passed"
    lines = command("objectives", "--address", server.address).stdout.splitlines()
    column = lines[0].split().index("CHECK")
    assert "passed" in lines[1].split()[column : column + 2]  # DATA is two words
    as_json = json.loads(command("objectives", "--json", "--address", server.address).stdout)
    assert (as_json["check"], as_json["precision"]) == ("passed", "highest")
