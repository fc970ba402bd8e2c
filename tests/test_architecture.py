"""The rules of docs/architecture/overview.md on imports between folders, a rule on
texts, and the place of each module's tests. Imports for type checkers do not count.
"""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SERVER = [
    ["__main__"],
    ["rank"],
    ["process"],
    ["app", "config_check"],
    ["status_page", "rpc"],
    ["krylov"],
    ["engine"],
    ["supervisor", "device"],
    ["admission"],
    ["derivation"],
    ["importer"],
    ["store", "group"],
    ["liveness"],
    ["scheduling", "tenancy", "bundle"],
    ["telemetry"],
    ["config", "errors", "files", "token_bucket"],
]
"""The server's folders and files, from the top down. Each imports only folders and
files below it.
"""

CLIENT = [
    ["__main__"],
    ["_cli", "aio"],
    ["_conformance", "_local", "_umbridge", "jax", "petsc", "torch"],
    ["_connect"],
    ["_client"],
    ["_registrar"],
    ["_objective", "_listing", "_naming", "_submission", "_usage"],
    ["_torch"],
    ["_point", "_layout"],
    ["_check", "_operators", "_transport"],
    ["_jax"],
    ["_registration"],
    ["_composite", "_plan", "krylov"],
    ["_wire", "_version", "_krylov"],
    ["_modules"],
    ["_arguments", "_arrays", "_profiles", "_progress"],
    ["_errors"],
    ["_html"],
    ["_environment", "_quiet", "_text", "_warnings", "v1"],
]
"""The client's folders and files, from the top down. `hvpd/__init__.py` imports from
all of them, and none imports it.
"""

SHARED = {"_wire", "_krylov", "_text", "_errors", "_composite", "_check", "_version", "v1"}
"""The parts of the client that the server may import."""

JAX = {
    "server/hvpd_server/admission/vetting_process.py",
    "server/hvpd_server/derivation",
    "server/hvpd_server/device/basis.py",
    "server/hvpd_server/device/executables.py",
    "server/hvpd_server/device/device.py",
    "server/hvpd_server/device/group_device.py",
    "server/hvpd_server/device/processes.py",
    "server/hvpd_server/device/rank_mesh.py",
    "server/hvpd_server/importer",
    "client/hvpd/_jax",  # Loaded by `as_jax` only.
    "client/hvpd/_registration",
    "client/hvpd/jax.py",  # Imported by users of jax only, and by no other module.
}
"""Files and folders that may import jax."""

TORCH = {
    "client/hvpd/_registration/torch_import.py",
    "client/hvpd/_registration/torch_program.py",
    "client/hvpd/_registration/torch_rules.py",
    "client/hvpd/_torch",
    "client/hvpd/torch.py",
}
"""Files and folders that may import torch. No other file imports these."""

GRPC = {
    "server/hvpd_server/app.py",
    "server/hvpd_server/errors.py",
    "server/hvpd_server/rpc",
    "client/hvpd/_quiet.py",
    "client/hvpd/_transport",
    "client/hvpd/_wire",
}
"""Files and folders that may import grpc. hvpd.v1 is generated."""


def modules(package):
    return [path for path in (ROOT / package).rglob("*.py") if "v1" not in path.parts]


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


@functools.cache
def imported(path):
    """Return the full names of a file's imports, with the names that it takes from
    packages.
    """

    class Visitor(ast.NodeVisitor):
        def __init__(self):
            self.found = set()

        def visit_If(self, node):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                self.generic_visit(node)

        def visit_Import(self, node):
            self.found |= {alias.name for alias in node.names}

        def visit_ImportFrom(self, node):
            assert node.level == 0, f"{path}: a relative import"
            self.found |= {f"{node.module}.{alias.name}" for alias in node.names}

    visitor = Visitor()
    visitor.visit(parsed(path))
    return visitor.found


def rooms(package, path):
    """Return a file's room, and the rooms of its package that the file imports."""
    name = Path(package).name
    own = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
    parts = [found.split(".") for found in imported(path)]
    return own, {part[1] for part in parts if part[0] == name and len(part) > 1} - {own}


def inside(path, places):
    relative = path.relative_to(ROOT).as_posix()
    return any(relative == place or relative.startswith(f"{place}/") for place in places)


@pytest.mark.parametrize(("package", "layers"), [("server/hvpd_server", SERVER), ("client/hvpd", CLIENT)])
def test_no_folder_imports_upwards(package, layers):
    floor = {room: number for number, level in enumerate(layers) for room in level}
    wrong = []
    for path in modules(package):
        own, others = rooms(package, path)
        if own == "__init__":
            continue
        assert own in floor, f"{path}: give {own} a place among the layers"
        wrong += [f"{path.relative_to(ROOT)} imports {other}" for other in others if floor.get(other, -1) <= floor[own]]
    assert wrong == []


def test_the_rule_sees_an_import_upwards(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "server/hvpd_server/store").mkdir(parents=True)
    (tmp_path / "server/hvpd_server/store/store.py").write_text("def f():\n    from hvpd_server.engine import lane\n")
    with pytest.raises(AssertionError, match=r"store\.py imports engine"):
        test_no_folder_imports_upwards("server/hvpd_server", SERVER)


