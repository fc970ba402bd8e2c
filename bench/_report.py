"""What a benchmark finds: figures with what was predicted and what is wanted, as a table for people and as JSON lines for machines.
Measures nothing.
"""

import dataclasses
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
    """Where a figure has to be."""

    sense: Literal["<=", ">="]
    bound: float

    def met(self, value: float) -> bool:
        """Whether a figure is there."""
        return value <= self.bound if self.sense == "<=" else value >= self.bound

    def __str__(self) -> str:
        return f"{self.sense} {self.bound:g}"


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number."""

    bench: str
    figure: str
    """What it is, in words."""
    value: float | None
    """The median of its repeats; None where it was not measured, and then `note` says why."""
    unit: str
    """Empty for ratios."""
    n: int | None = None
    """Elements of x."""
    k: int | None = None
    """Vectors of a block, or callers."""
    predicted: float | None = None
    """What was expected before it was measured."""
    goal: Goal | None = None
    repeats: int = 0
    """How many rounds the median is of."""
    spread: tuple[float, float] | None = None
    """First and third quartile of the rounds."""
    note: str = ""

    def to_json(self, environment: Mapping[str, Any]) -> dict[str, Any]:
        """The figure as one JSON object, with what it was measured on."""
        met = None if self.goal is None or self.value is None else self.goal.met(self.value)
        goal = None if self.goal is None else str(self.goal)
        return dataclasses.asdict(self) | {"goal": goal, "met": met} | dict(environment)


def measured(bench: str, figure: str, unit: str, rounds: npt.ArrayLike, **facts: Any) -> Figure:
    """A figure from one number a round: their median, and their quartiles as its spread."""
    values = np.asarray(rounds, float)
    low, middle, high = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return Figure(bench, figure, middle, unit, repeats=len(values), spread=(low, high), **facts)


def skipped(bench: str, figure: str, unit: str, why: str, **facts: Any) -> Figure:
    """A figure that could not be measured."""
    return Figure(bench, figure, None, unit, note=f"skipped: {why}", **facts)


def floor_rate(echoes: float, vectors: float) -> float:
    """Vectors a second of callers that first pay for the wire and then for the device: 1/(1/E + 1/B).

    Args:
        echoes: E, what the wire alone makes, a second.
        vectors: B, what the device alone makes, a second.
    """
    return 1.0 / (1.0 / echoes + 1.0 / vectors)


def environment() -> dict[str, Any]:
    """What the figures of this run were measured on; nothing that names the machine."""
    import jax

    versions = {name: importlib.metadata.version(name) for name in ("jax", "grpcio", "hvpd")}
    return {"device": jax.devices()[0].device_kind, "cores": len(os.sched_getaffinity(0)), **versions}


# For people

_COLUMNS = ("figure", "n", "k", "predicted", "measured", "quartiles", "unit", "goal")


def table(figures: Iterable[Mapping[str, Any]], *, markdown: bool = False) -> str:
    """The figures, as `Figure.to_json` gives them, under each other."""
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
    """Three digits, or all there are before the point."""
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


def write(path: Path, bench: str, found: Sequence[Mapping[str, Any]]) -> None:
    """Puts the figures of a benchmark into a file of JSON lines, in place of what an earlier run of it has left there."""
    kept = [figure for figure in read(path) if figure["bench"] != bench] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(figure) + "\n" for figure in [*kept, *found]))


def read(path: Path) -> list[dict[str, Any]]:
    """The figures of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


MARK = "<!-- What follows is written by `python -m bench report --write`. -->"
"""In README.md, before the tables."""


def render(results: Path) -> str:
    """All results in a folder as Markdown: a section for each file, a table for each benchmark in it."""
    parts = []
    for path in sorted(results.glob("*.jsonl")):
        figures = read(path)
        parts.append(f"### {path.stem}")
        for bench in dict.fromkeys(figure["bench"] for figure in figures):
            of_bench = [figure for figure in figures if figure["bench"] == bench]
            on = "; ".join(
                dict.fromkeys(
                    f"{f['device']}, {f['cores']} cores, jax {f['jax']}, grpcio {f['grpcio']}, hvpd {f['hvpd']}"
                    for f in of_bench
                )
            )
            parts += [f"#### {bench}", f"On {on}.", table(of_bench, markdown=True)]
    return "\n\n".join(parts) + "\n"
