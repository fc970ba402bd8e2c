"""Fourier transforms."""

from typing import Final

from jax import lax

from hvpd_server.importer.table import Call, Value, operation

_TYPES: Final = ("FFT", "IFFT", "RFFT", "IRFFT")


@operation("stablehlo.fft", attributes=["fft_type", "fft_length"])
def _fft(call: Call) -> Value:
    (x,) = call.operands
    kind = call.attributes["fft_type"]
    if kind not in _TYPES:
        raise call.refuse(f"of the type {kind}: expected one of {', '.join(_TYPES)}")
    return lax.fft(x, kind, tuple(call.attributes["fft_length"]))
