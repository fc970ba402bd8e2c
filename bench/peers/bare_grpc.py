"""The barest gRPC server around a compiled product: one unary method on plain bytes. It
has no protobuf, no batching and no checks.
"""

import concurrent.futures
import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.peers._peer import About
from bench.peers._spec import MOST, Given, Multiply, Spec

ABOUT = About("bare gRPC handler", "floor", "on the server")
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@contextlib.contextmanager
def serving(spec: Spec) -> Iterator[str]:
    """Serve in this process."""
    import grpc

    from bench.peers._kernel import Kernel

    kernel = Kernel(spec, most=1)
    multiply = kernel.at(kernel.x)

    def handle(message: bytes, context: Any) -> bytes:
        return multiply(np.frombuffer(message, np.float32)[None]).tobytes()

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(MOST), options=_OPTIONS)
    handlers: dict[str, Any] = {"Multiply": grpc.unary_unary_rpc_method_handler(handle)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Bare", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def connect(address: str, given: Given) -> Multiply:
    """Return a unary call on a channel of its own."""
    import grpc

    channel = grpc.insecure_channel(
        address, [*_OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    )
    call: Any = channel.unary_unary("/bench.Bare/Multiply")
    return lambda v: np.frombuffer(call(v.tobytes()), np.float32)
