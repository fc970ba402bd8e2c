"""The protocol of the vector port, for products past gRPC: bytes in, events out.

This file knows neither sockets, nor gRPC, nor the content of messages. Client, server
and tests share it; `vector_socket` connects an end to a socket. A ticket opens a
connection (CurvatureService.CreateVectorTicket), over TLS if the server uses it:

    server: MAGIC, the ticket's greeting    caller: MAGIC, the ticket's id
    server: its server_proof                caller: its client_proof

The server speaks first. A lying server may name the port of another service, which must
receive nothing.

Then one product follows the other. All integers are little-endian:

    caller: REQUEST, a ProductSpec, V
    server: RESPONSE, a ProductInfo, HV; or RESPONSE, a google.rpc.Status

On a Unix socket, the caller may offer a segment of shared memory, in which V and HV
then lie (`segment`):

    caller: REQUEST (OFFER)                 server: RESPONSE (SEGMENT)
    caller: a byte, with the descriptor     server: RESPONSE (SEGMENT)

docs/reference/vector-port.md describes the protocol for authors of other clients.

Each side reads with its end, `ServerEnd` or `CallerEnd`, in a loop:

    while (event := end.next_event()) is None:
        end.received(sock.recv_into(end.receive_buffer()))

A payload (V or HV) is not in an event, because it may be large. `fill` says where its
bytes go, and the rest of them is received there directly:

    end.fill(target)
    while end.missing:
        end.received(sock.recv_into(end.receive_buffer()))

An end goes through these states:

    GREETING ──> PROOF ──> HEAD ── event ──> PAYLOAD
                            ^                  │
                            └── fill or skip ──┘
"""

import enum
import hmac
import struct
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeAlias, TypeVar

MAGIC: Final = b"hvpd/v1\n"
PROOF_BYTES: Final = 16
"""Bytes of a ticket's greeting, of its id, and of either proof."""

OPENING_BYTES: Final = len(MAGIC) + PROOF_BYTES
"""Bytes of the first message of either side."""

REQUEST: Final = struct.Struct("<IIQQ")
"""Bytes of the ProductSpec, kind, bytes of V, and the caller's limit in nanoseconds.

A limit of 0 is none."""

FOLLOWS: Final = 0
SHARED: Final = 1
OFFER: Final = 2
"""Kinds of a request: V follows; V is in the segment; a segment of so many bytes."""

RESPONSE: Final = struct.Struct("<IIQ")
"""Bytes of the message, its kind, and bytes of HV or v'Hv; 0 for a failure."""

ANSWERED: Final = 0
FAILED: Final = 1
ANSWERED_SHARED: Final = 2
SEGMENT: Final = 3
"""Kinds of a response: a ProductInfo; a google.rpc.Status; a ProductInfo, and HV is in
the segment; an answer to an offer, without a message.
"""

SPEC_BYTES: Final = 16 << 10
STATUS_BYTES: Final = 64 << 10
"""Bytes of the largest messages."""

_ROOM_BYTES: Final = RESPONSE.size + STATUS_BYTES
"""Bytes of the receive buffer: the largest message with its head fits.

A small product arrives in one piece."""


class ClosedError(OSError):
    """The other end closed the connection."""


class ProtocolError(ConnectionError):
    """The other end sent bytes that the protocol does not allow.

    The connection cannot be used again.
    """


# Events


class Opening(NamedTuple):
    """The server has a caller's first message. `ServerEnd.admit` lets the caller in."""

    ticket: bytes
    """The id of the ticket."""


class Reply(NamedTuple):
    """The caller has a right message of the opening, and must send `content` now."""

    content: bytes


@dataclass(frozen=True)
class Opened:
    """The connection is open for products."""


@dataclass(slots=True)  # A NamedTuple takes longer to make.
class Request:
    """The server has the head of a product. V follows: `fill` or `skip`."""

    spec: bytes
    """An encoded ProductSpec."""
    size: int
    """Bytes of V."""
    timeout_ns: int
    """Nanoseconds that the caller waits; 0 for no limit."""
    shared: bool = False
    """Whether V is in the segment. Then the payload is empty."""


@dataclass(frozen=True)
class Offer:
    """The caller offers a segment, and waits for the answer: `segment_answer`."""

    size: int
    """Bytes of the segment."""


@dataclass(slots=True)
class Response:
    """The caller has the head of an answer. HV or v'Hv follows: `fill` or `skip`."""

    failed: bool
    message: bytes
    """An encoded ProductInfo, or an encoded google.rpc.Status of a failure."""
    size: int
    """Bytes of HV or v'Hv; 0 for a failure."""
    shared: bool = False
    """Whether HV is in the segment. Then the payload is empty."""


@dataclass(frozen=True)
class SegmentAnswer:
    """The server's answer to an offer, and then to the descriptor."""

    taken: bool
    """Whether the server takes the segment. If not, the caller sends V as before."""


