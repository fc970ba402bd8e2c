"""The embedded server, and clients that never import jax."""

import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

import hvpd


def run(program, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | environment,
    )


def test_an_embedded_server_ends_with_its_client(tmp_path):
    import jax.numpy as jnp

    with hvpd.local(store=tmp_path) as client:
        assert client.address.startswith("127.0.0.1:")
        objective = client.register(lambda x: jnp.sum(x**4) / 12, np.zeros(3))
        assert np.array_equal(objective.hessp(np.arange(3.0), np.ones(3)), np.arange(3.0) ** 2)
        address = client.address
    with pytest.raises(hvpd.UnavailableError):
        hvpd.connect(address, connect_timeout=0.3)
    assert any((tmp_path / "objectives").iterdir())


def test_a_client_of_a_killed_embedded_server_says_so_at_once(tmp_path, monkeypatch):
    import jax.numpy as jnp

    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *given, **options: started.append(popen(*given, **options)) or started[-1]
    )
    with hvpd.local(store=tmp_path, retry_timeout=3600) as client:
        H = client.register(lambda x: jnp.sum(x**4), np.ones(3)).at(np.ones(3)).hessian()
        started[0].kill()
        with pytest.raises(
            hvpd.HvpdError, match=r"the embedded server ended \(signal 9\): call hvpd.local\(\) again"
        ) as caught:
            H @ np.ones(3)
        assert caught.value.reason == "SERVER_ENDED"


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(3)", "pass", "raise SystemExit(1)"])
def test_it_never_outlives_its_owner(end, tmp_path):
    program = f"""
        import os, hvpd
        client = hvpd.local()
        print(client.address, flush=True)
        {end}
    """
    done = run(program, TMPDIR=str(tmp_path))
    address = done.stdout.strip()
    assert address.startswith("127.0.0.1:"), done.stderr
    with pytest.raises(hvpd.UnavailableError):
        ends = time.monotonic() + 60
        while time.monotonic() < ends:  # a child that is ending may still answer for a moment
            hvpd.connect(address, connect_timeout=0.3).close()
    assert list(tmp_path.glob("hvpd-*")) == []


def test_a_server_that_cannot_start_says_why(tmp_path):
    with pytest.raises(hvpd.HvpdError, match=r"^hvpd serve: argument --max-block-width.*power of two, got '3'$"):
        hvpd.local(max_block_width=3)
    with pytest.raises(
        hvpd.InvalidArgumentError, match=r"^hvpd serve: argument --memory-budget: expected .*got 'lots'$"
    ):
        hvpd.local(memory_budget="lots")
    (tmp_path / "file").touch()
    with pytest.raises(hvpd.HvpdError, match=r"did not start:(.|\n)*cannot start"):
        hvpd.local(store=tmp_path / "file")


def test_solving_never_imports_jax(server, client):
    """A teammate finds the objective by name and solves. Any import of jax would
    fail.
    """
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    A = rng.normal(size=(30, 30))
    client.register(lambda p, A: 0.5 * p["x"] @ (A @ A.T + jnp.eye(30)) @ p["x"], {"x": np.zeros(30)}, A, name="no-jax")
    done = run(
        """
        import sys
        sys.modules["jax"] = None  # an import of jax, anywhere, is an ImportError
        import numpy as np, scipy.optimize, scipy.sparse.linalg, hvpd
        client = hvpd.connect(sys.argv[1])
        objective = client.objective("no-jax")
        H = objective.at({"x": np.ones(30)}).hessian(shift=1e-3)
        d, code = scipy.sparse.linalg.cg(H, -H.point.gradient, rtol=1e-10)
        assert code == 0 and np.allclose(H @ d, -H.point.gradient, rtol=1e-6)
        scipy.sparse.linalg.eigsh(H, 3)
        found = scipy.optimize.minimize(
            objective.value_and_grad, np.ones(30), jac=True, hessp=objective.hessp, method="trust-ncg"
        )
        assert np.allclose(found.x, 0, atol=1e-3)
        assert objective.unravel(found.x)["x"].shape == (30,)
        try:
            client.register(lambda x: x, np.ones(1))
        except hvpd.MissingExtraError as error:
            assert "pip install 'hvpd[jax]'" in str(error)
        assert not [name for name, module in sys.modules.items() if name.startswith("jax") and module is not None]
        print("solved")
        """,
        server.address,
    )
    assert done.stdout == "solved\n", done.stderr


def test_solving_leaves_jax_out_of_sys_modules(server, client):
    """jax could be imported here, and nothing imports it."""
    import jax.numpy as jnp

    client.register(lambda x: jnp.sum(x**4) / 12, np.zeros(3), name="light")
    program = """
        import sys, numpy as np, hvpd
        H = hvpd.connect(sys.argv[1]).objective("light").at(np.arange(3.0)).hessian()
        assert np.array_equal(H @ np.ones(3), [0, 1, 4])
        assert "jax" not in sys.modules and "jaxlib" not in sys.modules and "prometheus_client" not in sys.modules
        print("light")
    """
    done = run(program, server.address)
    assert done.stdout == "light\n", done.stderr


def test_importing_hvpd_imports_nothing_heavy():
    done = run(
        "import sys, hvpd; print(sorted({'grpc', 'jax', 'numpy', 'scipy', 'google'} & {n.split('.')[0] for n in sys.modules}))"
    )
    assert done.stdout == "[]\n", done.stderr


def test_the_address_comes_from_the_environment(server):
    done = run("import hvpd; print(hvpd.connect().address)", HVPD_ADDRESS=server.address)
    assert done.stdout.strip() == server.address, done.stderr


def test_serving_without_its_packages_names_the_extra():
    for missing in ("prometheus_client", "grpc_health"):
        program = f"import sys; sys.modules[{missing!r}] = None; from hvpd._cli.main import main; sys.exit(main(['serve', '--port', '0']))"
        done = run(program)
        assert done.returncode == 1
        assert "pip install 'hvpd[server]'" in done.stderr


def test_a_fork_of_the_owner_leaves_the_server_alone_and_its_client_says_so(tmp_path):
    done = run(
        """
        import os, sys, numpy as np, hvpd
        client = hvpd.local()
        child = os.fork()
        if child == 0:
            try:
                client.objectives()
            except hvpd.HvpdError as error:
                assert "before a fork" in str(error)
                sys.exit(7)  # an ordinary exit, with everything that runs at one
            sys.exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert client.objectives() == []
        print("alive")
        """,
        TMPDIR=str(tmp_path),
    )
    assert done.stdout == "alive\n", done.stderr
    assert list(tmp_path.glob("hvpd-*")) == []


def test_an_unknown_setting_lists_the_known_ones():
    with pytest.raises(
        hvpd.InvalidArgumentError, match=r"no setting nonsense; it has cache_size, compile_timeout, drain, host"
    ):
        hvpd.local(nonsense=1)
