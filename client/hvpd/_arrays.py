"""Arrays of other libraries: to NumPy, and the results back to the caller's kind.

A kind is found by the library (PyTorch, jax, CuPy, Numba), or by the protocol
(`__array_namespace__`, `__cuda_array_interface__`, `__dlpack__`). No library is
imported here, because an array of a library exists only after its import. Everything
else is left to `numpy.asarray`, and its results are NumPy's.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hvpd import _text
from hvpd._errors import InvalidArgumentError

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A library's or a protocol's arrays."""

    name: str
    """Name of the library or of the protocol."""
    to_host: Callable[[Any], Array]
    """Returns an array of this kind as a NumPy array, as a view if possible."""
    from_host: Callable[[Array, Any], Any]
    """Returns a NumPy array as an array of this kind, on another one's device."""

    def host(self, array: Any, where: str) -> Array:
        """Return an array of this kind as a NumPy array.

        Args:
            array: The array.
            where: Name of the argument, for messages.

        Raises:
            InvalidArgumentError: The array cannot be copied to this machine's memory,
                or is a tensor that requires grad.
        """
        if getattr(array, "requires_grad", False) is True:
            raise InvalidArgumentError(
                f"{where} is a tensor that requires grad: pass its .detach()", reason="REQUIRES_GRAD"
            )
        if self.to_host is np.asarray:
            return np.asarray(array)
        try:
            return self.to_host(array)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{where} is {error}", reason=error.reason) from None
        except Exception as error:
            raise InvalidArgumentError(
                f"{where} is a {described(array)}, which NumPy cannot read: pass a copy in this machine's memory, of a dtype "
                f"that NumPy has ({_text.cut(str(error), 200)})",
                reason="ARRAY_UNREADABLE",
            ) from error

    def back(self, result: Array, like: Any) -> Any:
        """Return a result as an array of this kind, on the device of `like`.

        Args:
            result: A NumPy array, which the caller may change and keep.
            like: The caller's array.
        """
        return self.from_host(result, like)


def described(array: Any) -> str:
    """Return the class of an array, with its device if it has one."""
    cls = type(array)
    device = getattr(array, "device", None)
    return f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}" + (f" on {device}" if device is not None else "")


NUMPY = Kind("numpy", np.asarray, lambda result, like: result)
"""NumPy's arrays, and everything that NumPy converts: numbers, lists, data frames."""


# Libraries


def _torch_host(tensor: Any) -> Array:
    if tensor.dtype is sys.modules["torch"].bfloat16:  # NumPy has no bfloat16, and float32 holds each of its numbers.
        tensor = tensor.float()
    array: Array = tensor.cpu().resolve_conj().resolve_neg().numpy()
    return array


def _torch_back(result: Array, like: Any) -> Any:
    torch = sys.modules["torch"]
    tensor = torch.from_numpy(result if result.flags.writeable else result.copy())
    # PyTorch does not combine tensors of two dtypes, so the caller's dtype is kept.
    return tensor.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None)


def _jax_host(array: Any) -> Array:
    if isinstance(array, sys.modules["jax"].core.Tracer):
        raise InvalidArgumentError(
            "traced by jax (jit, vmap, grad): call the function that `as_jax()` of the operator or the objective returns",
            reason="TRACED_BY_JAX",
        )
    return np.asarray(array)


def _jax_back(result: Array, like: Any) -> Any:
    jax = sys.modules["jax"]
    if jax.dtypes.canonicalize_dtype(result.dtype) != result.dtype:
        return result  # jax has no 64 bits here, and would drop half of them.
    devices = like.devices()
    return jax.numpy.asarray(result, device=next(iter(devices)) if like.committed and len(devices) == 1 else None)


def _cupy_host(array: Any) -> Array:
    host: Array = array.get()
    return host


def _cupy_back(result: Array, like: Any) -> Any:
    with like.device:
        return sys.modules["cupy"].asarray(result)


def _numba_host(array: Any) -> Array:
    host: Array = array.copy_to_host()
    return host


def _numba_back(result: Array, like: Any) -> Any:
    return sys.modules["numba"].cuda.to_device(result)


TORCH = Kind("torch", _torch_host, _torch_back)
JAX = Kind("jax", _jax_host, _jax_back)
CUPY = Kind("cupy", _cupy_host, _cupy_back)
NUMBA = Kind("numba", _numba_host, _numba_back)


# Protocols


