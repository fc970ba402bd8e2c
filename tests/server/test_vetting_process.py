"""The vetter is a process that may crash, hang or lie, and then starts again."""

import ast
import contextlib
import dataclasses
import hashlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvpd_server.admission import spawn, vetting
from hvpd_server.admission.session import UnsupportedError
from hvpd_server.derivation import compiling
from hvpd_server.errors import Code, ServiceError
from hvpd_server.importer import refusals
from hvpd_server.importer.refusals import Limits
from tests.support.vetting import PLAIN, made, parts, refused

pytestmark = pytest.mark.slow  # Real programs, compiled and run.


START = spawn.start


@pytest.fixture
def told(monkeypatch, forked_vetters):
    """Return a function that starts vetters whose forks run code instead of reading:
    told(code, **limits).
    """
    opened = []

    def told(code, **limits):
        program = (
            "import os, signal, sys, time, ctypes\n"
            "from hvpd.v1 import objective_pb2\n"
            "from hvpd_server.admission import vetting_process\n"
            "def derive(programs, platform, limits, derivation):\n"
            f"{textwrap.indent(textwrap.dedent(code), '    ')}\n"
            "    return objective_pb2.Derivation(mode=f'told of {platform}')\n"
            "vetting_process.derive = derive\n"
            "vetting_process.main()\n"
        )
        monkeypatch.setattr(spawn, "COMMAND", ["-c", program])
        opened.append(vetting.Vetter(dataclasses.replace(Limits(), **limits)))
        return opened[-1]

    yield told
    for vetter in opened:
        vetter.close()


@pytest.mark.parametrize(
    ("code", "reason", "says"),
    [
        ("ctypes.string_at(0)", refusals.VETTING_FAILED, "SIGSEGV"),
        ("os.abort()", refusals.VETTING_FAILED, "SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGKILL)", refusals.VETTING_FAILED, "SIGKILL"),
        (
            "from jaxlib.mlir import ir\nir.Module.parse('module {' * 100_000 + '}' * 100_000, ir.Context())",
            refusals.VETTING_FAILED,
            "SIGSEGV",
        ),
        ("os._exit(3)", refusals.VETTING_FAILED, "code 3"),
        ("os._exit(0)", refusals.VETTING_FAILED, "said nothing"),
        ("return 3", refusals.VETTING_FAILED, "AttributeError"),
        ("bytearray(1 << 31)", refusals.VETTING_FAILED, "64 MiB of memory"),
        ("while True: pass", refusals.VETTING_TIMEOUT, "1 s of computing"),
        ("recursive = lambda: recursive()\nrecursive()", refusals.VETTING_FAILED, "RecursionError"),
        (
            "os.write(os.open(os.environ['HOME'] + '/.hvpd-test', os.O_CREAT | os.O_WRONLY), b'x')",
            refusals.VETTING_FAILED,
            "OSError",
        ),
    ],
)
def test_a_reader_that_fails_in_any_way_refuses_and_the_next_program_is_read(
    told, tmp_path, monkeypatch, code, reason, says
):
    monkeypatch.setenv("HOME", str(tmp_path))
    vetter = told(
        f"if programs['objective'] == b'bad':\n{textwrap.indent(code, '    ')}", memory_bytes=64 << 20, cpu_seconds=1
    )
    for _ in range(2):
        refused(vetter, b"bad", reason, says)
        assert vetter.vet(parts(PLAIN, objective=b"good"), "tpu").mode == "told of tpu"


@pytest.mark.parametrize("code", ["signal.pause()", "os.closerange(3, 100); signal.pause()"])
def test_one_that_waits_for_ever_is_ended(told, code):
    """It is ended also if it has closed the pipe for its verdict."""
    vetter = told(code, seconds=0.2)
    refused(vetter, b"", refusals.VETTING_TIMEOUT, "0.2 s")


def test_one_that_says_too_much_is_ended(told):
    vetter = told("raise vetting_process.Refused('OPERATION_REFUSED', 'x' * 10_000_000)")
    refused(vetter, b"", refusals.OPERATION_REFUSED)


def test_a_derivation_that_is_too_long_is_a_refusal(told):
    vetter = told("if programs['objective'] == b'bad': return objective_pb2.Derivation(programs=['x' * 10_000_000])")
    refused(vetter, b"bad", refusals.VETTING_FAILED)
    vetter.vet(parts(PLAIN))


