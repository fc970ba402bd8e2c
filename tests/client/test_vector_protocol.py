"""The vector port's protocol without a socket: the same events however the bytes are
split, and an error for bytes that the protocol does not allow.
"""

import ast
import random
import struct
from pathlib import Path

import pytest

from hvpd._wire import vector_protocol
from hvpd._wire.vector_protocol import (
    CallerEnd,
    ClosedError,
    Offer,
    Opened,
    Opening,
    ProtocolError,
    Reply,
    Request,
    Response,
    SegmentAnswer,
    ServerEnd,
)

GREETING, TICKET, SERVER_PROOF, CLIENT_PROOF = (bytes([each]) * 16 for each in range(1, 5))
OPENING = b"hvpd/v1\n" + TICKET + CLIENT_PROOF
ANSWER = b"hvpd/v1\n" + GREETING + SERVER_PROOF


def server_end():
    return ServerEnd(GREETING)


def caller_end():
    return CallerEnd(GREETING, TICKET, SERVER_PROOF, CLIENT_PROOF)


def asked(spec, vectors, timeout_ns=0, kind=0):
    """Return a product as docs/reference/vector-port.md has it."""
    return struct.pack("<IIQQ", len(spec), kind, len(vectors), timeout_ns) + spec + vectors


def answered(message, result, kind=0):
    return struct.pack("<IIQ", len(message), kind, len(result)) + message + result


class Reader:
    """Takes bytes in pieces, as a socket gives them, and notes events and payloads. It
    skips payloads of size `unwanted`.
    """

    def __init__(self, end, unwanted=-1):
        self.end = end
        self.found = []
        self._unwanted = unwanted
        self._payload = None

    def feed(self, said):
        """Give bytes to the end, which may span several messages."""
        said = memoryview(said)
        while said:
            room = self.end.receive_buffer()[: len(said)]
            assert room  # Otherwise nothing could arrive any more.
            room[:] = said[: len(room)]
            self.end.received(len(room))
            said = said[len(room) :]
            self._read()
        return self

    def _read(self):
        while not self.end.missing:
            if self._payload is not None:
                self.found.append(bytes(self._payload))
                self._payload = None
            event = self.end.next_event()
            if event is None:
                return
            self.found.append(event)
            if isinstance(event, Opening):
                assert self.end.admit(SERVER_PROOF, CLIENT_PROOF) == SERVER_PROOF
            elif isinstance(event, Request | Response):
                if event.size == self._unwanted:
                    self.end.skip()
                else:
                    self._payload = bytearray(0 if event.shared else event.size)
                    self.end.fill(memoryview(self._payload))
        assert self.end.next_event() is None


def opened(make):
    """Return the reader of an end that is open."""
    reader = Reader(make())
    reader.feed(OPENING if make is server_end else ANSWER)
    assert reader.found[-1] == Opened()
    reader.found.clear()
    return reader


SPEC, VECTORS = b"spec" * 9, random.Random(0).randbytes(200)
LONG = random.Random(1).randbytes(150_000)
OFFERED, TAKEN, REFUSED = (
    struct.pack("<IIQQ", 0, 2, 4096, 0),
    struct.pack("<IIQ", 0, 3, 1),
    struct.pack("<IIQ", 0, 3, 0),
)
SHARED = struct.pack("<IIQQ", len(SPEC), 1, 4096, 7) + SPEC, struct.pack("<IIQ", len(SPEC), 2, 4096) + SPEC
SERVER = (
    OPENING
    + asked(SPEC, VECTORS, 7)
    + OFFERED
    + SHARED[0]
    + asked(b"", b"")
    + asked(b"x" * vector_protocol.SPEC_BYTES, LONG),
    [
        Opening(TICKET),
        Opened(),
        *(Request(SPEC, 200, 7), VECTORS),
        Offer(4096),
        *(Request(SPEC, 4096, 7, shared=True), b""),
        *(Request(b"", 0, 0), b""),
        *(Request(b"x" * vector_protocol.SPEC_BYTES, len(LONG), 0), LONG),
    ],
)
CALLER = (
    ANSWER
    + answered(SPEC, VECTORS)
    + TAKEN
    + REFUSED
    + SHARED[1]
    + answered(b"y" * vector_protocol.STATUS_BYTES, b"", 1)
    + answered(b"", LONG),
    [
        Reply(b"hvpd/v1\n" + TICKET),
        Reply(CLIENT_PROOF),
        Opened(),
        *(Response(False, SPEC, 200), VECTORS),
        SegmentAnswer(taken=True),
        SegmentAnswer(taken=False),
        *(Response(False, SPEC, 4096, shared=True), b""),
        *(Response(True, b"y" * vector_protocol.STATUS_BYTES, 0), b""),
        *(Response(False, b"", len(LONG)), LONG),
    ],
)
both = pytest.mark.parametrize(("make", "said", "events"), [(server_end, *SERVER), (caller_end, *CALLER)])


