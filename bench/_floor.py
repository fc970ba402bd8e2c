"""The cost of the wire without hvpd: bare echoes of gRPC, TCP and a Unix socket, in a
process of their own as the server is.

`python -m bench._floor` serves them until its standard input ends. It uses no protobuf
and no interceptors. Its handlers take plain bytes.
"""

import concurrent.futures
import contextlib
import queue
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import grpc

from bench import _processes

CHUNK_BYTES = 1 << 20
"""Bytes of a message, as in hvpd: larger vectors travel as several messages."""

OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


Channel = grpc.Channel


# The clients: each is called for one round trip.


class UnaryEcho:
    """Sends one message there and back, as a unary call."""

    def __init__(self, channel: grpc.Channel, payload: bytes) -> None:
        self._call: Any = channel.unary_unary("/bench.Echo/Unary")
        self._payload = payload

    def __call__(self) -> None:
        self._call(self._payload)


class StreamEcho:
    """Sends messages of one size, at most 1 MiB, there and back on a stream that stays
    open.

    Args:
        payload: The bytes to send. They are cut into messages beforehand.
        whole: Whether the other end has all of them before it sends the first one back,
            as for a product it must.
    """

    def __init__(self, channel: grpc.Channel, payload: bytes, *, whole: bool = False) -> None:
        count = max(-(-len(payload) // CHUNK_BYTES), 1)
        size = max(-(-len(payload) // count), 1)
        self._chunks = [payload[i : i + size] for i in range(0, max(len(payload), 1), size)]
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method: Any = channel.stream_stream("/bench.Echo/Whole" if whole else "/bench.Echo/Stream")
        self._replies = method(iter(self._outgoing.get, None), metadata=(("chunks", str(len(self._chunks))),))

    def __call__(self) -> None:
        for chunk in self._chunks:
            self._outgoing.put(chunk)
        for _ in self._chunks:
            next(self._replies)

    def close(self) -> None:
        """End the stream."""
        self._outgoing.put(None)
        self._replies.cancel()


class SocketEcho:
    """Sends bytes there and back on a socket.

    Args:
        address: Host and port for TCP; the name of a Unix socket.
        payload: The bytes.
    """

    def __init__(self, address: "tuple[str, int] | str", payload: bytes) -> None:
        if isinstance(address, str):
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(address)
        else:
            self._socket = _no_delay(socket.create_connection(address))
        self._payload = payload
        self._buffer = memoryview(bytearray(min(len(payload), CHUNK_BYTES)))
        # A payload that fits into the socket's buffers needs no second thread. Without
        # one, a larger payload would block itself.
        self._sender = concurrent.futures.ThreadPoolExecutor(1) if len(payload) > 64 << 10 else None

    def __call__(self) -> None:
        sending = self._sender.submit(self._socket.sendall, self._payload) if self._sender else None
        if sending is None:
            self._socket.sendall(self._payload)
        left = len(self._payload)
        while left:
            left -= self._socket.recv_into(self._buffer, min(left, len(self._buffer)))
        if sending is not None:
            sending.result()

    def close(self) -> None:
        """End the connection."""
        self._socket.close()
        if self._sender:
            self._sender.shutdown()


class Echo:
    """Addresses of the echoes."""

    def __init__(self, grpc_port: int, tcp_port: int) -> None:
        self.address = f"127.0.0.1:{grpc_port}"
        self.tcp = ("127.0.0.1", tcp_port)
        self.unix = _unix_name(tcp_port)


def channel(address: str) -> grpc.Channel:
    """Return a new connection to an echo."""
    return grpc.insecure_channel(
        address, [*OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    )


@contextlib.contextmanager
def echoing() -> Iterator[Echo]:
    """Start the process; end it at the end of the context."""
    argv = [sys.executable, "-m", "bench._floor"]
    with _processes.child(argv, r"echoing on (\d+) (\d+)$") as found:
        yield Echo(int(found.ready[1]), int(found.ready[2]))


# The other end


def _stream(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from messages


def _whole(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    for whole in joined(messages, context):
        yield from whole


def joined(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[list[bytes]]:
    """Yield the messages of each round trip. The client's metadata says how many they
    are.
    """
    metadata = {str(key): str(value) for key, value in context.invocation_metadata()}
    together: list[bytes] = []
    for message in messages:
        together.append(message)
        if len(together) == int(metadata["chunks"]):
            yield together
            together = []


def _accept(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        if connection.family != socket.AF_UNIX:
            _no_delay(connection)
        threading.Thread(target=_echo, args=(connection,), daemon=True).start()


def _echo(connection: socket.socket) -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with connection, contextlib.suppress(ConnectionError):
        while count := connection.recv_into(buffer):
            connection.sendall(buffer[:count])


def _unix_name(tcp_port: int) -> str:
    """Return the name of the Unix socket beside a TCP port, which is no file."""
    return f"\0hvpd-bench-echo-{tcp_port}"


def _no_delay(connected: socket.socket) -> socket.socket:
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


def _serve(until: Iterable[str]) -> None:
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(512), options=OPTIONS)
    handlers: dict[str, Any] = {
        "Unary": grpc.unary_unary_rpc_method_handler(lambda message, context: message),
        "Stream": grpc.stream_stream_rpc_method_handler(_stream),
        "Whole": grpc.stream_stream_rpc_method_handler(_whole),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    listener = socket.create_server(("127.0.0.1", 0))
    tcp_port = listener.getsockname()[1]
    by_name = socket.socket(socket.AF_UNIX)
    by_name.bind(_unix_name(tcp_port))
    by_name.listen()
    for each in (listener, by_name):
        threading.Thread(target=_accept, args=(each,), daemon=True).start()
    print(f"echoing on {port} {tcp_port}", file=sys.stderr, flush=True)
    for _ in until:
        pass
    server.stop(None)


if __name__ == "__main__":
    _serve(sys.stdin)
