"""A Krylov space on the server: the basis stays there, and small matrices travel.

The client keeps the start vectors and a log of what was asked. If the server has lost
the run, the client starts it again and repeats the log. The caller only waits longer.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import grpc
import numpy as np

from hvpd._arguments import integer
from hvpd._errors import Failure, HvpdError, OverloadedError
from hvpd._krylov.space import LocalSpace, NotFiniteError, Step
from hvpd._transport import cancellation
from hvpd._transport.interrupts import interrupt_behind, leave
from hvpd._transport.stream import Filling, RpcFailure
from hvpd._transport.transport import Transport
from hvpd._wire import codec, protocol
from hvpd._wire.frames import Frame
from hvpd.v1 import krylov_pb2

_T = TypeVar("_T")

_SERVICE = "hvpd.v1.KrylovService"

_EMPTY = 4
"""Most messages without a step around the steps of one request."""

_RESTARTS = 20
"""Most times in a row that a lost run is started again without a new step."""

_AGREEMENT = 10.0
"""Largest difference of a repeated step's numbers after a restart, over the largest
coefficient and the square root of eps.
"""


@dataclasses.dataclass(frozen=True)
class ServerOperator:
    """An operator that the server can multiply by: scale A + shift I + U C U^T."""

    transport: Transport
    message: krylov_pb2.RunOperator
    """The operator, without its low-rank term."""
    n: int
    dtype: np.dtype[Any]
    arrays: dict[str, codec.Array]
    """The low-rank term: "U" and "C", or nothing."""
    restore: Callable[[], None]
    """Makes the point resident again."""


class ServerSpace:
    """A `Space` of the server.

    Args:
        operator: The operator.
        reorthogonalize: "full" or "none"; see `Space`.
    """

    def __init__(self, operator: ServerOperator, reorthogonalize: str) -> None:
        self.n = operator.n
        self.dtype = operator.dtype
        self.rows = 0
        self.products = 0
        self.reorthogonalize = reorthogonalize
        self.device_seconds = 0.0
        """Seconds of the server's device."""
        self.place = ""
        """Where the server computes the steps: "device" or "host"."""
        self._operator = operator
        self._transport = operator.transport
        self._waiting = 0
        self._run_id = ""
        self._changes = 0
        self._start = np.empty((0, self.n), self.dtype)
        self._pin: int | None = None
        self._log: list[Callable[[], object]] = []
        """What to repeat in a run that is started again, after its start."""
        self._taken: list[Step] = []
        """The steps since the last other entry of the log."""
        self._firm = False
        """Whether the caller has chosen rows by the numbers of earlier steps."""

    # Space

    def append(self, V: codec.Array) -> codec.Array:
        """See `Space.append`. The first rows are sent with the first request."""
        if not self.rows and not self._log:
            local = LocalSpace(_never, self.n, self.dtype)
            beta = local.append(V)
            self._start = local.combine(np.eye(local.rows))
            self.rows = self._waiting = len(self._start)
            return beta
        if not np.isfinite(V).all():
            raise NotFiniteError
        rows = np.ascontiguousarray(V, self.dtype)

        def append() -> codec.Array:
            def messages(position: krylov_pb2.RunPosition) -> Iterator[Frame[krylov_pb2.AppendRunRequest]]:
                first = krylov_pb2.AppendRunRequest(position=position, k=len(rows))
                return chunked(first, krylov_pb2.AppendRunRequest, rows)

            answer = self._unary(self._transport.channel.append_run, messages, "AppendRun")
            beta = self._matrix(answer.beta, len(rows))
            self._take(answer.state)
            return beta

        found = self._asking(append)
        self._note(append)
        return found

    def extend(self, steps: int) -> Iterator[Step]:
        """See `Space.extend`."""
        left, tries = steps, 0
        while True:
            try:
                for step in self._steps(left):
                    left, tries = left - 1, 0
                    yield step
            except HvpdError as error:
                if error.reason != "RUN_NOT_RESIDENT":
                    raise
                tries = self._again(tries, error)
            else:
                return

    def combine(self, Y: codec.Array) -> codec.Array:
        """See `Space.combine`."""
        Y = np.ascontiguousarray(Y, np.float64)

        def combine() -> codec.Array:
            def attempt(left: float | None) -> codec.Array:
                first = krylov_pb2.CombineRunRequest(position=self._position(), rows=len(Y), columns=Y.shape[1])
                found = Filling((Y.shape[1], self.n), self.dtype)
                call = self._transport.channel.combine_run(
                    chunked(first, krylov_pb2.CombineRunRequest, Y), metadata=metadata, timeout=left
                )
                for _, chunk in call:
                    found.append(chunk)
                if not found.complete:
                    raise bad_answer(self._transport, "it sent a part of a combination")
                return found.array

            with self._transport.sending(lambda: f"{_SERVICE}/CombineRun") as (metadata, request_id):
                return self._transport.call(attempt, restore=self._operator.restore, request_id=request_id)

        if not Y.shape[1]:
            return np.empty((0, self.n), self.dtype)
        return self._asking(combine)

    def restart(self, Y: codec.Array, *, waiting: bool = True) -> None:
        """See `Space.restart`."""
        Y = np.ascontiguousarray(Y, np.float64)

        def restart() -> None:
            def messages(position: krylov_pb2.RunPosition) -> Iterator[Frame[krylov_pb2.RestartRunRequest]]:
                first = krylov_pb2.RestartRunRequest(
                    position=position, rows=len(Y), columns=Y.shape[1], drop_waiting=not waiting
                )
                return chunked(first, krylov_pb2.RestartRunRequest, Y)

            self._take(self._unary(self._transport.channel.restart_run, messages, "RestartRun").state)

        self._asking(restart)
        self._note(restart)

    @property
    def id(self) -> str:
        """Return the id of the run; empty before its first step."""
        return self._run_id

    def pin(self, seconds: int) -> None:
        """Keep the run until it has not been used for `seconds`; 0 removes the pin."""
        self._pin = seconds = integer(seconds, "seconds", 0, protocol.MAX_PIN_SECONDS)

        self._asking(lambda: list(self._steps(0, pin_seconds=seconds)))

    def close(self) -> None:
        """See `Space.close`. The server evicts a run that it is not told to close."""
        if self._run_id:
            request = krylov_pb2.CloseRunRequest(point_id=self._point_id, run_id=self._run_id)
            # The memory of a pinned run must be free before the next request.
            close = self._transport.ask_once if self._pin else self._transport.tell
            close(self._transport.channel.close_run, request)
        self._run_id, self.rows, self._waiting = "", 0, 0
        self._start, self._log, self._taken = self._start[:0], [], []

    # Requests

    @property
    def _point_id(self) -> str:
        return self._operator.message.product.point_id

    def _position(self) -> krylov_pb2.RunPosition:
        return krylov_pb2.RunPosition(
            point_id=self._point_id,
            run_id=self._run_id,
            changes=self._changes,
            rows=self.rows,
            waiting=self._waiting,
        )

    def _matrix(self, numbers: Sequence[float], columns: int) -> codec.Array:
        """Return numbers of the server as rows."""
        if not columns or len(numbers) % columns:
            raise bad_answer(self._transport, f"{len(numbers)} numbers are no rows of {columns}")
        return np.array(numbers, np.float64).reshape(-1, columns)

    def _take(self, state: krylov_pb2.RunState) -> None:
        if not 0 <= state.waiting <= state.rows:
            raise bad_answer(self._transport, f"a basis of {state.rows} rows has {state.waiting} that wait")
        self._changes, self.rows, self._waiting = state.changes, state.rows, state.waiting

    def _note(self, repeat: Callable[[], object]) -> None:
        """Add a request to the log, after the steps before it."""
        self._seal()
        self._log.append(repeat)
        self._firm = True

    def _seal(self) -> None:
        """Close the entry of the latest steps."""
        if self._taken:
            taken, self._taken = self._taken, []
            self._log.append(lambda: self._repeat(taken))

    def _asking(self, request: Callable[[], _T]) -> _T:
        """Make a request. If the run is lost, start it again and repeat the request."""
        tries = 0
        while True:
            try:
                if not self._run_id:
                    list(self._steps(0))
                return request()
            except HvpdError as error:
                if error.reason != "RUN_NOT_RESIDENT":
                    raise
                tries = self._again(tries, error)

    def _again(self, tries: int, error: HvpdError) -> int:
        """Start the run again, and repeat the log. Return the number of tries."""
        while True:
            tries += 1
            if tries > _RESTARTS:
                raise OverloadedError(
                    f"the server forgot the run as often as it was started again, {_RESTARTS} times: it has too little memory for all "
                    f"that is asked of it ({error})",
                    reason="RUN_NOT_RESIDENT",
                ) from error
            self._seal()
            products, log = self.products, self._log
            self._run_id, self._changes, self._log = "", 0, []
            self.rows = self._waiting = len(self._start)
            try:
                list(self._steps(0))
                for repeat in log:
                    repeat()
            except HvpdError as lost:
                if lost.reason != "RUN_NOT_RESIDENT":
                    raise
                error = lost
            else:
                return tries
            finally:
                self.products, self._log, self._taken = products, log, []

    def _repeat(self, taken: list[Step]) -> None:
        """Take steps again, and put their numbers in place of the first ones.

        Rounding may differ, because a launch may have other steps, or other products
        beside it. So the caller's numbers become those of the new basis. After a
        restart they must agree, because the caller chose its rows by the first ones.
        """
        scale = max(float(abs(part).max(initial=0.0)) for step in taken for part in step)
        most = _AGREEMENT * float(np.finfo(self.dtype).eps) ** 0.5 * scale if self._firm else np.inf
        again = list(self._steps(len(taken)))
        for first, second in itertools.zip_longest(taken, again):
            if second is None or not (_near(first.alpha, second.alpha, most) and _near(first.beta, second.beta, most)):
                raise HvpdError(
                    "the server lost the run, and the steps that were repeated differ from the first ones: start the run again. An "
                    "objective that is registered with fixed_bucket gives the same bits each time",
                    reason="RUN_LOST",
                )
            first.alpha[...], first.beta[...] = second

    def _steps(self, steps: int, *, pin_seconds: int | None = None) -> Iterator[Step]:
        """Take steps, and yield them. If there is no run, start one."""
        stream, empty = _Answers(self, steps, pin_seconds=pin_seconds), 0
        try:
            while True:
                message = self._transport.call(stream.receive, restore=self._operator.restore)
                empty += not message.steps
                if len(message.steps) > stream.left or empty > _EMPTY:
                    raise bad_answer(self._transport, f"{stream.left} steps were left, and others came")
                for step in message.steps:
                    width = self._waiting
                    found = Step(self._matrix(step.alpha, width), self._matrix(step.beta, width))
                    if len(found.alpha) != width or len(found.beta) > width:
                        raise bad_answer(self._transport, f"a step of {width} vectors has another shape")
                    self.products += width
                    self._waiting = len(found.beta)
                    self.rows += self._waiting
                    self._taken.append(found)
                    stream.left -= 1
                    yield found
                if message.done:
                    self.device_seconds += message.state.device_seconds
                    self.place = message.state.place
                    if message.state.nonfinite:
                        raise NotFiniteError
                    return
        finally:
            stream.close()

    def _unary(self, method: Callable[..., Any], messages: Callable[[krylov_pb2.RunPosition], Any], name: str) -> Any:
        with self._transport.sending(lambda: f"{_SERVICE}/{name}") as (metadata, request_id):
            return self._transport.call(
                lambda left: method(messages(self._position()), metadata=metadata, timeout=left),
                restore=self._operator.restore,
                request_id=request_id,
            )

    def _opened(self, steps: int, left: float | None, pin_seconds: int | None) -> Any:
        """Ask for steps. If there is no run, start one. Return the call."""
        channel = self._transport.channel
        metadata, _ = channel.new_call()
        if self._run_id:
            request = krylov_pb2.ExtendRunRequest(position=self._position(), steps=steps, pin_seconds=pin_seconds)
            return channel.extend_run(request, metadata=metadata, timeout=left)
        arrays = {"Q": self._start, **self._operator.arrays}
        spec = krylov_pb2.RunSpec(
            operator=self._operator.message,
            reorthogonalize=self.reorthogonalize,
            steps=steps,
            arrays=described_arrays(arrays),
            pin_seconds=self._pin,
        )
        first = krylov_pb2.StartRunRequest(spec=spec)
        messages = chunked(first, krylov_pb2.StartRunRequest, *arrays.values())
        return channel.start_run(messages, metadata=metadata, timeout=left)


