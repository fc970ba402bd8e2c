"""Watches the order of locks in this process and in the servers of the tests. A thread
that breaks the order fails the run.
"""

import os
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import hvpd_lock_order  # noqa: E402 - from HERE, by the same name as in servers

_CHILD = hvpd_lock_order.REPORT in os.environ  # A process of pytest-xdist has the report of the main process.
if not _CHILD:
    os.environ[hvpd_lock_order.REPORT] = tempfile.mkstemp(prefix="hvpd-lock-order-")[1]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
hvpd_lock_order.install()

_faults: list[str] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if a thread broke the order."""
    if not _CHILD:
        path = Path(os.environ[hvpd_lock_order.REPORT])
        _faults.extend(path.read_text().split(hvpd_lock_order.END)[:-1])
        path.unlink()
        if _faults:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure() -> None:
    """Print the faults last, because they are all that the exit status is about."""
    for fault in sorted(set(_faults)):
        sys.stderr.write(f"\nlocks in a wrong order: {fault}")
