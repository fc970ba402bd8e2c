"""Hooks of mkdocs: pages that come from the code, and links to files outside of docs/.

A link to a file of the repository, such as ../tests/e2e/test_cli.py, works on a forge
and in an editor. On the site it leads to a page that shows the file.
"""

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import benchmarks  # noqa: E402 - needs the path
import reference  # noqa: E402

_MIRRORED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "bench/README.md": "benchmarks/index.md",
    "deploy/README.md": "operate/deployment.md",
    "deploy/kubernetes/README.md": "operate/kubernetes.md",
    "examples/README.md": "examples.md",
    "proto/hvpd/v1": "reference/protocol/index.md",
    **{f"proto/hvpd/v1/{name}.proto": f"reference/protocol/{name}.md" for name in reference.PROTOS},
}
"""Files of the repository that have a page of their own on the site."""

_COPIED = ("CHANGELOG.md", "CONTRIBUTING.md", "deploy/README.md", "deploy/kubernetes/README.md", "examples/README.md")
"""Those of them whose text is the page."""

_LINK = re.compile(r"(\]\(|^\[[^\]]+\]: )([^)\s#]+)(#[^)\s]*)?", re.MULTILINE)
_PART = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
_LANGUAGES = {".py": "python", ".yml": "yaml", ".yaml": "yaml", ".toml": "toml", ".json": "json", ".service": "ini"}
_UNSEARCHED = "---\nsearch: {exclude: true}\n---\n\n"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are no files of docs/."""
    pages = {_MIRRORED[path]: (ROOT / path).read_text() for path in _COPIED}
    pages |= benchmarks.pages() | reference.protocol()
    texts = {f"docs/{file.src_uri}": file.content_string for file in files if file.src_uri.endswith(".md")}
    texts |= {_origin(uri): text for uri, text in pages.items()}
    linked = {target for origin, text in texts.items() for target in _targets(origin, text)}
    pages |= {_source(target): _UNSEARCHED + _listing(ROOT / target) for target in linked - _MIRRORED.keys()}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in the generated parts of a page, and turn its links to the site's pages."""
    uri = page.file.src_uri
    folder = posixpath.dirname(_origin(uri))

    def turn(found: re.Match[str]) -> str:
        before, target, anchor = found[1], found[2], found[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if path == "bench/README.md" and anchor[1:] in benchmarks.NAMES:
            to, anchor = f"benchmarks/{anchor[1:]}.md", ""
        elif path in _MIRRORED:
            to = _MIRRORED[path]
        elif _is_outside(path):
            to = _source(path)
        elif path.startswith("docs/"):
            to = path.removeprefix("docs/")
        else:
            return found[0]
        return before + posixpath.relpath(to, posixpath.dirname(uri) or ".") + anchor

    if uri.startswith("source/"):
        return markdown
    return _LINK.sub(turn, _PART.sub(lambda found: reference.PARTS[found[1]](), markdown))


def _origin(uri: str) -> str:
    """Return the file of the repository whose text is a page."""
    if uri.startswith("benchmarks/"):
        return "bench/README.md"
    return next((path for path in _COPIED if _MIRRORED[path] == uri), f"docs/{uri}")


def _targets(origin: str, text: str) -> set[str]:
    """Return the paths outside of docs/ that a page links to."""
    folder = posixpath.dirname(origin)
    paths = {posixpath.normpath(posixpath.join(folder, found[2])) for found in _LINK.finditer(text)}
    return {path for path in paths if _is_outside(path)}


def _is_outside(path: str) -> bool:
    return "://" not in path and ":/" not in path and not path.startswith(("docs/", "..")) and (ROOT / path).exists()


def _source(path: str) -> str:
    """Return the page that shows a file or folder of the repository."""
    return f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"


def _listing(path: Path) -> str:
    """Return the content of a file, or the names in a folder, as a page."""
    title = f"# {path.relative_to(ROOT)}\n\n"
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir() if not child.name.startswith((".", "__")))
        return title + "".join(f"- `{name}`\n" for name in names)
    return title + f"`````{_LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}\n`````\n"