ServerEvent: TypeAlias = Opening | Opened | Request | Offer
CallerEvent: TypeAlias = Reply | Opened | Response | SegmentAnswer
"""The events of either end."""

_OPENED = Opened()

_UNDECIDED = "a payload arrives: call fill or skip first"

E = TypeVar("E")


class _State(enum.Enum):
    GREETING = enum.auto()
    """The other end's first message is next."""
    PROOF = enum.auto()
    """The other end's proof is next. A server may not have admitted the caller yet."""
    HEAD = enum.auto()
    """A request or a response is next."""
    PAYLOAD = enum.auto()
    """A payload is next. Nothing says yet where it goes."""


# Members of an enum are slow to look up, and each product passes through two states.
_HEAD, _PAYLOAD = _State.HEAD, _State.PAYLOAD


class End(Generic[E]):
    """One end of a connection: the bytes that it received, and their meaning.

    Attributes:
        missing: Bytes of the payload that have not arrived. Until they have, there is
            no further event.
    """

    def __init__(self) -> None:
        self.missing = 0
        self._target: memoryview | None = None
        """Memory for the missing bytes; None if they are skipped."""
        self._room = memoryview(bytearray(_ROOM_BYTES))
        self._start = self._stop = 0
        """Where the received bytes without an event are in the room."""
        self._state = _State.GREETING
        self._size = 0
        """Bytes of the payload of the last event."""

    @property
    def pending(self) -> bool:
        """Return whether bytes were received that are in no event yet."""
        return self._start < self._stop

    def receive_buffer(self) -> memoryview:
        """Return memory for the next bytes, which `received` then counts.

        Call it when `next_event` has returned None, or while bytes are missing.
        """
        if self._target is not None:
            return self._target
        start, stop = self._start, self._stop
        if start == stop:
            self._start = self._stop = 0
            return self._room[: self.missing] if self.missing else self._room
        if start:  # The beginning of a message moves to the front, so that all of it fits.
            self._room[: stop - start] = self._room[start:stop]
            self._start, self._stop = 0, stop - start
        return self._room[self._stop :]

    def received(self, count: int) -> None:
        """Note that so many bytes were written to `receive_buffer`.

        Raises:
            ClosedError: There are none: the other end has closed the connection.
        """
        if not count:
            raise ClosedError("the other end closed the connection")
        if not self.missing:
            self._stop += count
            return
        self.missing -= count
        if self._target is not None:
            # When all is there, a view would only keep the memory from being freed.
            self._target = self._target[count:] if self.missing else None

    def next_event(self) -> E | None:
        """Return the next event; None if more bytes must arrive first.

        Raises:
            ProtocolError: The other end broke the protocol.
            RuntimeError: The last event needs `fill`, `skip` or `admit` first.
        """
        raise NotImplementedError

    def fill(self, target: memoryview) -> None:
        """Let the payload of the last event fill memory.

        Args:
            target: As many bytes as the event has announced.
        """
        size = len(target)
        if self._state is not _PAYLOAD or size != self._size:
            raise RuntimeError(f"no payload of {size} bytes arrives")
        self._state = _HEAD
        start = self._start
        there = self._stop - start
        if there < size:
            self.missing, self._target, size = size - there, target[there:], there
        target[:size] = self._room[start : start + size]
        self._start = start + size

    def skip(self) -> None:
        """Discard the payload of the last event."""
        if self._state is not _PAYLOAD:
            raise RuntimeError("no payload arrives")
        self._state = _HEAD
        count = min(self._stop - self._start, self._size)
        self._start += count
        self.missing = self._size - count

    def _take(self, size: int) -> bytes | None:
        """Return the next bytes; None if not all of them are there."""
        if self._stop - self._start < size:
            return None
        found = bytes(self._room[self._start : self._start + size])
        self._start += size
        return found


