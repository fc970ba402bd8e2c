"""Ray Serve by gRPC, with `@serve.batch`, which makes a batch of the requests that came
during the last batch, without a delay. It runs with Ray's settings for throughput.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.peers._peer import About
from bench.peers._spec import MOST, SPECS, Given, Multiply, Spec, free_port, listening

ABOUT = About("Ray Serve", "peer", "on the server", batches=True, installed=True)

_METHOD = "/bench.Hessian/Multiply"
_LIMIT = 1 << 28
"""Most bytes of a message."""

_SETTINGS = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(_LIMIT),
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@contextlib.contextmanager
def serving(spec: Spec) -> Iterator[str]:
    """Start Ray with a proxy and one replica."""
    os.environ.update(_SETTINGS)
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions, gRPCOptions

    port = free_port()
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=256 << 20,
        _system_config={"automatic_object_spilling_enabled": False},
    )
    try:
        serve.start(
            http_options=HTTPOptions(host="127.0.0.1", port=free_port()),
            grpc_options=gRPCOptions(port=port, grpc_servicer_functions=[f"{__name__}.add_servicer"]),
        )
        serve.run(_application(spec.part))
        listening(port)
        yield f"127.0.0.1:{port}"
    finally:
        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()


def _application(part: str) -> Any:
    """Return the deployment of a size."""
    import asyncio

    from google.protobuf.wrappers_pb2 import BytesValue
    from ray import serve

    class Hessian:
        def __init__(self) -> None:
            from bench.peers._kernel import Kernel

            kernel = Kernel(SPECS[part])
            self._multiply = kernel.at(kernel.x)

        @serve.batch(max_batch_size=MOST, batch_wait_timeout_s=0)  # type: ignore[untyped-decorator]
        async def _products(self, vectors: list[bytes]) -> list[bytes]:
            rows = np.stack([np.frombuffer(vector, np.float32) for vector in vectors])
            # In a thread, so that the next requests arrive meanwhile.
            return [row.tobytes() for row in await asyncio.to_thread(self._multiply, rows)]

        async def Multiply(self, message: Any) -> Any:  # noqa: N802 - the name of a gRPC method
            return BytesValue(value=await self._products(message.value))

    return serve.deployment(max_ongoing_requests=4 * MOST)(Hessian).bind()


def add_servicer(servicer: Any, server: Any) -> None:
    """Add the method to Ray's gRPC server, as generated code would."""
    import grpc
    from google.protobuf.wrappers_pb2 import BytesValue

    handlers = {
        "Multiply": grpc.unary_unary_rpc_method_handler(
            servicer.Multiply,
            request_deserializer=BytesValue.FromString,
            response_serializer=BytesValue.SerializeToString,
        )
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Hessian", handlers),))


def connect(address: str, given: Given) -> Multiply:
    """Return a unary call on a channel of its own."""
    import grpc
    from google.protobuf.wrappers_pb2 import BytesValue

    channel = grpc.insecure_channel(
        address,
        [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ],
    )
    call = channel.unary_unary(
        _METHOD, request_serializer=BytesValue.SerializeToString, response_deserializer=BytesValue.FromString
    )
    return lambda v: np.frombuffer(call(BytesValue(value=v.tobytes())).value, np.float32)
