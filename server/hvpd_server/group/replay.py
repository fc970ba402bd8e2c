"""Executes the orders of the leader, in the same sequence on each rank. Knows neither
sockets nor jax.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

from hvpd._wire import codec
from hvpd._wire.codec import Buffer
from hvpd.v1 import group_pb2, tensor_pb2
from hvpd_server.group.order_log import DisagreementError


class Mesh(Protocol):
    """The devices of one rank."""

    def load(self, blob: Buffer) -> Any:
        """Return a compiled program."""

    def place(self, tensor: tensor_pb2.Tensor, rows: slice) -> Any:
        """Read the rank's part of some rows from the store, and return them on its
        devices.
        """

    def put(self, value: codec.Array) -> Any:
        """Return an array on each device."""

    def launch(self, program: Any, arguments: Sequence[Any]) -> None:
        """Run a program to its end."""


class Replay:
    """The state of one rank: its arrays and programs, by the numbers of the orders that
    made them.

    Args:
        mesh: The devices.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._held: dict[int, Any] = {}
        self._latest = 0

    @property
    def held(self) -> Sequence[int]:
        """The numbers of the orders whose arrays or programs are held."""
        return list(self._held)

    def drop(self, numbers: Sequence[int]) -> None:
        """Drop what earlier orders made.

        Raises:
            DisagreementError: An order made nothing, or its result was dropped before.
        """
        for number in numbers:
            if self._held.pop(number, None) is None:
                raise DisagreementError(f"order {number} is dropped, and this rank does not hold its result")

    def execute(self, order: group_pb2.GroupOrder, chunk: Buffer) -> group_pb2.GroupReport:
        """Execute an order, and return the report for the leader.

        Raises:
            DisagreementError: The order does not follow the last one, or needs a result
                that this rank does not hold.
        """
        if order.number != self._latest + 1:
            raise DisagreementError(f"order {order.number} follows order {self._latest}")
        self._latest = order.number
        self.drop(order.dropped)
        report = group_pb2.GroupReport(done=order.number)
        kind = order.WhichOneof("kind")
        try:
            made = self._made(order, chunk, report)
        except DisagreementError:
            raise
        except Exception as error:  # noqa: BLE001 - any error goes to the leader
            report.failure = f"{type(error).__name__}: {error}"
            # After a failed load or placement, the ranks are still in step: the leader
            # drops the order. If a launch fails on one rank, the others wait for it.
            report.fatal = kind not in ("load", "place")
            made = _FAILED
        if made is not None:
            self._held[order.number] = made
        return report

    def _made(self, order: group_pb2.GroupOrder, chunk: Buffer, report: group_pb2.GroupReport) -> Any:
        """Return the array or the program that an order makes; None for a launch."""
        match order.WhichOneof("kind"):
            case "load":
                report.sha256 = hashlib.sha256(chunk).digest()
                if report.sha256 != order.load.sha256:
                    raise DisagreementError(f"the program of order {order.number} has another digest than the leader's")
                return self._mesh.load(chunk)
            case "place":
                return self._mesh.place(order.place.tensor, slice(order.place.start, order.place.stop))
            case "put":
                return self._mesh.put(_value(order.put.array, chunk, 0)[0])
            case "launch":
                self._mesh.launch(self._found(order.launch.program), self._arguments(order.launch, chunk))
                return None
            case other:
                raise DisagreementError(f"order {order.number} is of kind {other}, which this rank does not know")

    def _arguments(self, launch: group_pb2.GroupOrder.Launch, chunk: Buffer) -> list[Any]:
        found, start = [], 0
        for argument in launch.arguments:
            if argument.WhichOneof("kind") == "array":
                found.append(self._found(argument.array))
            else:
                value, start = _value(argument.value, chunk, start)
                found.append(value)
        return found

    def _found(self, number: int) -> Any:
        held = self._held.get(number)
        if held is None or held is _FAILED:
            raise DisagreementError(f"the result of order {number} is used, and this rank does not hold it")
        return held


_FAILED = object()
"""Stands for the result of an order that failed, until the leader drops it."""


def _value(spec: tensor_pb2.ArraySpec, chunk: Buffer, start: int) -> tuple[codec.Array, int]:
    """Return an array whose bytes begin at `start`, and the position after it."""
    view = memoryview(chunk)
    dtype, size = codec.dtype(spec.dtype), 1
    for extent in spec.shape:
        size *= extent
    end = start + size * dtype.itemsize
    return codec.array(view[start:end], spec.dtype, spec.shape), end
