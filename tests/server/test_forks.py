"""Forks end with their answer, with a report of their bad end, or with their parent."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import until

PARENT = """
import os, pathlib, signal, socket, sys
from hvpd_server.admission.forks import Forks

control = socket.socket(fileno=os.dup(0))
forks = Forks()

def hang(answer):
    answer.sendall(f"{os.getpid()} ".encode())
    signal.pause()

def fill(answer):
    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
    while True:
        answer.send(bytes(1024), socket.MSG_DONTWAIT)  # At last, an error.

def work(kind):
    if kind == b"hang":
        return hang
    if kind == b"signal":
        return lambda answer: os.kill(os.getpid(), signal.SIGSEGV)
    if kind == b"late":
        return lambda answer: os.kill(os.getpid(), signal.SIGALRM)
    if kind == b"error":
        return lambda answer: 1 / 0
    if kind == b"silent":
        return lambda answer: None
    if kind == b"full":
        return fill
    return lambda answer: answer.sendall(b"done ")

while True:
    forks.wait(control)
    kind, descriptors, *_ = socket.recv_fds(control, 16, 1)
    if not kind:
        break
    answer = socket.socket(fileno=descriptors[0])
    done = work(kind)
    fork = os.fork
    if kind == b"scarce":
        os.fork = lambda: os.read(-1, 1)  # An error of the system.
    forks.start(answer, lambda: done(answer), closing=control)
    os.fork = fork
"""


@pytest.fixture
def filler(tmp_path):
    """Return the file that gets the process number of the fork that fills a socket."""
    return tmp_path / "filler"


@pytest.fixture
def parent(filler):
    """Start a process that forks for each request, and return how to ask it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen([sys.executable, "-P", "-c", PARENT, str(filler)], stdin=theirs.fileno())
        theirs.close()

        def ask(kind):
            near, far = socket.socketpair()
            with far:
                socket.send_fds(ours, [kind.encode()], [far.fileno()])
            near.settimeout(60)
            return near

        ask.process = process
        yield ask
        ours.close()
        assert process.wait(60) in (0, -signal.SIGKILL)


def everything(answer):
    """Return what arrives until the other end is closed."""
    with answer:
        return b"".join(iter(lambda: answer.recv(1 << 16), b""))


def pid_of(answer):
    return int(answer.recv(16))


def ended(pid):
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("kind", "code"), [("signal", -signal.SIGSEGV), ("late", -signal.SIGALRM), ("error", 1), ("silent", 0)]
)
def test_a_bad_end_is_reported_at_the_socket_of_its_fork(parent, kind, code):
    beside = parent("hang")
    pid_of(beside)
    assert json.loads(everything(parent(kind))) == {"ended": code}
    beside.close()


def test_an_answer_comes_before_any_report(parent):
    assert everything(parent("good")).startswith(b"done ")


def test_a_fork_ends_when_nobody_waits_for_its_answer_and_others_go_on(parent):
    first, second = parent("hang"), parent("hang")
    pids = pid_of(first), pid_of(second)
    first.close()
    until(lambda: ended(pids[0]))
    assert not ended(pids[1])
    os.kill(pids[1], signal.SIGTERM)
    assert json.loads(everything(second)) == {"ended": -signal.SIGTERM}


def test_a_later_fork_does_not_keep_the_answer_of_an_earlier_one_open(parent):
    first = parent("hang")
    pid = pid_of(first)
    second = parent("hang")
    pid_of(second)
    os.kill(pid, signal.SIGKILL)
    assert json.loads(everything(first)) == {"ended": -signal.SIGKILL}  # Its end came while the second fork still ran.
    second.close()


def test_an_answer_that_nobody_reads_yet_does_not_stop_the_others(parent, filler):
    full = parent("full")
    until(lambda: filler.exists() and filler.read_text() and ended(filler.read_text()))
    assert everything(parent("good")).startswith(b"done ")
    assert everything(full).strip(bytes(1)) == b""  # There was no room for a report.


def test_forks_end_with_their_parent(parent):
    pid = pid_of(answer := parent("hang"))
    parent.process.kill()
    parent.process.wait()
    until(lambda: ended(pid))
    answer.close()


def test_a_fork_for_which_the_system_has_no_process_ends_alone(parent):
    beside = parent("hang")
    pid = pid_of(beside)
    assert everything(parent("scarce")) == b""
    assert everything(parent("good")).startswith(b"done ")
    assert not ended(pid)
    beside.close()