@both
def test_bytes_may_come_all_at_once(make, said, events):
    assert Reader(make()).feed(said).found == events


@both
def test_bytes_may_come_one_by_one(make, said, events):
    reader = Reader(make())
    for index in range(len(said)):
        reader.feed(said[index : index + 1])
    assert reader.found == events
    assert not reader.end.pending


@both
@pytest.mark.parametrize("seed", range(100))
def test_bytes_may_be_split_anywhere(make, said, events, seed):
    """The pieces are of all magnitudes, up to several messages."""
    rng, reader, start = random.Random(seed), Reader(make()), 0
    while start < len(said):
        size = int(2 ** rng.uniform(0, rng.choice([3, 8, 18])))
        reader.feed(said[start : start + size])
        start += size
    assert reader.found == events


@pytest.mark.parametrize("make", [server_end, caller_end])
@pytest.mark.parametrize("seed", range(20))
def test_many_small_products_may_come_at_once(make, seed):
    """A message that the end of the buffer cuts off moves to its start."""
    rng = random.Random(seed)
    parts = [(rng.randbytes(rng.randrange(300)), rng.randbytes(rng.randrange(3000))) for _ in range(200)]
    message = asked if make is server_end else answered
    reader = opened(make).feed(b"".join(message(*part) for part in parts))
    assert reader.found[1::2] == [payload for _, payload in parts]
    assert [event.spec if make is server_end else event.message for event in reader.found[::2]] == [
        head for head, _ in parts
    ]


def test_a_payload_is_received_where_it_belongs():
    """Beyond the bytes that came with the head, it is not copied."""
    end = opened(server_end).end
    said = asked(SPEC, LONG)
    end.receive_buffer()[:100] = said[:100]
    end.received(100)
    assert end.next_event() == Request(SPEC, len(LONG), 0)
    target = bytearray(len(LONG))
    end.fill(memoryview(target))
    rest = end.receive_buffer()
    assert rest.obj is target
    assert len(rest) == len(said) - 100  # No byte of the next product may come into it.
    rest[:] = said[100:]
    end.received(len(rest))
    del rest
    assert not end.missing
    assert target == LONG
    target.clear()  # It raises if the end holds the memory still.


@pytest.mark.parametrize("size", [0, 1, 200, 150_000])
def test_an_unwanted_payload_is_skipped(size):
    reader = opened(server_end)
    reader._unwanted = size
    reader.feed(asked(SPEC, bytes(size)) + asked(b"next", b"12"))
    assert reader.found == [Request(SPEC, size, 0), Request(b"next", 2, 0), b"12"]


def test_a_head_is_an_event_before_its_payload_comes():
    """The server refuses a product before it takes memory for it."""
    assert opened(server_end).feed(asked(SPEC, b"")[:-36]).found == []
    end = opened(server_end).end
    head = struct.pack("<IIQQ", 4, 0, 2**64 - 1, 0) + b"spec"
    end.receive_buffer()[: len(head)] = head
    end.received(len(head))
    assert end.next_event() == Request(b"spec", 2**64 - 1, 0)
    end.skip()
    assert end.next_event() is None


