"""Random bits from a state that the program holds.

The same state gives the same bits, so that derivatives are well defined.
"""

from typing import Any, Final

import numpy as np
from jax import lax

from hvpd_server.importer import shapes
from hvpd_server.importer.table import Call, Value, dtype_of, operation, static_shape

_ALGORITHMS: Final = {
    "DEFAULT": lax.RandomAlgorithm.RNG_DEFAULT,
    "THREE_FRY": lax.RandomAlgorithm.RNG_THREE_FRY,
    "PHILOX": lax.RandomAlgorithm.RNG_PHILOX,
}


@operation("stablehlo.rng_bit_generator", attributes=["rng_algorithm"])
def _rng_bit_generator(call: Call) -> list[Value]:
    (state,) = call.operands
    dtype = dtype_of(call.types[1])
    return generate(call, state, shapes.fits(call, static_shape(call, 1), dtype), dtype)


def generate(call: Call, state: Value, shape: tuple[int, ...], dtype: np.dtype[Any]) -> list[Value]:
    """Return the next state and random bits of a shape and dtype, by the algorithm that
    the operation states.
    """
    algorithm = call.attributes["rng_algorithm"]
    if algorithm not in _ALGORITHMS:
        raise call.refuse(f"with the algorithm {algorithm}: expected one of {', '.join(_ALGORITHMS)}")
    if state.dtype != np.uint64 or state.shape != (2,):
        raise call.refuse(f"with a state of {state.dtype}{list(state.shape)}: expected uint64[2]")
    if dtype.kind != "u":
        # XLA gives a signed integer the bits of the unsigned one.
        state, bits = lax.rng_bit_generator(state, shape, np.dtype(f"uint{dtype.itemsize * 8}"), _ALGORITHMS[algorithm])
        return [state, lax.bitcast_convert_type(bits, dtype)]
    return list(lax.rng_bit_generator(state, shape, dtype, _ALGORITHMS[algorithm]))


@operation("stablehlo.rng", attributes=["rng_distribution"])
def _rng(call: Call) -> Value:
    raise call.refuse(
        "which draws other numbers at each run, so that no derivative is well defined: draw from a key that is data"
    )
