"""Which of jax's primitives get a mark, and the parameters that the mark keeps.

Every primitive that jax can differentiate is in one of these tables, or `marks` refuses
it.
"""

import enum
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import jax.export
import jax.interpreters.ad
import jax.interpreters.mlir as lowering
import numpy as np
from jax.extend.core import Primitive


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LOOKS_ALIKE: Final = _names(
    """
    abs add add_any and atan2 bitcast_convert_type broadcast_in_dim cbrt ceil clamp complex concatenate cond conj
    conv_general_dilated convert_element_type copy cos device_put div dot_general dynamic_slice dynamic_update_slice
    dynamic_slice eq eq_to exp expm1 fft floor ge gt imag is_finite jit layout_constraint le le_to log log1p
    lt lt_to max min mul mulhi name ne neg not optimization_barrier or pad real reduce reduce_max reduce_min
    reduce_precision reduce_prod reduce_sum reduce_window_max reduce_window_min reduce_window_sum rem reshape rev round
    rsqrt scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub select_and_scatter_add select_n
    sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin slice split sqrt squeeze stack
    sub tan tanh tile transpose unstack while xor
    eval_jaxpr hvpd_closed_over program_order with_memory_space_constraint
    custom_vmap_call random_bits random_fold_in random_seed random_split random_unwrap random_wrap remat_opt
    """
)
"""Differentiable primitives that need no mark.

The operation alone tells the importer the primitive, and so its rule."""

MARKED: Final = _names(
    """
    acos acosh asin asinh atan atanh cosh sinh exp2 log2 square one_minus_square integer_pow nextafter
    erf erfc erf_inv lgamma digamma polygamma zeta igamma igammac igamma_grad_a bessel_i0e bessel_i1e
    regularized_incomplete_beta random_gamma threefry2x32
    logistic argmax argmin sort top_k approx_top_k gather
    cumsum cumprod cummax cummin cumlogsumexp select_and_gather_add
    symmetric_product cholesky eigh eig svd qr geqrf lu lu_pivots_to_permutation householder_product ormqr triangular_solve
    tridiagonal tridiagonal_solve schur hessenberg
    """
)
"""Primitives that get a generic mark with their parameters."""

WRITTEN_OUT: Final = _names(
    """
    bcoo_dot_general bcoo_dot_general_sampled bcoo_extract bcoo_fromdense bcoo_sort_indices bcoo_spdot_general
    bcoo_sum_duplicates bcoo_todense bcoo_transpose bcsr_dot_general bcsr_extract bcsr_fromdense bcsr_todense
    coo_fromdense coo_matmat coo_matvec coo_todense csr_fromdense csr_matmat csr_matvec csr_todense todense
    maybe_set nondifferentiable_backward psum ragged_dot_general select_if_vmap
    """
)
"""Primitives of jax, jax.experimental.sparse and equinox, which become the operations
behind them.

Each is linear in each of its arguments, so these operations have the same
derivatives."""

ALLOWED_CALLS: Final = tuple(
    jax.export.DisabledSafetyCheck.custom_call(f"lapack_{name}_ffi")
    for name in ("sormqr", "dormqr", "cunmqr", "zunmqr")
)
"""Calls of LAPACK that jax does not keep stable.

They are inside of marks only, and the server binds the marked primitive instead."""

COMPLEX: Final = _names("cos exp log log1p max min sin sqrt")
"""Primitives that are marked for complex numbers.

jax.export writes these out in real arithmetic."""

STRUCTURAL: Final = frozenset(
    ["custom_jvp_call", "custom_vjp_call", "custom_linear_solve", "remat2", "scan", "stop_gradient"]
)
"""Primitives whose marks carry functions."""


class UnmarkableError(NotImplementedError):
    """A construct whose derivative rule the server could not put back."""


def registered() -> Mapping[str, Primitive]:
    """Return jax's primitives that can be lowered or differentiated, by name."""
    tables: list[Mapping[Primitive, Any]] = [
        lowering._lowerings,  # noqa: SLF001 - jax has no public list of its primitives
        *lowering._platform_specific_lowerings.values(),  # noqa: SLF001 - jax has no public list of its primitives
        jax.interpreters.ad.primitive_jvps,
        jax.interpreters.ad.primitive_transposes,
    ]
    return {primitive.name: primitive for primitive in itertools.chain.from_iterable(tables)}


def needs_mark(name: str, avals: Sequence[Any]) -> bool:
    """Return whether a primitive of these tables needs a mark for such arguments."""
    if name == "pow":
        # The lowering converts an integer exponent to the base's dtype, and with it the
        # derivative rule.
        return not is_floating(avals[1])
    return name not in COMPLEX or np.issubdtype(avals[0].dtype, np.complexfloating)


def differentiable(primitive: Primitive) -> bool:
    """Return whether jax can differentiate a primitive."""
    ad = jax.interpreters.ad
    return primitive in ad.primitive_jvps or primitive in ad.primitive_transposes


def is_floating(aval: Any) -> bool:
    """Return whether an argument has tangents with values."""
    return bool(aval.to_tangent_aval().dtype != jax.dtypes.float0)


def parameters_of(primitive: Primitive, params: Mapping[str, Any], avals: Sequence[Any]) -> dict[str, Any]:
    """Return a primitive's parameters as JSON.

    Raises:
        UnmarkableError: A parameter is not plain data, such as a size that depends on
            symbolic shapes.
    """
    found = {name: _plain(value, f"{primitive}'s {name}") for name, value in params.items() if name != "slice_sizes"}
    if primitive.name == "gather":
        whole = avals[0].shape
        found["slice_sizes"] = [
            None if not isinstance(size, (int, np.integer)) and size == extent else _plain(size, "gather's slice_sizes")
            for size, extent in zip(params["slice_sizes"], whole, strict=True)
        ]
    if primitive.name == "top_k":
        # jax 0.10 has no such parameter: its top_k is stable, and a stable order is
        # allowed where any order is.
        found.pop("is_stable", None)
    if primitive.name == "random_gamma":
        found["impl"] = avals[0].dtype._impl.name  # noqa: SLF001 - jax tells an abstract key's generator nowhere else
    return found


def _plain(value: Any, what: str) -> Any:
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, (np.generic, float)) and math.isfinite(value):
        return np.asarray(value).item()
    if isinstance(value, (enum.Enum, np.dtype, Primitive)):
        return value.name
    if hasattr(value, "_asdict"):
        return {name: _plain(each, what) for name, each in value._asdict().items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each, what) for each in value]
    raise UnmarkableError(f"{what} is {value!r}, which is not plain data: give it as a number")
