"""Pages as a reader follows them: block by block, in a folder of the page's own."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hvpd._cli import main
from tests.support.serving import Serving

ROOT = Path(__file__).parents[2]

_BLOCK = re.compile(r'^```(\w*)(?: title="([^"\n]*)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)

_STAND_INS = {
    "hvpd": '[ "$1" != serve ] || { shift; set -- serve --check-config "$@"; }; exec PYTHON -m hvpd._cli "$@"',
    "python": '[ "$1 $2" != "-m venv" ] || { mkdir -p "$3/bin"; cp BIN/pip "$3/bin"; touch "$3/bin/activate"; exit; }; '
    'exec PYTHON "$@"',
    "pip": "exit 0",
    "make": 'exec make --dry-run -C ROOT "$@"',
    "kubectl": 'command -v kubectl > BIN/found || exit 0; exec kubectl "$@" --dry-run=client -o name',
}
"""Scripts in the place of commands that need a network, or that run until a signal. The
environment is the test's, and the servers that a page starts are started by `Reader`.
"""


@dataclass(frozen=True)
class Block:
    """A code block: its language, the file that it is written to, its code and line."""

    language: str
    title: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Return the fenced code blocks of a page."""
    text = page.read_text()
    return [Block(*found.groups(), text.count("\n", 0, found.start(3))) for found in _BLOCK.finditer(text)]


def indented(page: Path) -> Iterator[str]:
    """Yield the first line of each indented code block, which has no language."""
    before, fenced = "", False
    for line in page.read_text().splitlines():
        fenced ^= line.startswith("```")
        if not fenced and line.startswith("    ") and not re.match(r" |!!!|:::|[-*] |\d+\. ", before):
            yield line
        before = line or before


class Reader:
    """A reader with a shell in a folder.

    Args:
        folder: The working directory, which is the home directory, too.
        start: Start a server: start(*flags).
        starts: Whether the reader starts the page's servers. Otherwise the settings of
            `hvpd serve` are checked.
    """

    def __init__(self, folder: Path, start: Callable[..., Serving], *, starts: bool) -> None:
        self.written: dict[str, str] = {}
        """Texts of the page, and the texts to take for them, such as an address."""
        self.environment = {"HOME": str(folder), "HVPD_PORT": "0"}
        """Variables of the commands, which `export` changes."""
        self.typed = ""
        """What the commands read from the terminal."""
        self.lines: list[str] = []
        """What the servers said."""
        self._folder, self._start, self._starts = folder, start, starts
        self._serving: dict[str, Serving] = {}
        self._bin = folder / ".bin"
        self._bin.mkdir()
        path = os.environ["PATH"]
        places = {"PYTHON": sys.executable, "ROOT": str(ROOT), "BIN": str(self._bin)}
        for name, template in _STAND_INS.items():
            script = re.sub(r"\b(PYTHON|ROOT|BIN)\b", lambda found: shlex.quote(places[found[0]]), template)
            (self._bin / name).write_text(f"#!/bin/sh\nPATH={shlex.quote(path)}\n{script}\n")
            (self._bin / name).chmod(0o755)
        (self._bin / "python3").symlink_to("python")
        self._path = f"{self._bin}:{path}"

    def here(self, code: str) -> str:
        """Return code with the addresses and paths of this reader."""
        for written, meant in self.written.items():
            code = code.replace(written, meant)
        return code

    def follow(self, code: str) -> None:
        """Run the commands of a block. Servers go on.

        Commands of hvpd alone run in this process, which takes a tenth of the time.
        """
        lines = code.splitlines()
        if not all(re.fullmatch(r"hvpd [^$|;&<>`]*?( +# .*)?", line) for line in lines):
            served = [line for line in lines if self._starts and line.startswith("hvpd serve ")]
            self._shell("\n".join(self.here(line) for line in lines if line not in served))
            lines = served
        for line in lines:
            _, command, *flags = shlex.split(self.here(line), comments=True)
            if command != "serve":
                assert main.main([command, *flags]) == 0, line
            elif self._starts:
                self._serve(shlex.split(line, comments=True)[2:])
            else:
                assert main.main([command, "--check-config", *flags]) == 0, line

    def _shell(self, code: str) -> None:
        exported = self._folder / ".exported"
        done = subprocess.run(
            ["bash", "-eu", "-c", f"{code}\nenv -0 > {shlex.quote(str(exported))}"],
            cwd=self._folder,
            env=os.environ | self.environment | {"PATH": self._path},
            input=self.typed,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{code}{done.stdout}{done.stderr}"
        variables = (line.partition("=") for line in exported.read_text().split("\0"))
        self.environment |= {name: value for name, _, value in variables if name.startswith("HVPD_")}

    def _serve(self, flags: list[str]) -> None:
        """Start a server, in place of one that the page started at this port."""
        port = flags[flags.index("--port") + 1] if "--port" in flags else "7070"
        if server := self._serving.get(port):
            assert server.terminate() == 0
            server.start()
        else:
            given = [self.here(flag) if flag != port else "0" for flag in flags]
            server = self._serving[port] = self._start(*given)
        self.lines = server.lines
        self.written[f"localhost:{port}"] = self.environment["HVPD_ADDRESS"] = server.address
        self.written[port] = str(server.port)
