"""The README and every page of docs/ are true. Their Python and their commands run as
they stand, in the order of the page. Their tables agree with the code.
"""

import json
import re
import shlex
from pathlib import Path

import matplotlib as mpl
import pytest

import hvpd
import hvpd.aio
import hvpd.jax
import hvpd.petsc
import hvpd.torch
from hvpd._cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r'^```(\w+)(?: title="(.*)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)


def name(page):
    return str(page.relative_to(ROOT))


def runs(page):
    """Return whether a page has Python or commands with their output."""
    return any(language in ("python", "console") for language, _, _ in BLOCK.findall(page.read_text()))


@pytest.fixture
def one_server(server, monkeypatch, tmp_path):
    """Let a page use the session's server for every address and for hvpd.local(), and a
    folder of its own for files.
    """
    connect, clients = hvpd.connect, []

    def connected(address=None, **settings):
        clients.append(connect(server.address, **settings))
        return clients[-1]

    monkeypatch.setattr(hvpd, "connect", connected)
    monkeypatch.setattr(hvpd, "local", connected)
    monkeypatch.setenv("HVPD_ADDRESS", server.address)
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    yield
    for client in clients:
        client.close()


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=name)
def test_its_code_runs(page, one_server, capsys):
    text = page.read_text()
    namespace: dict[str, object] = {}
    for found in BLOCK.finditer(text):
        language, title, code = found.groups()
        if language == "python":
            if title:
                Path(title).write_text(code)
            line = text.count("\n", 0, found.start(3))
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
        elif language == "console":
            capsys.readouterr()
            shown = code.splitlines()
            for command in (line.removeprefix("$ hvpd ") for line in shown if line.startswith("$ hvpd ")):
                assert main.main(shlex.split(command)) == 0
            printed = {shape(line) for line in capsys.readouterr().out.splitlines()}
            assert printed.issuperset(shape(line) for line in shown if not line.startswith("$"))


def shape(line):
    """Return a line of output without its numbers, digests and widths of columns."""
    line = re.sub(r"\b[0-9a-f]{12,64}\b|[-+]?\d[\d.:-]*(?:e[-+]\d+)?", "#", line)
    return " ".join(line.replace("pending", "passed").split())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_its_commands_are_right(page):
    """Each command line of hvpd has flags and arguments that the command takes."""
    text = page.read_text()
    code = "".join(code for language, _, code in BLOCK.findall(text) if language in ("sh", "console"))
    indented = re.findall(r"^    hvpd .*", text, re.MULTILINE)
    for line in re.findall(r"^(?: {4}|\$ )?hvpd ([a-z].*)", "\n".join([code, *indented]), re.MULTILINE):
        for command in line.partition(" #")[0].split("; hvpd "):
            if "[" not in command and "..." not in command:
                main._parser().parse_args(shlex.split(command))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_it_is_short(page):
    most = 120 if page.name == "README.md" else 200
    assert len(page.read_text().splitlines()) <= most


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / "deploy").rglob("*.md"), ROOT / "examples/README.md"], ids=name)
def test_its_links_lead_to_files_of_the_repository(page):
    for target in re.findall(r"\]\(([^)#\s]+)|^\[[^]]+\]: ([^#\s]+)", page.read_text(), re.MULTILINE):
        if "://" not in "".join(target):
            assert (page.parent / "".join(target)).exists(), target


def test_pages_list_every_public_name():
    pages = "".join(page.read_text() for page in (ROOT / "docs/reference/python").glob("*.md"))
    assert set(re.findall(r"^::: hvpd\.(\w+)$", pages, re.MULTILINE)) == set(hvpd.__all__) - {"__version__"}
    for module in (hvpd.aio, hvpd.jax, hvpd.petsc, hvpd.torch):
        listed = set(re.findall(rf"^::: {module.__name__}\.(\w+)$", pages, re.MULTILINE))
        assert listed == set(module.__all__)


def test_the_alerts_page_has_a_section_for_every_alert():
    alerts = set(re.findall(r"- alert: (\w+)", (ROOT / "deploy/prometheus/rules.yml").read_text()))
    assert set(re.findall(r"^## (Hvpd\w+)", (ROOT / "docs/operate/alerts.md").read_text(), re.MULTILINE)) == alerts


def test_a_page_lists_every_error():
    page = (ROOT / "docs/reference/errors.md").read_text()
    for error in hvpd.__all__:
        if error.endswith("Error") and error != "HvpdError":
            assert f"| `{error}`" in page


FIGURES = [
    ("latency", "product", 6160, 1, "{:.2f} ms", ("docs/concepts/cost.md", "docs/concepts/when-not.md")),
    ("latency", "in process (hvp)", 6160, 1, "{:.2f} ms", ("docs/concepts/cost.md", "docs/concepts/when-not.md")),
    ("latency", "product", 269322, 1, "{:.1f} ms", ("README.md", "docs/concepts/cost.md", "docs/concepts/when-not.md")),
    ("latency", "in process (apply)", 269322, 1, "{:.1f} ms", ("README.md", "docs/concepts/cost.md")),
    ("latency", "product", 1863690, 1, "{:.1f} ms", ("docs/concepts/cost.md", "docs/concepts/when-not.md")),
    ("latency", "in process (apply)", 1863690, 1, "{:.1f} ms", ("docs/concepts/cost.md",)),
    ("coalescing", "memory-bound, threads: products", 4000, 1, "{:.0f}", ("README.md", "docs/concepts/when-not.md")),
    ("coalescing", "memory-bound, threads: products", 4000, 16, "{:,.0f}", ("README.md", "docs/concepts/when-not.md")),
    ("coalescing", "compute-bound, threads: products", 269322, 1, "{:.0f}", ("docs/concepts/when-not.md",)),
    ("coalescing", "compute-bound, threads: products", 269322, 16, "{:.0f}", ("docs/concepts/when-not.md",)),
    ("modes", "logistic regression: hvp, time", 4000, 1, "{:.1f} gradients", ("docs/concepts/cost.md",)),
    ("modes", "transformer: hvp, time", 104448, 1, "{:.1f}", ("docs/concepts/cost.md",)),
    ("restart", "20 objectives: warm until the ready line", 6235, None, "{:.1f} s", ("docs/operate/sizing.md",)),
    ("restart", "20 objectives: cold until the ready line", 6235, None, "{:.1f} s", ("docs/operate/sizing.md",)),
]
"""Figures that pages repeat: benchmark, figure, n, k, format, pages."""


@pytest.mark.parametrize(("bench", "figure", "n", "k", "form", "pages"), FIGURES)
def test_pages_repeat_the_figures_of_the_benchmarks(bench, figure, n, k, form, pages):
    results = map(json.loads, (ROOT / "bench/results/cpu-2core.jsonl").read_text().splitlines())
    wanted = {"bench": bench, "figure": figure, "n": n, "k": k}
    (value,) = [result["value"] for result in results if wanted.items() <= result.items()]
    for page in pages:
        assert form.format(value) in (ROOT / page).read_text(), page
