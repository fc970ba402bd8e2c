"""The programs of an objective compiled and called in this process, as the server compiles and calls them: what the device
alone costs. They are what `client.register` would send, serialized and read back.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import numpy as np
import numpy.typing as npt

from bench._objectives import Problem, Vector, normal
from hvpd import _codec, _export
from hvpd.v1 import tensor_pb2

# As on the server: in the thread that asks. Must come before jax finds its devices.
jax.config.update("jax_cpu_enable_async_dispatch", False)


class Programs:
    """What an objective is registered as, warm in this process, its x and data on the device."""

    def __init__(self, problem: Problem, mode: str = "forward_over_reverse") -> None:
        self.n = problem.n
        self._export = _export.export(
            problem.fun, problem.x, problem.data, platforms=("cpu", "cuda"), precision="highest", mode=mode
        )
        bundle = self._export.bundle
        self._x = jax.device_put(problem.flat())
        self._args = [jax.device_put(self._array(tensor)) for tensor in (*bundle.captured, *bundle.data)]
        self._compiled: dict[tuple[str, int], Any] = {}

    def call(self, name: str, k: int = 0) -> Callable[[], object]:
        """A program with its arguments, to be called for one run: from the host's memory, where vectors are, and back.

        Args:
            name: value_and_grad, prepare, hvp or apply.
            k: Vectors in the block, of hvp and apply.
        """
        compiled = self.compiled(name, k)
        if name not in ("hvp", "apply"):
            return lambda: jax.block_until_ready(compiled(self._x, *self._args))
        V = aligned(normal(5, k, self.n))
        arguments = [self._x, V, *self._args] if name == "hvp" else [V, *self._residuals()]
        return lambda: np.asarray(compiled(*arguments))

    def multiply(self, name: str) -> Callable[[Vector], Vector]:
        """The product of a vector with the Hessian, both of shape (1, n), by hvp or apply."""
        compiled, x, args = self.compiled(name, 1), self._x, self._args
        residuals = self._residuals() if name == "apply" else []

        def product(v: Vector) -> Vector:
            found: Vector = np.asarray(compiled(v, *residuals) if residuals else compiled(x, v, *args))
            return found

        return product

    def flops(self, name: str, k: int = 0) -> float:
        """What XLA counts for one run of the compiled program."""
        return float(self.compiled(name, k).cost_analysis()["flops"])

    def compiled(self, name: str, k: int) -> Any:
        """The compiled program."""
        if (name, k) not in self._compiled:
            blob = self._export.blobs[self._export.bundle.programs[name].digest]
            exported = jax.export.deserialize(bytearray(blob))
            with jax.enable_x64(True):
                specs = [
                    jax.ShapeDtypeStruct([size if isinstance(size, int) else k for size in aval.shape], aval.dtype)
                    for aval in exported.in_avals
                ]
                self._compiled[name, k] = jax.jit(exported.call, keep_unused=True).lower(*specs).compile()
        return self._compiled[name, k]

    def _residuals(self) -> Sequence[Any]:
        arguments = [self._x, *self._args]
        results = self.compiled("prepare", 0)(*arguments)[2:]
        return [
            results[residual.result] if residual.WhichOneof("source") == "result" else arguments[residual.argument]
            for residual in self._export.bundle.residuals
        ]

    def _array(self, tensor: tensor_pb2.Tensor) -> npt.NDArray[Any]:
        return _codec.array(self._export.blobs[tensor.digest], tensor.dtype, tensor.shape)


def aligned(array: Vector) -> Vector:
    """A copy that begins where XLA takes it as it is: on a CPU a call does not copy it."""
    buffer = np.empty(array.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
