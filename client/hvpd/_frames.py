"""Messages that carry a chunk of payload, taken apart and put together without protobuf copying the chunk.

protobuf copies a `bytes` field when it is set, when the message is serialized, when it is parsed, and when it is read. Here the
bytes of a message are split into the chunk, as a view, and the rest, which protobuf parses. What is on the wire is the same:
https://protobuf.dev/programming-guides/encoding/
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from hvpd import _codec
from hvpd._errors import InvalidArgumentError

M = TypeVar("M", bound=Message)

_CHUNK = "chunk"
"""The name of the field, in every message that has one."""

_VARINT, _LENGTH_DELIMITED = 0, 2
"""The wire types of all fields here."""


class Frame(NamedTuple, Generic[M]):
    """A message, and its chunk."""

    message: M
    """Everything else."""
    chunk: _codec.Buffer = b""
    """One piece of payload; empty where there is none."""


@dataclasses.dataclass(frozen=True)
class Codec:
    """How the messages of one type become bytes and back: as `Frame`s where they have a chunk, else as they are."""

    write: Callable[[Any], bytes]
    read: Callable[[bytes], Any]


class Malformed:
    """In place of a message that is none. Whoever looks at it is refused: gRPC itself would blame the server, with INTERNAL, and fill
    its log.
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
    """The codec of a message type.

    Args:
        kind: The type.
        refuse: Gives what is read from bytes that are no such message, or raises.
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
                    break  # A field that no message here has: protobuf skips it, or refuses it.
                size, position = _read_varint(data, position + 1)
                if tag == key and size and position + size == end:
                    message = parse(data[:start])
                    message.ClearField(instead)  # What comes last counts.
                    return Frame(message, memoryview(data)[position:])
                position += size if tag & 7 == _LENGTH_DELIMITED else 0
            message = parse(data)  # Nobody writes a chunk but at the end; protobuf knows what it means elsewhere.
            return Frame(message, getattr(message, _CHUNK))
        except DecodeError as error:
            return refuse(error)

    return Codec(write, read)


def call(channel: grpc.Channel, method: MethodDescriptor) -> Callable[..., Any]:
    """What a stub has for a method, its messages as codecs have them."""
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
    """What a server registers for a method, its messages as codecs have them, and `Malformed` for what is none."""
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
    """A number, and where it ends.

    Raises:
        DecodeError: The bytes end within it, or it has more than 64 bits.
    """
    number = shift = 0
    for digit in data[position : position + 10]:
        number |= (digit & 0x7F) << shift
        shift += 7
        if digit < 0x80:
            return number, position + shift // 7
    raise DecodeError("a number is cut off, or has more than 64 bits")
