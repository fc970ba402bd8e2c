"""A point on its way to the server: the messages to send, and the answer."""

import dataclasses
from typing import TypeAlias

from hvpd._transport.stream import Filling, Stream
from hvpd._wire import codec
from hvpd._wire.frames import Frame
from hvpd.v1 import curvature_pb2

PointStream: TypeAlias = "Stream[Frame[curvature_pb2.CreatePointRequest], Frame[curvature_pb2.CreatePointResponse]]"

_INLINE_BYTES = 64 << 10
"""Bytes of the largest x that is sent before the server asks for it."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A point that follows from a base: x = base.x + alpha * direction."""

    base_id: str
    """Point.id of the base, which the server may hold."""
    alpha: float
    """Length of the step, in the objective's dtype."""
    direction: codec.Array
    """Direction of shape (n,), in the objective's dtype."""

    @property
    def message(self) -> curvature_pb2.Move:
        """Return the step as the wire has it."""
        digest = codec.digest(codec.payload(self.direction))
        return curvature_pb2.Move(base_id=self.base_id, alpha=self.alpha, direction_digest=digest)


class Creation:
    """The creation of one point. x and the direction are sent if the server asks for
    them.

    Args:
        spec: The point.
        x: Flat vector of shape (n,).
        step: The step that leads to x; None for none.
        pin_seconds: Seconds for which the point is pinned; None to leave its pin as it
            is.
    """

    def __init__(
        self, spec: curvature_pb2.PointSpec, x: codec.Array, step: Step | None, pin_seconds: int | None
    ) -> None:
        self._x = x
        payload = codec.payload(x)
        self._parts = {"x_wanted": payload}
        if step is not None:
            self._parts["direction_wanted"] = codec.payload(step.direction)
        self._opening = curvature_pb2.CreatePointRequest(
            spec=spec,
            inline_x=bytes(payload) if len(payload) <= _INLINE_BYTES else b"",
            move=None if step is None else step.message,
            pin_seconds=pin_seconds,
        )

    def attempt(self, stream: PointStream) -> tuple[curvature_pb2.Point, codec.Array]:
        """Make the point once; return it and its gradient of shape (n,).

        Raises:
            RpcFailure: The stream broke.
        """
        point, gradient = None, Filling(self._x.shape, self._x.dtype)
        parts = dict(self._parts)  # Each is sent once, however often a server asks for it.
        try:
            stream.send([Frame(self._opening)])
            while point is None or not gradient.complete:
                response, chunk = stream.receive()
                for name in [name for name in parts if getattr(response, name)]:
                    empty = curvature_pb2.CreatePointRequest()
                    stream.send(Frame(empty, piece) for piece in codec.chunks(parts.pop(name)))
                if response.HasField("point"):
                    point = response.point
                gradient.append(chunk)
        except BaseException as error:
            stream.drop(error)
            raise
        stream.close()
        return point, gradient.array
