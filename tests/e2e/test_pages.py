"""The README and every page are true. Their Python and their commands run as they
stand, in the order of the page. Their tables agree with the code.
"""

import json
import re
import shlex
import shutil
import subprocess
import threading
import tomllib
import warnings
from pathlib import Path

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
import yaml

import hvpd
import hvpd.aio
import hvpd.jax
import hvpd.petsc
import hvpd.torch
from hvpd._cli import main
from hvpd._umbridge.http_server import UmbridgeServer
from hvpd._umbridge.model import Model
from tests.support.pages import ROOT, Reader, blocks, indented
from tests.support.security import Place

CONNECT = hvpd.connect
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md", *sorted((ROOT / "deploy").rglob("*.md"))]

STARTED = {"docs/start/terminal.md", "docs/operate/upgrade-drill.md", "docs/operate/replicas.md"}
"""Pages whose servers are started. Elsewhere, their settings are checked."""

TENANTS = {"docs/start/team.md", "docs/how-to/profiles.md", "docs/operate/access.md", "docs/operate/tenants.md"}
"""Pages about a server with tokens and TLS."""

NOT_RUN = {
    ("docs/how-to/foreign-programs.md", "ir = tf.function"): "needs TensorFlow; e2e/test_stablehlo.py has its programs",
    ("docs/how-to/other-libraries.md", "import hvpd.petsc"): "needs petsc4py; client/test_petsc.py runs its operators",
    ("docs/how-to/pytorch.md", "summed ="): "needs laplace-torch; e2e/test_torch.py runs it",
    ("docs/how-to/register.md", "graph, state"): "needs flax, which the suite does without",
    ("docs/how-to/umbridge.md", "hvpd umbridge"): "runs until a signal; the test starts it for the page",
    ("docs/operate/access.md", "openssl"): "e2e/security/test_tls.py runs it",
    ("docs/operate/groups.md", "srun"): "needs Slurm or Open MPI; server/test_processes.py has their variables",
    ("docs/operate/replicas.md", "pip install"): "needs S3; server/test_object_store.py has a server of S3",
    ("docs/operate/replicas.md", "hvpd store copy"): "needs S3; server/test_object_store.py has a server of S3",
    ("docs/operate/run.md", "python3 -m venv"): "needs root and systemd; deploy/test_systemd.py checks the unit",
    ("docs/operate/run.md", "cd /var/lib/hvpd"): "e2e/test_backup.py runs it",
    ("docs/operate/run.md", "mkdir -p /var/lib/hvpd"): "e2e/test_backup.py runs it",
    ("docs/operate/tracing.md", "from opentelemetry"): "sets the provider of the process; e2e/test_tracing.py has one",
    ("docs/operate/upgrading.md", "python tests/compat"): "writes into the repository, at a release",
    ("docs/reference/walkthrough.md", "protoc"): "needs the plugin of C++; deploy/test_proto.py runs protoc",
    ("deploy/README.md", "docker build"): "needs Docker; deploy/test_image.py has its flags",
    ("deploy/README.md", "buildah"): "takes minutes; deploy/test_image.py builds the image",
    ("deploy/kubernetes/README.md", "client ="): "needs a cluster",
}
"""Blocks of which only the syntax is checked: page, begin of the block; reason."""


def name(page):
    return str(page.relative_to(ROOT))


def runs(page, block):
    return not any(name(page) == where and block.code.startswith(begin) for where, begin in NOT_RUN)


@pytest.fixture(scope="module")
def tenants(serve_module, tmp_path_factory):
    """A server with tokens and TLS, its files, and a token with all rights."""
    place = Place(tmp_path_factory.mktemp("tenants"))
    token, _ = place.token("vision", "use", "publish", "administer")
    return serve_module("--tokens", str(place.tokens), *place.flags), place, token


