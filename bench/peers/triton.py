"""PyTriton: NVIDIA's Triton server around a Python function, with dynamic batching and
no delay of its queue, by gRPC.

Triton brings an interpreter of its own, which reads the standard library of this one.
The library of an early patch release works, and the system's Python often is one. The
library of Python 3.11.7 does not work.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.peers._peer import About
from bench.peers._spec import MOST, Given, Multiply, Spec, as_vector, free_port

ABOUT = About("PyTriton", "peer", "on the server", batches=True, installed=True, system_python=True)
_MODEL = "hessian"


@contextlib.contextmanager
def serving(spec: Spec) -> Iterator[str]:
    """Serve from this process, which computes."""
    from pytriton.decorators import batch
    from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
    from pytriton.triton import Triton, TritonConfig

    from bench.peers._kernel import Kernel

    kernel = Kernel(spec)
    multiply = kernel.at(kernel.x)

    @batch  # type: ignore[untyped-decorator]  # the library has no types
    def infer(v: Any) -> dict[str, Any]:
        return {"product": multiply(v)}

    port = free_port()
    here = "127.0.0.1"
    config = TritonConfig(
        http_address=here,
        http_port=free_port(),
        grpc_address=here,
        grpc_port=port,
        metrics_port=free_port(),
        log_verbose=0,
    )
    with Triton(config=config) as server:
        server.bind(
            model_name=_MODEL,
            infer_func=infer,
            inputs=[Tensor(name="v", dtype=np.float32, shape=(spec.n,))],
            outputs=[Tensor(name="product", dtype=np.float32, shape=(spec.n,))],
            config=ModelConfig(max_batch_size=MOST, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        )
        server.run()
        yield f"{here}:{port}"


def connect(address: str, given: Given) -> Multiply:
    """Return a call of the model."""
    from pytriton.client import ModelClient

    client = ModelClient(f"grpc://{address}", _MODEL)
    return lambda v: as_vector(client.infer_sample(v)["product"])
