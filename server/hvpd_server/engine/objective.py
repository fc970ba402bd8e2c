"""A registered objective in memory: its programs, and the facts that follow from its
bundle.

Knows neither gRPC nor a device.
"""

import dataclasses
import math
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence

from hvpd._wire import codec
from hvpd.v1 import curvature_pb2, objective_pb2, tensor_pb2
from hvpd_server import bundle as _admission
from hvpd_server.derivation.names import Name
from hvpd_server.device import data_sources
from hvpd_server.device.programs import Kernels, Programs
from hvpd_server.engine.plan import Plan
from hvpd_server.errors import Code, ServiceError
from hvpd_server.scheduling.holdback import Holdback, Timing

OPERATORS: Mapping[int, str] = {
    curvature_pb2.OPERATOR_HESSIAN: "hvp",
    curvature_pb2.OPERATOR_GGN: "ggn",
    curvature_pb2.OPERATOR_FISHER: "fisher",
    curvature_pb2.OPERATOR_EMPIRICAL_FISHER: "empirical_fisher",
    curvature_pb2.OPERATOR_SAMPLED_FISHER: "sampled_fisher",
}
"""The program that multiplies by an operator."""


_OBJECTIVE_BYTES = 1 << 16
"""Bytes of memory that any loaded objective takes."""

_MESSAGE_FACTOR = 4
"""Bytes of memory for each byte of a serialized message."""

LINEARIZED = "hvp@linearized"
"""The program for products of the Hessian by `apply`, if the objective's own mode is
another.
"""

MAX_BLOCKS = _admission.MAX_BLOCKS
"""Most principal blocks of one objective that have programs of their own, because each
is compiled.
"""


def program_of(spec: curvature_pb2.ProductSpec, bundle: objective_pb2.Bundle) -> str:
    """Return the program that multiplies by an operator, or by a principal block of it,
    such as "ggn[0,2]".
    """
    program = OPERATORS[spec.operator]
    if not (spec.block or spec.leaves or spec.mode or spec.precision):  # As mostly.
        return program
    leaves = bundle.blocks[spec.block - 1].leaves if spec.block else spec.leaves
    mode = "" if spec.mode == bundle.mode else spec.mode
    precision = "" if spec.precision == bundle.precision else spec.precision
    return str(Name(program, mode, precision, tuple(leaves)))


OWN_RULES = ("hvpd.custom_jvp", "hvpd.custom_vjp", "hvpd.linear_solve")
"""Marks whose functions get tangents or cotangents."""


