"""One contender while it runs: its server, its callers in processes of their own, and
what they say. All of them end with the context.
"""

import contextlib
import json
import select
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import _delay, _processes
from bench.peers import _environments, _family
from bench.peers._peer import About, peer
from bench.peers._spec import MOST, Spec, Vector

_ROOT = Path(__file__).resolve().parents[2]
_PROCESSES = 2
"""Processes of the callers, one for each core of the machine of the figures."""
_START_SECONDS = 180.0
_ANSWER_SECONDS = 180.0

_ERROR = 1e-4
"""Largest relative error of a product. All compute in float32, in different orders."""


class FailedError(Exception):
    """A contender cannot be measured on this machine. The text says why."""


class Contender:
    """A contender that has started, and whose answer is right."""

    def __init__(
        self, name: str, address: str, server: _processes.Child | None, callers: Sequence[_processes.Child]
    ) -> None:
        self.name = name
        self.about: About = peer(name).ABOUT
        self._address = address
        self._server = server
        self._callers = callers

    def time(self, count: int, seconds: float) -> tuple[float, npt.NDArray[np.float64]]:
        """Return products a second of so many callers, and each call's seconds."""
        shares = [len(range(index, count, len(self._callers))) for index in range(len(self._callers))]
        busy = [(child, share) for child, share in zip(self._callers, shares, strict=True) if share]
        for child, share in busy:
            _say(child, do="time", count=share, seconds=seconds)
        answers = [_heard(child) for child, _ in busy]
        return sum(answer["rate"] for answer in answers), np.concatenate([answer["seconds"] for answer in answers])

    def once(self) -> float:
        """Return the seconds of one caller's product."""
        return float(_asked(self._callers[0], do="once")["seconds"])

    def check(self, folder: Path, expected: Vector) -> None:
        """Compare a product with jax's own.

        Raises:
            FailedError: It is wrong.
        """
        _asked(self._callers[0], do="check")
        found = np.load(folder / f"{self.name}.npy")
        error = (
            float(np.linalg.norm(found - expected) / np.linalg.norm(expected)) if found.shape == expected.shape else 1.0
        )
        if not error <= _ERROR:
            raise FailedError(f"its product is wrong: the relative error is {error:.1e}")

    def bytes_a_product(self) -> float:
        """Return the bytes to and from the server of one product by TCP."""
        with _delay.distance(self._address, 0.0) as far:
            _asked(self._callers[0], do="far", address=far.address)
            before = far.counted()
            _asked(self._callers[0], do="again")
            after = far.counted()
        return float(sum(after) - sum(before))

    def memory_bytes(self) -> tuple[float, float]:
        """Return the memory of the server's processes, and that of the callers'."""
        server = _family.used_bytes(self._server.pid) if self._server else 0
        return float(server), float(sum(_family.used_bytes(child.pid) for child in self._callers))


@contextlib.contextmanager
def started(name: str, spec: Spec, folder: Path, expected: Vector) -> Iterator[Contender]:
    """Install a contender, start it, and check its answer, if it multiplies.

    Raises:
        FailedError: It cannot be installed, does not start, or answers wrong.
    """
    about = peer(name).ABOUT
    try:
        python = [sys.executable]
        if about.installed:
            python = ["env", f"PYTHONPATH={_ROOT}", str(_environments.python(name, system=about.system_python))]
    except _environments.NotInstalledError as error:
        raise FailedError(f"not installed: {error}") from None
    with contextlib.ExitStack() as stack:
        server, address = None, "-"
        if not about.in_process:
            argv = [*python, "-m", "bench.peers._serve", name, spec.part]
            server = stack.enter_context(_running(argv, r"^peer serves on (\S+)$", talks=False))
            address = server.ready[1]
        count = 1 if about.in_process else _PROCESSES
        argv = [*python, "-m", "bench.peers._caller", name, spec.part, address, str(folder), str(MOST // count)]
        callers = [
            stack.enter_context(_running([*argv, str(index)], "^peer's callers are connected$", talks=True))
            for index in range(count)
        ]
        found = Contender(name, address, server, callers)
        if about.x != "not used":
            found.check(folder, expected)
        yield found


@contextlib.contextmanager
def _running(argv: Sequence[str], ready: str, *, talks: bool) -> Iterator[_processes.Child]:
    """Run a process. At the end, end its descendants, too."""
    family: list[_family.Member] = []
    try:
        with contextlib.ExitStack() as stack:
            try:
                child = stack.enter_context(_processes.child(argv, ready, talks=talks, patience=_START_SECONDS))
            except RuntimeError as error:
                raise FailedError(f"did not start: {_environments.reason(str(error))}") from None
            try:
                yield child
            finally:
                family = _family.members(child.pid)
    finally:
        _family.end(family)


def _asked(child: _processes.Child, **order: Any) -> dict[str, Any]:
    _say(child, **order)
    return _heard(child)


def _say(child: _processes.Child, **order: Any) -> None:
    assert child.process.stdin is not None
    try:
        child.process.stdin.write(json.dumps(order) + "\n")
        child.process.stdin.flush()
    except BrokenPipeError:
        raise _ended(child) from None


def _heard(child: _processes.Child) -> dict[str, Any]:
    """Return the answer to an order. There is one line for each."""
    pipe = child.process.stdout
    assert pipe is not None
    if not select.select([pipe], [], [], _ANSWER_SECONDS)[0]:
        raise FailedError(f"no answer within {_ANSWER_SECONDS:g} s")
    line = pipe.readline()
    if not line:
        raise _ended(child)
    found: dict[str, Any] = json.loads(line)
    return found


def _ended(child: _processes.Child) -> FailedError:
    child.process.wait(10)
    return FailedError(f"its callers ended: {_environments.reason(''.join(child.latest))}")
