"""The leader's side of a group: admits the other ranks, sends them orders, and ends the
group if one of them dies, stops or disagrees.

One process decides the sequence of all orders. The leader does not rely on jax to
notice a failure: jax notices a killed process after 100 s, and a stopped process never.
"""

import collections
import contextlib
import dataclasses
import logging
import secrets
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, NoReturn

from google.protobuf.message import DecodeError

from hvpd._wire.codec import Buffer
from hvpd.v1 import group_pb2
from hvpd_server.group import channel as _channel
from hvpd_server.group import failure
from hvpd_server.group.channel import Channel
from hvpd_server.group.facts import differences
from hvpd_server.group.order_log import DisagreementError, OrderLog
from hvpd_server.liveness import LOST
from hvpd_server.telemetry import logs

_log = logging.getLogger(__name__)

_GREETING_SECONDS: Final = 5.0
"""Most seconds for each step of a request to join."""

_REMINDER_SECONDS: Final = 30.0
"""Seconds between two lines in the log about ranks that have not joined yet."""

_WATCH_SECONDS: Final = 0.1
"""Seconds between two checks of the ranks."""

_GRACE_SECONDS: Final = 1.0
"""Seconds to wait after a failed launch, because a dead rank may be the cause."""

End = Callable[[str, int], NoReturn]
"""Ends the process, for a reason, with an exit code."""


@dataclasses.dataclass
class _Rank:
    channel: Channel
    nonces: tuple[bytes, bytes]
    """The leader's nonce, and the rank's."""
    heard: float = float("inf")
    """Time of the last message."""
    devices: Mapping[str, str] | None = None
    """Facts about the rank's devices, once it has told them."""


