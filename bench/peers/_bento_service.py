"""The services that BentoML's server loads."""

import os
from typing import Annotated

import bentoml
import numpy as np
from bentoml.validators import ContentType

from bench.peers._kernel import Kernel
from bench.peers._spec import MOST, PART, SPECS

Raw = Annotated[bytes, ContentType("application/octet-stream")]
_PATIENCE = {"timeout": 300}


@bentoml.service(workers=1, traffic=_PATIENCE)
class Products:
    """Multiplies batches."""

    def __init__(self) -> None:
        """Compile all widths."""
        kernel = Kernel(SPECS[os.environ[PART]])
        self._multiply = kernel.at(kernel.x)

    @bentoml.api(batchable=True, batch_dim=0, max_batch_size=MOST, max_latency_ms=60_000)  # type: ignore[untyped-decorator]
    def multiply(self, V: np.ndarray) -> np.ndarray:
        """Multiply rows (k, n) with the Hessian."""
        return self._multiply(V)


@bentoml.service(workers=1, traffic=_PATIENCE)
class Vectors:
    """Takes one vector as bytes."""

    products = bentoml.depends(Products)

    @bentoml.api  # type: ignore[untyped-decorator]
    async def multiply(self, v: Raw, /) -> Raw:
        """Multiply one vector, of little-endian float32 numbers."""
        rows = np.frombuffer(v, np.float32)[None]
        found: bytes = np.asarray(await self.products.to_async.multiply(rows)).tobytes()
        return found
