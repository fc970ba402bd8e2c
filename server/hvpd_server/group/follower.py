"""The side of a rank that is not the leader: joins the group, executes its orders in
one thread, and ends with it.
"""

import contextlib
import queue
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, NoReturn

from google.protobuf.message import DecodeError

from hvpd.v1 import group_pb2
from hvpd_server.group import channel as _channel
from hvpd_server.group import failure
from hvpd_server.group.channel import Channel
from hvpd_server.group.leader import End
from hvpd_server.group.order_log import DisagreementError
from hvpd_server.group.replay import Replay
from hvpd_server.telemetry import logs

_PAUSE_SECONDS: Final = 0.2
"""Seconds between two requests to join."""

_CONNECT_SECONDS: Final = 5.0
"""Most seconds for a connection."""

_REMINDER_SECONDS: Final = 30.0
"""Seconds between two lines in the log while there is no leader."""

_REFUSED_SECONDS: Final = 90.0
"""Most seconds of refusals that may end by themselves. The secret of a new start
becomes visible in a shared directory: NFS keeps the absence of a file for 60 s. The
leader notices that an earlier process of this rank is gone: its machine may have lost
its power, which TCP notices after 30 s.
"""


class RefusedError(Exception):
    """The leader does not admit this rank."""


class Follower:
    """The group, as a rank other than the leader sees it. It asks the leader again and
    again until the leader admits the rank.

    Args:
        address: The leader's host and port.
        rank: The number of this rank, from 1.
        size: Number of ranks, with the leader.
        facts: The facts about this rank's software, by name.
        secret: Returns the secret of the leader's start; None if there is none.
        context: Returns the TLS of a connection; None for a plain one. It is called for
            each connection, since the certificate may have changed.
        silence: Seconds without a sign of life after which the leader counts as
            stopped.
        end: Ends this process.

    Raises:
        RefusedError: The leader does not admit this rank.
    """

    def __init__(
        self,
        address: tuple[str, int],
        rank: int,
        size: int,
        facts: Mapping[str, str],
        secret: Callable[[], bytes | None],
        *,
        context: Callable[[], ssl.SSLContext | None] = lambda: None,
        silence: float = failure.SILENCE_SECONDS,
        end: End = failure.end,
    ) -> None:
        self._address = address
        self._rank = rank
        self._size = size
        self._facts = facts
        self._secret = secret
        self._context = context
        self._silence = silence
        self._end = end
        self._sending = threading.Lock()
        self._channel, self.coordinator = self._joined()
        self._heard = time.monotonic()
        self._orders: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="hvpd-orders", daemon=True).start()
        threading.Thread(target=self._beat, name="hvpd-rank-beat", daemon=True).start()

    def _joined(self) -> tuple[Channel, str]:
        """Return the connection to the leader, and the address of jax's coordinator."""
        never, reminder = threading.Event(), time.monotonic()
        refused: float | None = None
        while True:
            try:
                found = self._asked()
            except (OSError, DecodeError) as error:
                refused, why = None, str(error)
            else:
                if isinstance(found, tuple):
                    return found
                refused, why = refused or time.monotonic(), found.refusal
                if not found.retry or time.monotonic() - refused > _REFUSED_SECONDS:
                    raise RefusedError(found.refusal)
            if time.monotonic() >= reminder:
                reminder = time.monotonic() + _REMINDER_SECONDS
                host, port = self._address
                logs.say(f"rank {self._rank} waits for the leader at {host}:{port} ({why})")
            never.wait(_PAUSE_SECONDS)

    def _asked(self) -> tuple[Channel, str] | group_pb2.GroupOrder.Admission:
        """Request to join. Return the connection and the address of jax's coordinator,
        or the refusal.
        """
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(socket.create_connection(self._address, _CONNECT_SECONDS))
            channel = Channel(connection, self._context())
            found = self._ask(channel)
            if isinstance(found, str):
                stack.pop_all()
                return channel, found
            return found

    def _ask(self, channel: Channel) -> str | group_pb2.GroupOrder.Admission:
        """Request to join. Return the address of jax's coordinator, or the refusal."""
        nonce = secrets.token_bytes(_channel.NONCE_BYTES)
        challenge = _channel.read(channel.receive(_channel.FIRST_BYTES)).message.challenge.nonce
        secret = self._secret() or b""
        join = group_pb2.GroupReport.Join(
            rank=self._rank, size=self._size, nonce=nonce, proof=_channel.proof(secret, "rank", challenge, nonce)
        )
        channel.send(group_pb2.GroupReport(join=join, facts=self._facts).SerializeToString())
        channel.timeout(None)  # The leader answers when all ranks have joined.
        admission = _channel.read(channel.receive(_channel.FIRST_BYTES)).message.admission
        if admission.refusal:
            found: group_pb2.GroupOrder.Admission = admission
            return found
        if not secret or not _channel.is_proof(admission.proof, _channel.proof(secret, "leader", challenge, nonce)):
            raise RefusedError("the leader does not know the secret of this start: is another program at its address?")
        return str(admission.coordinator)

    def confirm(self, devices: Mapping[str, str]) -> None:
        """Tell the leader the facts about this rank's devices."""
        self._send(group_pb2.GroupReport(facts=devices))

    def serve(self, replay: Replay) -> NoReturn:
        """Execute the orders of the leader, until the group ends."""
        while True:
            try:
                frame = _channel.read(self._orders.get())
                order = frame.message
                if not order.number:
                    replay.drop(order.dropped)
                    continue
                report = replay.execute(order, frame.chunk)
            except (DecodeError, DisagreementError) as error:
                report = group_pb2.GroupReport(failure=str(error), fatal=True)
            self._send(report)
            if report.fatal:
                self._end(f"this is rank {self._rank}, and it failed: {report.failure}", failure.ENDED)

    def _send(self, report: group_pb2.GroupReport) -> None:
        try:
            with self._sending:
                self._channel.send(report.SerializeToString())
        except OSError as error:
            self._end(f"the leader is gone ({error})", failure.ENDED)

    def _listen(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                self._heard = time.monotonic()
                self._orders.put(message)
        except OSError as error:
            self._end(f"the leader is gone ({error})", failure.ENDED)

    def _beat(self) -> None:
        never = threading.Event()
        while not never.wait(failure.BEAT_SECONDS):
            silent = time.monotonic() - self._heard
            if silent > self._silence:
                self._end(f"the leader has been silent for {silent:.1f} s", failure.ENDED)
            self._send(group_pb2.GroupReport())

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()
