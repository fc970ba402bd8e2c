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
    lengths = tuple(call.attributes["fft_length"])
    # jax leaves these extents to the compiler.
    expected = (*lengths[:-1], lengths[-1] // 2 + 1) if kind == "IRFFT" and lengths else lengths
    if not lengths or x.shape[-len(lengths) :] != expected:
        raise call.refuse(
            f"of shape {list(x.shape)} and lengths {list(lengths)}: expected {list(expected)} as last extents"
        )
    return lax.fft(x, kind, lengths)
