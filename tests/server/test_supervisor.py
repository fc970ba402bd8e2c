"""The supervisor finds the cause of a server's end. tests/e2e/test_supervisor.py has
real servers.
"""

import signal
import subprocess
import sys
import time

import pytest

from hvpd_server import config as _config
from hvpd_server import supervisor
from hvpd_server.group.failure import ENDED
from hvpd_server.liveness import LOST, Liveness
from hvpd_server.store.quarantine import Quarantine

DIGEST = "a" * 64


@pytest.mark.parametrize(
    ("code", "strikes"),
    [(-signal.SIGSEGV, 1), (LOST, 1), (-signal.SIGKILL, 0), (1, 0)],
    ids=["crash", "lost", "killed", "1"],
)
def test_work_that_ran_at_a_crash_or_a_lost_device_is_blamed(tmp_path, code, strikes):
    config, liveness = _config.Config(store=tmp_path), Liveness()
    liveness.begin(DIGEST)
    supervisor._blame(config, liveness, code, None)
    assert Quarantine(tmp_path, 3).release(DIGEST) == strikes


OTHER = "b" * 64


@pytest.mark.parametrize("group", ["/", "/system.slice/hvpd.service"])
def test_the_kernel_says_how_many_processes_it_ended_for_lack_of_memory(tmp_path, group):
    own = tmp_path / "own"
    own.write_text(f"4:memory:/other\n0::{group}\n")
    assert supervisor.oom_kills(tmp_path, own) == 0
    events = tmp_path / group.lstrip("/") / "memory.events"
    events.parent.mkdir(parents=True, exist_ok=True)
    events.write_text("low 0\nhigh 0\nmax 31\noom 4\noom_kill 3\noom_group_kill 0\n")
    assert supervisor.oom_kills(tmp_path, own) == 3


@pytest.mark.parametrize("content", ["", "oom_kill", "oom_kill many", "oom 3", "a b c"])
def test_a_kernel_that_says_nothing_of_use_has_ended_no_process(tmp_path, content):
    (tmp_path / "own").write_text("0::/\n")
    (tmp_path / "memory.events").write_text(content)
    assert supervisor.oom_kills(tmp_path, tmp_path / "own") == 0
    assert supervisor.oom_kills(tmp_path, tmp_path / "missing") == 0


@pytest.mark.parametrize(("kills", "strikes"), [(0, 0), (1, 1)])
def test_a_server_that_the_kernel_ends_for_lack_of_memory_has_crashed(tmp_path, monkeypatch, kills, strikes):
    """Any other SIGKILL comes from outside."""
    config, liveness = _config.Config(store=tmp_path), Liveness()
    liveness.begin(DIGEST)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(supervisor, "oom_kills", lambda: 0 if process.returncode is None else kills)
    process.kill()
    stopped, ended = supervisor._watch(process, liveness, config)
    assert not stopped
    supervisor._blame(config, liveness, process.returncode, ended)
    assert Quarantine(tmp_path, 3).release(DIGEST) == strikes


def test_objectives_that_ran_together_in_a_crash_are_on_probation_without_a_strike(tmp_path):
    config, liveness = _config.Config(store=tmp_path), Liveness()
    liveness.begin(DIGEST)
    liveness.begin(OTHER, compiling=True)
    supervisor._blame(config, liveness, -signal.SIGSEGV, None)
    quarantine = Quarantine(tmp_path, 3)
    assert quarantine.probation().suspects == {DIGEST, OTHER}
    assert [quarantine.release(digest) for digest in (DIGEST, OTHER)] == [0, 0]


def test_probation_lasts_for_ten_minutes_and_the_time_of_a_launch(tmp_path):
    config, liveness = _config.Config(store=tmp_path, launch_timeout=200.0), Liveness()
    liveness.begin(DIGEST)
    liveness.begin(OTHER)
    began = time.time()
    supervisor._blame(config, liveness, -signal.SIGSEGV, None)
    assert began + 800 <= Quarantine(tmp_path, 3).probation().until <= time.time() + 800