@pytest.fixture
def reader(request, server, client, serve, monkeypatch, tmp_path):
    """Return a reader of a page: reader(page). Its Python takes the session's server
    for hvpd.local(), and for an address that the page only shows.
    """

    def connected(address=None, **settings):
        known = address is None or address in reading.written.values()
        client = CONNECT(address if known else server.address, **settings)
        request.addfinalizer(client.close)
        return client

    def read(page):
        nonlocal reading
        reading = Reader(tmp_path, serve, starts=name(page) in STARTED)
        reading.environment["HVPD_ADDRESS"] = server.address
        reading.written |= dict.fromkeys(("localhost:7070", "gpu-box:7070"), server.address)
        if name(page) in TENANTS:
            join(reading, tmp_path, *request.getfixturevalue("tenants"))
        if name(page) in GIVEN:
            GIVEN[name(page)](reading, tmp_path, request)
        return reading

    reading = None
    monkeypatch.setattr(hvpd, "connect", connected)
    monkeypatch.setattr(hvpd, "local", lambda: connected(server.address))
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    with warnings.catch_warnings():
        yield read


def join(reader, folder, serving, place, token):
    """Give a reader a token and the files of a server with tenants."""
    (folder / "hvpd").mkdir()
    (folder / "hvpd/lab.token").touch(0o600)
    (folder / "hvpd/lab.token").write_text(token)
    for file in ("ca.pem", "server.pem", "server.key", "tokens.json"):
        shutil.copy(place.root / file, folder)
        reader.written[f"/etc/hvpd/{file}"] = str(folder / file)
    shutil.copy(place.trust, folder / "hvpd")
    reader.written |= dict.fromkeys(("gpu-box:7070", "lab:7070"), serving.address) | {"hvpd_...": token}
    reader.environment |= {"HVPD_ADDRESS": serving.address, "HVPD_CA": "ca.pem", "HVPD_TOKEN": token}
    reader.typed = f"{token}\n"


def an_objective(*names):
    def give(reader, folder, request):
        client = request.getfixturevalue("client")
        for given in names:
            client.register(
                lambda x: jnp.sum(x["a"] ** 4) + jnp.sum(x["b"]) ** 2, {"a": np.ones(3), "b": np.ones(4)}, name=given
            )

    return give


def briefly(reader, folder, request):
    an_objective("team/model")(reader, folder, request)
    reader.written["--callers 1,8"] = "--callers 1,8 --seconds 0"


def an_objective_to_delete(reader, folder, request):
    serving, place, token = request.getfixturevalue("tenants")
    with CONNECT(serving.address, ca=place.trust, token=token) as client:
        client.register(lambda x: jnp.sum(x**4), np.ones(3), name="digits/mlp")


def a_backup(reader, folder, request):
    """A backup of a store, and a solve that ends."""
    serving = request.getfixturevalue("serve")()
    with CONNECT(serving.address) as client:
        client.register(lambda x: jnp.sum(x**4), np.ones(3), name="team/model")
    assert serving.terminate() == 0
    subprocess.run(["tar", "-C", serving.store, "-cf", folder / "backup.tar", "."], check=True)
    reader.written |= {"/backup.tar": str(folder / "backup.tar"), "itertools.count()": "range(3)"}


def a_module(reader, folder, request):
    (code,) = re.findall(r'MODULE = """\n(.*?)"""', (ROOT / "docs/how-to/foreign-programs.md").read_text(), re.DOTALL)
    (folder / "loss.mlir").write_text(code)
    (folder / "model.py").write_text("import numpy as np\ndef arguments():\n    return np.zeros(3), np.ones((8, 3))\n")


