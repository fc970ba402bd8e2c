"""Figures with their predictions and goals, as a table for people and as JSON lines for
machines. This module measures nothing.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True)
class Goal:
    """The range in which a figure has to be."""

    sense: Literal["<=", ">="]
    bound: float

    def met(self, value: float) -> bool:
        """Return whether a figure is in the range."""
        return value <= self.bound if self.sense == "<=" else value >= self.bound

    def __str__(self) -> str:
        return f"{self.sense} {self.bound:g}"


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number."""

    bench: str
    figure: str
    """The figure's description."""
    value: float | None
    """The median of its repeats. None if it was not measured; `note` then gives the
    reason.
    """
    unit: str
    """The unit; empty for ratios."""
    n: int | None = None
    """Elements of x."""
    k: int | None = None
    """Vectors of a block, or callers."""
    predicted: float | None = None
    """The value that was predicted before the first measurement."""
    goal: Goal | None = None
    repeats: int = 0
    """Number of rounds of the median."""
    spread: tuple[float, float] | None = None
    """First and third quartile of the rounds."""
    note: str = ""

    def to_json(self, environment: Mapping[str, Any]) -> dict[str, Any]:
        """Return the figure as one JSON object, with the environment of its run."""
        met = None if self.goal is None or self.value is None else self.goal.met(self.value)
        goal = None if self.goal is None else str(self.goal)
        return dataclasses.asdict(self) | {"goal": goal, "met": met} | dict(environment)


def measured(bench: str, figure: str, unit: str, rounds: npt.ArrayLike, **facts: Any) -> Figure:
    """Return a figure of one number a round: their median, with their quartiles as its
    spread.
    """
    values = np.asarray(rounds, float)
    low, middle, high = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return Figure(bench, figure, middle, unit, repeats=len(values), spread=(low, high), **facts)


def skipped(bench: str, figure: str, unit: str, why: str, **facts: Any) -> Figure:
    """Return a figure that could not be measured."""
    return Figure(bench, figure, None, unit, note=f"skipped: {why}", **facts)


def floor_rate(echoes: float, vectors: float) -> float:
    """Return 1/(1/E + 1/B): vectors a second of callers that pay for the wire, and then
    for the device.

    Args:
        echoes: E, echoes a second of the wire alone.
        vectors: B, vectors a second of the device alone.
    """
    return 1.0 / (1.0 / echoes + 1.0 / vectors)


def environment() -> dict[str, Any]:
    """Return the hardware, versions and day of this run, without the machine's name."""
    import jax

    versions = {name: importlib.metadata.version(name) for name in ("jax", "grpcio", "hvpd")}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"device": jax.devices()[0].device_kind, "cores": len(os.sched_getaffinity(0)), **versions, "date": today}


# For people

_COLUMNS = ("figure", "n", "k", "predicted", "measured", "quartiles", "unit", "goal")


def table(figures: Iterable[Mapping[str, Any]], *, markdown: bool = False) -> str:
    """Return a table of figures that `Figure.to_json` made."""
    rows = [_COLUMNS, *map(_row, figures)]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(_COLUMNS))]
    left = {0, 6}
    lines = [
        [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    rule = ["-" * width if i in left or not markdown else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    edge, bar = ("| ", " | ") if markdown else ("", "  ")
    return "\n".join((edge + bar.join(line) + edge[::-1]).rstrip() for line in [lines[0], rule, *lines[1:]])


def number(value: float | None) -> str:
    """Return a number with three digits, or with all digits before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _row(figure: Mapping[str, Any]) -> tuple[str, ...]:
    goal = "" if figure["goal"] is None else figure["goal"] + {True: " met", False: " MISSED", None: ""}[figure["met"]]
    spread = " to ".join(map(number, figure["spread"] or ()))
    note = f" ({figure['note']})" if figure["note"] else ""
    return (
        figure["figure"] + note,
        *("" if figure[name] is None else f"{figure[name]:,}" for name in ("n", "k")),
        number(figure["predicted"]),
        number(figure["value"]),
        spread,
        figure["unit"],
        goal,
    )


# For machines


def write(path: Path, bench: str, found: Sequence[Mapping[str, Any]], *, part: bool = False) -> None:
    """Write a benchmark's figures into a file of JSON lines, in place of the figures of
    its earlier run; or, after a part of it, in place of the same figures.
    """
    names = {figure["figure"] for figure in found}
    kept = [
        figure
        for figure in (read(path) if path.exists() else ())
        if figure["bench"] != bench or (part and figure["figure"] not in names)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(figure) + "\n" for figure in [*kept, *found]))


def read(path: Path) -> list[dict[str, Any]]:
    """Return the figures of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


MARK = "<!-- What follows is written by `python -m bench report --write`. -->"
"""The line of README.md after which the tables come."""


def render(results: Path) -> str:
    """Return all results of a folder as Markdown: a section a file, tables for each
    benchmark.
    """
    from bench import _tables  # It needs this module.

    parts = []
    for path in sorted(results.glob("*.jsonl")):
        figures = read(path)
        parts.append(f"### {path.stem}")
        for bench in dict.fromkeys(figure["bench"] for figure in figures):
            of_bench = [figure for figure in figures if figure["bench"] == bench]
            parts += [f"#### {bench}", _tables.origin(of_bench), _tables.markdown(bench, of_bench, absolute=True)]
    return "\n\n".join(parts) + "\n"