class ServerEnd(End[ServerEvent]):
    """The server's end: `Opening`, `Opened`, and a `Request` for each product.

    Args:
        greeting: The greeting of the tickets.
    """

    def __init__(self, greeting: bytes) -> None:
        super().__init__()
        self.greeting = MAGIC + greeting
        """The bytes to send first."""
        self._proof: bytes | None = None

    def admit(self, server_proof: bytes, client_proof: bytes) -> bytes:
        """Let the caller in; return the bytes to send to it now.

        Args:
            server_proof: The proof of the server, of the ticket that `Opening` names.
            client_proof: The proof that the caller must send. Then `Opened` follows.
        """
        self._proof = client_proof
        return server_proof

    def _opening(self) -> Opening | Opened | None:
        if self._state is _State.GREETING:
            said = self._take(OPENING_BYTES)
            if said is None:
                return None
            if not said.startswith(MAGIC):
                raise ProtocolError("the caller does not speak the protocol of the vector port")
            self._state = _State.PROOF
            return Opening(said[len(MAGIC) :])
        if self._state is _PAYLOAD:
            raise RuntimeError(_UNDECIDED)
        if self._proof is None:
            raise RuntimeError("the caller shows a ticket: call admit first, or end the connection")
        proof = self._take(PROOF_BYTES)
        if proof is None:
            return None
        if not hmac.compare_digest(proof, self._proof):
            raise ProtocolError("the caller does not have the ticket's proof")
        self._state = _HEAD
        return _OPENED

    def next_event(self) -> ServerEvent | None:
        if self._state is not _HEAD:
            return self._opening()
        start, there = self._start, self._stop - self._start
        if there < REQUEST.size or self.missing:
            return None
        spec_bytes, kind, size, timeout_ns = REQUEST.unpack_from(self._room, start)
        if spec_bytes > SPEC_BYTES or kind > OFFER or (kind == OFFER and (spec_bytes or timeout_ns)):
            raise ProtocolError(
                f"the spec of a request has {spec_bytes} bytes, of at most {SPEC_BYTES}, its kind is {kind}, of at most "
                f"{OFFER}, and its limit is {timeout_ns}; an offer has neither a spec nor a limit"
            )
        if there < REQUEST.size + spec_bytes:
            return None
        start += REQUEST.size
        self._start = stop = start + spec_bytes
        if kind == FOLLOWS:
            self._size, self._state = size, _PAYLOAD
            return Request(bytes(self._room[start:stop]), size, timeout_ns)
        if kind == OFFER:
            return Offer(size)
        self._size, self._state = 0, _PAYLOAD
        return Request(bytes(self._room[start:stop]), size, timeout_ns, shared=True)


class CallerEnd(End[CallerEvent]):
    """The caller's end: `Reply` twice, `Opened`, and a `Response` for each product.

    Args:
        greeting: The ticket's greeting.
        identity: The ticket's id.
        server_proof: The ticket's proof of the server.
        client_proof: The ticket's proof of the caller.
    """

    def __init__(self, greeting: bytes, identity: bytes, server_proof: bytes, client_proof: bytes) -> None:
        super().__init__()
        self._awaited = [MAGIC + greeting, server_proof]
        self._replies = [MAGIC + identity, client_proof]

    def _opening(self) -> Reply | Opened | None:
        if self._state is _PAYLOAD:
            raise RuntimeError(_UNDECIDED)
        if not self._awaited:
            self._state = _HEAD
            return _OPENED
        said = self._take(len(self._awaited[0]))
        if said is None:
            return None
        if not hmac.compare_digest(said, self._awaited.pop(0)):
            raise ProtocolError("this is not the vector port of the server that made the ticket")
        self._state = _State.PROOF
        return Reply(self._replies.pop(0))

    def next_event(self) -> CallerEvent | None:
        if self._state is not _HEAD:
            return self._opening()
        start, there = self._start, self._stop - self._start
        if there < RESPONSE.size or self.missing:
            return None
        message_bytes, kind, size = RESPONSE.unpack_from(self._room, start)
        if (
            message_bytes > STATUS_BYTES
            or kind > SEGMENT
            or (kind == FAILED and size)
            or (kind == SEGMENT and (message_bytes or size > 1))
        ):
            raise ProtocolError(
                f"the answer has a message of {message_bytes} bytes, of at most {STATUS_BYTES}, kind {kind}, "
                f"and {size} bytes of result"
            )
        if there < RESPONSE.size + message_bytes:
            return None
        start += RESPONSE.size
        self._start = stop = start + message_bytes
        if kind == SEGMENT:
            return SegmentAnswer(bool(size))
        shared = kind == ANSWERED_SHARED
        self._size, self._state = 0 if shared else size, _PAYLOAD
        return Response(kind == FAILED, bytes(self._room[start:stop]), size, shared)


# Messages


def request(spec: bytes, size: int, timeout_ns: int, *, shared: bool = False) -> bytes:
    """Return the bytes before a block of `size` bytes; see `Request`."""
    return REQUEST.pack(len(spec), SHARED if shared else FOLLOWS, size, timeout_ns) + spec


def offer(size: int) -> bytes:
    """Return the offer of a segment of `size` bytes."""
    return REQUEST.pack(0, OFFER, size, 0)


def segment_answer(*, taken: bool) -> bytes:
    """Return the answer to an offer, or to the descriptor after it."""
    return RESPONSE.pack(0, SEGMENT, taken)


def answer(info: bytes, size: int, *, shared: bool = False) -> bytes:
    """Return the bytes before a result of `size` bytes.

    Args:
        info: An encoded ProductInfo.
        size: Bytes of HV or v'Hv.
        shared: Whether the result is in the segment.
    """
    return RESPONSE.pack(len(info), ANSWERED_SHARED if shared else ANSWERED, size) + info


def refusal(status: bytes) -> bytes:
    """Return the answer for a product that failed.

    Args:
        status: An encoded google.rpc.Status.
    """
    return RESPONSE.pack(len(status), FAILED, 0) + status