def models(reader, folder, request):
    """What `hvpd umbridge` serves."""
    an_objective("team/posterior")(reader, folder, request)
    objective = request.getfixturevalue("client").objective("team/posterior")
    bridge = UmbridgeServer([Model("team/posterior", objective)], "127.0.0.1", 0)
    thread = threading.Thread(target=bridge.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    request.addfinalizer(lambda: (bridge.shutdown(), thread.join(), bridge.server_close()))
    reader.written["http://localhost:4242"] = bridge.url


GIVEN = {
    "docs/how-to/foreign-programs.md": a_module,
    "docs/how-to/umbridge.md": models,
    "docs/operate/groups.md": lambda reader, *_: reader.written.update(
        {"host0": "localhost", "/shared/hvpd": "shared"}
    ),
    "docs/operate/replicas.md": lambda reader, *_: reader.written.update({"/shared/hvpd": "shared"}),
    "docs/operate/sizing.md": briefly,
    "docs/operate/tenants.md": an_objective_to_delete,
    "docs/operate/upgrade-drill.md": a_backup,
}
"""What the reader of a page has before."""


@pytest.mark.parametrize("page", [page for page in [*PAGES, *OTHERS] if blocks(page)], ids=name)
def test_its_code_runs(page, reader, capsys, monkeypatch):
    reading = reader(page)
    namespace: dict[str, object] = {}
    printed = None
    for block in blocks(page):
        for variable, value in reading.environment.items():
            monkeypatch.setenv(variable, value)
        code = reading.here(block.code)
        if block.title:
            write(Path(block.title).expanduser(), code)
        elif block.language == "text" and printed is not None:
            assert missing(code, printed) == []
        printed = None
        if not runs(page, block):
            SYNTAX[block.language](code)
        elif block.language == "python":
            exec(compile("\n" * block.line + code, str(page), "exec"), namespace)
            printed = capsys.readouterr().out
        elif block.language == "console":
            assert [main.main(shlex.split(line)) for line in re.findall(r"^\$ hvpd (.*)", code, re.MULTILINE)] in (
                [],
                [0],
            )
            assert missing(re.sub(r"^\$ .*", "", code), capsys.readouterr().out) == []
        elif block.language == "sh":
            reading.follow(block.code)
        else:
            SYNTAX[block.language](code)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def missing(shown, printed):
    """Return the lines that a page shows and that no program printed, whatever their
    numbers.
    """
    found = {shape(line) for line in printed.splitlines()}
    return [line for line in shown.splitlines() if line and shape(line) not in found]


SYNTAX = {
    "python": lambda code: compile(code, "", "exec"),
    "sh": lambda code: subprocess.run(["bash", "-n", "-c", code], check=True),
    "json": json.loads,
    "toml": tomllib.loads,
    "yaml": yaml.safe_load,
    "text": str,
}
"""Readers of blocks that are not run, by language."""


def test_the_blocks_that_do_not_run_exist():
    begins = {
        (name(page), begin)
        for page in [*PAGES, *OTHERS]
        for _, begin in NOT_RUN
        for block in blocks(page)
        if block.code.startswith(begin)
    }
    assert NOT_RUN.keys() <= begins


def shows(expected, printed):
    """Check that a page shows lines that a program printed, except for numbers."""
    found = {shape(line) for line in printed.splitlines()}
    assert [line for line in expected.splitlines() if not line.startswith("$") and shape(line) not in found] == []


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name)
def test_each_of_its_blocks_has_a_language(page):
    assert list(indented(page)) == []


def test_pip_is_asked_for_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in [*PAGES, *OTHERS]:
        for asked in re.findall(r"(?:'\.|hvpd)\[([\w,]+)\]'", page.read_text()):
            assert set(asked.split(",")) <= extras.keys(), asked


def shape(line):
    """Return a line of output without its numbers, digests and widths of columns."""
    line = re.sub(r"\b[0-9a-f]{12,64}\b|[-+]?\d[\d.:-]*(?:e[-+]\d+)?", "#", line)
    return " ".join(line.replace("pending", "passed").split())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_its_commands_are_right(page):
    """Each command line of hvpd has flags and arguments that the command takes."""
    code = "".join(block.code for block in blocks(page) if block.language in ("sh", "console"))
    for line in re.findall(r"^(?:\$ )?hvpd ([a-z].*)", code, re.MULTILINE):
        for command in line.partition(" #")[0].split("; hvpd "):
            main._parser().parse_args(shlex.split(command))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_it_is_short(page):
    most = 120 if page.name == "README.md" else 200
    assert len(page.read_text().splitlines()) <= most


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name)
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
