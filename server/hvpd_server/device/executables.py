"""The executables of one objective: loaded from the store's cache, or compiled by
another process. Knows no gRPC.

The server itself does not read, trace or lower a program, so that no program can stop
or crash it.
"""

import contextlib
import hashlib
import logging
import os
import platform as machine
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hvpd.v1 import objective_pb2
from hvpd_server.admission.session import UnsupportedError
from hvpd_server.admission.spawn import BUNDLE
from hvpd_server.admission.vetting import Vetter, key_of
from hvpd_server.derivation import compiling
from hvpd_server.derivation.compiling import Compiled, Target
from hvpd_server.derivation.programs import ITERATIONS, Derivation
from hvpd_server.device.leaves import LeafProgram
from hvpd_server.errors import Code, ServiceError, invalid
from hvpd_server.files import atomic_file
from hvpd_server.importer import reader, refusals
from hvpd_server.importer.table import Refused
from hvpd_server.store.program_cache import ProgramCache

_log = logging.getLogger(__name__)

_USUAL_BYTES = 1 << 17
"""Bytes that an executable counts if its backend cannot serialize it."""


class Built(NamedTuple):
    """An executable that was compiled or loaded."""

    compiled: Compiled
    outcome: str
    """"compiled", or "cached" if the program was compiled before."""
    size_bytes: int
    """Bytes of the serialized executable."""


Build = Callable[[int, str, int], Built]
"""Compiles a program for a number of rows and a block width: (rows, name, width)."""


class Executables:
    """The executables of one objective.

    Args:
        digest: Digest of the bundle.
        bundle: The bundle.
        derivation: The description that the vetting process derived from the bundle.
        parts: The devices, which work as one if there are several.
        read: Reads a blob by its digest.
        vetter: Compiles, in another process.
        cache: The files of compiled programs.
        loading: Makes a context for loading an executable, or compiling one in this
            process.
        memory_bytes: Most bytes that a program may take beside its arguments; None: the
            device's allocator limits it.
        check_wanted: Raises ServiceError if the objective was deleted.
        load: Loads an executable from its bytes; by default on the parts.
        spans_processes: Whether some parts belong to other processes.
        tenants: Returns the tenants of the objective, or the one that registers it.
    """

    def __init__(
        self,
        digest: str,
        bundle: objective_pb2.Bundle,
        derivation: objective_pb2.Derivation,
        parts: Sequence[jax.Device],
        read: Callable[[str], bytes],
        vetter: Vetter,
        cache: ProgramCache,
        loading: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        memory_bytes: int | None = None,
        check_wanted: Callable[[], None] = lambda: None,
        load: Callable[[bytes], Compiled] | None = None,
        spans_processes: bool = False,
        tenants: Callable[[], Collection[str]] = lambda: (),
    ) -> None:
        self._tenants = tenants
        self._load = load or (lambda blob: compiling.load(blob, parts))
        self._spans_processes = spans_processes
        self._check_wanted = check_wanted
        self._memory_bytes = memory_bytes
        self._digest = digest
        self._bundle = bundle
        self._derivation = derivation
        self._parts = parts
        self._platform = {"gpu": "cuda"}.get(parts[0].platform, parts[0].platform)
        self._read = read
        self._vetter = vetter
        self._cache = cache
        self._loading = loading
        self._key = key_of(bundle.SerializeToString())
        self._form = _form(bundle)
        self._in_process: Build | None = None

    def __call__(self, rows: int, name: str, width: int) -> Built:
        """Return an executable.

        Raises:
            ServiceError: The program cannot be compiled.
        """
        built = self._built(rows, name, width)
        if not self._bundle.sharded_parameters or len(self._parts) == 1:
            return built
        shapes = [tuple(leaf.shape) for leaf in self._bundle.x_leaves]
        iterates = name.startswith(ITERATIONS)
        return built._replace(compiled=LeafProgram(built.compiled, shapes, width, iterates=iterates))

    def _built(self, rows: int, name: str, width: int) -> Built:
        bundle = self._bundle
        order: dict[str, object] = {
            "rows": rows,
            "name": name,
            "width": width,
            "devices": list(range(len(self._parts))) if self._spans_processes else [part.id for part in self._parts],
            "data": len(bundle.captured) + len(bundle.data),
            "deterministic": bundle.fixed_bucket > 0,
        }
        if self._spans_processes:
            order["processes"] = True
        if self._in_process is not None:
            return self._checked(self._in_process(rows, name, width), order)
        key = _fingerprint(self._form, self._parts[0], order)
        path = self._cache.path(self._digest, key)
        if not path.exists():
            self._cache.borrow(self._digest, key, self._tenants())
        found, size = self._cached(path)
        if found is not None:
            return self._checked(Built(found, "cached", size), order)
        try:
            blob = self._vetter.compile(
                self._key, self._programs, self._derivation, self._platform, order, self._check_wanted
            )
        except UnsupportedError as error:
            if self._spans_processes:
                raise ServiceError(
                    Code.FAILED_PRECONDITION,
                    "NO_GROUP",
                    f"{self._parts[0].device_kind} cannot load executables of another process, which a group needs ({error}): register the "
                    "objective without sharded",
                ) from error
            _log.warning(
                "%s cannot load executables of another process, so this server compiles by itself: a compile can now delay, or "
                "crash, all products (%s)",
                self._parts[0].device_kind,
                error,
            )
            self._in_process = InProcess(bundle, self._derivation, self._parts, self._read, self._loading)
            return self._checked(self._in_process(rows, name, width), order)
        if _write(path, blob):
            self._cache.written(self._digest, len(blob))
        with self._loading():
            found = self._load(blob)
        return self._checked(Built(found, "compiled", len(blob)), order)

    def _checked(self, built: Built, order: Mapping[str, object]) -> Built:
        """Return a program; raise ServiceError if it takes more memory than it may,
        because the kernel would kill the server.
        """
        executable: Any = built.compiled  # A compiled program of jax.
        found = executable.memory_analysis()
        if self._memory_bytes is None or found is None:
            return built
        size = found.temp_size_in_bytes + found.output_size_in_bytes
        if size > self._memory_bytes:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                refusals.DEVICE_MEMORY,
                f"{order['name']} (width {order['width']}) takes {size} bytes of memory beside its arguments, and {self._memory_bytes} "
                "are allowed: send narrower blocks, or write the objective so that it keeps smaller arrays",
            )
        return built

    def _cached(self, path: Path) -> tuple[Compiled | None, int]:
        """Return the executable in a file, and its size; None if there is none, or it
        is damaged.
        """
        try:
            content = path.read_bytes()
        except OSError:
            return None, 0
        checksum, blob = content[:32], content[32:]
        if hashlib.sha256(blob).digest() != checksum:
            _log.warning("the compiled program %s is damaged, and is compiled again", path.name)
            return None, 0
        try:
            with self._loading():
                return self._load(blob), len(blob)
        except Exception as error:  # noqa: BLE001 - after any error, the program is compiled again
            _log.warning("the compiled program %s cannot be loaded, and is compiled again: %s", path.name, error)
            return None, 0

    def _programs(self) -> Mapping[str, bytes]:
        programs = {name: self._read(program.digest) for name, program in sorted(self._bundle.programs.items())}
        return {BUNDLE: self._bundle.SerializeToString(), **programs}