class _Answers:
    """The answers to a request for steps. The request is sent again if its call breaks.

    Attributes:
        left: Steps that have not come.
    """

    def __init__(self, space: ServerSpace, steps: int, *, pin_seconds: int | None = None) -> None:
        self.left = steps
        self._space = space
        self._pin_seconds = pin_seconds
        self._call: Any = None

    def receive(self, left: float | None) -> Any:
        """Return the next message."""
        space = self._space
        try:
            if self._call is None:
                self._call = space._opened(self.left, left, self._pin_seconds)  # noqa: SLF001 - its own space
            with cancellation.ending(self._call.cancel):
                message = next(self._call, None)
        except BaseException as error:
            # After an interrupt, gRPC's locks may be held.
            if self._call is not None and interrupt_behind(error, None) is not None:
                leave(self._call)
            self._call = None
            raise
        if message is None:
            self._call = None
            raise RpcFailure(Failure(grpc.StatusCode.UNAVAILABLE, "the server ended a run without an answer"))
        if message.HasField("state"):
            space._run_id = message.state.run_id  # noqa: SLF001 - its own space
        return message

    def close(self) -> None:
        """End the call."""
        if self._call is not None:
            self._call.cancel()
            self._call = None


def described_arrays(arrays: Mapping[str, codec.Array]) -> list[krylov_pb2.RunArray]:
    """Return names, dtypes and shapes of arrays, as the wire has them."""
    return [krylov_pb2.RunArray(name=name, dtype=array.dtype.name, shape=array.shape) for name, array in arrays.items()]


