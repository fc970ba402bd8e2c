"""The pages of the benchmarks: the texts of bench/README.md, and bench/results as plots
and tables.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plots

from bench import _report, _tables

_BENCH = Path(__file__).resolve().parents[2] / "bench"
_README = (_BENCH / "README.md").read_text()
_SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", _README, re.MULTILINE | re.DOTALL))

NAMES = tuple(name for name in _SECTIONS if (_BENCH / f"{name}.py").exists() or (_BENCH / name).is_dir())
"""The benchmarks, in the order of the README."""

_MOST_BARS = 40
"""Ratios of the largest plot. More are in the tables only."""

_LEGEND = (
    "The bars are ratios on a logarithmic axis. A line spans the quartiles of the rounds, and a ring is the prediction."
)
_NONE = "There are no figures yet. Absolute times come from accelerators only, and this benchmark has not run on one."


def pages() -> dict[str, str]:
    """Return the benchmarks' pages by their names on the site: what each one measures,
    then its figures.
    """
    figures = [
        (path.stem, figure) for path in sorted((_BENCH / "results").glob("*.jsonl")) for figure in _report.read(path)
    ]
    found = {}
    for name in NAMES:
        parts = [f"# {name}", _SECTIONS[name].strip()]
        of_bench = [(machine, figure) for machine, figure in figures if figure["bench"] == name]
        for machine in dict.fromkeys(machine for machine, _ in of_bench):
            parts += _machine(name, machine, [figure for of, figure in of_bench if of == machine])
        if not of_bench:
            parts += ["## Figures", _NONE]
        found[f"benchmarks/{name}.md"] = "\n\n".join(parts) + "\n"
    found["benchmarks/index.md"] = _index()
    return found


def _machine(name: str, machine: str, figures: list[dict[str, Any]]) -> list[str]:
    """Return the parts of a page for one machine."""
    parts = [f"## Figures: {machine}", _tables.origin(figures)]
    if any(map(_tables.is_absolute, figures)):
        parts.append(
            f"Times and rates of this CPU are left out here. They are in [the results](results/{machine}.jsonl)."
        )
    plotted = [figure for figure in figures if _is_plotted(figure)]
    groups = [[figure for figure in plotted if figure["n"] == n] for n in dict.fromkeys(f["n"] for f in plotted)]
    if len(plotted) <= _MOST_BARS:
        groups = [plotted]
    charts = [plots.chart(list(map(_bar, group))) for group in groups if 0 < len(group) <= _MOST_BARS]
    return [*parts, *([_LEGEND, *charts] if charts else []), _tables.markdown(name, figures, absolute=False)]


def _is_plotted(figure: Mapping[str, Any]) -> bool:
    """Return whether a figure is a ratio for a plot. Of the peers, only rates are."""
    if figure["bench"] == "peers" and not figure["figure"].endswith("products of hvpd over its"):
        return False
    return figure["unit"] == "" and bool(figure["value"]) and figure["value"] > 0


def _bar(figure: Mapping[str, Any]) -> plots.Bar:
    of = f", k = {figure['k']}" if figure["k"] else ""
    label = f"{figure['figure']}{of}"
    if figure["n"] and ":" not in figure["figure"]:
        label += f", n = {figure['n']:,}"
    return plots.Bar(label, figure["value"], tuple(figure["spread"] or [figure["value"]] * 2), figure["predicted"])


def _index() -> str:
    """Return the README without the texts of single benchmarks and without tables."""
    before, _, rest = _README.partition("## What each one says\n")
    after = "## Where" + rest.partition("## Where")[2].partition("## Results")[0]
    pages = "".join(f"- [{name}]({name}.md)\n" for name in NAMES)
    return f"{before}## The benchmarks\n\n{pages}\n{after}"
