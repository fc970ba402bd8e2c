"""Run by `make test-wheel`: hvpd comes from the wheel, and not from the source tree."""

import importlib.metadata
import re
from pathlib import Path

import hvpd
import hvpd_server

ROOT = Path(__file__).parents[2]


def test_hvpd_comes_from_the_wheel():
    for package in (hvpd, hvpd_server):
        assert Path(package.__file__).is_relative_to(ROOT / "build/wheel/installed")


def test_the_wheel_has_every_file_of_the_packages():
    for package, source in ((hvpd, "client/hvpd"), (hvpd_server, "server/hvpd_server")):
        installed = Path(package.__file__).parent
        for path in (ROOT / source).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (installed / path.relative_to(ROOT / source)).is_file(), path


def test_the_page_of_an_index_names_no_file_of_the_repository():
    metadata = importlib.metadata.metadata("hvpd")
    assert metadata["Description-Content-Type"] == "text/markdown"
    page, source = metadata.get_payload(), (ROOT / "README.md").read_text()
    local = re.compile(r"\]\((?!https?://)")
    assert local.search(source)
    assert not local.search(page)
    for block in re.findall(r"^#+ [^\n]*$|^```.*?^```$", source, re.MULTILINE | re.DOTALL):
        assert block in page
