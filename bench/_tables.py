"""The figures of one benchmark on one machine, as Markdown for bench/README.md and for
the site. `peers` and `solve` have tables of their own form; the others have a row for
each figure.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench import _report

Figures = Sequence[Mapping[str, Any]]

_ABSOLUTE = {"ms", "s", "/s", "GB/s", "TFLOP/s"}
"""Units of figures that say more about the machine than about hvpd."""

_LIMIT = 2.0
"""A solve is called slow if it takes this many times as long as in process."""


def is_absolute(figure: Mapping[str, Any]) -> bool:
    """Return whether a figure is an absolute time or rate of a CPU. The site shows
    these for accelerators only.
    """
    return figure["device"] == "cpu" and figure["unit"] in _ABSOLUTE


def origin(figures: Figures) -> str:
    """Return the machines, versions and days of figures, as a sentence."""
    places = dict.fromkeys(
        f"{f['device']}, {f['cores']} cores, jax {f['jax']}, grpcio {f['grpcio']}, hvpd {f['hvpd']}"
        + (f", {f['date']}" if f.get("date") else "")
        for f in figures
    )
    return f"On {'; '.join(places)}."


def markdown(bench: str, figures: Figures, *, absolute: bool) -> str:
    """Return the tables of a benchmark.

    Args:
        bench: The benchmark.
        figures: Its figures, all of one machine.
        absolute: Whether to show absolute times of a CPU, too.
    """
    form: Callable[[Figures, bool], str] = {"peers": _peers, "solve": _solve}.get(bench, _plain)
    return form(figures, absolute)


def _plain(figures: Figures, absolute: bool) -> str:
    return _report.table([f for f in figures if absolute or not is_absolute(f)], markdown=True)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table whose first columns are text and whose others are numbers."""
    rule = ["---" if column < left else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


# bench.peers

_PEER_RATIOS = {
    "products of hvpd over its": "hvpd's products over its",
    "p50 over that of hvpd": "p50 over hvpd's",
    "p99 over that of hvpd": "p99 over hvpd's",
    "bytes on the wire, over those of v and Hv": "bytes",
    "memory of the server": "server, MiB",
    "memory of the callers": "callers, MiB",
}
_PEER_TIMES = {"products": "products a second", "p50": "p50, ms", "p99": "p99, ms"}


def _peers(figures: Figures, absolute: bool) -> str:
    columns = {**(_PEER_TIMES if absolute else {}), **_PEER_RATIOS}
    rows: dict[tuple[int, int, str], dict[str, Mapping[str, Any]]] = {}
    for figure in figures:
        _, label, measure = figure["figure"].split(": ", 2)
        rows.setdefault((figure["n"], figure["k"], label), {})[measure] = figure
    parts = []
    for n, k in dict.fromkeys((n, k) for n, k, _ in rows):
        of_it = {label: found for (m, j, label), found in rows.items() if (m, j) == (n, k)}
        lines = [[label, *(_peer_cell(found.get(name)) for name in columns)] for label, found in of_it.items()]
        notes = [f"- {label}: {note}." for label, found in of_it.items() for note in _notes(found)]
        callers = "1 caller" if k == 1 else f"{k} callers"
        parts += [f"**n = {n:,}, {callers}**", _grid(["", *columns.values()], lines), "\n".join(notes)]
    return "\n\n".join(part for part in parts if part)


def _peer_cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None or figure["value"] is None:
        return ""
    cell = _report.number(figure["value"])
    if figure["predicted"] is not None:
        cell += f" (predicted {_report.number(figure['predicted'])})"
    if figure["met"] is False:
        cell += f", goal {figure['goal']} MISSED"
    return cell


def _notes(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(figure["note"] for figure in found.values() if figure["note"]))


# bench.solve


def _solve(figures: Figures, absolute: bool) -> str:
    ratios: dict[str, dict[tuple[str, str], dict[str, Mapping[str, Any]]]] = {}
    times: dict[tuple[str, str], float] = {}
    for figure in figures:
        part, solve, link, measure = figure["figure"].split(": ", 3)
        if measure.endswith(" over local"):
            place = measure.removesuffix(" over local")
            ratios.setdefault(part, {}).setdefault((solve, place), {})[link] = figure
        elif measure == "local":
            times.setdefault((part, solve), figure["value"])
    parts = []
    for part, rows in ratios.items():
        links = list(dict.fromkeys(link for found in rows.values() for link in found))
        n = next(iter(next(iter(rows.values())).values()))["n"]
        lines = [
            [solve, place, *(_solve_cell(found.get(link)) for link in links), _limit(found)]
            + ([_report.number(times.get((part, solve)))] if absolute else [])
            for (solve, place), found in rows.items()
        ]
        head = ["solve", "way", *links, f"below {_LIMIT:g} times up to", *(["in process, s"] if absolute else [])]
        parts += [f"**n = {n:,}**", _grid(head, lines, left=2)]
    return "\n\n".join(parts)


def _solve_cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None or figure["value"] is None:
        return ""
    return f"{_report.number(figure['value'])} ({_report.number(figure['predicted'])})"


def _limit(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the last link in the order of the measurement up to which a solve takes
    less than twice the time in process.
    """
    good = ""
    for link, figure in found.items():
        if figure["value"] is None or figure["value"] >= _LIMIT:
            break
        good = link
    return good or "nowhere"