class InProcess:
    """Compiles the programs of one objective in this process: for a backend that cannot
    load the executables that another process compiled.
    """

    def __init__(
        self,
        bundle: objective_pb2.Bundle,
        derivation: objective_pb2.Derivation,
        parts: Sequence[jax.Device],
        read: Callable[[str], bytes],
        loading: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._bundle = bundle
        self._target = Target(parts)
        self._loading = loading
        self._derivation = Derivation(
            bundle, lambda name: reader.read(read(bundle.programs[name].digest)), self._target.platform, derivation
        )

    def __call__(self, rows: int, name: str, width: int) -> Built:
        """Return an executable; see `Executables`."""
        bundle = self._bundle
        try:
            with self._loading():
                compiled = compiling.compile_program(
                    self._derivation.for_rows(rows),
                    name,
                    width,
                    self._target,
                    len(bundle.captured) + len(bundle.data),
                    deterministic=bundle.fixed_bucket > 0,
                )
        except ServiceError:
            raise
        except Refused as refused:
            raise invalid(refused.reason, f"the program {refused}") from None
        except Exception as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
                raise
            _log.exception("compiling %s for width %d failed", name, width)
            raise invalid(
                refusals.COMPILE_FAILED, f"the server cannot compile {name} (width {width}): {error}"
            ) from error
        return Built(compiled, "compiled", _USUAL_BYTES)


def _form(bundle: objective_pb2.Bundle) -> str:
    """Return a digest of a bundle without the content of its arrays, which are
    arguments of the programs.
    """
    form = objective_pb2.Bundle()
    form.CopyFrom(bundle)
    for tensor in (*form.captured, *form.data):
        tensor.ClearField("digest")
    return hashlib.sha256(form.SerializeToString(deterministic=True)).hexdigest()


def _fingerprint(form: str, device: jax.Device, order: Mapping[str, object]) -> str:
    """Return a digest of everything that an executable depends on."""
    facts = [
        form,
        sorted(order.items()),
        refusals.version(),
        device.device_kind,
        device.client.platform_version,
        os.environ.get("XLA_FLAGS", ""),
        processor() if device.platform == "cpu" else "",
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def processor() -> str:
    """Return the model and the features of the CPU, because XLA compiles for them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0].splitlines()
    except OSError:
        return machine.processor()
    return "".join(sorted(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))))


def _write(path: Path, blob: bytes) -> bool:
    """Store an executable atomically, and return whether it is stored. If the disk is
    full, the next start compiles it again.
    """
    try:
        # Not durable: the checksum finds an executable that a power failure damaged.
        with atomic_file(path.parent, durable=False) as (file, commit):
            file.write(hashlib.sha256(blob).digest() + blob)
            commit(path)
    except OSError as error:
        _log.warning("a compiled program is not kept: %s", error)
        return False
    return True
