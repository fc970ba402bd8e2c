"""Processes by fork: `python tests/support/zygote.py MODULE`.

Most of the CPU time of a server's start goes into imports. A *zygote* has imported
MODULE, and forks for each process that a test starts. The process has its own
arguments, environment, standard streams and sockets, as if `python -m MODULE` had
started it, but LAPACK has one thread. The zygote has one thread, so no fork inherits a
lock that is held.

A request is a message on a Unix socket, with the process's standard streams. The first
answer is the process's ID, and the second its exit code.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_EARLY = ("FAKETIME", "GRPC", "JAX", "LD_", "MALLOC", "OMP", "OPENBLAS", "PYTHON")
"""Variables with these prefixes are read at the start of Python or at an import."""

_MOST = 1 << 18
"""Most bytes of a request."""


class UnsuitedError(Exception):
    """The zygote was started with other variables of `_EARLY`."""


class Zygote:
    """A zygote, which ends with this process at the latest.

    Args:
        module: "hvpd_server", "hvpd_server.admission.vetting_process" or "hvpd._cli".
        environment: The zygote's environment.
    """

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, module],
            stdin=subprocess.PIPE,  # Its end of file ends the zygote.
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        """The socket's abstract name."""

    def close(self) -> None:
        """End the zygote. Its forks go on."""
        self._process.communicate()


class Fork:
    """A process forked by a zygote, with the methods of subprocess.Popen.

    Args:
        address: The zygote's address.
        streams: File descriptors for stdin, stdout and stderr.
        arguments: Arguments of `python -m MODULE`.
        environment: The process's environment.
        new_session: Whether the process leads a session of its own.
        vetters: Address of a zygote that forks the vetters of servers.

    Raises:
        UnsuitedError: Only a new Python process can have this environment.
    """

    def __init__(
        self,
        address: str,
        streams: Sequence[int],
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        new_session: bool = False,
        vetters: str = "",
    ) -> None:
        self.returncode: int | None = None
        self._lock = threading.Lock()
        request = {
            "arguments": [*arguments],
            "environment": {**environment},
            "directory": str(Path.cwd()),
            "new_session": new_session,
            "vetters": vetters,
        }
        self._answers = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._answers.connect(f"\0{address}")
        socket.send_fds(self._answers, [json.dumps(request).encode()], streams)
        self.pid = int(self._answers.recv(32))
        if self.pid < 0:
            self._answers.close()
            raise UnsuitedError

    def poll(self) -> int | None:
        """Return the exit code; None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process's end, and return its exit code.

        Raises:
            subprocess.TimeoutExpired: The process still runs.
        """
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._answers, select.POLLIN)
            poll.poll(None if timeout is None else 1000 * timeout)
            with self._lock, contextlib.suppress(BlockingIOError):
                if self.returncode is None:
                    self.returncode = int(self._answers.recv(32, socket.MSG_DONTWAIT))
                    self._answers.close()
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a fork", timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)


# In the zygote


