"""Tables and plots of the benchmarks' pages."""

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench import _tables
from bench._report import Goal, measured, skipped

_SITE = Path(__file__).parents[2] / "docs/_site"
_MACHINE = {"device": "cpu", "cores": 2, "jax": "0.10", "grpcio": "1.85", "hvpd": "0.1", "date": "2026-11-30"}
_GPU = _MACHINE | {"device": "NVIDIA H200"}


@pytest.fixture
def site(monkeypatch):
    monkeypatch.syspath_prepend(str(_SITE))
    import benchmarks
    import plots

    yield benchmarks, plots
    for name in ("benchmarks", "plots"):
        sys.modules.pop(name, None)


def _rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_absolute_times_of_a_cpu_are_left_out_of_the_site_only():
    times = [measured("b", "one product", "ms", [1.5]), measured("b", "over floor", "", [1.2])]
    for machine, left in ((_MACHINE, {"over floor"}), (_GPU, {"one product", "over floor"})):
        figures = [each.to_json(machine) for each in times]
        assert {row[0] for row in _rows(_tables.markdown("b", figures, absolute=False))[2:]} == left
        assert len(_rows(_tables.markdown("b", figures, absolute=True))) == 4


def test_a_machine_is_named_with_its_day():
    assert _tables.origin([_MACHINE]) == "On cpu, 2 cores, jax 0.10, grpcio 1.85, hvpd 0.1, 2026-11-30."
    older = {name: value for name, value in _MACHINE.items() if name != "date"}
    assert _tables.origin([older, older]) == "On cpu, 2 cores, jax 0.10, grpcio 1.85, hvpd 0.1."


def _peers():
    facts = {"n": 6160, "k": 16}
    return [
        measured("peers", "6 k: hvpd: products", "/s", [1000.0], **facts),
        measured("peers", "6 k: hvpd: memory of the server", "MiB", [300.0], **facts),
        measured(
            "peers",
            "6 k: Ray Serve: products of hvpd over its",
            "",
            [2.5],
            predicted=3.5,
            goal=Goal(">=", 3.0),
            **facts,
        ),
        measured("peers", "6 k: Ray Serve: products", "/s", [400.0], note="x sent with every vector", **facts),
        skipped("peers", "6 k: PyTriton: products", "/s", "not installed: no wheel", **facts),
    ]


def test_peers_have_a_row_each_and_losses_are_shown():
    text = _tables.markdown("peers", [each.to_json(_MACHINE) for each in _peers()], absolute=False)
    rows = _rows(text)
    assert "**n = 6,160, 16 callers**" in text
    assert [row[0] for row in rows[2:]] == ["hvpd", "Ray Serve", "PyTriton"]
    assert rows[3][1] == "2.5 (predicted 3.5), goal >= 3 MISSED"
    assert "- PyTriton: skipped: not installed: no wheel." in text
    assert "- Ray Serve: x sent with every vector." in text
    assert "400" not in text
    assert "400" in _tables.markdown("peers", [each.to_json(_MACHINE) for each in _peers()], absolute=True)


def test_solves_have_a_column_for_each_link_and_the_farthest_good_one():
    figures = []
    for link, ratio in (("loopback", 1.1), ("10 ms, 1 Gb/s", 1.9), ("50 ms, 1 Gb/s", 4.0)):
        start = f"6 k: CG, 16 right-hand sides: {link}"
        figures += [
            measured("solve", f"{start}: run over local", "", [ratio], n=6160, predicted=2.0),
            measured("solve", f"{start}: streamed over local", "", [3 * ratio], n=6160, predicted=2.0),
            measured("solve", f"{start}: local", "s", [0.25], n=6160),
        ]
    found = [each.to_json(_MACHINE) for each in figures]
    rows = _rows(_tables.markdown("solve", found, absolute=False))
    assert rows[0][2:] == ["loopback", "10 ms, 1 Gb/s", "50 ms, 1 Gb/s", "below 2 times up to"]
    assert rows[2] == ["CG, 16 right-hand sides", "run", "1.1 (2)", "1.9 (2)", "4 (2)", "10 ms, 1 Gb/s"]
    assert rows[3][-1] == "nowhere"
    assert _rows(_tables.markdown("solve", found, absolute=True))[2][-1] == "0.25"


def test_a_plot_has_a_bar_for_each_ratio_on_a_logarithmic_axis(site):
    _, plots = site
    chart = ET.fromstring(
        plots.chart([plots.Bar("a < b", 10.0, (8.0, 12.0), 20.0), plots.Bar("below one", 0.1, (0.1, 0.1), None)])
    )
    boxes = [(float(each.get("x")), float(each.get("width"))) for each in chart.iter("rect")]
    texts = [each.text for each in chart.iter("text")]
    assert {"a < b", "below one", "0.1", "1", "10", "100"} <= set(texts)
    assert len(list(chart.iter("circle"))) == 1
    assert {"10", "0.1"} <= {each.text for each in chart.iter("text") if float(each.get("x")) > 600}  # The values.
    (above, wide), (below, narrow) = boxes
    assert below + narrow == pytest.approx(above, abs=0.2)  # Both begin at 1.
    assert wide == pytest.approx(narrow, abs=0.2)  # A factor of 10 each.


def test_each_benchmark_of_the_readme_has_a_page(site):
    benchmarks, _ = site
    pages = benchmarks.pages()
    assert {"benchmarks/peers.md", "benchmarks/solve.md", "benchmarks/gpu.md"} <= pages.keys()
    assert "There are no figures yet." in pages["benchmarks/gpu.md"]
    assert re.search(r"^On cpu, 2 cores", pages["benchmarks/latency.md"], re.MULTILINE)
    assert "<svg" in pages["benchmarks/latency.md"]
    assert not re.search(r"\| ms +\|", pages["benchmarks/latency.md"])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1.0, 1.0, [1, 2]),
        (0.93, 1.9, [0.5, 1, 2]),
        (1.0, 25.0, [1, 2, 5, 10, 20, 50]),
        (0.3, 250.0, [0.1, 1, 10, 100, 1000]),
    ],
)
def test_the_axis_spans_all_numbers_with_round_marks(site, low, high, ticks):
    _, plots = site
    assert plots._ticks(low, high) == pytest.approx(ticks)
