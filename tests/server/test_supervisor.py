"""Whose doing it was that a server ended. tests/e2e/test_supervisor.py has real ones."""

import signal

import pytest

from hvpd_server import _config, _supervisor
from hvpd_server._board import LOST, Board
from hvpd_server._quarantine import Quarantine

DIGEST = "a" * 64


@pytest.mark.parametrize(
    ("code", "strikes"),
    [(-signal.SIGSEGV, 1), (LOST, 1), (-signal.SIGKILL, 0), (1, 0)],
    ids=["crash", "lost", "killed", "1"],
)
def test_what_ran_when_the_server_crashed_or_lost_its_device_is_to_blame(tmp_path, code, strikes):
    config, board = _config.Config(store=tmp_path), Board()
    board.begin(DIGEST)
    _supervisor._blame(config, board, code, None)
    assert Quarantine(tmp_path, 3).release(DIGEST) == strikes
