"""What has begun for a registration ends when no caller waits for it any more, unless
the objective is stored.
"""

import contextlib
import queue
import socket
import threading
import types

import pytest

from hvpd_server import app
from hvpd_server.admission import spawn, vetting
from hvpd_server.config import Config
from hvpd_server.device import executables
from hvpd_server.engine import registration
from hvpd_server.engine.registration import Registration
from hvpd_server.errors import Code
from tests.support.engine import WAIT, refusal, uploaded

pytestmark = pytest.mark.slow  # Real programs, compiled and run.

PROGRAM = """
import socket
from hvpd_server.admission import vetting_process
from hvpd_server.derivation import compiling

def hold(work):
    holder = socket.socket(socket.AF_UNIX)
    holder.connect({address!r})
    holder.send(work.encode())
    holder.recv(1)

derive, compile_program = vetting_process.derive, compiling.compile_program

def held_derive(*args):
    hold("read")
    return derive(*args)

def held_compile(sized, name, *args, **settings):
    hold(name)
    return compile_program(sized, name, *args, **settings)

vetting_process.derive, compiling.compile_program = held_derive, held_compile
vetting_process.main()
"""


class Held:
    """Processes of the vetter that wait for the test before they read or compile."""

    def __init__(self):
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("")
        self._listener.listen()
        self.address = self._listener.getsockname().decode()
        self._found = queue.SimpleQueue()
        self._free = {"read", "value_and_grad", "hvp", "prepare", "apply"}
        self._held = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                process, _ = self._listener.accept()
                process.settimeout(WAIT)
                name = process.recv(64).decode()
                if name in self._free:
                    process.close()
                else:
                    self._held.append(process)
                    self._found.put(process)

    def hold(self, *names):
        self._free -= {*names}

    def begun(self):
        """Wait for the next process that is held."""
        return self._found.get(timeout=WAIT)

    def free(self):
        """Let all go on, and hold none any more."""
        self._free |= {"read", "value_and_grad", "hvp", "prepare", "apply"}
        for process in self._held:
            process.close()

    def close(self):
        self.free()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def ended(process):
    """Wait until a held process has ended."""
    return process.recv(1) == b""


@pytest.fixture
def held():
    with contextlib.closing(Held()) as opened:
        yield opened


@pytest.fixture
def vetter(held, monkeypatch, forked_vetters):
    monkeypatch.setattr(spawn, "COMMAND", ["-c", PROGRAM.format(address=held.address)])
    # Otherwise a program that an earlier test has compiled is not compiled here.
    monkeypatch.setattr(executables.Executables, "_cached", lambda self, path: (None, 0))
    with contextlib.closing(vetting.Vetter()) as opened:
        yield opened


@pytest.fixture
def begin(start):
    """Register in another thread; return the result to come, and a function for the
    caller to give up.
    """

    def begin(engine, digest, name=""):
        latest, left = [], threading.Event()

        def on_wait(cancel):
            latest.append(cancel)
            if left.is_set():
                cancel()

        def leave():
            left.set()
            latest[-1]()

        return start(engine.registration.register, digest, name, on_wait=on_wait), leave

    return begin


@pytest.fixture
def started(tmp_path, device, vetter, monkeypatch):
    """Yield a server that has started, without a grace for callers that gave up."""
    monkeypatch.setattr(app, "devices", lambda cache: [device])
    monkeypatch.setattr(Registration.sweep, "__defaults__", (0.0,))
    server = app.App(Config(store=tmp_path / "store", port=0, vector_port="off", drain=0.0), vetter=vetter)
    server.start()
    yield server
    server.stop()


@pytest.mark.parametrize("work", ["read", "value_and_grad"])
def test_work_that_no_caller_waits_for_ends_and_can_be_repeated(open_engine, rosen, upload, held, begin, work):
    engine = open_engine()
    digest = uploaded(engine, rosen, upload)
    held.hold(work)
    result, leave = begin(engine, digest)
    process = held.begun()
    leave()
    engine.registration.sweep(0.0)
    assert ended(process)
    refusal(Code.CANCELLED, "CANCELLED", result.result, WAIT)
    assert engine.store.objectives() == []
    held.free()
    assert engine.registration.register(digest, "").kernels.ready("value_and_grad")


