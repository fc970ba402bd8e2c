"""Whole solves near and far: the solves are right in each place, and a run writes its
figures. No time is asserted.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hvpd
from bench import _delay, _report, solve
from bench._objectives import mlp

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def problem():
    return mlp((6, 5, 3), 20)


@pytest.fixture(scope="module")
def places(problem):
    with hvpd.local() as client:
        objective = client.register(problem.fun, problem.x, *problem.data)
        yield {"local": solve._Local(problem), "streamed": solve._Streamed(objective), "run": objective}


@pytest.mark.parametrize("name", [name for name in solve.SOLVES if "eigsh" not in name])
def test_a_solve_gives_the_same_in_each_place(name, places, problem):
    shift = 1.5 * solve._lowest(places["local"], problem.flat())
    found = {place: np.asarray(solve.SOLVES[name](each, problem.flat(), shift)) for place, each in places.items()}
    for place in ("streamed", "run"):
        assert np.allclose(found[place], found["local"], rtol=0.05, atol=0.03 * np.abs(found["local"]).max()), place


def test_the_largest_eigenvalues_are_the_same_in_each_place(places, problem):
    found = [solve.SOLVES[f"eigsh, top {solve.PAIRS}"](each, problem.flat(), 0.0) for each in places.values()]
    assert all(len(values) == solve.PAIRS for values in found)
    assert np.allclose(found[1:], found[0], rtol=0.03, atol=3e-3)


def test_streaming_is_one_product_at_a_time(places, problem):
    H = places["streamed"].at(problem.flat()).hessian()
    assert not isinstance(H, hvpd.CurvatureOperator)


def test_predictions_grow_with_the_distance_and_fall_with_the_rate():
    name = f"eigsh, top {solve.PAIRS}"
    near, far = (solve.predictions("6 k", name, solve.Link(seconds, 10.0)) for seconds in (0.001, 0.05))
    assert near["streamed"] < far["streamed"]
    assert far["run"] < far["streamed"]
    slow = solve.predictions("270 k", name, solve.Link(0.01, 0.1))
    assert slow["streamed"] > solve.predictions("270 k", name, solve.Link(0.01, 1.0))["streamed"]


def test_every_solve_has_a_prediction_and_every_link_a_name():
    assert solve._WORK.keys() == solve.SOLVES.keys()
    labels = [link.label for link in solve.LINKS]
    assert labels[0] == "loopback"
    assert {"1 ms, 10 Gb/s", "10 ms, 1 Gb/s", "10 ms, 100 Mb/s"} <= set(labels)
    assert len(set(labels)) == len(labels)


def test_a_link_lets_its_rate_through_for_all_connections_together():
    line = _delay.Line(1000.0)
    assert line.due(500, 10.0) == pytest.approx(10.5)
    assert line.due(500, 10.1) == pytest.approx(11.0)  # Waits for the piece before it.
    assert line.due(100, 20.0) == pytest.approx(20.1)
    assert _delay.Line(0.0).due(1 << 30, 7.0) == 7.0


@pytest.mark.slow
def test_a_quick_run_writes_its_figures(tmp_path):
    path = tmp_path / "solve.jsonl"
    argv = [sys.executable, "-m", "bench", "solve", "--quick", "--json", str(path)]
    done = subprocess.run(argv, cwd=_ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    figures = _report.read(path)
    names = {tuple(each["figure"].split(": ")[1:3]) for each in figures}
    assert names == {(name, link.label) for name in solve.QUICK for link in solve.LINKS[:2]}
    ratios = [each for each in figures if each["figure"].endswith("over local")]
    assert len(ratios) == 8
    assert all(each["value"] > 0 and each["predicted"] > 0 for each in ratios)
    sent = {each["figure"]: each["value"] for each in figures if each["figure"].endswith("bytes")}
    assert sent["6 k: CG: 1 ms, 10 Gb/s: streamed, bytes"] > 2 * sent["6 k: CG: 1 ms, 10 Gb/s: run, bytes"] > 2
