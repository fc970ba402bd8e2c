"""The programs of an objective in this process: traced by the client, imported,
differentiated and compiled as the server does. They show the cost of the device alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from bench._objectives import Problem, Vector, normal
from hvpd._registration import export as _export
from hvpd._wire import codec
from hvpd.v1 import tensor_pb2
from hvpd_server.derivation.programs import Derivation
from hvpd_server.importer import reader

# As on the server, the calling thread computes. This must be set before jax finds its
# devices.
jax.config.update("jax_cpu_enable_async_dispatch", False)


class Programs:
    """An objective's programs, warm in this process, with x and data on the device."""

    def __init__(self, problem: Problem, mode: str = "forward_over_reverse", precision: str = "highest") -> None:
        self.n = problem.n
        self._export = _export.export(
            problem.fun, problem.x, problem.data, platforms=("cpu", "cuda"), precision=precision, mode=mode
        )
        bundle = self._export.bundle
        derivation = Derivation(
            bundle,
            lambda name: reader.read(bytes(self._export.blobs[bundle.programs[name].digest])),
            jax.default_backend().replace("gpu", "cuda"),
        )
        self._sized = derivation.for_rows(0)
        self._described = self._sized.describe()
        self._x = jax.device_put(problem.flat())
        self._args = [jax.device_put(self._array(tensor)) for tensor in (*bundle.captured, *bundle.data)]
        self._compiled: dict[tuple[str, int], Any] = {}

    def call(self, name: str, k: int = 0) -> Callable[[], object]:
        """Return a function that runs a program once, from vectors in the host's memory
        to results there.

        Args:
            name: value_and_grad, prepare, hvp or apply.
            k: Vectors in the block, of hvp and apply.
        """
        compiled = self.compiled(name, k)
        if name not in ("hvp", "apply"):
            return lambda: jax.block_until_ready(compiled(self._x, *self._args))
        V = aligned(normal(5, k, self.n))
        arguments = [self._x, V, *self._args] if name == "hvp" else [V, *self.residuals()]
        return lambda: np.asarray(compiled(*arguments))

    def on_device(self, name: str, k: int = 0) -> Callable[[], object]:
        """Return a function that launches a program once, with vectors on the device.

        Args:
            name: value_and_grad, hvp, apply, ggn or kfac.
            k: Vectors in the block, of hvp, apply and ggn.
        """
        compiled = self.compiled(name, k)
        V = [jax.device_put(normal(5, k, self.n))] if k else []
        arguments = [*V, *self.residuals()] if name == "apply" else [self._x, *V, *self._args]
        return lambda: compiled(*arguments)

    def multiply(self, name: str) -> Callable[[Vector], Vector]:
        """Return a function that multiplies a vector of shape (1, n) with the Hessian,
        by hvp or apply.
        """
        compiled, x, args = self.compiled(name, 1), self._x, self._args
        residuals = self.residuals() if name == "apply" else []

        def product(v: Vector) -> Vector:
            found: Vector = np.asarray(compiled(v, *residuals) if residuals else compiled(x, v, *args))
            return found

        return product

    @property
    def arguments(self) -> tuple[Any, Sequence[Any]]:
        """Return x, and the captured arrays and data, on the device."""
        return self._x, self._args

    def function(self, name: str, k: int) -> Callable[..., Any]:
        """Return a program as a function that jax can trace."""
        with self._sized.tracing():
            return self._sized.program(name, k).ways[0]

    def flops(self, name: str, k: int = 0) -> float:
        """Return the operations that XLA counts for one run of the compiled program."""
        return float(self.compiled(name, k).cost_analysis()["flops"])

    def compiled(self, name: str, k: int) -> Any:
        """Return the compiled program."""
        if (name, k) not in self._compiled:
            with self._sized.tracing():
                program = self._sized.program(name, k)
                lowered = jax.jit(program.ways[0], keep_unused=True).lower(*program.specs)
                self._compiled[name, k] = lowered.compile()
        return self._compiled[name, k]

    def residuals(self) -> Sequence[Any]:
        """Return the arguments of apply after its vectors."""
        arguments = [self._x, *self._args]
        results = self.compiled("prepare", 0)(*arguments)[2:]
        return [
            results[residual.result] if residual.WhichOneof("source") == "result" else arguments[residual.argument]
            for residual in self._described.residuals
        ]

    def _array(self, tensor: tensor_pb2.Tensor) -> npt.NDArray[Any]:
        return codec.array(self._export.blobs[tensor.digest], tensor.dtype, tensor.shape)


def aligned(array: Vector) -> Vector:
    """Return a copy that is aligned for XLA. A call on a CPU does not copy it."""
    buffer = np.empty(array.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
