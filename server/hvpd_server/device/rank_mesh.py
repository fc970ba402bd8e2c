"""The devices of a rank that executes the orders of a leader; see `group.replay`."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hvpd._wire import codec
from hvpd._wire.codec import Buffer
from hvpd.v1 import tensor_pb2
from hvpd_server.derivation import compiling
from hvpd_server.derivation.compiling import Target
from hvpd_server.device.processes import assembled, assembled_rows
from hvpd_server.store.store import Store


class RankMesh:
    """The devices of this process, as a part of those of the whole group.

    Args:
        store: The store, which all ranks share.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._parts = jax.devices()
        self._target = Target(self._parts)

    def load(self, blob: Buffer) -> Any:
        """See `Mesh.load`."""
        return compiling.load_on_all(bytes(blob), self._parts)

    def place(self, tensor: tensor_pb2.Tensor, rows: slice) -> Any:
        """See `Mesh.place`. The leader has verified the tensor's digest."""
        opened = self._store.open_tensor(tensor, set_aside=False, verified=True)
        return assembled_rows(self._target, opened, rows)

    def put(self, value: codec.Array) -> Any:
        """See `Mesh.put`."""
        return assembled(self._target, value.shape, lambda rows: value, data=False)

    def launch(self, program: Any, arguments: Sequence[Any]) -> None:
        """See `Mesh.launch`."""
        jax.block_until_ready(program(*[self._argument(each) for each in arguments]))

    def _argument(self, argument: Any) -> Any:
        return self.put(argument) if isinstance(argument, np.ndarray) else argument