class Leader:
    """The group, as the leader sees it. It listens from its construction on.

    Args:
        address: The host, empty for all addresses, and the port to listen on.
        size: Number of ranks, with the leader.
        facts: The leader's facts about its software, by name.
        secret: The secret of this start.
        context: TLS; None for plain connections.
        silence: Seconds without a sign of life after which a rank counts as stopped.
        patience: Most seconds for an order; 0 for no limit.
        end: Ends this process.

    Raises:
        OSError: The address cannot be listened on.
    """

    def __init__(
        self,
        address: tuple[str, int],
        size: int,
        facts: Mapping[str, str],
        secret: bytes,
        *,
        context: ssl.SSLContext | None = None,
        silence: float = failure.SILENCE_SECONDS,
        patience: float = 0.0,
        end: End = failure.end,
    ) -> None:
        self.size = size
        self._facts = facts
        self._secret = secret
        self._context = context
        self._silence = silence
        self._patience = patience
        self._end = end
        host, port = address
        family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        self._listener = socket.create_server(address, family=family)
        self.port: int = self._listener.getsockname()[1]
        """The port that the leader listens on."""
        self._ranks: dict[int, _Rank] = {}
        self._log = OrderLog(range(1, size))
        self._sent = time.monotonic()
        self._sending = threading.Lock()
        self._changed = threading.Condition(threading.Lock())
        self._digests: dict[int, bytes] = {}
        self._failures: dict[int, str] = {}
        # Finalizers append to it. They run at any time, so they cannot take a lock.
        self._dropped: collections.deque[int] = collections.deque()
        self.counts: collections.Counter[str] = collections.Counter()
        """The orders so far, by kind."""

    @property
    def pending(self) -> int:
        """Orders that the slowest rank has not executed yet."""
        with self._changed:
            return self._log.pending

    # The group forms

    def gather(self, coordinator: str) -> None:
        """Wait until all ranks have joined, and admit them.

        Args:
            coordinator: Address of jax's coordinator, for the ranks.
        """
        while missing := [rank for rank in range(1, self.size) if rank not in self._ranks]:
            channels = [rank.channel.fileno() for rank in self._ranks.values()]
            readable, _, _ = select.select([self._listener.fileno(), *channels], [], [], _REMINDER_SECONDS)
            if not readable:
                logs.say(f"the group waits for rank {', '.join(map(str, missing))} of {self.size}")
            # A waiting rank sends nothing, so a readable socket means that it is gone.
            for number in [number for number, rank in self._ranks.items() if rank.channel.fileno() in readable]:
                self._ranks.pop(number).channel.close()
            if self._listener.fileno() in readable:
                connection, peer = self._listener.accept()
                self._greet(connection, str(peer[0]))
        self._listener.close()
        for number, rank in self._ranks.items():
            rank.heard = time.monotonic()
            proof = _channel.proof(self._secret, "leader", *rank.nonces)
            admission = group_pb2.GroupOrder.Admission(proof=proof, coordinator=coordinator)
            with contextlib.suppress(OSError):  # The rank's thread notices.
                rank.channel.send(_channel.written(group_pb2.GroupOrder(admission=admission)))
            threading.Thread(target=self._listen, args=(number, rank), name="hvpd-rank", daemon=True).start()
        threading.Thread(target=self._watch, name="hvpd-group", daemon=True).start()

    def _greet(self, connection: socket.socket, peer: str) -> None:
        """Answer a request to join."""
        connection.settimeout(_GREETING_SECONDS)
        nonce = secrets.token_bytes(_channel.NONCE_BYTES)
        try:
            channel = Channel(connection, self._context, server=True)
            challenge = group_pb2.GroupOrder.Challenge(nonce=nonce)
            channel.send(_channel.written(group_pb2.GroupOrder(challenge=challenge)))
            report = _channel.REPORTS.read(bytes(channel.receive(_channel.FIRST_BYTES)))
        except (OSError, DecodeError) as error:
            _log.warning("a connection from %s did not join the group: %s", peer, error)
            connection.close()
            return
        refusal, retry = self._refusal(report, nonce)
        if not refusal:
            channel.timeout(None)
            self._ranks[report.join.rank] = _Rank(channel, (nonce, report.join.nonce))
            return
        _log.warning("a request of %s to join the group is refused: %s", peer, refusal)
        admission = group_pb2.GroupOrder.Admission(refusal=refusal, retry=retry)
        with contextlib.suppress(OSError):
            channel.send(_channel.written(group_pb2.GroupOrder(admission=admission)))
        channel.close()

    def _refusal(self, report: group_pb2.GroupReport, nonce: bytes) -> tuple[str, bool]:
        """Return why a rank is refused, or an empty text; and whether it may ask
        again.
        """
        join = report.join
        expected = _channel.proof(self._secret, "rank", nonce, join.nonce)
        if len(join.nonce) != _channel.NONCE_BYTES or not _channel.is_proof(join.proof, expected):
            return "it does not know the secret of this start: give all ranks the same --store and --leader", True
        if join.size != self.size:
            return f"rank {join.rank} has --size {join.size}, and the leader has --size {self.size}", False
        if not 0 < join.rank < self.size:
            return f"there is no rank {join.rank} among {self.size}: --rank is from 1 to {self.size - 1}", False
        if join.rank in self._ranks:
            return f"rank {join.rank} has joined already: give each process a --rank of its own", True
        return differences(join.rank, report.facts, self._facts), False

    def confirm(self, devices: Mapping[str, str]) -> None:
        """Wait until all ranks have told the facts about their devices. End the group
        if they differ from the leader's.
        """
        with self._changed:
            self._changed.wait_for(lambda: all(rank.devices is not None for rank in self._ranks.values()))
        for number, rank in self._ranks.items():
            if why := differences(number, rank.devices or {}, devices):
                self._end(why, failure.ENDED)

    # Orders

    def order(self, order: group_pb2.GroupOrder, chunk: Buffer = b"", *, awaited: bool = False) -> int:
        """Number an order, and send it to all ranks. Return the number.

        Args:
            order: What to do.
            chunk: The order's bytes.
            awaited: Whether `done` is called for the order.
        """
        with self._sending:
            with self._changed:
                number = order.number = self._log.append(time.monotonic())
                if awaited:
                    self._digests[number] = order.load.sha256
            self._send(order, chunk)
            self.counts[order.WhichOneof("kind") or ""] += 1
        return number

    def done(self, number: int) -> str:
        """Wait until all ranks have executed an order. Return why it failed on some
        rank; empty if it did not.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._log.reached(number))
            del self._digests[number]
            return self._failures.pop(number, "")

    def drop(self, number: int) -> None:
        """Tell the ranks, with the next message, that the result of an order is not
        used any more. Takes no lock.
        """
        self._dropped.append(number)

    def _send(self, order: group_pb2.GroupOrder, chunk: Buffer = b"") -> None:
        """Send a message to all ranks, with what was dropped before."""
        while self._dropped:
            order.dropped.append(self._dropped.popleft())
        message = _channel.written(order, chunk)
        self._sent = time.monotonic()
        for number, rank in self._ranks.items():
            try:
                rank.channel.send(message)
            except OSError as error:
                self._end(f"rank {number} is gone ({error})", failure.ENDED)

    # Failures

    def launch_failed(self, error: Exception) -> NoReturn:
        """End the group after a launch that failed here: other ranks may have run
        it.
        """
        # If a rank has died, its own connection shows that within this time.
        threading.Event().wait(_GRACE_SECONDS)
        self._end(f"a launch failed: {error}", _code(str(error)))

    def _listen(self, number: int, rank: _Rank) -> None:
        """Receive the reports of a rank."""
        try:
            while True:
                report = _channel.REPORTS.read(bytes(rank.channel.receive()))
                self._note(number, rank, report)
        except (DecodeError, DisagreementError) as error:
            self._end(f"rank {number} disagrees: {error}", failure.ENDED)
        except OSError as error:
            self._end(f"rank {number} is gone ({error})", failure.ENDED)

    def _note(self, number: int, rank: _Rank, report: group_pb2.GroupReport) -> None:
        rank.heard = time.monotonic()
        if report.fatal:
            self._end(f"rank {number} failed: {report.failure}", _code(report.failure))
        if not (report.done or report.facts):
            return
        with self._changed:
            if report.facts:
                rank.devices = dict(report.facts)
            if report.done:
                self._log.done(number, report.done)
                expected = self._digests.get(report.done, b"")
                if report.failure:
                    self._failures[report.done] = f"rank {number}: {report.failure}"
                elif report.sha256 != expected:
                    raise DisagreementError(f"the program of order {report.done} has another digest there")
            self._changed.notify_all()

    def _watch(self) -> None:
        """End the group if a rank falls silent, or takes too long for an order."""
        never = threading.Event()
        while not never.wait(_WATCH_SECONDS):
            now = time.monotonic()
            if why := self._overdue(now):
                self._end(why, failure.ENDED)
            # A send to a rank that has stopped can hold the lock for ever.
            if now - self._sent > failure.BEAT_SECONDS and self._sending.acquire(blocking=False):
                try:
                    self._send(group_pb2.GroupOrder())
                finally:
                    self._sending.release()

    def _overdue(self, now: float) -> str:
        """Return which rank is silent or too slow at a time; empty if none is."""
        for number, rank in self._ranks.items():
            if now - rank.heard > self._silence:
                return f"rank {number} has been silent for {now - rank.heard:.1f} s"
            with self._changed:
                oldest = self._log.oldest(number)
            if oldest and self._patience and now - oldest[1] > self._patience:
                return f"rank {number} has not executed order {oldest[0]} within {self._patience:g} s"
        return ""


def _code(why: str) -> int:
    """Return the exit code after a launch that failed: the supervisor blames the
    objective if the devices had no memory for the launch.
    """
    return LOST if "RESOURCE_EXHAUSTED" in why else failure.ENDED
