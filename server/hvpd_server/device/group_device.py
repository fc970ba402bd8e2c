"""All devices of a group as one, in the leader's process. Each action is an order to
the other ranks, which do the same with their devices.
"""

import hashlib
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hvpd._wire import codec
from hvpd.v1 import group_pb2, tensor_pb2
from hvpd_server.derivation import compiling
from hvpd_server.derivation.compiling import Compiled
from hvpd_server.device.device import Device, device_errors
from hvpd_server.device.processes import assembled, assembled_rows
from hvpd_server.errors import Code, ServiceError
from hvpd_server.group.leader import Leader

_log = logging.getLogger(__name__)


class GroupProgram:
    """A program that all ranks have loaded.

    Args:
        compiled: The program in this process.
        number: The number of the order that loaded it.
    """

    def __init__(self, compiled: jax.stages.Compiled, number: int) -> None:
        self.compiled = compiled
        self.number = number

    def __call__(self, *args: Any) -> Any:
        """Run the leader's part of the program."""
        return self.compiled(*args)

    def memory_analysis(self) -> Any:
        """See `jax.stages.Compiled.memory_analysis`."""
        return self.compiled.memory_analysis()


class GroupDevice(Device):
    """All devices of all ranks, which work as one.

    Data is split by rows over all of them. Results are on each device, and this process
    returns its own copy of them.

    Args:
        leader: Sends the orders.
    """

    def __init__(self, leader: Leader) -> None:
        super().__init__(jax.devices())
        self.spans_processes = True
        self._leader = leader
        # The number of the order that placed an array, by the array's id.
        self._numbers: dict[int, int] = {}

    def readings(self) -> dict[str, Any]:
        """Return the fields of `telemetry.readings.Live` about the group."""
        leader = self._leader
        return {"ranks": leader.size, "orders": dict(leader.counts), "pending_orders": leader.pending}

    def load(self, blob: bytes) -> GroupProgram:
        """Load a compiled program on all ranks. Each compares its digest first."""
        load = group_pb2.GroupOrder.Load(sha256=hashlib.sha256(blob).digest())
        number = self._leader.order(group_pb2.GroupOrder(load=load), blob, awaited=True)
        try:
            compiled = compiling.load_on_all(blob, self.parts)
        except BaseException:
            self._leader.done(number)
            self._leader.drop(number)
            raise
        self._check(number, "a compiled program cannot be loaded")
        found = GroupProgram(compiled, number)
        weakref.finalize(found, self._leader.drop, number)
        return found

    def _check(self, number: int, what: str) -> None:
        """Wait until all ranks have executed an order, and raise ServiceError if one
        could not.
        """
        if why := self._leader.done(number):
            self._leader.drop(number)
            raise ServiceError(Code.INTERNAL, "RANK_FAILED", f"{what} on {why}. The log of that rank has more")

    def place_rows(self, part: Any, rows: slice) -> jax.Array:
        """Place some rows of a tensor of the store; see `Device.place_rows`. Each rank
        reads its own rows.
        """
        tensor: tensor_pb2.Tensor = part.tensor
        place = group_pb2.GroupOrder.Place(tensor=tensor, start=rows.start, stop=rows.stop)
        number = self._leader.order(group_pb2.GroupOrder(place=place), awaited=True)
        try:
            with device_errors():
                placed = assembled_rows(self.target, part, rows)
        except BaseException:
            self._leader.done(number)
            self._leader.drop(number)
            raise
        self._check(number, f"rows {rows.start} to {rows.stop} of tensor {tensor.digest[:12]} cannot be placed")
        return self._known(placed, number)

    def put(self, array: codec.Array, *, data: bool = False, owned: bool = False) -> jax.Array:
        """Copy an array to each device. Data is placed by `place_rows`."""
        order = group_pb2.GroupOrder(put=group_pb2.GroupOrder.Put(array=_spec(array)))
        number = self._leader.order(order, codec.payload(array))
        try:
            return self._known(self._everywhere(array, owned=owned), number)
        except BaseException:
            self._leader.drop(number)
            raise

    def _everywhere(self, array: codec.Array, *, owned: bool) -> jax.Array:
        with device_errors():
            if self.platform == "cpu" and not owned:
                array = np.array(array, copy=True)
            return assembled(self.target, array.shape, lambda rows: array, data=False)

    def _known(self, placed: jax.Array, number: int) -> jax.Array:
        """Note which order placed an array, until the array is not used any more."""
        key = id(placed)
        self._numbers[key] = number
        weakref.finalize(placed, self._forget, key)
        return placed

    def _forget(self, key: int) -> None:
        self._leader.drop(self._numbers.pop(key))

    def run(self, compiled: Compiled, args: Sequence[Any]) -> Any:
        """Run a program on all ranks, one at a time, to its end. Return this process's
        copy of the results.

        An error of the launch ends the group, since other ranks may have run it.
        """
        assert isinstance(compiled, GroupProgram)
        launch, values, placed = group_pb2.GroupOrder.Launch(program=compiled.number), [], []
        for arg in args:
            number = self._numbers.get(id(arg))
            if number is not None:
                launch.arguments.add(array=number)
                placed.append(arg)
            else:
                value = np.asarray(arg)
                launch.arguments.add(value=_spec(value))
                values.append(codec.payload(value))
                placed.append(self._everywhere(value, owned=True))
        assert self._turn is not None
        with self._turn:
            self._leader.order(group_pb2.GroupOrder(launch=launch), b"".join(values))
            try:
                found = jax.block_until_ready(compiled(*placed))
            except Exception as error:  # noqa: BLE001 - after any error, the ranks may not be in step
                self._leader.launch_failed(error)
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), found)


def _spec(array: codec.Array) -> tensor_pb2.ArraySpec:
    return tensor_pb2.ArraySpec(dtype=array.dtype.name, shape=array.shape)
