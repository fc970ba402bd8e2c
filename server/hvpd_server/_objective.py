"""A registered objective in memory: its programs, and what follows from its bundle. Knows no gRPC, and no device."""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence

from hvpd import _codec
from hvpd.v1 import curvature_pb2, objective_pb2, tensor_pb2
from hvpd_server import _admission, _kernels, _sources
from hvpd_server._plan import Plan

OPERATORS: Mapping[int, str] = {
    curvature_pb2.OPERATOR_HESSIAN: "hvp",
    curvature_pb2.OPERATOR_GGN: "ggn",
    curvature_pb2.OPERATOR_FISHER: "fisher",
    curvature_pb2.OPERATOR_EMPIRICAL_FISHER: "empirical_fisher",
    curvature_pb2.OPERATOR_SAMPLED_FISHER: "sampled_fisher",
}
"""The program that multiplies by an operator."""


def program_of(spec: curvature_pb2.ProductSpec) -> str:
    """The program that multiplies by an operator, or by a principal block of it."""
    program = OPERATORS[spec.operator]
    return f"{program}[{spec.block - 1}]" if spec.block else program


class Objective:
    """A registered objective with its programs."""

    def __init__(
        self, digest: str, bundle: objective_pb2.Bundle, programs: _kernels.Programs, memory_budget_bytes: int
    ) -> None:
        self.digest = digest
        self.bundle = bundle
        self.programs = programs
        self._memory_budget_bytes = memory_budget_bytes
        self.dtype = _codec.dtype(bundle.dtype)
        self.n = bundle.n
        self.kernels = self.kernels_for(bundle.data)
        """For the data that it was registered with."""
        self.sizes = (bundle.n, *(_admission.block_size(bundle, block) for block in bundle.blocks))
        self.residual_bytes = sum(
            array_bytes(residual.spec) for residual in bundle.residuals if residual.WhichOneof("source") == "result"
        )
        self.plan = Plan(
            bundle.mode,
            has_apply="apply" in bundle.programs,
            fits=self.residual_bytes <= memory_budget_bytes // 4,
            fixed=bundle.fixed_bucket > 0,
        )
        self.steady: dict[Hashable, bool] = {}
        """Whether vectors can share launches of a fixed width and keep their bits, by program and rows of data."""
        self.widest: dict[str, int] = {}
        """The width of launches for which the device's memory sufficed, by program; where it once did not."""

    def columns(self, program: str) -> int:
        """How many elements the vectors have that a program multiplies."""
        _, _, index = program.rstrip("]").partition("[")
        return self.sizes[int(index) + 1 if index else 0]

    def placement(self, data: Sequence[tensor_pb2.Tensor]) -> "Placement":
        """Where data goes: on the device, or, where it does not fit and can be gone through in chunks, in the store."""
        bundle = self.bundle
        resident = [*bundle.captured, *data]
        moving = [data[leaf] for leaf in bundle.row_leaves] if bundle.row_reduction else []
        room = self._memory_budget_bytes - 2 * self.n * self.dtype.itemsize - sum(map(array_bytes, resident))
        if room >= 0 or not moving:
            return Placement(resident)
        size_bytes = sum(map(array_bytes, moving))
        rows = _admission.rows_of(bundle, data)
        spans = _sources.spans(rows, -(-size_bytes // rows), room + size_bytes)
        kept = [tensor for index, tensor in enumerate(data) if index not in bundle.row_leaves]
        return Placement([*bundle.captured, *kept], spans, -(-size_bytes // rows) * spans[0].stop)

    def kernels_for(self, data: Sequence[tensor_pb2.Tensor]) -> _kernels.Kernels | _sources.Several:
        """The programs, to be compiled for data of this size, or for the chunks that it is gone through in."""
        spans = self.placement(data).spans
        if not spans:
            return self.programs.for_rows(_admission.rows_of(self.bundle, data))
        sizes = dict.fromkeys(span.stop - span.start for span in spans)
        return _sources.Several([self.programs.for_rows(size) for size in sizes])


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the data of a point goes."""

    resident: Sequence[tensor_pb2.Tensor]
    """On the device as a whole."""
    spans: Sequence[slice] = ()
    """Chunks of rows, of the data that stays in the store; empty where none does."""
    chunk_bytes: int = 0
    """Size of a chunk; two are on the device at a time."""

    @property
    def needs(self) -> dict[Hashable, int]:
        """Bytes that are resident for many points, by tensor."""
        return {tensor_key(tensor): array_bytes(tensor) for tensor in self.resident}


def array_bytes(array: tensor_pb2.Tensor | tensor_pb2.ArraySpec) -> int:
    """Size of an array."""
    return math.prod(array.shape) * _codec.dtype(array.dtype).itemsize


def tensor_key(tensor: tensor_pb2.Tensor) -> Hashable:
    """What equal tensors have in common, whichever objectives they belong to."""
    return tensor.digest, tensor.dtype, tuple(tensor.shape)
