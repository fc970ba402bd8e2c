"""Arrays to bytes and back: dtypes by name, digests, chunks.

Client and server use it. It knows neither gRPC nor jax.
"""

import functools
import hashlib
import math
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvpd import _arrays, _text
from hvpd._errors import InvalidArgumentError

CHUNK_BYTES = 1 << 20
"""Most bytes of payload in one message.

Pipelined messages of 1 MiB are several times faster than a large one."""

VECTOR_DTYPES = ("float32", "float64")
"""dtypes of flat x, gradient and products.

Narrower leaves are computed in their own dtype and raveled to float32."""


Array = npt.NDArray[Any]

_MOST_AXES = 64
"""Most axes of a numpy array."""

Buffer = bytes | bytearray | memoryview

_BLOCK_BYTES = 64 << 20
"""Approximate bytes of a block on this machine.

The transport cuts a block into the server's widths, and sends these without waiting."""

_LITTLE_ENDIAN = sys.byteorder == "little"

_NUMPY = frozenset(
    ["bool", "float16", "float32", "float64", "complex64", "complex128"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)
_ML_DTYPES = ("bfloat16", "float8_")
"""dtypes of ml_dtypes, without those below a byte, which only XLA packs."""


@functools.cache
def dtype(name: str) -> np.dtype[Any]:
    """Return the little-endian dtype of a name on the wire.

    bfloat16 and float8 need ml_dtypes, which jax installs.

    Raises:
        TypeError: The dtype cannot be sent, or ml_dtypes is not installed.
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
    """Return the array in this machine's byte order."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def is_real_floating(dtype: np.dtype[Any]) -> bool:
    """Return whether elements are real floating numbers, also bfloat16 and float8."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat16", "float8_"))


def payload(array: Array) -> memoryview:
    """Return the row-major, little-endian bytes, without a copy if possible."""
    if array.dtype.isnative is _LITTLE_ENDIAN:
        try:
            return array.data.cast("B")
        except (TypeError, ValueError):  # It is not contiguous, or as in `octets`.
            pass
    return octets(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")))


def octets(array: Array) -> memoryview:
    """Return the memory of a contiguous array as bytes.

    It casts if it can, because with cold caches a cast takes a third of a view's time.
    """
    try:
        return array.data.cast("B")
    except (TypeError, ValueError):  # It is empty, or Python does not know the dtype.
        return array.reshape(-1).view(np.uint8).data


def array(data: Buffer, dtype_name: str, shape: Sequence[int]) -> Array:
    """Return the array of some bytes.

    Raises:
        ValueError: The number of bytes does not fit the shape.
    """
    element = dtype(dtype_name)
    expected = math.prod(shape) * element.itemsize
    size = memoryview(data).nbytes
    if size != expected:
        raise ValueError(f"{dtype_name}{list(shape)} takes {expected} bytes, got {size}")
    return np.frombuffer(data, element).reshape(shape)


def count(shape: Sequence[int]) -> int:
    """Return the number of elements of a shape that came from elsewhere.

    Raises:
        ValueError: A size is negative, or there are more axes than numpy has, or more
            elements than addresses.
    """
    if len(shape) <= _MOST_AXES and all(size >= 0 for size in shape) and (found := math.prod(shape)) < 1 << 48:
        return found
    raise ValueError(f"an array of the shape {_text.cut(str(list(shape)), 200)} cannot exist")


def digest(*parts: Buffer) -> str:
    """Return the SHA-256 of the concatenated parts, in hexadecimal."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()


_DIGEST = re.compile("[0-9a-f]{64}")


def is_digest(text: str) -> bool:
    """Return whether a text consists of 64 lower-case hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None


def chunks(data: Buffer, most: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """Yield consecutive views of `data`, of about equal length.

    There are as few as possible with at most `most` bytes each. Empty data gives one
    empty view.
    """
    view = memoryview(data).cast("B")
    size = -(-len(view) // max(-(-len(view) // most), 1))
    for start in range(0, max(len(view), 1), max(size, 1)):
        yield view[start : start + size]


def spans(count: int, n: int, dtype: np.dtype[Any]) -> Iterator[slice]:
    """Yield the blocks into which `count` vectors of n elements are cut."""
    width = min(max(_BLOCK_BYTES // max(n * dtype.itemsize, 1), 16), 1024)
    for start in range(0, count, width):
        yield slice(start, min(start + width, count))


def unsent(leaf: Any, found: Array) -> str:
    """Describe a leaf that cannot be sent, with the remedy."""
    if callable(leaf):
        return (
            "a function: bind it with functools.partial. For an equinox module, pass the first part of "
            "eqx.partition(model, eqx.is_array), and call eqx.combine with the other part in the function"
        )
    if type(leaf).__module__.startswith("scipy.sparse"):
        return (
            f"a scipy.sparse {type(leaf).__name__}, and client.register takes such a matrix as data only: if the objective was "
            "registered with a dense array, or for x, pass .toarray()"
        )
    if "int" in found.dtype.name:
        return f"dtype {found.dtype}: pass .astype(jnp.int8), and compute with int8: the server has no {found.dtype}"
    if found.dtype.kind in "US" or found.dtype == object:
        what = "a string" if found.dtype.kind in "US" else f"a {type(leaf).__name__}"
        return f"{what} (dtype {found.dtype}): bind arguments that are no arrays with functools.partial"
    return f"dtype {found.dtype}"


def data_array(leaf: Any, where: str, *, x_dtype: np.dtype[Any], x64: bool) -> Array:
    """Convert a leaf of data as jax does.

    Python numbers get x's dtype. Without x64, 64 bits are narrowed to 32.

    Args:
        leaf: An array or a number.
        where: Name of the leaf, for messages.
        x_dtype: dtype of the flat x.
        x64: Whether the objective is traced in 64 bits.

    Raises:
        InvalidArgumentError: The leaf is no array of numbers, or holds integers that 32
            bits cannot hold.
    """
    found = native(_arrays.host(leaf, where))
    if type(leaf) is float:
        found = found.astype(x_dtype)
    elif type(leaf) is int and found.dtype.kind in "iu" and abs(leaf) < 2**31:
        found = found.astype(np.int32)
    try:
        dtype(found.dtype.name)
    except TypeError:
        raise InvalidArgumentError(
            f"{where} must be an array of numbers or booleans, got {unsent(leaf, found)}", reason="DTYPE"
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
                "register it under jax.enable_x64(True), or with a float64 x",
                reason="X64_DISABLED",
            )
    return found.astype(to)
