"""The parts that requests of Krylov runs have in common: the operator, and arrays that
follow in chunks.
"""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from hvpd import _text
from hvpd._wire import codec
from hvpd._wire.frames import Frame
from hvpd.v1 import krylov_pb2
from hvpd_server.engine.engine import Engine
from hvpd_server.engine.objective import program_of
from hvpd_server.errors import Code, ServiceError, invalid
from hvpd_server.krylov.operator import Operator, Terms, Work
from hvpd_server.rpc.call_context import GrpcCall
from hvpd_server.rpc.call_limits import Arrivals
from hvpd_server.rpc.products import Cancellation

_MOST_ARRAYS = 4096
"""Most arrays of a request."""

Chunks = Iterator[codec.Buffer]

Specs = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""Shape and dtype of arrays, by name."""

Arrays = dict[str, codec.Array]


class Expected(NamedTuple):
    """An array that a request may have."""

    shape: tuple[int | str | None, ...]
    """Sizes: "n" for that of the operator, None for any."""
    required: bool = True
    integers: bool = False
    """Whether the array has int64 in place of the operator's dtype."""


_UPDATE = {"U": Expected(("n", None), required=False), "C": Expected((None, None), required=False)}


class Requests:
    """Reads requests.

    Args:
        engine: Knows the points.
        room: Counts the bytes in transit.
    """

    def __init__(self, engine: Engine, room: Arrivals) -> None:
        self._engine = engine
        self._room = room

    @contextlib.contextmanager
    def operator(
        self,
        operator: krylov_pb2.RunOperator,
        listed: "Iterable[krylov_pb2.RunArray]",
        expected: Mapping[str, Expected],
        chunks: Chunks,
        call: GrpcCall,
    ) -> Iterator[tuple[Operator, Arrays]]:
        """Yield the operator of a request, and the request's other arrays. Their bytes
        count as in transit meanwhile.

        Args:
            operator: The description.
            listed: The arrays that follow.
            expected: The arrays that may follow beside the operator's. A name that ends
                in "#" stands for all names with a number in its place.
            chunks: Their bytes.
            call: The call.
        """
        product = operator.product
        product.k = 1
        point = self._engine.resident(product, call.owner)
        call.objective = point.objective.digest
        program = program_of(product, point.objective.bundle)
        n, dtype = point.objective.columns(program), point.objective.dtype
        scale = operator.scale if operator.HasField("scale") else 1.0
        for name, number in (("scale", scale), ("shift", operator.shift)):
            if not math.isfinite(number):
                raise invalid("NOT_FINITE", f"the operator's {name} must be a finite number, got {number}")
        specs = _specs(listed, {**_UPDATE, **expected}, n, dtype)
        with self.received(specs, chunks, call) as arrays:
            U, C = arrays.pop("U", None), arrays.pop("C", None)
            _check_update(U, C)
            terms = Terms(scale, operator.shift, U, C)
            made = Operator(self._engine, point, program, seed=product.seed, priority=product.priority, terms=terms)
            made.work = work_of(call)
            yield made, arrays

    @contextlib.contextmanager
    def received(self, specs: Specs, chunks: Chunks, call: GrpcCall) -> Iterator[Arrays]:
        """Yield the arrays of a request. Their bytes count as in transit meanwhile."""
        total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())
        check_bytes(self._engine, total, "the arrays of the request")
        with self._room.holding(call.tenant, total):
            buffer, filled = np.empty(total, np.uint8), 0
            while filled < total:
                chunk = next(chunks, None)
                if chunk is None or not len(chunk):
                    raise invalid("SIZE_MISMATCH", f"the arrays have {total} bytes, and {filled} came")
                if filled + len(chunk) > total:
                    raise invalid("SIZE_MISMATCH", f"the arrays have {total} bytes, and more came")
                buffer[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
                filled += len(chunk)
            arrays, start = Arrays(), 0
            for name, (shape, dtype) in specs.items():
                size = math.prod(shape) * dtype.itemsize
                arrays[name] = np.array(buffer[start : start + size].view(dtype).reshape(shape))
                start += size
            del buffer
            yield arrays


def _specs(
    listed: "Iterable[krylov_pb2.RunArray]", expected: Mapping[str, Expected], n: int, dtype: "np.dtype[Any]"
) -> Specs:
    """Return what arrays a request has.

    Raises:
        ServiceError: They are not those that it may have.
    """
    specs = Specs()
    for array in listed:
        name = array.name
        found = expected.get(name) or expected.get(re.sub(r"\d{1,9}$", "#", name))
        if found is None or name in specs or len(specs) == _MOST_ARRAYS:
            raise invalid("ARRAYS", f"the arrays may be {', '.join(expected)}, each once, got {_text.quoted(name, 40)}")
        kind = np.dtype(np.int64) if found.integers else dtype
        sizes = [n if size == "n" else size for size in found.shape]
        given = list(array.shape)
        fits = len(given) == len(sizes) and all(
            got == want if want is not None else 1 <= got < 1 << 40 for got, want in zip(given, sizes, strict=False)
        )
        if array.dtype != kind.name or not fits:
            wanted = ", ".join("k" if size is None else str(size) for size in sizes)
            raise invalid(
                "ARRAYS",
                f"array {name} must be {kind.name}[{wanted}], got {_text.quoted(array.dtype, 20)}{_text.cut(str(given), 80)}",
            )
        specs[name] = (tuple(given), kind)
    if missing := [name for name, each in expected.items() if each.required and name not in specs]:
        raise invalid("ARRAYS", f"the request has no array {missing[0]}: list it in `arrays`, and send its bytes")
    return specs


def check_bytes(engine: Engine, size_bytes: int, what: str) -> None:
    """Raise ServiceError if arrays are larger than the memory budget."""
    most = engine.limits.memory_budget_bytes
    if size_bytes > most:
        raise ServiceError(
            Code.RESOURCE_EXHAUSTED,
            "MEMORY_BUDGET",
            f"{what} have {size_bytes} bytes, more than the server's memory budget of {most} bytes: ask for less at a time",
        )


def first_of(messages: Iterator[Frame[Any]], empty: Frame[Any], field: str) -> Frame[Any]:
    """Return the first message, which must have a field."""
    found = next(messages, empty)
    if not found.message.HasField(field):
        raise invalid("SPEC_MISSING", f"the first message must have `{field}`")
    return found


def rest(chunk: codec.Buffer, messages: Iterator[Frame[Any]]) -> Chunks:
    """Yield the chunks of a request, that of its first message before all others."""
    if len(chunk):
        yield chunk
    for _, following in messages:
        yield following


def work_of(call: GrpcCall) -> Work:
    """Return the work of a call, which ends when its caller is gone."""
    cancellation = Cancellation()
    work = Work(call.tenant, call.owner, call.deadline, cancellation.on_queue, end=call.cancel)

    def gone() -> None:
        work.gone.set()
        cancellation.gone()

    if not call.on_end(gone):
        gone()
    return work


def _check_update(U: codec.Array | None, C: codec.Array | None) -> None:
    if U is None and C is None:
        return
    if U is None or C is None or C.shape != (U.shape[1],) * 2:
        raise invalid("ARRAYS", "a low-rank term has U of shape [n, r] and C of shape [r, r]")
    if not (np.isfinite(U).all() and np.isfinite(C).all()):
        raise invalid("NOT_FINITE", "the low-rank term holds NaN or infinity")