@pytest.mark.parametrize(("package", "places"), [("jax", JAX), ("jaxlib", JAX), ("torch", TORCH), ("grpc", GRPC)])
def test_a_library_is_imported_in_its_places_only(package, places):
    users = [
        path
        for path in [*modules("server/hvpd_server"), *modules("client/hvpd")]
        if package in {found.split(".")[0] for found in imported(path)}
    ]
    assert users
    assert [str(path.relative_to(ROOT)) for path in users if not inside(path, places)] == []


def test_each_place_of_a_library_has_it():
    for package, places in (("jax", JAX), ("torch", TORCH), ("grpc", GRPC)):
        for place in places:
            files = modules(place) if (ROOT / place).is_dir() else [ROOT / place]
            found = {name.split(".")[0] for path in files for name in imported(path)}
            assert package in found, f"{place} does not import {package} any more"


def test_the_server_imports_the_shared_part_of_the_client_only():
    found = {
        name.split(".")[1]
        for path in modules("server/hvpd_server")
        for name in imported(path)
        if name.startswith("hvpd.")
    }
    assert found <= SHARED | {"__version__"}


def test_every_folder_has_a_docstring():
    for package in ("server/hvpd_server", "client/hvpd"):
        for path in (ROOT / package).rglob("__init__.py"):
            if "v1" not in path.parts:
                assert ast.get_docstring(parsed(path)), f"{path} has no docstring"


DIGEST_CHARACTERS = {12, 16}
"""Numbers of characters to which texts shorten digests."""

MARKS = {
    "client/hvpd/_text.py",
    "client/hvpd/_transport/transport.py",
    "server/hvpd_server/telemetry/logs.py",
    "server/hvpd_server/telemetry/recent_failures.py",
}
"""Files that write a mark of their own where they cut a text."""


def cuts(path):
    """Return the texts in a file's f-strings that are cut without a mark."""
    formatted = [node.value for node in ast.walk(parsed(path)) if isinstance(node, ast.FormattedValue)]
    for part in (part for value in formatted for part in ast.walk(value)):
        cut = isinstance(part, ast.Subscript) and isinstance(part.slice, ast.Slice) and part.slice.lower is None
        if cut and getattr(part.slice.upper, "value", None) not in DIGEST_CHARACTERS:
            yield f"{path.relative_to(ROOT)}:{part.lineno}: {ast.unparse(part)}"


def test_a_text_that_is_cut_has_a_mark():
    """`_text.cut` and `_text.quoted` leave one. Without a mark, a reader takes the part
    for the whole.
    """
    files = [*modules("server/hvpd_server"), *modules("client/hvpd")]
    found = {cut for path in files if not inside(path, MARKS) for cut in cuts(path)}
    assert found == set()


def test_the_rule_sees_a_cut_text(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("f'{name[:80]!r} of {digest[:12]} {list(x[:n])} {x[1:]}'")
    assert list(cuts(tmp_path / "a.py")) == ["a.py:1: name[:80]", "a.py:1: x[:n]"]


def without_a_mirror():
    """Return the modules without a test file, or a folder of tests, of their name."""
    found = set()
    for package, folders in (("client/hvpd", ["client"]), ("server/hvpd_server", ["server", "importer"])):
        paths = [path for folder in folders for path in (ROOT / "tests" / folder).rglob("*")]
        named = {path.stem.removeprefix("test_") for path in paths if path.is_dir() or path.name.startswith("test_")}
        names = [path.relative_to(ROOT / package).with_suffix("") for path in modules(package)]
        found |= {(package, name.as_posix()) for name in names if name.name.lstrip("_") not in named | {"init__"}}
    return found


def listed(page):
    """Return each module in the tables of tests/README.md, with its package and the
    files that test it.
    """
    found, package = {}, ""
    for line in page.splitlines():
        if heading := re.match(r"\| modules of (\S+) \|", line):
            package = heading[1]
        elif package and (row := re.match(r"\| (`.*`) \| (.*) \|", line)):
            found |= {(package, name): row[2].split(", ") for name in re.findall(r"`([^`]+)`", row[1])}
    return found


def test_each_module_has_tests_of_its_name_or_a_row_in_the_table():
    table = listed((ROOT / "tests" / "README.md").read_text())
    folders = {(package, name) for package, name in table if name.endswith("/")}
    single = {
        (package, name)
        for package, name in without_a_mirror()
        if (package, f"{name.rpartition('/')[0]}/") not in folders
    }
    assert single - table.keys() == set(), "add tests/.../test_X.py, or a row to tests/README.md"
    assert table.keys() - folders - single == set(), "remove from tests/README.md: these have tests of their name"
    assert [name for names in table.values() for name in names if not (ROOT / "tests" / name).is_file()] == []


CLIENT_ONLY = {"lanczos", "quadrature", "ritz", "thick_restart", "minimize", "spectrum"}
"""Modules of _krylov whose functions run on the client only."""


def test_the_server_calls_no_function_of_scipy_that_holds_the_gil():
    """Other callers would wait meanwhile. Of scipy.linalg, qr lets other threads run;
    svd, eigh, eigh_tridiagonal and solve_triangular do not. NumPy's functions do.
    """
    algorithms = [path for path in (ROOT / "client/hvpd/_krylov").glob("*.py") if path.stem not in CLIENT_ONLY]
    called = set()
    for path in [*(ROOT / "server/hvpd_server").rglob("*.py"), *algorithms]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "scipy.linalg":
                called.add((path.stem, node.attr))
            if isinstance(node, ast.ImportFrom) and node.module == "scipy.linalg":
                called.update((path.stem, alias.name) for alias in node.names)
    assert {name for _, name in called} == {"qr"}, called
