"""A registered objective in memory: its programs, and what follows from its bundle. Knows no gRPC, and no device."""

import dataclasses
import math
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence

from hvpd import _codec
from hvpd.v1 import curvature_pb2, objective_pb2, tensor_pb2
from hvpd_server import _admission, _kernels, _sources
from hvpd_server._crowd import Crowd, Habits
from hvpd_server._errors import Code, ServiceError
from hvpd_server._plan import Plan
from hvpd_server.derivation.names import Name

OPERATORS: Mapping[int, str] = {
    curvature_pb2.OPERATOR_HESSIAN: "hvp",
    curvature_pb2.OPERATOR_GGN: "ggn",
    curvature_pb2.OPERATOR_FISHER: "fisher",
    curvature_pb2.OPERATOR_EMPIRICAL_FISHER: "empirical_fisher",
    curvature_pb2.OPERATOR_SAMPLED_FISHER: "sampled_fisher",
}
"""The program that multiplies by an operator."""


PRODUCT_MODES = (
    "forward_over_reverse",
    "reverse_over_forward",
    "reverse_over_reverse",
    "linearized",
    "finite_difference",
)
"""Modes that a product of the Hessian can have."""

PRODUCT_PRECISIONS = ("highest", "high", "default")
"""Precisions that a product can have."""

LINEARIZED = "hvp@linearized"
"""Products of the Hessian by `apply`, of an objective whose own mode is another."""

MAX_BLOCKS = _admission.MAX_BLOCKS
"""Most principal blocks of one objective that have programs of their own, since each is compiled."""


def program_of(spec: curvature_pb2.ProductSpec, bundle: objective_pb2.Bundle) -> str:
    """Return the program that multiplies by an operator, or by a principal block of it, such as "ggn[0,2]"."""
    program = OPERATORS[spec.operator]
    if not (spec.block or spec.leaves or spec.mode or spec.precision):  # As mostly.
        return program
    leaves = bundle.blocks[spec.block - 1].leaves if spec.block else spec.leaves
    mode = "" if spec.mode == bundle.mode else spec.mode
    precision = "" if spec.precision == bundle.precision else spec.precision
    return str(Name(program, mode, precision, tuple(leaves)))


