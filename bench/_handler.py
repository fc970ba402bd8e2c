"""The barest handler of gRPC in Python for a product: plain bytes around the compiled
program, with x and residuals on the device. It has no protocol, no checks, no queue and
no other caller.

`python -m bench._handler PROGRAM ROWS SIZE SIZE ...` serves the product of an MLP until
its standard input ends.
"""

import concurrent.futures
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np

from bench import _floor, _processes
from bench._objectives import Vector, mlp
from bench._programs import Programs


@contextlib.contextmanager
def handling(program: str, rows: int, sizes: Sequence[int]) -> Iterator[str]:
    """Start the process, yield its address, and end it at the end of the context.

    `_floor.StreamEcho(..., whole=True)` is its client.
    """
    argv = [sys.executable, "-m", "bench._handler", program, str(rows), *map(str, sizes)]
    with _processes.child(argv, r"^handling on (\d+)$") as found:
        yield f"127.0.0.1:{found.ready[1]}"


def _handler(
    multiply: Callable[[Vector], Vector],
) -> "Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]":
    def handle(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for whole in _floor.joined(messages, context):
            product = multiply(np.frombuffer(b"".join(whole), np.float32)[None]).reshape(-1).view(np.uint8).data
            start = 0
            for message in whole:
                yield bytes(product[start : start + len(message)])
                start += len(message)

    return handle


def _serve(program: str, rows: int, sizes: Sequence[int], until: Iterable[str]) -> None:
    multiply = Programs(mlp(sizes, rows)).multiply(program)
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(8), options=_floor.OPTIONS)
    handlers: dict[str, Any] = {"Whole": grpc.stream_stream_rpc_method_handler(_handler(multiply))}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"handling on {port}", file=sys.stderr, flush=True)
    for _ in until:
        pass
    server.stop(None)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), [int(size) for size in sys.argv[3:]], sys.stdin)
