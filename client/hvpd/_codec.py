"""Arrays to bytes and back: dtypes by name, digests, chunks.

Both ends use it. It knows no gRPC and no jax; what is sent where is decided elsewhere.
"""

import functools
import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvpd._errors import InvalidArgumentError

CHUNK_BYTES = 1 << 20
"""Most bytes of payload in one message. Pipelined messages of 1 MiB go several times faster than one large one."""

VECTOR_DTYPES = ("float32", "float64")
"""dtypes of flat x, gradient and products. Narrower leaves are computed in their own dtype and raveled to float32."""


Array = npt.NDArray[Any]

_MOST_AXES = 64
"""numpy's limit."""

Buffer = bytes | bytearray | memoryview


_LITTLE_ENDIAN = sys.byteorder == "little"

_NUMPY = frozenset(
    ["bool", "float16", "float32", "float64", "complex64", "complex128"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)
_ML_DTYPES = ("bfloat16", "float8_")
"""Not those of less than a byte: XLA packs them, and arrays here do not."""


@functools.cache
def dtype(name: str) -> np.dtype[Any]:
    """The dtype of a name on the wire, little-endian. bfloat16 and the like need ml_dtypes, which comes with jax.

    Raises:
        TypeError: No such dtype can be sent, or ml_dtypes is not installed.
    """
    if name in _NUMPY:
        return np.dtype(name).newbyteorder("<")
    if name.startswith(_ML_DTYPES):
        try:
            import ml_dtypes

            found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        except (ImportError, AttributeError):
            raise TypeError(f"dtype {name!r} needs the package ml_dtypes, in a version that knows it") from None
        return found
    raise TypeError(f"arrays of dtype {name!r} cannot be sent")


def native(array: Array) -> Array:
    """The array in this machine's byte order."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def is_real_floating(dtype: np.dtype[Any]) -> bool:
    """Whether the elements are real floating numbers, bfloat16 and float8 among them."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat16", "float8_"))


def payload(array: Array) -> memoryview:
    """The elements of `array`, row-major and little-endian, as bytes without a copy where they already lie so."""
    if array.dtype.isnative is _LITTLE_ENDIAN:
        try:
            return array.data.cast("B")
        except (TypeError, ValueError):  # It lies otherwise; or as below.
            pass
    return octets(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")))


def octets(array: Array) -> memoryview:
    """The memory of a contiguous array, as bytes: mostly by a cast, which with cold caches takes a third of the time of a view."""
    try:
        return array.data.cast("B")
    except (TypeError, ValueError):  # It is empty, or Python does not know the dtype.
        return array.reshape(-1).view(np.uint8).data


def array(data: Buffer, dtype_name: str, shape: Sequence[int]) -> Array:
    """The array of some bytes; raises ValueError where their number is not what the shape needs."""
    element = dtype(dtype_name)
    expected = math.prod(shape) * element.itemsize
    size = memoryview(data).nbytes
    if size != expected:
        raise ValueError(f"{dtype_name}{list(shape)} takes {expected} bytes, got {size}")
    return np.frombuffer(data, element).reshape(shape)


def count(shape: Sequence[int]) -> int:
    """Return the number of elements of an array of a shape that came from elsewhere.

    Raises:
        ValueError: It has a negative size, more axes than numpy has, or more elements than there are addresses.
    """
    if len(shape) <= _MOST_AXES and all(size >= 0 for size in shape) and (found := math.prod(shape)) < 1 << 48:
        return found
    raise ValueError(f"an array of the shape {list(shape[:_MOST_AXES])} cannot be")


def digest(*parts: Buffer) -> str:
    """SHA-256 of the concatenated parts, in hexadecimal."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()


def is_digest(text: str) -> bool:
    """Whether `text` has the form of a digest: 64 lower-case hexadecimal digits."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def chunks(data: Buffer, most: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """Consecutive views of `data`, as few as there can be of `most` bytes each, about as long as each other. One empty view for
    empty data.
    """
    view = memoryview(data).cast("B")
    size = -(-len(view) // max(-(-len(view) // most), 1))
    for start in range(0, max(len(view), 1), max(size, 1)):
        yield view[start : start + size]


def data_array(leaf: Any, where: str, *, x_dtype: np.dtype[Any], x64: bool) -> Array:
    """A leaf of data as jax takes it: Python numbers in x's dtype, 64 bits narrowed where x64 is off.

    Raises:
        InvalidArgumentError: Not an array of numbers, or integers that 32 bits cannot hold.
    """
    found = native(np.asarray(leaf))
    if type(leaf) is float:
        found = found.astype(x_dtype)
    elif type(leaf) is int and found.dtype.kind in "iu" and abs(leaf) < 2**31:
        found = found.astype(np.int32)
    try:
        dtype(found.dtype.name)
    except TypeError:
        raise InvalidArgumentError(
            f"{where} must be an array of numbers or booleans, got dtype {found.dtype}"
        ) from None
    narrow = {"float64": "float32", "complex128": "complex64", "int64": "int32", "uint64": "uint32"}
    if x64 or found.dtype.name not in narrow:
        return found
    to = narrow[found.dtype.name]
    if found.dtype.kind in "iu" and found.size:
        limits = np.iinfo(to)
        if found.min() < limits.min or found.max() > limits.max:
            raise InvalidArgumentError(
                f"{where} holds integers that {to} cannot, and this objective is traced without 64-bit types: "
                "register it under jax.enable_x64(True), or with a float64 x"
            )
    return found.astype(to)