def test_work_goes_on_for_a_while_because_the_client_may_call_again(open_engine, rosen, upload, held, begin):
    engine = open_engine()
    digest = uploaded(engine, rosen, upload)
    held.hold("value_and_grad")
    first, leave = begin(engine, digest)
    held.begun()
    leave()
    engine.registration.sweep()
    again, _ = begin(engine, digest)
    held.free()
    assert again.result(WAIT).digest == first.result(WAIT).digest == digest


def test_work_that_no_caller_repeats_ends_after_thirty_seconds(
    open_engine, rosen, upload, held, begin, start, monkeypatch
):
    engine, now = open_engine(), 1000.0
    monkeypatch.setattr(registration, "time", types.SimpleNamespace(monotonic=lambda: now))
    digest = uploaded(engine, rosen, upload)
    held.hold("value_and_grad")
    result, leave = begin(engine, digest)
    process = held.begun()
    leave()
    has_ended = start(ended, process)
    now += 29.9
    engine.registration.sweep()
    assert not result.done()
    now += 0.2
    engine.registration.sweep()
    assert has_ended.result(WAIT)
    refusal(Code.CANCELLED, "CANCELLED", result.result, WAIT)


def test_work_goes_on_while_one_of_two_callers_waits(open_engine, rosen, upload, held, begin):
    engine = open_engine()
    digest = uploaded(engine, rosen, upload)
    held.hold("value_and_grad")
    _, leave = begin(engine, digest)
    held.begun()
    stays, _ = begin(engine, digest, "stays")
    leave()
    engine.registration.sweep(0.0)
    held.free()
    assert stays.result(WAIT).digest == digest


def test_work_for_a_stored_objective_goes_on_without_a_caller(open_engine, rosen, upload, held, begin):
    engine = open_engine()
    digest = uploaded(engine, rosen, upload)
    held.hold("hvp")
    objective = engine.registration.register(digest, "")
    held.begun()
    engine.registration.sweep(0.0)
    held.free()
    objective.kernels.request("hvp", 1).result(WAIT)


def test_work_for_a_deleted_objective_ends(open_engine, rosen, upload, held):
    engine = open_engine()
    digest = uploaded(engine, rosen, upload)
    held.hold("hvp")
    objective = engine.registration.register(digest, "deleted")
    process = held.begun()
    running = objective.kernels.request("hvp", 1)
    engine.registration.delete("deleted")
    assert ended(process)
    refusal(Code.CANCELLED, "CANCELLED", running.result, WAIT)
    later = objective.kernels.request("hvp", 4)
    refusal(Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND", later.result, WAIT)


def test_a_server_looks_for_work_that_no_caller_waits_for(started, rosen, upload, held, begin):
    digest = uploaded(started.engine, rosen, upload)
    held.hold("value_and_grad")
    result, leave = begin(started.engine, digest)
    process = held.begun()
    leave()
    assert ended(process)
    refusal(Code.CANCELLED, "CANCELLED", result.result, WAIT)


def test_a_compile_that_begins_while_its_objective_is_deleted_ends(
    open_engine, rosen, upload, held, vetter, start, monkeypatch
):
    engine = open_engine()
    digest = uploaded(engine, rosen, upload)
    objective = engine.registration.register(digest, "deleted")
    for compile_ in engine.objectives.lane(objective).warm(objective):
        compile_.result(WAIT)
    open_session = vetter._open

    def delete_meanwhile(*args):  # The compile has read the programs, and has no process yet.
        start(engine.registration.delete, "deleted").result(WAIT)
        return open_session(*args)

    vetter.sweep(-1.0)  # Otherwise the compile would take a session that is open.
    monkeypatch.setattr(vetter, "_open", delete_meanwhile)
    held.hold("hvp")
    refusal(Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND", objective.kernels.request("hvp", 8).result, WAIT)
