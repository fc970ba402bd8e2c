"""The pages of the benchmarks: the texts of bench/README.md, and bench/results."""

import re
from pathlib import Path

from bench import _report

_BENCH = Path(__file__).resolve().parents[2] / "bench"
_README = (_BENCH / "README.md").read_text()
_SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", _README, re.MULTILINE | re.DOTALL))

NAMES = tuple(name for name in _SECTIONS if (_BENCH / f"{name}.py").exists())
"""The benchmarks, in the order of the README."""


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
            table = _report.table([figure for of, figure in of_bench if of == machine], markdown=True)
            parts += [f"## Figures: {machine}", table]
        found[f"benchmarks/{name}.md"] = "\n\n".join(parts) + "\n"
    found["benchmarks/index.md"] = _index()
    return found


def _index() -> str:
    """Return the README without the texts of single benchmarks and without tables."""
    before, _, rest = _README.partition("## What each one says\n")
    after = "## Where" + rest.partition("## Where")[2].partition("## Results")[0]
    pages = "".join(f"- [{name}]({name}.md)\n" for name in NAMES)
    return f"{before}## The benchmarks\n\n{pages}\n{after}"
