"""The comparison with other ways to serve a product: its parts, and a run with those
contenders that need no packages of their own. Nothing is installed here.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from bench import _report, peers
from bench._objectives import mlp
from bench.peers import _caller, _contender, _environments, _family, _kernel, _predictions, _run, _serve, _spec
from bench.peers._peer import NAMES, peer

_ROOT = Path(__file__).parents[2]
_SMALL = _spec.Spec("small", (6, 5, 3), 20)
_LIBRARIES = {"umbridge", "tesseract_core", "pytriton", "ray", "bentoml", "curvlinops", "torch", "jax", "grpc", "hvpd"}


@pytest.fixture
def problem():
    return mlp(_SMALL.sizes, _SMALL.rows)


def test_the_sizes_are_those_of_the_problems(problem):
    assert _SMALL.n == problem.n
    assert [spec.n for spec in _spec.SPECS.values()] == [6_160, 269_322, 1_863_690]


def test_importing_a_peer_imports_none_of_its_libraries():
    code = f"import sys\nfrom bench.peers._peer import NAMES, peer\nlist(map(peer, NAMES))\nprint(*({_LIBRARIES} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", NAMES)
def test_each_peer_has_the_interface_and_predictions_and_pinned_versions(name):
    about = peer(name).ABOUT
    assert callable(peer(name).serving)
    assert callable(peer(name).connect)
    for part in _spec.SPECS:
        assert name == "own" or len(_predictions.PREDICTED[part][name]) == len(_run.COUNTS)
    pins = Path(_environments.__file__).with_name(f"{name}.txt")
    assert pins.exists() == about.installed
    if about.installed:
        assert all("==" in line for line in pins.read_text().splitlines())


def test_every_contender_but_the_floors_is_own_or_a_peer():
    assert {peer(name).ABOUT.label for name in NAMES if peer(name).ABOUT.kind == "floor"} == {
        "bare gRPC handler",
        "bare gRPC echo, no product",
        "jax in process",
    }


def test_the_kernel_multiplies_blocks_and_single_vectors_alike(problem):
    kernel = _kernel.Kernel(_SMALL)
    V = np.stack([_spec.vector(_SMALL.n, seed) for seed in range(5)])
    rows = kernel.at(problem.flat())(V)
    assert rows.shape == V.shape
    for v, row in zip(V, rows, strict=True):
        assert np.allclose(kernel.multiply(problem.flat(), v), row, rtol=1e-5, atol=1e-6)
    step = 1e-2 * V[0] / np.linalg.norm(V[0])
    difference = kernel.gradient(problem.flat() + step) - kernel.gradient(problem.flat() - step)
    assert np.allclose(difference / 2, kernel.multiply(problem.flat(), step), rtol=0.05, atol=1e-5)


def test_curvlinops_has_the_same_order_of_parameters(problem, tmp_path):
    _spec.give(tmp_path, problem.flat(), *problem.data)
    multiply = peer("curvlinops").connect("-", _spec.given(tmp_path, _SMALL))
    V = np.stack([_spec.vector(_SMALL.n, seed) for seed in range(3)])
    assert np.allclose(multiply(V), _kernel.Kernel(_SMALL).at(problem.flat())(V), rtol=1e-4, atol=1e-6)


@pytest.fixture
def callers(problem, tmp_path, monkeypatch):
    _spec.give(tmp_path, problem.flat(), *problem.data)
    monkeypatch.setitem(_spec.SPECS, "small", _SMALL)
    with peer("bare_grpc").serving(_SMALL) as address:
        yield _caller.Callers("bare_grpc", address, _spec.given(tmp_path, _SMALL), tmp_path, 3, 0)


def test_callers_leave_the_checked_product_and_count_their_calls(callers, problem, tmp_path):
    callers.check()
    expected = _kernel.Kernel(_SMALL, most=1).multiply(problem.flat(), _spec.vector(_SMALL.n, _caller.CHECKED))
    assert np.allclose(np.load(tmp_path / "bare_grpc.npy"), expected, rtol=1e-5, atol=1e-6)
    found = callers.time(3, 0.0)
    assert len(found["seconds"]) == 3
    assert found["rate"] > 0
    assert callers.once()["seconds"] > 0


def test_a_block_in_process_is_one_call_of_many_products(problem, tmp_path):
    _spec.give(tmp_path, problem.flat(), *problem.data)
    callers = _caller.Callers("in_process", "-", _spec.given(tmp_path, _SMALL), tmp_path, 4, 0)
    found = callers.time(4, 0.0)
    assert len(found["seconds"]) == 1
    assert found["rate"] >= 4 / (1.5 * found["seconds"][0])


def test_the_run_and_the_callers_check_the_same_vector():
    assert _run.CHECKED == _caller.CHECKED


def test_a_family_counts_and_ends_its_members():
    code = "import subprocess, sys; subprocess.Popen(['sleep', '1000']); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline()
        family = _family.members(parent.pid)
        assert family[0].pid == parent.pid
        assert len(family) == 2
        assert _family.used_bytes(parent.pid) > 1 << 20
        parent.stdin.close()
        parent.wait(30)  # The child outlives it.
        assert _family.members(family[1].pid) == [family[1]]
        _family.end(family)
    assert _family.members(family[1].pid) == []


def test_a_process_that_got_the_number_of_an_ended_one_is_left_alone():
    with subprocess.Popen(["sleep", "1000"]) as other:
        _family.end([_family.Member(other.pid, "1")])
        assert other.poll() is None
        other.kill()


def test_a_failed_command_gives_its_last_error():
    assert _environments.reason("Collecting x\nERROR: no version of x\n\n") == "ERROR: no version of x"
    assert _environments.reason("one\ntwo\n") == "two"
    assert _environments.reason("") == "no output"


def test_a_peer_that_cannot_be_installed_is_named_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "absent.txt").write_text("")
    monkeypatch.setattr(_environments, "_FOLDER", tmp_path)
    monkeypatch.setattr(_environments.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho 'ERROR: no such interpreter' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(_environments.NotInstalledError, match=r"^ERROR: no such interpreter$"):
        _environments.python("absent", folder=tmp_path)


def test_an_environment_that_has_the_pinned_versions_is_used_again(tmp_path, monkeypatch):
    (tmp_path / "there.txt").write_text("x==1\n")
    monkeypatch.setattr(_environments, "_FOLDER", tmp_path)
    calls = []

    def done(argv):
        calls.append(argv)
        (tmp_path / "there").mkdir(exist_ok=True)

    monkeypatch.setattr(_environments, "_done", done)
    for _ in range(2):
        assert _environments.python("there", folder=tmp_path) == tmp_path / "there/bin/python"
    assert len(calls) == 2  # venv and pip, once.
    (tmp_path / "there.txt").write_text("x==2\n")
    _environments.python("there", folder=tmp_path)
    assert len(calls) == 4


def test_the_installations_are_a_part_of_their_own(monkeypatch, capsys):
    asked = []

    def python(name, *, system=False):
        asked.append((name, system))
        if name == "bento":
            raise _environments.NotInstalledError("ERROR: no wheel")

    monkeypatch.setattr(_environments, "python", python)
    assert list(peers.run(quick=False, part="install")) == []
    assert asked == [(name, name == "triton") for name in NAMES if peer(name).ABOUT.installed]
    said = capsys.readouterr().err
    assert "peers: BentoML: not installed: ERROR: no wheel\n" in said
    assert "peers: Ray Serve: installed\n" in said


def test_a_wrong_product_is_refused(tmp_path, monkeypatch):
    contender = _contender.Contender("bare_grpc", "-", None, [None])
    monkeypatch.setattr(_contender, "_asked", lambda child, **order: {})
    np.save(tmp_path / "bare_grpc.npy", np.ones(3, np.float32))
    contender.check(tmp_path, np.ones(3, np.float32))
    with pytest.raises(_contender.FailedError, match="its product is wrong: the relative error is"):
        contender.check(tmp_path, np.array([1, 1, 1.01], np.float32))
    with pytest.raises(_contender.FailedError, match="wrong"):
        contender.check(tmp_path, np.ones(4, np.float32))


class Fake:
    """A contender without processes. Its products take so many seconds."""

    def __init__(self, seconds, *, fails_after=99):
        self.about = peer("bare_grpc").ABOUT
        self.seconds, self.left = seconds, fails_after
        self.calls = 0

    def once(self):
        return self.seconds

    def time(self, count, seconds):
        self.left -= 1
        if self.left < 0:
            raise _contender.FailedError("its callers ended: gone")
        self.calls += 1
        return count / self.seconds, np.full(count, self.seconds)


def test_slow_contenders_get_fewer_rounds_and_the_slowest_none():
    quick, slow, slowest = Fake(0.01), Fake(0.4), Fake(2.5)
    rounds, failed = _run._rounds({"own": quick, "bare_grpc": slow, "echo": slowest}, 16, quick=False)
    assert len(rounds["own"]) == _run._ROUNDS
    assert [each.number for each in rounds["bare_grpc"]] == [0]
    assert failed == {"echo": "a product takes 2.5 s, so 16 callers would take 40 s"}
    assert slowest.calls == 0


def test_a_contender_that_ends_is_named_and_the_others_go_on():
    rounds, failed = _run._rounds({"own": Fake(0.01), "echo": Fake(0.01, fails_after=2)}, 1, quick=False)
    assert failed == {"echo": "its callers ended: gone"}
    assert len(rounds["own"]) == _run._ROUNDS


def test_the_server_process_serves_until_its_input_ends(monkeypatch):
    monkeypatch.setitem(_spec.SPECS, "small", _SMALL)
    monkeypatch.setattr(sys, "argv", ["_serve", "echo", "small"])
    monkeypatch.setattr(_serve.signal, "signal", lambda *_: None)
    reading, writing = os.pipe()
    with os.fdopen(reading) as orders:
        monkeypatch.setattr(sys, "stdin", orders)
        serving = threading.Thread(target=_serve.main)
        serving.start()
        os.close(writing)
        serving.join(120)
        assert not serving.is_alive()


@pytest.mark.slow
def test_a_quick_run_measures_what_needs_no_packages_and_names_the_rest(tmp_path):
    path = tmp_path / "peers.jsonl"
    argv = [sys.executable, "-m", "bench", "peers", "--quick", "--json", str(path)]
    done = subprocess.run(argv, cwd=_ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    figures = _report.read(path)
    measured = {each["figure"].split(": ")[1] for each in figures if each["value"] is not None}
    assert measured == {peer(name).ABOUT.label for name in NAMES if not peer(name).ABOUT.installed}
    left_out = {each["figure"].split(": ")[1]: each["note"] for each in figures if each["value"] is None}
    assert left_out.keys() == {peer(name).ABOUT.label for name in NAMES if peer(name).ABOUT.installed}
    assert set(left_out.values()) == {"skipped: needs an environment of its own, which --quick does not make"}
    sizes = {each["figure"]: each["value"] for each in figures if "bytes" in each["figure"]}
    assert sizes["6 k: bare gRPC handler: bytes on the wire, over those of v and Hv"] == pytest.approx(1, abs=0.05)
    assert json.loads(path.read_text().splitlines()[0])["bench"] == "peers"