def test_a_crash_alone_is_a_strike_and_probation_goes_on_until_the_last_one(tmp_path):
    config = _config.Config(store=tmp_path, quarantine_after=2)
    quarantine = Quarantine(tmp_path, 2)
    quarantine.suspect([DIGEST, OTHER], 30)
    until = quarantine.probation().until
    liveness = Liveness()
    liveness.begin(DIGEST)
    liveness.begin(DIGEST)
    supervisor._blame(config, liveness, -signal.SIGSEGV, None)
    assert quarantine.probation().until > until
    supervisor._blame(config, liveness, -signal.SIGSEGV, None)
    assert quarantine.probation() is None
    assert [quarantine.release(digest) for digest in (DIGEST, OTHER)] == [2, 0]


def hangs(monkeypatch, *ages, compiling=False, config=None):
    """Return the objectives that the supervisor blames for a device that hangs, after
    so many seconds of work.
    """
    liveness = Liveness()
    for digest, age in zip((DIGEST, OTHER), ages, strict=True):
        monkeypatch.setattr("hvpd_server.liveness.time.monotonic", lambda age=age: 10_000.0 - age)
        liveness.begin(digest, compiling=compiling)
    return supervisor._stuck(liveness, config, 10_000.0)


@pytest.mark.parametrize(("digests", "known"), [([DIGEST], True), ([DIGEST, OTHER], False), ([], False)])
def test_only_a_crash_of_one_objective_has_a_known_cause(tmp_path, digests, known):
    """After a known cause the next server starts at once, each time."""
    config = _config.Config(store=tmp_path)
    ended = supervisor._Ended("hung", digests, "it hung")
    assert supervisor._blame(config, Liveness(), -signal.SIGKILL, ended) is known


def test_work_that_progresses_while_the_device_hangs_is_not_blamed(monkeypatch, tmp_path):
    config = _config.Config(store=tmp_path, launch_timeout=600.0, compile_timeout=3600.0)
    assert hangs(monkeypatch, 599.0, 1.0, config=config) is None
    assert hangs(monkeypatch, 601.0, 1.0, config=config).digests == [DIGEST]
    assert hangs(monkeypatch, 601.0, 400.0, config=config).digests == [DIGEST, OTHER]
    assert hangs(monkeypatch, 3599.0, 3000.0, compiling=True, config=config) is None
    assert hangs(monkeypatch, 3601.0, 1000.0, compiling=True, config=config).digests == [DIGEST]


def test_a_rank_that_is_silent_is_replaced_soon_and_no_objective_is_blamed(monkeypatch, tmp_path):
    """Another rank may have stopped, and the silence of one ends all."""
    liveness = Liveness()
    liveness.begin(DIGEST)
    liveness.beat(0, 0)
    alone = _config.Config(store=tmp_path, launch_timeout=6.0)
    member = _config.Config(store=tmp_path, launch_timeout=6.0, leader="a:1", rank=1, size=2)
    now = time.monotonic()
    assert supervisor._stuck(liveness, member, now + 2.9) is None
    ended = supervisor._stuck(liveness, member, now + 3.5)
    assert (ended.reason, list(ended.digests)) == ("was silent for 4 s", [])
    assert supervisor._stuck(liveness, alone, now + 5.5) is None


def test_the_end_of_a_group_is_the_fault_of_no_objective(tmp_path):
    config, liveness = _config.Config(store=tmp_path), Liveness()
    liveness.begin(DIGEST)
    assert supervisor._blame(config, liveness, ENDED, None) is False
    assert Quarantine(tmp_path, 3).release(DIGEST) == 0
    assert supervisor._how(ENDED) == "ended with its group"


def test_objectives_that_hang_together_are_on_probation(tmp_path):
    config = _config.Config(store=tmp_path)
    supervisor._blame(config, Liveness(), -signal.SIGKILL, supervisor._Ended("hung", [DIGEST, OTHER], "it hung"))
    assert Quarantine(tmp_path, 3).probation().suspects == {DIGEST, OTHER}
    supervisor._blame(config, Liveness(), -signal.SIGKILL, supervisor._Ended("hung", [DIGEST], "it hung"))
    assert Quarantine(tmp_path, 3).release(DIGEST) == 1
