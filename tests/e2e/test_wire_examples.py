"""The examples that know proto/ only, against closed forms: Python without hvpd, and
Node.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "wire"
PROTO = EXAMPLES.parents[1] / "proto"
N = 200_000
"""Elements of the large x: it does not fit into the first message."""


def chain(x):
    """f(x) = sum(x^4) / 12 + sum of (x[i+1] - x[i])^2 / 2."""
    return jnp.sum(x**4) / 12 + jnp.sum(jnp.diff(x) ** 2) / 2


@pytest.fixture(scope="module")
def expected(client):
    """Return what the examples must print for each name."""
    found = {}
    for name, n in (("wire/small", 6), ("wire/large", N)):
        client.register(chain, np.zeros(n), name=name)
        x = 1 / np.arange(1, n + 1)
        ones = np.ones(n)
        difference = np.diff(x)
        gradient = x**3 / 3
        gradient[1:] += difference
        gradient[:-1] -= difference
        product = x**2  # Differences of ones are zero.
        found[name] = {
            "n": n,
            "value": np.sum(x**4) / 12 + difference @ difference / 2,
            "gradient": np.linalg.norm(gradient),
            "product": np.linalg.norm(product * ones),
            "streamed": np.linalg.norm(product * ones),
        }
    n = 6
    D = np.diff(np.eye(n), axis=0)
    found["wire/small"]["largest"] = np.linalg.eigvalsh(np.diag(1 / np.arange(1, n + 1) ** 2) + D.T @ D)[-1]
    return found


def check(lines, expected):
    printed = {name: float(value) for name, value in (line.split() for line in lines)}
    assert printed.keys() >= expected.keys()
    for name, value in expected.items():
        assert printed[name] == pytest.approx(value, rel=1e-10)


def test_an_address_without_a_name_is_answered_by_the_usage():
    run = subprocess.run(
        [sys.executable, EXAMPLES / "lanczos.py", "localhost:7070"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr == "usage: python examples/wire/lanczos.py HOST:PORT NAME\n"


@pytest.mark.parametrize("name", ["wire/small", "wire/large"])
def test_python_without_hvpd(server, expected, name, tmp_path):
    # hvpd itself is taken off the path. The stubs of proto/hvpd/v1 have its name.
    code = (
        "import os, runpy, sys; sys.path[:] = [p for p in sys.path if not os.path.exists(os.path.join(p, 'hvpd', '_wire'))]; "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "import hvpd; assert not hasattr(hvpd, '__version__')"
    )
    command = [sys.executable, "-c", code, str(EXAMPLES / "lanczos.py"), server.address, name]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    check(run.stdout.splitlines(), expected[name])


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """Return the folder of the example for Node, with its packages."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    for file in (EXAMPLES / "node").glob("*.js*"):
        shutil.copy(file, folder)
    command = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--prefer-offline"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    if run.returncode:
        pytest.skip(f"npm cannot install the packages: {run.stderr[-200:]}")
    return folder


@pytest.mark.parametrize("name", ["wire/small", "wire/large"])
def test_node(server, expected, node, name):
    command = ["node", "lanczos.js", server.address, name]
    environment = os.environ | {"PROTO": str(PROTO)}
    run = subprocess.run(command, cwd=node, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    check(run.stdout.splitlines(), expected[name])


def test_an_unknown_name_is_told(server, node):
    run = subprocess.run(
        ["node", "lanczos.js", server.address, "wire/none"],
        cwd=node,
        env=os.environ | {"PROTO": str(PROTO)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1
    assert "wire/none" in run.stderr
