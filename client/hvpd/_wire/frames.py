"""Reads and writes messages with a chunk of payload, without copies by protobuf.

protobuf copies a `bytes` field when it is set, when the message is serialized, when it
is parsed, and when it is read. This file splits the bytes of a message into the chunk,
as a view, and the rest, which protobuf parses. It is for gRPC's messages; the vector
port's are in `vector_protocol`. The wire does not change:
https://protobuf.dev/programming-guides/encoding/
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from hvpd._errors import InvalidArgumentError
from hvpd._wire import codec as _codec

M = TypeVar("M", bound=Message)

_CHUNK = "chunk"
"""Name of the field, in every message that has one."""

_VARINT, _LENGTH_DELIMITED = 0, 2
"""Wire types of all fields here."""


class Frame(NamedTuple, Generic[M]):
    """A message with its chunk."""

    message: M
    """The message without the chunk."""
    chunk: _codec.Buffer = b""
    """A piece of payload; empty for none."""


@dataclasses.dataclass(frozen=True)
class Codec:
    """Writes and reads the messages of one type, those with a chunk as `Frame`s."""

    write: Callable[[Any], bytes]
    read: Callable[[bytes], Any]


class Malformed:
    """A stand-in for bytes that are no such message. Each access raises.

    gRPC itself would report INTERNAL, as if the server were at fault, and fill its log.
    """

    def __init__(self, why: str) -> None:
        self._why = why

    def _refuse(self) -> NoReturn:
        raise InvalidArgumentError(f"a message cannot be read: {self._why}", reason="MALFORMED_MESSAGE")

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse()

    def __iter__(self) -> NoReturn:
        self._refuse()


def _raise(error: DecodeError) -> NoReturn:
    raise error


def codec(kind: type[M], refuse: Callable[[DecodeError], Any] = _raise) -> Codec:
    """Return the codec of a message type.

    Args:
        kind: The type.
        refuse: Raises for bytes that are no such message, or returns the result of
            reading them.
    """
    parse: Callable[[bytes], M] = kind.FromString
    field = kind.DESCRIPTOR.fields_by_name.get(_CHUNK)
    if field is None:
        return Codec(kind.SerializeToString, _reading(parse, refuse))
    key = field.number << 3 | _LENGTH_DELIMITED
    instead = field.name if field.containing_oneof is None else field.containing_oneof.name

    def write(frame: Frame[M]) -> bytes:
        if not frame.chunk:
            return frame.message.SerializeToString()
        return b"".join((frame.message.SerializeToString(), bytes((key,)), _varint(len(frame.chunk)), frame.chunk))

    def read(data: bytes) -> Any:
        try:
            position, end = 0, len(data)
            while position < end:
                start, tag = position, data[position]
                if tag >= 0x80 or tag & 7 not in (_VARINT, _LENGTH_DELIMITED):
                    break  # No message here has such a field, so protobuf skips or refuses it.
                size, position = _read_varint(data, position + 1)
                if tag == key and size and position + size == end:
                    message = parse(data[:start])
                    message.ClearField(instead)  # The last one counts.
                    return Frame(message, memoryview(data)[position:])
                position += size if tag & 7 == _LENGTH_DELIMITED else 0
            message = parse(data)  # hvpd writes the chunk last. Another order is for protobuf.
            return Frame(message, getattr(message, _CHUNK))
        except DecodeError as error:
            return refuse(error)

    return Codec(write, read)


def call(channel: grpc.Channel, method: MethodDescriptor) -> Callable[..., Any]:
    """Return a method as a stub has it, with the messages of its codecs."""
    kinds: Mapping[tuple[bool, bool], Any] = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    request, response = codec(GetMessageClass(method.input_type)), codec(GetMessageClass(method.output_type))
    path = f"/{method.containing_service.full_name}/{method.name}"
    found: Callable[..., Any] = kinds[method.client_streaming, method.server_streaming](
        path, request.write, response.read
    )
    return found


def handler(servicer: object, method: MethodDescriptor) -> "grpc.RpcMethodHandler[Any, Any]":
    """Return the handler that a server registers for a method.

    It reads messages by their codecs, and other bytes as `Malformed`.
    """
    kind = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[method.client_streaming, method.server_streaming]
    request = codec(GetMessageClass(method.input_type), lambda error: Malformed(str(error)))
    response = codec(GetMessageClass(method.output_type))
    return kind(getattr(servicer, method.name), request.read, response.write)


def _reading(parse: Callable[[bytes], M], refuse: Callable[[DecodeError], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as error:
            return refuse(error)

    return read


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Return a number, and the position behind it.

    Raises:
        DecodeError: The bytes end within the number, or it has more than 64 bits.
    """
    number = shift = 0
    for digit in data[position : position + 10]:
        number |= (digit & 0x7F) << shift
        shift += 7
        if digit < 0x80:
            return number, position + shift // 7
    raise DecodeError("a number is cut off, or has more than 64 bits")
