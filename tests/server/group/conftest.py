"""A leader and other ranks in threads of the tests' process, connected by loopback."""

import contextlib
import sys
import threading

import pytest

from hvpd_server.group.follower import Follower
from hvpd_server.group.leader import Leader

SECRET = b"s" * 32
FACTS = {"version": "1"}


class Ends:
    """Why a side has ended its process."""

    def __init__(self):
        self.reasons = []
        self.some = threading.Event()

    def __call__(self, reason, code):
        self.reasons.append((reason, code))
        self.some.set()
        if threading.current_thread() is threading.main_thread():
            sys.exit()
        threading.Event().wait()  # This thread goes no further.

    def first(self):
        assert self.some.wait(60)
        return self.reasons[0]


class Group:
    """Forms groups, whose connections end with the test."""

    def __init__(self, stack):
        self._stack = stack
        self.leader_ends = Ends()
        self.rank_ends = Ends()

    def leader(self, size=2, *, facts=FACTS, **settings):
        found = Leader(("127.0.0.1", 0), size, facts, SECRET, end=self.leader_ends, **settings)
        self._stack.callback(self._close, found)
        return found

    def follower(self, leader, rank=1, size=2, *, facts=FACTS, secret=lambda: SECRET, port=0, **settings):
        address = "127.0.0.1", port or leader.port
        found = Follower(address, rank, size, facts, secret, end=self.rank_ends, **settings)
        self._stack.callback(found.close)
        return found

    def gathering(self, leader):
        """Gather ranks in a thread, until the test closes the leader."""

        def gather():
            with contextlib.suppress(OSError, ValueError):
                leader.gather("nowhere:1")

        thread = threading.Thread(target=gather, daemon=True)
        thread.start()
        return thread

    def formed(self, **settings):
        """Return a leader and its one rank."""
        leader = self.leader(**settings)
        gathering = self.gathering(leader)
        follower = self.follower(leader)
        gathering.join(60)
        return leader, follower

    def _close(self, leader):
        leader._listener.close()
        for rank in leader._ranks.values():
            rank.channel.close()


@pytest.fixture
def group():
    with contextlib.ExitStack() as stack:
        yield Group(stack)
