"""Writes the Python stubs of proto/hvpd into client/, or checks that the committed ones
are fresh (--check). googleapis-common-protos brings the stubs of proto/google.
"""

import argparse
import importlib.resources
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def generate(target: Path) -> None:
    """Generate messages, services and their type stubs below `target`."""
    sources = sorted(str(path) for path in (ROOT / "proto/hvpd").rglob("*.proto"))
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc"),
            *(f"-I{include}" for include in (ROOT / "proto", well_known)),
            *(f"--{kind}_out={target}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
            *sources,
        ],
        check=True,
        # The mypy plugins are commands beside this interpreter.
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"},
    )


def stubs(root: Path) -> dict[str, bytes]:
    """Return the generated files below `root` by their relative names."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.glob("hvpd/v1/*_pb2*.py*")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the committed stubs are stale")
    if not parser.parse_args().check:
        generate(ROOT / "client")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh, committed = stubs(Path(scratch)), stubs(ROOT / "client")
    stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    if stale:
        print("stale stubs, run `make stubs`:", *stale, sep="\n  ", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
