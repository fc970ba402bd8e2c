"""The figures' arithmetic and their table, and a run of each benchmark. No time is
asserted.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bench import __main__, _floor, _report, _timing, coalescing, modes
from bench._report import Figure, Goal, measured

_ROOT = Path(__file__).parents[2]
_ENVIRONMENT = {"device": "cpu", "cores": 2, "jax": "0.10", "grpcio": "1.85", "hvpd": "0.1", "date": "2026-11-30"}
_FIELDS = {
    *("bench", "figure", "value", "unit", "n", "k", "predicted", "goal", "met"),
    *("device", "cores", "jax", "grpcio", "hvpd", "date", "repeats", "spread", "note"),
}


def test_the_floor_adds_the_times_of_wire_and_device():
    assert _report.floor_rate(4800, 2750) == pytest.approx(1748.3, abs=0.1)  # DESIGN section 6, logistic regression.
    assert _report.floor_rate(703, 269) == pytest.approx(194.6, abs=0.1)  # DESIGN section 6, MLP.
    assert _report.floor_rate(1e30, 100) == pytest.approx(100)


def test_a_figure_is_the_median_of_its_rounds_with_their_quartiles():
    figure = measured("b", "f", "ms", [5.0, 1.0, 2.0, 4.0, 3.0], n=7)
    assert (figure.value, figure.spread, figure.repeats, figure.n) == (3.0, (2.0, 4.0), 5, 7)


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        (Goal("<=", 1.1), 1.1, True),
        (Goal("<=", 1.1), 1.2, False),
        (Goal(">=", 0.8), 0.8, True),
        (Goal(">=", 0.8), 0.7, False),
    ],
)
def test_goals_have_a_direction(goal, value, met):
    assert measured("b", "f", "", [value], goal=goal).to_json({})["met"] is met


def test_a_skipped_figure_has_neither_value_nor_verdict():
    found = _report.skipped("b", "f", "", "no room", goal=Goal("<=", 1.0)).to_json(_ENVIRONMENT)
    assert (found["value"], found["met"], found["note"]) == (None, None, "skipped: no room")
    assert "no room" in _report.table([found])


def test_json_has_every_field_and_comes_back(tmp_path):
    found = measured("b", "f", "ms", [1.0, 2.0], n=3, k=1, predicted=1.2, goal=Goal("<=", 1.6)).to_json(_ENVIRONMENT)
    assert found.keys() == _FIELDS
    _report.write(tmp_path / "r.jsonl", "b", [found])
    assert _report.read(tmp_path / "r.jsonl") == [json.loads(json.dumps(found))]


def test_a_run_replaces_the_figures_of_the_same_benchmark(tmp_path):
    path = tmp_path / "r.jsonl"
    for bench, value in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        _report.write(path, bench, [Figure(bench, "f", value, "").to_json(_ENVIRONMENT)])
    assert [(figure["bench"], figure["value"]) for figure in _report.read(path)] == [("b", 2.0), ("a", 3.0)]


def test_the_table_has_a_row_for_each_figure_in_columns():
    rows = [
        measured("b", "first", "ms", [0.12345], n=270_000, k=1, predicted=0.1, goal=Goal("<=", 1.0)).to_json({}),
        measured("b", "second one", "/s", [12345.0], goal=Goal(">=", 1e6)).to_json({}),
    ]
    head, rule, first, second = _report.table(rows).splitlines()
    assert set(rule) == {"-", " "}
    assert first.split() == ["first", "270,000", "1", "0.1", "0.123", "0.123", "to", "0.123", "ms", "<=", "1", "met"]
    assert second.endswith(">= 1e+06 MISSED")
    assert "12,345" in second
    assert head.index("unit") == first.index("ms") == second.index("/s")
    assert all(line.count("|") == 9 for line in _report.table(rows, markdown=True).splitlines())


def test_results_are_rendered_by_file_and_benchmark(tmp_path):
    for bench in ("latency", "growth"):
        _report.write(tmp_path / "cpu-2core.jsonl", bench, [Figure(bench, "f", 1.0, "ms").to_json(_ENVIRONMENT)])
    rendered = _report.render(tmp_path)
    places = [rendered.index(part) for part in ("### cpu-2core", "#### latency", "On cpu, 2 cores", "#### growth")]
    assert places == sorted(places)


def test_contenders_take_turns_and_each_round_begins_with_another():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    found = _timing.interleave(contenders, rounds=3, seconds=0.0)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"  # Each is called beforehand, too.
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3, "c": 3}


def test_callers_call_at_the_same_time_and_wait_for_two_answers_each():
    together = threading.Barrier(3)  # Passes only while all three call.
    answers = []
    assert _timing.rate([lambda: answers.append(together.wait(30))] * 3, seconds=0.0) > 0
    assert len(answers) == 6


def test_a_block_is_predicted_to_share_the_work_without_its_vectors():
    assert modes.predicted_flops("MLP", "hvp", 1) == pytest.approx(2.1)
    assert modes.predicted_flops("MLP", "hvp", 16) == pytest.approx(0.6 + 16 * 1.5)
    assert modes.predicted_flops("MLP", "prepare", 1) == 1.0


def test_one_caller_is_predicted_as_fast_as_itself():
    for bound in ("memory-bound", "compute-bound"):
        assert coalescing.predictions(bound, 1)["over one caller"] == 1.0
        assert coalescing.predictions(bound, 16)["over floor"] < 1.0


@pytest.mark.parametrize("size", [1, 1000, (3 << 20) + 17])
def test_echoes_bring_everything_back(size):
    payload = os.urandom(size)
    with _floor.echoing() as echo, _floor.channel(echo.address) as channel:
        _floor.UnaryEcho(channel, payload)()
        for whole in (False, True):
            stream = _floor.StreamEcho(channel, payload, whole=whole)
            stream()
            stream()
            stream.close()
        for address in (echo.tcp, echo.unix):
            plain = _floor.SocketEcho(address, payload)
            plain()
            plain.close()


def test_a_part_keeps_the_figures_of_the_other_parts(tmp_path):
    path = tmp_path / "r.jsonl"

    def figure(bench, name, value):
        return measured(bench, name, "ms", [value]).to_json({})

    _report.write(path, "b", [figure("b", "first", 1.0), figure("b", "second", 2.0)])
    _report.write(path, "c", [figure("c", "first", 3.0)])
    _report.write(path, "b", [figure("b", "second", 4.0)], part=True)
    assert {(each["bench"], each["figure"]): each["value"] for each in _report.read(path)} == {
        ("b", "first"): 1.0,
        ("b", "second"): 4.0,
        ("c", "first"): 3.0,
    }
    _report.write(path, "b", [figure("b", "third", 5.0)])
    assert [each["figure"] for each in _report.read(path)] == ["first", "third"]


@pytest.mark.parametrize(
    ("name", "says"),
    [("krylov", "krylov has 6 k, 270 k, 1.9 M, got 'all'"), ("latency", "latency has no parts, got 'all'")],
)
def test_a_part_that_there_is_not_is_refused(name, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", name, "--part", "all"])
    with pytest.raises(SystemExit):
        __main__.main()
    assert says in capsys.readouterr().err


def test_a_quick_run_writes_its_figures(tmp_path):
    path = tmp_path / "latency.jsonl"
    argv = [sys.executable, "-m", "bench", "latency", "--quick", "--json", str(path)]
    done = subprocess.run(argv, cwd=_ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    figures = _report.read(path)
    assert [figure["figure"].split(" (")[0] for figure in figures] == [
        *(
            "product over floor",
            "product by gRPC over floor",
            "bare handler over floor",
            "product over socket and program",
        ),
        *("product", "stream echo", "in process", "unary echo", "socket echo"),
    ]
    for figure in figures:
        assert figure.keys() == _FIELDS
        assert figure["value"] > 0
        assert figure["predicted"] > 0
        assert figure["spread"][0] <= figure["value"] <= figure["spread"][1]
        assert figure["figure"] in done.stdout


def test_an_interrupted_run_leaves_no_process_behind():
    argv = [sys.executable, "-m", "bench", "growth", "--quick"]
    with subprocess.Popen(argv, cwd=_ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as running:
        assert running.stderr is not None
        assert running.stderr.readline().startswith("growth: 1 objective")
        children = _children(running.pid)
        running.send_signal(signal.SIGINT)
        running.stderr.read()
        assert running.wait(120) == 130
    assert len(children) == 2
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def _children(pid):
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]