class Objective:
    """A registered objective with its programs.

    Args:
        digest: Digest of the bundle.
        bundle: The bundle.
        programs: Its programs.
        memory_budget_bytes: Memory budget of its device, in bytes.
        parts: Number of devices that work as its one device.
        copies: Returns how many copies of data of a shape these hold together.
    """

    def __init__(
        self,
        digest: str,
        bundle: objective_pb2.Bundle,
        programs: Programs,
        memory_budget_bytes: int,
        *,
        parts: int = 1,
        leaf_copies: Callable[[Sequence[int]], int] | None = None,
        copies: Callable[[Sequence[int]], int] = lambda shape: 1,
    ) -> None:
        self.digest = digest
        self.bundle = bundle
        self.programs = programs
        self._memory_budget_bytes = memory_budget_bytes
        self._parts = parts
        self._copies = copies
        self.dtype = codec.dtype(bundle.dtype)
        self.n = bundle.n
        self.leaves = [] if leaf_copies is None else [tuple(leaf.shape) for leaf in bundle.x_leaves]
        """Shapes of the leaves of x, if x is split by leaf over several devices."""
        elements = bundle.n * parts
        if leaf_copies is not None:
            elements = sum(math.prod(shape) * leaf_copies(shape) for shape in self.leaves)
        self.vector_bytes = elements * self.dtype.itemsize
        """Bytes of a vector of n elements on the device."""
        self.kernels = self.kernels_for(bundle.data)
        """The programs for the data of the registration."""
        self.described = programs.described
        """The description that the server derived from the bundle."""
        self.own_rules = any(rule in name for name in self.described.recognised for rule in OWN_RULES)
        """Whether V goes through functions of the client, which may choose an index or
        a branch by V. Products are linear in V otherwise.
        """
        self.forgotten = threading.Event()
        """Set when the objective was deleted, or its registration failed: nothing of it
        is compiled any more.
        """
        self._sizes: dict[str, int] = {}
        self.residual_bytes = sum(
            array_bytes(residual.spec)
            for residual in self.described.residuals
            if residual.WhichOneof("source") == "result"
        )
        self.fixed_bucket = bundle.fixed_bucket
        """The only width of launches, if the objective asked for one; else 0."""
        self.plan = self._plan_of(self.described.mode)
        """The plan for products in the objective's own mode."""
        self._linearized = self._plan_of("linearized")
        self._fused = self._plan_of("")
        self.goes_by_rows = threading.Event()
        """Whether a probe has found that the objective is a mean, or a sum,
        over rows.
        """
        self.steady: dict[Hashable, bool] = {}
        """Whether products keep their bits beside others in a launch of fixed width, by
        program and rows.
        """
        self.probing = threading.Lock()
        """Held during a probe."""
        self.widest: dict[Hashable, int] = {}
        """The widest launch that may fit into the device's memory after a wider one did
        not, by program and rows.
        """
        self.pair_holdback = Holdback(Timing())
        """The hold-back of products that can be launched as pairs, at any of its
        points.
        """
        self._timings: dict[str, Timing] = {}
        self.description_bytes = _OBJECTIVE_BYTES + _MESSAGE_FACTOR * (bundle.ByteSize() + self.described.ByteSize())
        """Bytes of memory beside the programs, estimated."""

    @property
    def program_bytes(self) -> int:
        """The bytes of memory of the compiled programs, estimated."""
        return self.programs.memory_bytes

    @property
    def used(self) -> float:
        """The time of the last launch, on time.monotonic's clock."""
        return self.programs.used

    def _plan_of(self, mode: str) -> Plan:
        return Plan(
            mode,
            has_apply=bool(mode) and "apply" in self.described.programs,
            fits=self.residual_bytes <= self._memory_budget_bytes // 4,
            fixed=self.fixed_bucket > 0,
        )

    def plan_of(self, program: str) -> Plan:
        """Return the plan for products by a program, which may be in another mode than
        the objective's.
        """
        if program == "hvp":
            return self.plan
        return self._linearized if program == LINEARIZED else self._fused

    def timing(self, program: str) -> Timing:
        """Return the measured times of a program."""
        return self._timings.setdefault(program, Timing())

    def columns(self, program: str) -> int:
        """Return the number of elements of the vectors that a program multiplies.

        Raises:
            ServiceError: x has no such principal block, or there are too many blocks.
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
        """Return where data goes: to the device or, if it does not fit and can be used
        in chunks, to the store.
        """
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
        row_bytes = sum(math.prod(tensor.shape[1:]) * codec.dtype(tensor.dtype).itemsize for tensor in moving)
        spans = data_sources.spans(rows, row_bytes, room, self._parts)
        sizes = {span.stop - span.start for span in spans}
        chunk_bytes = max(size * row_bytes * self._copies((size,)) for size in sizes)
        room_key = ("chunks", chunk_bytes, *map(tensor_key, moving))
        return Placement({**needs, room_key: 2 * chunk_bytes}, spans, room_key, row_bytes)

    def _bytes_of(self, tensor: tensor_pb2.Tensor) -> int:
        """Return the bytes of a tensor on the device."""
        return array_bytes(tensor) * self._copies(tensor.shape)

    def kernels_for(self, data: Sequence[tensor_pb2.Tensor]) -> Kernels | data_sources.Several:
        """Return the programs for data of this size, or for its chunks."""
        spans = self.placement(data).spans
        if not spans:
            return self.programs.for_rows(_admission.rows_of(self.bundle, data))
        sizes = dict.fromkeys(span.stop - span.start for span in spans)
        return data_sources.Several([self.programs.for_rows(size) for size in sizes])


@dataclasses.dataclass(frozen=True)
class Placement:
    """The place of a point's data."""

    needs: Mapping[Hashable, int]
    """Bytes on the device by key, of tensors and of the room for chunks. Several points
    may share them.
    """
    spans: Sequence[slice] = ()
    """Chunks of rows, if data stays in the store; else empty."""
    room_key: Hashable = None
    """Key of the room for two chunks among the needs. All points with this data share
    the room.
    """
    row_bytes: int = 0
    """Bytes of a row."""


def array_bytes(array: tensor_pb2.Tensor | tensor_pb2.ArraySpec) -> int:
    """Return the bytes of an array."""
    return math.prod(array.shape) * codec.dtype(array.dtype).itemsize


def tensor_key(tensor: tensor_pb2.Tensor) -> Hashable:
    """Return the key of a tensor. Equal tensors of several objectives have the same
    key.
    """
    return tensor.digest, tensor.dtype, tuple(tensor.shape)
