"""How the server starts the process of `vetting_process`, and what it calls the parts
of a registration.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import hvpd

BUNDLE: Final = "bundle"
"""Name of the bundle among a registration's programs."""

DERIVATION: Final = "derivation"
"""Name of an earlier session's derivation among them, and in a verdict."""

COMMAND = ["-m", "hvpd_server.admission.vetting_process"]

_KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")
"""Variables of the process's environment, beside `_KEPT_PREFIXES`. Credentials are not
among them.
"""

_ALLOCATOR = (
    "glibc.malloc.hugetlb=1:glibc.malloc.top_pad=8388608:"
    "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=536870912"
)
"""Settings of glibc's allocator: take huge pages, and keep freed memory. With them, a
compile has a third fewer page faults. https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html
"""

_KEPT_PREFIXES = ("XLA_", "CUDA_", "NVIDIA_", "ROCR_", "HIP_", "TPU_")


def start(stdin: int, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start the process.

    Args:
        stdin: The socket to the process. The end of this stream tells the process that
            the server has ended, even by a crash.
        environment: The process's environment.
    """
    return subprocess.Popen(  # noqa: S603 - this interpreter, our own module
        [sys.executable, "-P", *COMMAND],
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # Ctrl-C goes to the server alone, which may still need an answer.
    )


def environment() -> dict[str, str]:
    """Return the process's environment, from that of the server."""
    found = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    roots = dict.fromkeys([str(Path(hvpd.__file__).parents[1]), str(Path(__file__).parents[2])])
    paths = [*roots, *filter(None, [found.get("PYTHONPATH")])]
    return found | {
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",  # Only a fork that compiles opens the device.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # The server needs the device's memory.
        "GLIBC_TUNABLES": _ALLOCATOR,
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
