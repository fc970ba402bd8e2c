"""Runs benchmarks: `python -m bench NAME [--json FILE] [--quick]`, from the root."""

import argparse
import contextlib
import importlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from bench import _report

BENCHMARKS = (
    "register",
    "latency",
    "coalescing",
    "transfer",
    "modes",
    "restart",
    "growth",
    "neighbour",
    "krylov",
    "as_jax",
    "samehost",
    "fleet",
    "solve",
    "group",
)
ALONE = ("versions", "peers", "gpu", "accuracy")
"""Benchmarks that `all` leaves out: `versions` cannot run without another checkout,
`peers` installs packages, `gpu` has figures only on an accelerator, and `accuracy`
measures no time.
"""
COMPARES = ("register", "versions")
"""Benchmarks that take another checkout."""
_FOLDER = Path(__file__).parent


def main() -> int:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measures what hvpd promises; see bench/README.md."
    )
    parser.add_argument(
        "name", choices=[*BENCHMARKS, *ALONE, "all", "report"], help="which; report renders bench/results instead"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="also one JSON object a figure, one a line, into this file"
    )
    parser.add_argument("--quick", action="store_true", help="whether it runs, not how fast: few sizes, few rounds")
    parser.add_argument(
        "--before",
        metavar="DIR",
        type=Path,
        help="with register and versions: another checkout of hvpd to measure beside this one",
    )
    parser.add_argument(
        "--write", action="store_true", help="with report: into bench/README.md, in place of its figures"
    )
    parser.add_argument(
        "--part", metavar="NAME", help="only this part, of a benchmark that has parts; see bench/README.md"
    )
    arguments = parser.parse_args()
    if arguments.name == "report":
        return _results(write=arguments.write)
    if arguments.part and arguments.part not in (parts := _parts(arguments.name)):
        parser.error(f"--part: {arguments.name} has {', '.join(parts) or 'no parts'}, got {arguments.part!r}")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    # Two processes share an accelerator here, so neither may take all of its memory
    # beforehand.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    for name in BENCHMARKS if arguments.name == "all" else (arguments.name,):
        options = {"before": arguments.before} if name in COMPARES else {}
        if arguments.part:
            options["part"] = arguments.part
        _run(name, arguments.json, quick=arguments.quick, **options)
    return 0


def _parts(name: str) -> tuple[str, ...]:
    """Return the names of a benchmark's parts."""
    return () if name == "all" else getattr(importlib.import_module(f"bench.{name}"), "PARTS", ())


def _run(name: str, path: Path | None, **options: Any) -> None:
    benchmark = importlib.import_module(f"bench.{name}")
    environment = _report.environment()
    found = []
    with contextlib.closing(benchmark.run(**options)) as figures:
        for figure in figures:
            if _told:
                sys.exit(128 + _told[0])
            found.append(figure.to_json(environment))
            print(f"{name}: {figure.figure}: {_report.number(figure.value)} {figure.unit}", file=sys.stderr, flush=True)
    print(f"\n{name}, on {', '.join(f'{key} {value}' for key, value in environment.items())}\n")
    print(_report.table(found), flush=True)
    if path is not None:
        _report.write(path, name, found, part="part" in options)


def _results(*, write: bool) -> int:
    rendered = _report.render(_FOLDER / "results")
    if not write:
        print(rendered, end="")
        return 0
    readme = _FOLDER / "README.md"
    text = readme.read_text()
    head = text[: text.index(_report.MARK) + len(_report.MARK)]
    readme.write_text(f"{head}\n\n{rendered}".rstrip() + "\n")
    return 0


_told: list[int] = []
"""Signals that came. Python loses an exception that is raised in a callback; then the
run ends at the next figure.
"""


def _leave(number: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that child processes are ended."""
    _told.append(number)
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