# Bytes that are not allowed


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (b"hvpd/v2\n" + TICKET, "does not speak the protocol"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "does not speak the protocol"),
        (b"hvpd/v1\n" + TICKET + SERVER_PROOF, "does not have the ticket's proof"),
        (OPENING + asked(b"x" * (vector_protocol.SPEC_BYTES + 1), b""), "16385 bytes, of at most 16384"),
        (OPENING + asked(SPEC, b"", kind=3), "its kind is 3, of at most 2"),
        (OPENING + asked(SPEC, b"", kind=2), "an offer has neither a spec nor a limit"),
        (OPENING + asked(b"", b"", timeout_ns=1, kind=2), "an offer has neither a spec nor a limit"),
    ],
)
def test_a_caller_that_breaks_the_protocol_is_an_error(said, says):
    with pytest.raises(ProtocolError, match=says):
        Reader(server_end()).feed(said)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (b"hvpd/v1\n" + TICKET, "not the vector port of the server"),
        (b"SSH-2.0-OpenSSH_9.6\r\n" + bytes(30), "not the vector port of the server"),
        (b"hvpd/v1\n" + GREETING + CLIENT_PROOF, "not the vector port of the server"),
        (ANSWER + answered(b"", b"", kind=4), "kind 4"),
        (ANSWER + answered(b"1", b"", kind=3), "a message of 1 bytes, of at most 65536, kind 3"),
        (ANSWER + answered(b"", b"12", kind=3), "kind 3, and 2 bytes of result"),
        (ANSWER + answered(b"", b"1", kind=1), "kind 1, and 1 bytes of result"),
        (ANSWER + struct.pack("<IIQ", vector_protocol.STATUS_BYTES + 1, 0, 0), "65537 bytes, of at most 65536"),
    ],
)
def test_a_server_that_breaks_the_protocol_is_an_error(said, says):
    with pytest.raises(ProtocolError, match=says):
        Reader(caller_end()).feed(said)


def test_a_caller_says_nothing_before_the_server_has_proved_itself():
    """Another service that listens there receives no byte."""
    for wrong in range(24):
        said = bytearray(b"hvpd/v1\n" + GREETING)
        said[wrong] ^= 1
        reader = Reader(caller_end())
        with pytest.raises(ProtocolError):
            reader.feed(said)
        assert reader.found == []


@both
def test_an_end_is_an_error_wherever_it_is(make, said, events):
    for length in range(300):
        reader = Reader(make()).feed(said[:length])
        with pytest.raises(ClosedError, match="closed the connection"):
            reader.end.received(0)


# Faults of the program itself


def test_an_end_that_is_used_wrongly_says_so():
    end = server_end()
    with pytest.raises(RuntimeError, match="no payload"):
        end.skip()
    with pytest.raises(RuntimeError, match="no payload"):
        end.fill(memoryview(b""))
    end.receive_buffer()[: len(OPENING)] = OPENING
    end.received(len(OPENING))
    assert end.next_event() == Opening(TICKET)
    with pytest.raises(RuntimeError, match="admit"):
        end.next_event()
    end.admit(SERVER_PROOF, CLIENT_PROOF)
    assert end.next_event() == Opened()
    said = asked(SPEC, VECTORS)
    end.receive_buffer()[: len(said)] = said
    end.received(len(said))
    assert end.next_event() == Request(SPEC, len(VECTORS), 0)
    with pytest.raises(RuntimeError, match="fill or skip"):
        end.next_event()
    with pytest.raises(RuntimeError, match="no payload of 199 bytes"):
        end.fill(memoryview(bytearray(199)))
    end.skip()
    assert end.next_event() is None
    with pytest.raises(RuntimeError, match="no payload"):
        end.skip()


# Sending


def test_messages_are_written_as_the_documentation_has_them():
    assert vector_protocol.request(SPEC, 200, 7) + VECTORS == asked(SPEC, VECTORS, 7)
    assert vector_protocol.answer(SPEC, 200) + VECTORS == answered(SPEC, VECTORS)
    assert vector_protocol.refusal(SPEC) == answered(SPEC, b"", kind=1)
    assert server_end().greeting == b"hvpd/v1\n" + GREETING


def test_two_ends_understand_each_other():
    server, caller = Reader(server_end()), Reader(caller_end())
    caller.feed(server.end.greeting)
    server.feed(caller.found.pop().content)
    caller.feed(SERVER_PROOF)
    reply, last = caller.found
    assert last == Opened()
    server.feed(reply.content)
    assert server.found == [Opening(TICKET), Opened()]


def test_the_protocol_knows_no_socket():
    tree = ast.parse(Path(vector_protocol.__file__).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"enum", "hmac", "struct", "dataclasses", "typing"}
