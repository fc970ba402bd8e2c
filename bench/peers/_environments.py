"""An environment for each peer, with the versions that its file of this folder pins.

`PEER.txt` has one `package==version` a line, all that `pip freeze` said after an
installation. The environments are in build/peers, and stay for later runs.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).parent
_ROOT = _FOLDER.parents[1]
_PATIENCE_SECONDS = 1200


class NotInstalledError(Exception):
    """A peer's packages cannot be installed on this machine. The text says why."""


def python(name: str, *, system: bool = False, folder: Path = _ROOT / "build/peers") -> Path:
    """Return the interpreter of a peer's environment. Make the environment first, if
    its versions are not there yet.

    Args:
        name: The peer.
        system: Whether the environment has the system's interpreter, not this one.
        folder: Where the environments are.

    Raises:
        NotInstalledError: pip failed.
    """
    pins = _FOLDER / f"{name}.txt"
    place = folder / name
    found, mark = place / "bin/python", place / "installed"
    base = (shutil.which("python3", path=os.defpath) if system else None) or sys.executable
    digest = hashlib.sha256(pins.read_bytes() + base.encode()).hexdigest()
    if mark.exists() and mark.read_text() == digest:
        return found
    print(f"peers: installing {name} into {place}", file=sys.stderr, flush=True)
    _done([base, "-m", "venv", "--clear", "--without-pip", str(place)])
    pip = [sys.executable, "-m", "pip", "--python", str(found), "install", "--quiet", "--no-input"]
    _done([*pip, "--disable-pip-version-check", "-r", str(pins)])
    mark.write_text(digest)
    return found


def _done(argv: Sequence[str]) -> None:
    """Run a command.

    Raises:
        NotInstalledError: It failed.
    """
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise NotInstalledError(f"an installation took more than {_PATIENCE_SECONDS} s") from None
    if done.returncode:
        raise NotInstalledError(reason(done.stderr + done.stdout))


def reason(output: str) -> str:
    """Return the last error of a failed command's output, in one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no output"])[-1][:300]