class Objective:
    """A registered objective with its programs.

    Args:
        digest: Of its bundle.
        bundle: What was registered.
        programs: Its programs.
        memory_budget_bytes: Of the device that it is served on.
        parts: How many devices that is made of.
        copies: How many times data of a shape is on them together.
    """

    def __init__(
        self,
        digest: str,
        bundle: objective_pb2.Bundle,
        programs: _kernels.Programs,
        memory_budget_bytes: int,
        *,
        parts: int = 1,
        copies: Callable[[Sequence[int]], int] = lambda shape: 1,
    ) -> None:
        self.digest = digest
        self.bundle = bundle
        self.programs = programs
        self._memory_budget_bytes = memory_budget_bytes
        self._parts = parts
        self._copies = copies
        self.dtype = _codec.dtype(bundle.dtype)
        self.n = bundle.n
        self.vector_bytes = bundle.n * self.dtype.itemsize * parts
        """Of a vector of n elements on the device."""
        self.kernels = self.kernels_for(bundle.data)
        """For the data that it was registered with."""
        self.described = programs.described
        """What the server derived from the bundle."""
        self._sizes: dict[str, int] = {}
        self.residual_bytes = sum(
            array_bytes(residual.spec)
            for residual in self.described.residuals
            if residual.WhichOneof("source") == "result"
        )
        self.fixed_bucket = bundle.fixed_bucket
        """The only width of launches that it asked for; 0: any."""
        self.plan = self._plan_of(self.described.mode)
        """For products in the objective's own mode."""
        self._linearized = self._plan_of("linearized")
        self._fused = self._plan_of("")
        self.goes_by_rows = threading.Event()
        """Whether it was seen to be a mean, or a sum, over rows, as its bundle says."""
        self.steady: dict[Hashable, bool] = {}
        """Whether vectors can share launches of a fixed width and keep their bits, by program and rows of data."""
        self.probing = threading.Lock()
        """Held by who finds out one of these."""
        self.widest: dict[Hashable, int] = {}
        """The width of launches for which the device's memory sufficed, by program and rows of data; where it once did not."""

        self.crowd = Crowd(Habits())
        """Who asks for products that can go as pairs, at any of its points."""
        self._habits: dict[str, Habits] = {}

    def _plan_of(self, mode: str) -> Plan:
        return Plan(
            mode,
            has_apply=bool(mode) and "apply" in self.described.programs,
            fits=self.residual_bytes <= self._memory_budget_bytes // 4,
            fixed=self.fixed_bucket > 0,
        )

    def plan_of(self, program: str) -> Plan:
        """Return the plan for products by a program, which may be in another mode than the objective's."""
        if program == "hvp":
            return self.plan
        return self._linearized if program == LINEARIZED else self._fused

    def habits(self, program: str) -> Habits:
        """What was seen of those who ask for a program's products at one point."""
        return self._habits.setdefault(program, Habits())

    def columns(self, program: str) -> int:
        """Return how many elements the vectors have that a program multiplies.

        Raises:
            ServiceError: The program is of a principal block that x does not have, or of one block too many.
        """
        _, _, leaves = program.rstrip("]").partition("[")
        if not leaves:
            return self.n
        size = self._sizes.get(leaves)
        if size is None:
            positions = list(map(int, leaves.split(",")))
            _admission.check_leaves(self.bundle, positions, "a block")
            if len(self._sizes) >= MAX_BLOCKS:
                raise ServiceError(
                    Code.RESOURCE_EXHAUSTED,
                    "TOO_MANY_BLOCKS",
                    f"objective {self.digest[:12]} has products of {MAX_BLOCKS} principal blocks already: multiply by the "
                    "whole operator, with zeros outside of the block",
                )
            size = self._sizes[leaves] = _admission.block_size(self.bundle, positions)
        return size

    def placement(self, data: Sequence[tensor_pb2.Tensor]) -> "Placement":
        """Where data goes: on the device, or, where it does not fit and can be gone through in chunks, in the store."""
        bundle = self.bundle
        resident = [*bundle.captured, *data]
        needs = {tensor_key(tensor): self._bytes_of(tensor) for tensor in resident}
        moving = [data[leaf] for leaf in bundle.row_leaves] if bundle.row_reduction else []
        if not moving or sum(needs.values()) + 2 * self.vector_bytes <= self._memory_budget_bytes:
            return Placement(needs)
        kept = [tensor for index, tensor in enumerate(data) if index not in bundle.row_leaves]
        needs = {tensor_key(tensor): self._bytes_of(tensor) for tensor in [*bundle.captured, *kept]}
        room = self._memory_budget_bytes - sum(needs.values()) - 2 * self.vector_bytes
        rows = _admission.rows_of(bundle, data)
        row_bytes = sum(math.prod(tensor.shape[1:]) * _codec.dtype(tensor.dtype).itemsize for tensor in moving)
        spans = _sources.spans(rows, row_bytes, room, self._parts)
        sizes = {span.stop - span.start for span in spans}
        chunk_bytes = max(size * row_bytes * self._copies((size,)) for size in sizes)
        room_key = ("chunks", chunk_bytes, *map(tensor_key, moving))
        return Placement({**needs, room_key: 2 * chunk_bytes}, spans, room_key, row_bytes)

    def _bytes_of(self, tensor: tensor_pb2.Tensor) -> int:
        """On the device."""
        return array_bytes(tensor) * self._copies(tensor.shape)

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

    needs: Mapping[Hashable, int]
    """Bytes on the device that many points share: of tensors, by key, and of the room for chunks."""
    spans: Sequence[slice] = ()
    """Chunks of rows, of the data that stays in the store; empty where none does."""
    room_key: Hashable = None
    """Among the needs, the room for chunks: two are on the device at a time, whichever of the points with this data asks."""
    row_bytes: int = 0
    """Size of a row."""


def array_bytes(array: tensor_pb2.Tensor | tensor_pb2.ArraySpec) -> int:
    """Size of an array."""
    return math.prod(array.shape) * _codec.dtype(array.dtype).itemsize


def tensor_key(tensor: tensor_pb2.Tensor) -> Hashable:
    """What equal tensors have in common, whichever objectives they belong to."""
    return tensor.digest, tensor.dtype, tuple(tensor.shape)
