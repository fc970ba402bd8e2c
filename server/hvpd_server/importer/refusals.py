"""Reasons to refuse a program, and limits of its size.

The operations that it may have are in `importer.table`.
"""

import dataclasses
import hashlib
import importlib.metadata
from pathlib import Path
from typing import Final

OPERATION_REFUSED: Final = "OPERATION_REFUSED"
"""Reason: an operation, call or attribute that is not listed."""

PROGRAM_TOO_LARGE: Final = "PROGRAM_TOO_LARGE"
"""Reason: nested too deeply, or too many operations, or constants or arrays that are
too large.
"""

VETTING_FAILED: Final = "VETTING_FAILED"
"""Reason: the process that read the program crashed, or ran out of its memory."""

VETTING_TIMEOUT: Final = "VETTING_TIMEOUT"
"""Reason: reading the program took too long."""

BUNDLE_INCOMPATIBLE: Final = "BUNDLE_INCOMPATIBLE"
"""Reason: no program that this version of jax can read."""

BUNDLE_INVALID: Final = "BUNDLE_INVALID"
"""Reason: a program that contradicts its own signature."""

NOT_DIFFERENTIABLE: Final = "NOT_DIFFERENTIABLE"
"""Reason: jax cannot take the second derivative of the objective."""

COMPILE_FAILED: Final = "COMPILE_FAILED"
"""Reason: XLA cannot compile a program, or crashed over it."""

DEVICE_MEMORY: Final = "DEVICE_MEMORY"
"""Reason: the device has too little memory to compile a program now."""

REASONS: Final = frozenset(
    [
        OPERATION_REFUSED,
        PROGRAM_TOO_LARGE,
        VETTING_FAILED,
        VETTING_TIMEOUT,
        BUNDLE_INCOMPATIBLE,
        BUNDLE_INVALID,
        NOT_DIFFERENTIABLE,
        COMPILE_FAILED,
        DEVICE_MEMORY,
    ]
)


@dataclasses.dataclass(frozen=True)
class Allowance:
    """Limits of one process, and the texts about its end."""

    did: str
    """The process's work in the past tense, such as "read"."""
    failed: str
    """Reason if it crashes."""
    late: str
    """Reason if it takes too long."""
    memory_bytes: int
    cpu_seconds: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a program, and of reading all programs of a bundle."""

    memory_bytes: int = 4 << 30
    """Private writable memory, beyond that of the process before it reads."""
    cpu_seconds: int = 120
    """Seconds of computing."""
    seconds: float = 300.0
    """Seconds in all."""
    compile_memory_bytes: int = 16 << 30
    """Private writable memory for compiling one program, beyond what the process has
    before it compiles.
    """
    compile_cpu_seconds: int = 36_000
    """Seconds of computing for compiling one program."""
    compile_seconds: float = 3600.0
    """Seconds in all for compiling one program; 0: for ever."""
    bundle_bytes: int = 512 << 20
    """Size of all serialized programs."""
    operations: int = 1_000_000
    """Operations of one program; a function's count as often as it is called."""
    nesting: int = 64
    """Operations inside each other."""
    calls: int = 64
    """Functions that call each other, in a chain."""
    constant_bytes: int = 256 << 20
    """Constants of one program, written out."""
    array_bytes: int = 1 << 50
    """One array, its symbolic extents taken as 1. It need never be in memory as a
    whole; but arithmetic with such sizes overflows.
    """
    rank: int = 64
    """Axes of an array."""

    def reading(self) -> Allowance:
        """Return the limits for reading a bundle."""
        return Allowance("read", VETTING_FAILED, VETTING_TIMEOUT, self.memory_bytes, self.cpu_seconds, self.seconds)

    def compiling(self) -> Allowance:
        """Return the limits for compiling a program."""
        return Allowance(
            "compiled",
            COMPILE_FAILED,
            COMPILE_FAILED,
            self.compile_memory_bytes,
            self.compile_cpu_seconds,
            self.compile_seconds,
        )


def version() -> str:
    """Return the version of the code that reads and differentiates programs: these
    files, and jax.
    """
    root = Path(__file__).parents[1]
    state = hashlib.sha256()
    for path in sorted([*(root / "importer").glob("*.py"), *(root / "derivation").glob("*.py")]):
        state.update(path.read_bytes())
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib"))
    return f"{state.hexdigest()[:16]} {versions}"
