"""Every lock of the server has its place in docs/architecture/concurrency.md, and a
thread that takes locks in another order is found, in this process and in servers.
"""

import ast
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.lock_order.plugin import hvpd_lock_order as order

PAGE = order.TABLES.read_text()
REGISTERING = "engine/registration.py Registration._registering"
BATCHER = "scheduling/batcher.py Batcher._lock"
LOADING = "device/residency.py Residency._loading"
TICKETS, STREAMS = "rpc/tickets.py Tickets._lock", "rpc/streams.py Streams._lock"
PROBATION = "scheduling/probation.py Probation._lock"
LOG = "telemetry/log_rate_limit.py LogRateLimit._lock"


@pytest.fixture
def faults(monkeypatch):
    """Return the faults that are reported, which do not fail the run here."""
    found = []
    monkeypatch.setattr(order, "report", lambda *names: found.append(names))
    return found


@pytest.fixture
def lock():
    """Return a function that makes the lock of a name."""
    levels = order.levels(PAGE)
    return lambda name, recursive=False: (
        order._RecursiveLock(order._RealRecursive(), name, levels[name])
        if recursive
        else order._Lock(order._Real(), name, levels[name])
    )


@pytest.fixture(autouse=True)
def _nothing_is_held():
    """Fail a test that leaves a lock held, because later tests would be blamed."""
    yield
    assert order._held.locks == []


def made(path):
    """Return the names of the locks that a file makes."""
    lines = path.read_text().splitlines()
    for kind in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(kind, ast.ClassDef):
            for node in ast.walk(kind):
                call = ast.unparse(node) if isinstance(node, ast.Call) else ""
                if call in ("threading.Lock()", "threading.RLock()", "threading.Condition()"):
                    yield order.name_of(path, lines[node.lineno - 1], kind.name)


def test_the_page_lists_the_locks_that_the_server_makes():
    assert {name for path in order.SERVER.rglob("*.py") for name in made(path)} == set(order.levels(PAGE))


def test_the_order_is_that_of_the_page():
    levels = order.levels(PAGE)
    assert levels[REGISTERING] < levels[LOADING] < levels[BATCHER] < levels[TICKETS] == levels[STREAMS] < levels[LOG]
    assert len(set(levels.values())) < len(levels)


def test_locks_in_order_are_no_fault(lock, faults):
    for names in ((REGISTERING, BATCHER, TICKETS, LOG), (LOADING, LOADING, STREAMS)):
        locks = [lock(name) for name in names]
        for each in locks:
            each.acquire()
        for each in locks:  # In any order.
            each.release()
    with lock(TICKETS):
        pass
    with lock(BATCHER):
        pass
    assert faults == []


@pytest.mark.parametrize("names", [(BATCHER, REGISTERING), (TICKETS, STREAMS), (TICKETS, TICKETS), (LOG, TICKETS)])
def test_locks_in_another_order_are(lock, faults, names):
    first, second = map(lock, names)
    with first, second:
        pass
    assert faults == [names]


def test_a_thread_is_not_blamed_for_the_locks_of_another_one(lock, faults):
    with lock(TICKETS), ThreadPoolExecutor(1) as pool:
        pool.submit(lock(BATCHER).acquire).result()
    assert faults == []


def test_a_lock_that_another_thread_releases_is_held_no_more(lock, faults):
    held = lock(TICKETS)
    held.acquire()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(held.release).result()
    with lock(BATCHER):
        pass
    assert faults == []


def test_a_lock_that_is_only_tried_may_have_any_order(lock, faults):
    tried = lock(BATCHER)
    with lock(TICKETS):
        assert tried.acquire(blocking=False)
        tried.release()
    assert faults == []


def test_a_recursive_lock_may_be_taken_again(lock, faults):
    held = lock(LOG, recursive=True)
    with held, held:
        pass
    with lock(TICKETS):
        pass
    assert faults == []


@pytest.mark.parametrize("recursive", [False, True])
def test_a_lock_is_not_held_while_its_condition_waits(lock, faults, recursive):
    condition, asleep = threading.Condition(lock(TICKETS, recursive)), threading.Event()

    def sleep():
        with condition:
            asleep.set()
            assert condition.wait_for(lambda: woken, 30)
        with lock(BATCHER):
            pass

    woken = []
    with ThreadPoolExecutor(1) as pool:
        sleeper = pool.submit(sleep)
        assert asleep.wait(30)
        with condition:
            woken.append(True)
            condition.notify()
        sleeper.result(30)
    assert faults == []


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("with b, a: pass", []),
        ("with a, b: pass", [f"takes {PROBATION} while it holds {TICKETS}"]),
        ("with a, b: pass\nwith a, b: pass", [f"takes {PROBATION} while it holds {TICKETS}"]),
    ],
)
def test_servers_of_the_tests_are_watched(tmp_path, code, said):
    """Another process writes its faults to the report, each once."""
    report = tmp_path / "report"
    report.touch()
    code = (
        "from hvpd_server.rpc.tickets import Tickets\n"
        "from hvpd_server.scheduling.probation import Probation\n"
        "a, b = Tickets()._lock, Probation()._lock\n" + code
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {order.REPORT: str(report)},
        stderr=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    found = report.read_text().split(order.END)[:-1]
    assert len(found) == len(said)
    assert all(each in fault and each in run.stderr for each, fault in zip(said, found, strict=True))


def test_a_fault_fails_a_run_of_tests(tmp_path):
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["tests.lock_order.plugin"]\n')
    (tmp_path / "test_it.py").write_text(
        "from hvpd_server.rpc.tickets import Tickets\n\n\ndef test_it():\n    with Tickets()._lock, Tickets()._lock:\n        pass\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != order.REPORT}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path],
        env=environment | {"PYTHONPATH": os.pathsep.join([*sys.path, str(order.ROOT)])},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
    summary = run.stdout.partition("1 passed")[2]
    assert f"takes {TICKETS} while it holds {TICKETS}" in summary
    assert "test_it.py" in summary, "the stack"
