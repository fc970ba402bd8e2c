"""Forks that may crash, hang or be killed: each has a socket for its answer."""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


class Forks:
    """The forks of this process, which has no other children and one thread.

    A fork that ends badly cannot answer, so this process sends {"ended": code} on the
    fork's socket. The code is the exit code, or a negative signal. If the other end of
    that socket is closed, the fork is killed. Both happen in `wait`.

    Example:
        forks = Forks()
        forks.start(answer, work, closing=control)
        forks.wait(control)
    """

    def __init__(self) -> None:
        self._ended, self._write = os.pipe()
        os.set_blocking(self._ended, False)
        os.set_blocking(self._write, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._running: dict[int, socket.socket] = {}

    def start(self, answer: socket.socket, work: Callable[[], None], closing: socket.socket) -> None:
        """Do `work` in a fork, and return at once.

        Args:
            answer: Socket for the fork's answer. It is closed when the fork has ended.
            work: Sends the answer.
            closing: A socket of this process that the fork must not keep open.
        """
        parent = os.getpid()
        try:
            child = os.fork()
        except OSError:  # The system has no process or no memory left. Other forks go on.
            answer.close()
            return
        if child == 0:
            with contextlib.suppress(BaseException):
                self._leave(closing)
                _die_with(parent)
                work()
                os._exit(0)
            os._exit(1)
        self._running[child] = answer

    def wait(self, control: socket.socket) -> None:
        """Return when something has arrived at `control`, or it was closed. Attend to
        the forks until then.
        """
        poll = select.poll()
        poll.register(control, select.POLLIN)
        poll.register(self._ended, select.POLLIN)
        for answer in self._running.values():
            poll.register(answer, 0)  # Reports a hang-up only.
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            for child, answer in list(self._running.items()):
                if answer.fileno() in ready:
                    os.kill(child, signal.SIGKILL)
                    self._forget(child, poll)
            if self._ended in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._ended, 256)
                self._reap(poll)
            if control.fileno() in ready:
                return

    def _reap(self, poll: select.poll) -> None:
        """Report the ends of forks."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                child, status = ended
                if child in self._running:
                    verdict = {"ended": os.waitstatus_to_exitcode(status)}
                    with contextlib.suppress(OSError):  # The other end is closed, or the socket is full.
                        self._running[child].send(json.dumps(verdict).encode() + b"\n", socket.MSG_DONTWAIT)
                    self._forget(child, poll)

    def _forget(self, child: int, poll: select.poll) -> None:
        answer = self._running.pop(child)
        poll.unregister(answer)
        answer.close()

    def _leave(self, closing: socket.socket) -> None:
        """Close what belongs to the parent."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        os.close(self._ended)
        os.close(self._write)
        closing.close()
        for answer in self._running.values():
            answer.close()


def _die_with(parent: int) -> None:
    """End this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
