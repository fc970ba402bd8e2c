"""`hvpd spectrum`, `eigsh` and `solve`."""

import json
import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from hvpd._cli import krylov, main

VALUES = np.linspace(-1.0, 20.0, 60)


@pytest.fixture(scope="module")
def objective(client):
    return client.register(lambda x, d: jnp.sum(d * x**2) / 2 + x.sum(), np.zeros(60), VALUES, name="krylov/commands")


@pytest.fixture
def command(client, objective, monkeypatch, capsys):
    monkeypatch.setenv("HVPD_ADDRESS", client.address)

    def run(*arguments):
        code = main.main([arguments[0], objective.name, *arguments[1:]])
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run


def test_spectrum_as_text_picture_and_file(command, tmp_path):
    done = command(
        "spectrum", "--probes", "4", "--steps", "30", "--png", f"{tmp_path}/a.png", "--save", f"{tmp_path}/a.npz"
    )
    assert done.returncode == 0, done.stderr
    first, second, third, *rows, last = done.stdout.splitlines()
    assert third == "bars are logarithmic; none below half an eigenvalue"
    assert re.search(r"right to [\d.]+ percentage points by the probes .*, and to [\d.]+ by the steps", second)
    assert last == "at a standard normal x, seed 0; --x FILE.npy for another"
    assert first.startswith("hessian of krylov/commands: 60 eigenvalues from -1 to 20, ")
    assert second.startswith("120 products; ")
    assert len(rows) == 20
    shares = [float(re.search(r"([\d.]+) %", row)[1]) for row in rows]
    assert abs(sum(shares) - 100) < 0.2
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    loaded = hvpd.krylov.load(tmp_path / "a.npz")
    assert (loaded.n, loaded.program) == (60, "hessian")


def test_eigsh(command):
    done = command("eigsh", "-k", "3", "--which", "SA", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert np.allclose(found["values"], VALUES[:3], rtol=1e-10)
    text = command("eigsh", "-k", "2", "--which", "LA", "--shift", "1.5").stdout.splitlines()
    assert float(text[1].split()[0]) == pytest.approx(21.5)
    assert "products; " in text[2]
    assert found["point"] == text[3].removeprefix("at ")
    assert found["file"] is None
    assert len(json.loads(command("eigsh", "--json").stdout)["values"]) == 6


def test_eigsh_shows_what_has_not_converged(command, tmp_path):
    failed = command("eigsh", "--maxiter", "1", "--save", f"{tmp_path}/pairs")
    assert failed.returncode == 3
    assert failed.stderr == ""
    *rows, summary, _ = failed.stdout.splitlines()
    assert len(rows) == 6
    assert any(row.endswith(", not converged") for row in rows)
    assert summary.endswith("allow more by --maxiter, or a larger residual by --tol")
    assert len(hvpd.krylov.load(tmp_path / "pairs.npz").values) == 6
    found = json.loads(command("eigsh", "--maxiter", "1", "--json", "--save", f"{tmp_path}/pairs").stdout)
    assert found["file"] == f"{tmp_path}/pairs.npz"
    assert not all(found["converged"])


def test_eigsh_of_few_parameters(client, command, monkeypatch):
    few = client.register(lambda x, d: jnp.sum(d * x**2) / 2, np.zeros(3), VALUES[:3], name="krylov/few")
    assert main.main(["eigsh", few.name]) == 0
    assert len(few.at(np.zeros(3)).hessian().eigsh().values) == 3


def test_progress_goes_to_stderr(command, monkeypatch, capsys):
    asked = []
    connect = krylov.connect
    monkeypatch.setattr(krylov, "connect", lambda *arguments, progress: asked.append(progress) or connect(*arguments))
    assert command("eigsh", "-k", "1").returncode == 0
    assert command("eigsh", "-k", "1", "--progress").returncode == 0
    bars, lines = asked
    assert bars is None  # Those of a terminal.
    lines(hvpd.Progress("eigsh of a, residual 2.0e-03", 35, None, "steps", 3.2, False))
    assert capsys.readouterr().err == "hvpd: eigsh of a, residual 2.0e-03: 35 steps, 3 s\n"
    lines(hvpd.Progress("eigsh of a, residual 2.0e-03", 36, None, "steps", 3.4, False))
    assert capsys.readouterr().err == ""  # A line each second.
    lines(hvpd.Progress("spectrum of a", 37, None, "steps", 4.1, False))
    lines(hvpd.Progress("spectrum of a", 38, None, "steps", 4.2, True))
    assert capsys.readouterr().err == "hvpd: spectrum of a: 37 steps, 4 s\nhvpd: spectrum of a: 38 steps, 4 s\n"


def test_solve(command, tmp_path):
    np.save(tmp_path / "x.npy", np.ones(60))
    np.save(tmp_path / "b.npy", VALUES + 2)
    done = command("solve", "--shift", "2", "--x", f"{tmp_path}/x.npy", "--tol", "1e-10", "--save", f"{tmp_path}/s.npz")
    assert done.returncode == 0, done.stderr
    assert "all residuals are within the tolerance" in done.stdout
    assert done.stdout.splitlines()[-2:] == [f"the solution is in {tmp_path}/s.npz", f"at x of {tmp_path}/x.npy"]
    assert "--save FILE.npz writes the solution" in command("solve", "--shift", "2").stdout
    assert np.allclose(hvpd.krylov.load(tmp_path / "s.npz").x, -(VALUES + 1) / (VALUES + 2))
    other = command("solve", "--shift", "2", "--b", f"{tmp_path}/b.npy", "--json")
    assert json.loads(other.stdout)["converged"] is True
    indefinite = command("solve", "--json")
    assert indefinite.returncode == 3
    assert json.loads(indefinite.stdout)["curvature"] < 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["solve", "--x", "/nowhere.npy"], "cannot read /nowhere.npy"),
        (["solve", "--tol", "-1"], "tol must be at least 0"),
        (["eigsh", "-k", "61"], "k must be an integer from 1 to 60"),
        (["spectrum", "--probes", "1"], "probes must be an integer of at least 2"),
        (["spectrum", "--seed", "-1"], "--seed must be from 0"),
        (["spectrum", "--operator", "ggn"], "was registered without ggn"),
        (["spectrum", "--steps", "5", "--png", "/nowhere/a.png"], "cannot write /nowhere/a.png"),
    ],
)
def test_wrong_arguments_are_one_line(command, arguments, says):
    done = command(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("hvpd: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