def chunked(first: Any, kind: type[Any], *arrays: codec.Array) -> Iterator[Frame[Any]]:
    """Yield the first message, with the bytes of arrays in it and in those after it."""
    message = first
    for chunk in _parts(arrays):
        if len(chunk) or message is first:
            yield Frame(message, chunk)
        message = kind()


def _parts(arrays: Iterable[codec.Array]) -> Iterator[codec.Buffer]:
    """Yield the bytes of arrays. Small arrays are joined."""
    small = bytearray()
    for array in arrays:
        payload = codec.payload(array)
        if len(payload) <= codec.CHUNK_BYTES - len(small):
            small += payload
            continue
        if small:
            yield bytes(small)
            small = bytearray()
        yield from codec.chunks(payload)
    yield bytes(small)


def bad_answer(transport: Transport, why: str) -> HvpdError:
    """Return the error of an answer that contradicts itself or the request."""
    return HvpdError(f"the server at {transport.address} gives a wrong answer: {why}", reason="BAD_ANSWER")


def _near(first: codec.Array, second: codec.Array, most: float) -> bool:
    return first.shape == second.shape and bool((abs(first - second) <= most).all())


def _never(rows: codec.Array) -> codec.Array:
    raise AssertionError(f"a start of shape {rows.shape} takes no product")