def test_a_long_derivation_comes_back_whole(told):
    vetter = told("return objective_pb2.Derivation(programs=[str(number) for number in range(200_000)])")
    assert vetter.vet(parts(PLAIN)).programs == [str(number) for number in range(200_000)]


def test_words_of_a_program_do_not_reach_a_terminal_as_they_are(told):
    text = "\\x1b[31mred\\r\\n\\tover\\u202ethere \\U0001f600"
    says = refused(
        told(f"raise vetting_process.Refused('OPERATION_REFUSED', '{text}')"), b"", refusals.OPERATION_REFUSED
    )
    assert says == "the registration is refused: ?[31mred over?there \U0001f600"


def test_a_reason_that_is_unknown_is_none(told):
    refused(
        told("raise vetting_process.Refused('BECAUSE', 'no')"),
        b"",
        refusals.VETTING_FAILED,
        "the registration is refused: no",
    )


def test_a_fork_has_neither_the_servers_streams_nor_its_environment(told, monkeypatch, capfd):
    monkeypatch.setattr(spawn, "start", START)  # By its true command line.
    for name in ("HVPD_SECRET", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "XLA_FLAGS", "NVIDIA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "secret")
    vetter = told(
        """
        os.write(1, b"out"); os.write(2, b"err")
        open_ones = [os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
        raise vetting_process.Refused("OPERATION_REFUSED", f"{sorted(os.environ)} {sorted(open_ones)}")
        """
    )
    says = refused(vetter, b"", refusals.OPERATION_REFUSED)
    names = set(ast.literal_eval(says[says.index("[") : says.index("]") + 1]))
    kept = {name for name in names if re.match("XLA_|NVIDIA_|CUDA_|ROCR_|HIP_|TPU_", name)}
    assert {"XLA_FLAGS", "NVIDIA_VISIBLE_DEVICES"} <= kept
    named = {"PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "VIRTUAL_ENV"}
    named |= {"PYTHONHOME", "PYTHONPATH", "JAX_PLATFORMS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"}
    assert names - kept <= named | {"GLIBC_TUNABLES", "TF_CPP_MIN_LOG_LEVEL"}
    assert "JAX_PLATFORMS" in names
    assert says.count("socket") == 1  # It answers on that socket.
    assert capfd.readouterr() == ("", "")


def test_reading_and_compiling_have_a_lower_priority_than_the_server(told, monkeypatch):
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    says = refused(
        told("raise vetting_process.Refused('OPERATION_REFUSED', f'nice {os.nice(0)}')"),
        b"",
        refusals.OPERATION_REFUSED,
    )
    assert says.endswith(f"nice {min(ours + 10, 19)}")
    program = (
        "import os\n"
        "from hvpd_server.admission import vetting_process\n"
        "from hvpd_server.derivation import compiling\n"
        "def compile_program(*args, **settings):\n"
        "    raise ValueError(f'nice {os.nice(0)}')\n"
        "compiling.compile_program = compile_program\n"
        "vetting_process.main()\n"
    )
    monkeypatch.setattr(spawn, "COMMAND", ["-c", program])
    with contextlib.closing(vetting.Vetter()) as compiles, pytest.raises(ServiceError) as error:
        compiled(compiles, "hvp", 1)
    assert str(error.value).endswith(f"nice {min(ours + 10, 19)}")


def test_a_process_that_dies_is_started_again(vetter):
    good = parts(PLAIN)
    vetter.vet(good)
    before = vetter._process
    before.kill()
    before.wait()
    vetter.vet(good)
    assert vetter._process is not before


def order(name, width=0, rows=0):
    return {"rows": rows, "name": name, "width": width, "devices": [0], "data": 0, "deterministic": False}


GIVEN = parts(PLAIN)


def ask(vetter, derived, name, width):
    return vetter.compile(vetting.key_of(GIVEN["bundle"]), lambda: GIVEN, derived, "cpu", order(name, width))


def compiled(vetter, name, width=0, parts_=None, platform="cpu"):
    given = parts_ or parts(PLAIN)
    key = hashlib.sha256(given["bundle"]).hexdigest()
    return vetter.compile(key, lambda: given, vetter.vet(given, platform), platform, order(name, width))


def test_compiles_go_on_when_the_process_is_killed(vetter, start):
    """Several compile at a time. Each starts the process again, and none ends a process
    that another has started.
    """
    given = parts(PLAIN)
    key, derived = hashlib.sha256(given["bundle"]).hexdigest(), vetter.vet(given)
    futures = [start(vetter.compile, key, lambda: given, derived, "cpu", order("hvp", width)) for width in (1, 2, 3, 4)]
    vetter._process.kill()
    for future in futures:
        compiling.load(future.result(120), jax.devices()[:1])


@pytest.mark.parametrize(
    ("work", "reason", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", refusals.COMPILE_FAILED, "SIGSEGV"),
        ("os._exit(0)", refusals.COMPILE_FAILED, "said nothing"),
        ("signal.pause()", refusals.COMPILE_FAILED, "more than 0.5 s"),
        ("bytearray(1 << 40)", refusals.COMPILE_FAILED, "cannot be compiled in 16384 MiB of memory"),
        ("raise RuntimeError('RESOURCE_EXHAUSTED: no memory')", refusals.DEVICE_MEMORY, "no memory"),
        ("raise RuntimeError('XLA does not know this')", refusals.COMPILE_FAILED, "XLA does not know this"),
    ],
)
def test_a_compile_that_ends_badly_is_an_answer_and_the_next_one_is_compiled(
    monkeypatch, forked_vetters, work, reason, says
):
    program = (
        "import os, signal\n"
        "from hvpd_server.admission import vetting_process\n"
        "from hvpd_server.derivation import compiling\n"
        "compile_program = compiling.compile_program\n"
        "def bad(sized, name, *args, **settings):\n"
        f"    if name == 'hvp': {work}\n"
        "    return compile_program(sized, name, *args, **settings)\n"
        "compiling.compile_program = bad\n"
        "vetting_process.main()\n"
    )
    monkeypatch.setattr(spawn, "COMMAND", ["-c", program])
    seconds = 0.5 if "pause" in work else 60
    with contextlib.closing(vetting.Vetter(dataclasses.replace(Limits(), compile_seconds=seconds))) as vetter:
        for _ in range(2):
            with pytest.raises(ServiceError, match=r"the server cannot compile hvp \(width 1\): ") as error:
                compiled(vetter, "hvp", 1)
            assert error.value.reason == reason
            assert says in str(error.value)
            if "pause" not in work:
                compiling.load(compiled(vetter, "value_and_grad"), jax.devices()[:1])


def test_forks_find_jax_and_scipy_imported(monkeypatch):
    """A compile that imports scipy.linalg takes twice as long."""
    program = (
        "import sys\n"
        "from hvpd_server.admission import vetting_process\n"
        "from hvpd_server.derivation import compiling\n"
        "import_all, compile_program = vetting_process._import_all, compiling.compile_program\n"
        "def imported():\n"
        "    import_all()\n"
        "    known.update(sys.modules)\n"
        "def late(*args, **settings):\n"
        "    compile_program(*args, **settings)\n"
        "    found = {name.split('.')[0] for name in set(sys.modules) - known}\n"
        "    raise vetting_process.Refused('COMPILE_FAILED', f'late: {sorted(found & set(\"jax jaxlib numpy scipy\".split()))}')\n"
        "known = set()\n"
        "vetting_process._import_all, compiling.compile_program = imported, late\n"
        "vetting_process.main()\n"
    )
    monkeypatch.setattr(spawn, "COMMAND", ["-c", program])
    factored = made(lambda x: jnp.sum(jnp.linalg.cholesky(jnp.eye(3) + jnp.outer(x, x))), np.zeros(3))
    with (
        contextlib.closing(vetting.Vetter()) as vetter,
        pytest.raises(ServiceError, match=r"late: \[\]"),
    ):
        compiled(vetter, "hvp", 1, parts(factored))


def test_a_backend_that_cannot_serialize_is_told_apart(monkeypatch, forked_vetters):
    program = (
        "from hvpd_server.admission import vetting_process\n"
        "from hvpd_server.derivation import compiling\n"
        "compiling.dump = lambda compiled: 1 / 0\n"
        "vetting_process.main()\n"
    )
    monkeypatch.setattr(spawn, "COMMAND", ["-c", program])
    with (
        contextlib.closing(vetting.Vetter()) as vetter,
        pytest.raises(UnsupportedError, match="ZeroDivision"),
    ):
        compiled(vetter, "hvp", 1)


def test_sessions_that_compile_nothing_end(vetter):
    compiled(vetter, "hvp", 1)
    assert vetter._sessions
    vetter.sweep(-1.0)
    assert not vetter._sessions
    compiled(vetter, "hvp", 1)


@pytest.fixture
def told_pids(monkeypatch, forked_vetters):
    """Return a vetter whose compiles return the number of their process, wait for a
    file named after the program, and end if the program is `hvp` of width 13.
    """

    def open_vetter(folder):
        program = (
            "import os, time\n"
            "from hvpd_server.admission import vetting_process\n"
            "from hvpd_server.derivation import compiling\n"
            "def compile_program(sized, name, width, *args, **settings):\n"
            "    if width == 13: os._exit(3)\n"
            f"    fifo = {str(folder)!r} + f'/{{name}}-{{width}}'\n"
            "    if os.path.exists(fifo): open(fifo).read()\n"
            "    return str(os.getpid()).encode()\n"
            "compiling.compile_program, compiling.dump = compile_program, lambda compiled: compiled\n"
            "vetting_process.main()\n"
        )
        monkeypatch.setattr(spawn, "COMMAND", ["-c", program])
        return contextlib.closing(vetting.Vetter())

    return open_vetter


def test_one_process_compiles_the_programs_of_a_bundle(told_pids, tmp_path):
    with told_pids(tmp_path) as vetter:
        derived = vetter.vet(GIVEN)
        pids = {ask(vetter, derived, "hvp", width) for width in (1, 2, 4)}
        assert len(pids) == 1


def test_a_program_that_ends_its_process_fails_alone(told_pids, tmp_path):
    with told_pids(tmp_path) as vetter:
        derived = vetter.vet(GIVEN)
        before = ask(vetter, derived, "hvp", 1)
        with pytest.raises(ServiceError, match=r"hvp \(width 13\): .* code 3"):
            ask(vetter, derived, "hvp", 13)
        assert ask(vetter, derived, "hvp", 2) != before


def test_a_program_waits_for_a_short_compile_and_not_for_a_long_one(told_pids, tmp_path, start, monkeypatch):
    long = tmp_path / "hvp-1"
    os.mkfifo(long)
    with told_pids(tmp_path) as vetter:
        derived = vetter.vet(GIVEN)
        first = start(ask, vetter, derived, "hvp", 1)
        with long.open("w"):  # The first compile runs.
            monkeypatch.setattr(vetting, "_WAIT", 0.0)
            other = ask(vetter, derived, "hvp", 2)
            monkeypatch.setattr(vetting, "_WAIT", 60.0)
        assert first.result(60) != other


def test_a_program_whose_objective_is_deleted_meanwhile_says_so(vetter):
    """Its programs are gone when the session reads them."""
    derived = vetter.vet(GIVEN)
    vetter.sweep(-1.0)

    def gone():
        raise ServiceError(Code.FAILED_PRECONDITION, "BLOBS_MISSING", "gone")

    def deleted():
        raise ServiceError(Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND", "deleted")

    for check, reason in [(deleted, "OBJECTIVE_NOT_FOUND"), (lambda: None, "BLOBS_MISSING")]:
        with pytest.raises(ServiceError) as error:
            vetter.compile(vetting.key_of(GIVEN["bundle"]), gone, derived, "cpu", order("hvp", 1), check)
        assert error.value.reason == reason


def test_a_compile_that_needs_more_than_its_memory_is_refused(vetter):
    """XLA itself runs out of memory here. With the default limit it does not."""
    compiling.load(compiled(vetter, "hvp", 1), jax.devices()[:1])
    with contextlib.closing(vetting.Vetter(Limits(compile_memory_bytes=64 << 20))) as narrow:
        with pytest.raises(ServiceError, match=r"cannot compile hvp .* take more than 64 MiB") as error:
            compiled(narrow, "hvp", 1)
    assert error.value.reason == refusals.COMPILE_FAILED


@pytest.fixture
def as_for_a_gpu(monkeypatch, forked_vetters):
    """Have programs compiled for the CPU by a process that has the limits of a GPU's.
    Return a function that starts a vetter whose compiles run code first.
    """

    def start(code, **limits):
        program = (
            "import jax, mmap, os\n"
            "from hvpd_server.admission import vetting_process\n"
            "from hvpd_server.derivation import compiling\n"
            "from hvpd_server.importer.table import Refused\n"
            "compile_program = compiling.compile_program\n"
            "def driven(*args, **settings):\n"
            f"{textwrap.indent(textwrap.dedent(code), '    ')}\n"
            "    return compile_program(*args, **settings)\n"
            "compiling.compile_program = driven\n"
            "vetting_process._devices = lambda platform, pretended: {each.id: each for each in jax.local_devices()}\n"
            "vetting_process.main()\n"
        )
        monkeypatch.setattr(spawn, "COMMAND", ["-c", program])
        return contextlib.closing(vetting.Vetter(dataclasses.replace(Limits(), **limits)))

    return start


DRIVER = """
anonymous = mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python 3.11 does not know
reserved = mmap.mmap(-1, 1 << 40, mmap.MAP_PRIVATE | anonymous, prot=0)
shared = mmap.mmap(-1, 1 << 40, mmap.MAP_SHARED | anonymous)
"""
"""What the driver of a GPU does: it reserves addresses, and maps the device."""


def test_a_driver_may_reserve_addresses_without_end(as_for_a_gpu):
    with as_for_a_gpu(DRIVER) as vetter:
        compiling.load(compiled(vetter, "hvp", 1, platform="cuda"), jax.devices()[:1])


def test_a_compile_for_a_gpu_has_a_limit_on_memory(as_for_a_gpu):
    taken = DRIVER + "mmap.mmap(-1, 1 << 30, mmap.MAP_PRIVATE | anonymous)"
    for limit, fits in [(2 << 30, True), (1 << 30, False)]:
        with as_for_a_gpu(taken, compile_memory_bytes=limit) as vetter:
            if fits:
                compiled(vetter, "hvp", 1, platform="cuda")
                continue
            with pytest.raises(ServiceError, match="Cannot allocate memory") as error:
                compiled(vetter, "hvp", 1, platform="cuda")
            assert error.value.reason == refusals.COMPILE_FAILED


@pytest.mark.parametrize(
    ("platform", "size", "says"),
    [("cuda", 1 << 20, "written"), ("cuda", 3 << 30, "File too large"), ("cpu", 1, "File too large")],
)
def test_a_driver_may_write_files_of_some_size(as_for_a_gpu, platform, size, says):
    code = f"os.ftruncate(os.memfd_create('cache'), {size})\nraise Refused('COMPILE_FAILED', 'written')"
    with as_for_a_gpu(code) as vetter, pytest.raises(ServiceError, match=says) as error:
        compiled(vetter, "hvp", 1, platform=platform)
    assert error.value.reason == refusals.COMPILE_FAILED


def test_on_a_system_without_a_limit_on_memory_the_log_says_so(monkeypatch, caplog):
    process = types.SimpleNamespace(wait=lambda timeout: 0)
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **settings: process)
    with contextlib.closing(vetting.Vetter()) as vetter:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(sys, "platform", "darwin")
            vetter.start()
        assert caplog.messages == ["programs are read without a limit on memory: darwin has none"]


@pytest.mark.parametrize(
    "command", [["-c", "raise SystemExit(1)"], ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]]
)
def test_one_that_cannot_be_had_is_not_the_bundles_fault(monkeypatch, command):
    monkeypatch.setattr(spawn, "COMMAND", command)
    with contextlib.closing(vetting.Vetter()) as broken, pytest.raises(ServiceError) as error:
        broken.vet(parts(PLAIN, objective=b""))
    assert (error.value.code, error.value.reason) == (Code.UNAVAILABLE, "VETTING_UNAVAILABLE")
    assert error.value.retry_after == 1


def test_a_vetter_that_is_closed_says_so():
    vetter = vetting.Vetter()
    vetter.close()
    with pytest.raises(ServiceError) as error:
        vetter.vet({"bundle": b""})
    assert (error.value.code, error.value.reason) == (Code.UNAVAILABLE, "SHUTTING_DOWN")


def test_kill_9_of_the_server_leaves_no_process_behind(tmp_path):
    """Neither the process that waits for work stays, nor the one that reads. Both hold
    a pipe open for as long as they live.
    """
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = f"""
import os, signal
from hvpd_server.admission import vetting_process
alive = os.open({str(pipe)!r}, os.O_WRONLY)
def derive(programs, platform, limits, derivation):
    os.write(alive, b"reading")
    signal.pause()
vetting_process.derive = derive
vetting_process.main()
"""
    owning = f"""
from hvpd_server.admission import spawn, vetting
spawn.COMMAND = ["-c", {reading!r}]
vetting.Vetter().vet({{"bundle": b""}})
"""
    with subprocess.Popen([sys.executable, "-c", owning]) as owner, pipe.open("rb", buffering=0) as alive:
        assert alive.read(100) == b"reading"
        owner.send_signal(signal.SIGKILL)
        assert alive.read(100) == b""