def _serve(listener: socket.socket, began: Mapping[str, str]) -> dict[str, Any]:
    """Fork for each request. Return the request in the fork, and never in the zygote.

    Args:
        listener: Accepts the requests.
        began: The variables of `_EARLY` that forks must have.
    """
    forks: dict[int, socket.socket] = {}
    ended, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    poll = select.poll()
    for descriptor in (0, listener.fileno(), ended):
        poll.register(descriptor, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if 0 in ready:
            sys.exit()
        if ended in ready:
            os.read(ended, 64)
            _report(forks)
        if listener.fileno() not in ready:
            continue
        answers, _ = listener.accept()
        message, streams, *_ = socket.recv_fds(answers, _MOST, 3)
        request: dict[str, Any] = json.loads(message)
        pid = -1 if _early(request["environment"]) != began else _fork()
        if pid == 0:
            _take(streams, [ended, write], [listener, answers, *forks.values()])
            return request
        answers.send(b"%d" % pid)
        forks[pid] = answers
        for stream in streams:
            os.close(stream)


def _take(streams: Sequence[int], descriptors: Sequence[int], sockets: Sequence[socket.socket]) -> None:
    """Take the standard streams, and close all that belongs to the zygote."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for descriptor in (*streams, *descriptors):
        os.close(descriptor)
    for each in sockets:
        each.close()


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax warns about forks of processes with threads.
        return os.fork()


def _early(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_EARLY)}


def _report(forks: dict[int, socket.socket]) -> None:
    """Send the exit codes of the forks that have ended."""
    forks.pop(-1, None)  # A refusal.
    for pid in list(forks):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            with forks.pop(pid) as answers, contextlib.suppress(OSError):
                answers.send(b"%d" % os.waitstatus_to_exitcode(status))


def _server(request: Mapping[str, Any]) -> int:
    from hvpd_server import __main__

    _fork_vetters(request["vetters"])
    return __main__.main()


def vetters_by_fork(address: str) -> Callable[[int, Mapping[str, str]], Any]:
    """Return a function for `spawn.start` that has a zygote fork the vetter of this
    process. The vetter runs the program of `spawn.COMMAND` if that is `-c PROGRAM`.
    """
    from hvpd_server.admission import spawn

    start = spawn.start

    def fork(stdin: int, environment: Mapping[str, str]) -> Any:
        arguments = spawn.COMMAND if spawn.COMMAND[0] == "-c" else ()
        with Path(os.devnull).open("wb") as silent:
            try:
                return Fork(address, (stdin, silent.fileno(), 2), arguments, environment, new_session=True)
            except UnsuitedError:
                return start(stdin, environment)

    return fork


def _fork_vetters(address: str) -> None:
    from hvpd_server.admission import spawn

    spawn.start = vetters_by_fork(address)


class _Child:
    """A server forked by its supervisor, with the methods of subprocess.Popen that the
    supervisor uses.
    """

    def __init__(self, pid: int, stdin: int) -> None:
        self.pid = pid
        self.stdin = os.fdopen(stdin, "wb")
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._collect(os.WNOHANG)

    def wait(self) -> int | None:
        return self._collect(0)

    def _collect(self, options: int) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, options)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _command(request: Mapping[str, Any]) -> int:
    """Run `hvpd`. The supervisor of `hvpd serve` forks the server from itself."""
    from hvpd._cli.main import main
    from hvpd_server import __main__, supervisor

    def fork(arguments: Sequence[str], environment: Mapping[str, str], descriptor: int) -> Any:
        read, write = os.pipe()
        pid = _fork()
        if pid:
            os.close(read)
            return _Child(pid, write)
        code = 1
        try:  # An exception must not reach the supervisor's own code.
            os.dup2(read, 0)
            os.close(read)
            os.close(write)
            os.environ.clear()
            os.environ.update(environment)
            sys.argv[1:] = arguments
            code = __main__.main()
        finally:
            sys.stderr.flush()
            os._exit(code)

    _fork_vetters(request["vetters"])
    supervisor._start = fork
    return main()


def _vetter(request: Mapping[str, Any]) -> None:
    from hvpd_server.admission import vetting_process

    vetting_process._import_all = lambda: None  # The zygote has done this.
    match request["arguments"]:
        case ["-c", program]:
            exec(program, {"__name__": "__main__"})
        case _:
            vetting_process.main()


def main() -> None:
    """Import a module, print the address, and fork until stdin ends."""
    module = sys.argv[1]
    began = _early(os.environ)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # OpenBLAS starts its threads when NumPy is imported.
    if module in ("hvpd_server", "hvpd._cli"):
        importlib.import_module("hvpd_server.process")  # `__main__` imports it late, and jax with it.
        run = _server
        if module == "hvpd._cli":
            importlib.import_module("hvpd._cli.main")
            run = _command
    else:
        import jax

        from hvpd_server.admission import vetting_process

        jax.config.update("jax_enable_x64", True)
        vetting_process._import_all()
        run = _vetter
    gc.collect()
    gc.freeze()
    assert len([*Path("/proc/self/task").iterdir()]) == 1
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("")
    listener.listen(64)
    sys.stdout.write(listener.getsockname()[1:].decode() + "\n")
    sys.stdout.flush()
    request = _serve(listener, began)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    if request["new_session"]:
        os.setsid()
    sys.argv[1:] = request["arguments"]
    sys.exit(run(request))


if __name__ == "__main__":
    main()