def _exchanged(array: Any) -> Array:
    """Return the array of an object with `__dlpack__` or `__array__`."""
    exchange: Any = np.from_dlpack
    # The second try is for other devices. NumPy asks for copies since its version 2.1.
    for options in ({}, {"device": "cpu", "copy": True}):
        with contextlib.suppress(Exception):
            found: Array = exchange(array, **options)
            return found
    return np.asarray(array) if hasattr(array, "__array__") else np.from_dlpack(array)


def _standard_back(result: Array, like: Any) -> Any:
    namespace, device = like.__array_namespace__(), getattr(like, "device", None)
    try:
        return namespace.asarray(result, device=device)
    except TypeError:  # Some libraries have no devices.
        return namespace.asarray(result)


def _cuda_host(array: Any) -> Array:
    cupy = sys.modules.get("cupy")
    if cupy is None:
        raise InvalidArgumentError(
            f"a {described(array)} in a GPU's memory, and no library that reads __cuda_array_interface__ is imported: import "
            "cupy, or pass torch.as_tensor(x)",
            reason="ARRAY_UNREADABLE",
        )
    return _cupy_host(cupy.asarray(array))


def _cuda_back(result: Array, like: Any) -> Any:
    return sys.modules["cupy"].asarray(result)


def _dlpack_back(result: Array, like: Any) -> Any:
    """Return an array of the caller's library, if it has a function `from_dlpack`;
    otherwise NumPy's.
    """
    library = sys.modules.get(type(like).__module__.partition(".")[0])
    make = getattr(library, "from_dlpack", None)
    return result if make is None else make(result)


STANDARD = Kind("__array_namespace__", _exchanged, _standard_back)
CUDA = Kind("__cuda_array_interface__", _cuda_host, _cuda_back)
DLPACK = Kind("__dlpack__", _exchanged, _dlpack_back)

_LIBRARIES = (("torch", "Tensor", TORCH), ("jax", "Array", JAX), ("cupy", "ndarray", CUPY))
"""Libraries with the class of their arrays."""


def kind_of(array: Any) -> Kind:
    """Return the kind of an array, or of anything that NumPy converts."""
    if isinstance(array, (np.ndarray, np.generic, int, float, complex, list, tuple, dict)):
        return NUMPY
    for library, name, kind in _LIBRARIES:
        cls = getattr(sys.modules.get(library), name, None)
        if isinstance(cls, type) and isinstance(array, cls):
            return kind
    if type(array).__module__.startswith("numba.") and hasattr(array, "copy_to_host"):
        return NUMBA
    if hasattr(array, "__array_namespace__"):
        return STANDARD
    if hasattr(array, "__cuda_array_interface__"):
        return CUDA
    return DLPACK if hasattr(array, "__dlpack__") else NUMPY


def is_array(thing: Any) -> bool:
    """Return whether something is an array of any kind, and no pytree of arrays."""
    return isinstance(thing, np.ndarray) or hasattr(thing, "__array__") or kind_of(thing) is not NUMPY


def host(array: Any, where: str) -> Array:
    """Return an array of any kind as a NumPy array; raise as `Kind.host`."""
    return array if type(array) is np.ndarray else kind_of(array).host(array, where)


def vectors(array: Any, where: str) -> Array:
    """Return vectors of any kind as a NumPy array; raise as `host`, and for a dict."""
    if isinstance(array, Mapping):
        keys = ", ".join(sorted(map(str, array)))
        raise InvalidArgumentError(
            f"{where} must be an array, got a dict with the keys {{{keys}}}: objective.ravel(tree) makes the vector",
            reason="SHAPE",
        )
    return host(array, where)


def fault(array: Array) -> str:
    """Return the reason of an error about an array that must have another shape, or
    must be real.
    """
    return "SHAPE" if array.dtype.kind in "fiub" else "DTYPE"


def back(result: Array, like: Any) -> Any:
    """Return a result in the kind of the caller's array."""
    return result if type(like) is np.ndarray else kind_of(like).back(result, like)


def common(arrays: Iterable[Any]) -> Callable[[Array], Any]:
    """Return a function that gives results the kind of several arrays.

    Without arrays, and for arrays of several kinds, the results are NumPy's.
    """
    listed = list(arrays)
    kinds = {kind_of(array).name for array in listed}
    if len(kinds) != 1:
        return lambda result: result
    return lambda result: back(result, listed[0])
