"""The end of a process with its group."""

import subprocess
import sys

import pytest

from hvpd_server.group import failure


@pytest.mark.parametrize(("timeout", "seconds"), [(600.0, 5.0), (6.0, 3.0), (0.0, 5.0)])
def test_silence_shows_before_the_supervisor_blames_a_launch(timeout, seconds):
    assert failure.silence_seconds(timeout) == seconds


def test_the_process_ends_at_once_with_a_reason():
    code = "from hvpd_server.group import failure; failure.end('rank 1 is gone')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == failure.ENDED
    assert "hvpd: the group ends: rank 1 is gone" in ended.stderr
