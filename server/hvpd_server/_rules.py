"""What a program may be made of: operations, calls of the runtime's own routines, sizes. Lists and limits, no reading of programs.

What is not listed is refused. The lists hold what jax writes for pure functions on one device; a test holds them against jax's own.
"""

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

OPERATION_REFUSED: Final = "OPERATION_REFUSED"
"""Reason: an operation, call or attribute that is not listed."""

PROGRAM_TOO_LARGE: Final = "PROGRAM_TOO_LARGE"
"""Reason: nested too deeply, or too many operations, or constants or arrays that are too large."""

VETTING_FAILED: Final = "VETTING_FAILED"
"""Reason: the process that read the program ended: it crashed, or ran out of its memory."""

VETTING_TIMEOUT: Final = "VETTING_TIMEOUT"
"""Reason: reading the program took too long."""

BUNDLE_INCOMPATIBLE: Final = "BUNDLE_INCOMPATIBLE"
"""Reason: no program that this version of jax can read."""

BUNDLE_INVALID: Final = "BUNDLE_INVALID"
"""Reason: a program that is not what its own signature says."""

REASONS: Final = frozenset(
    [OPERATION_REFUSED, PROGRAM_TOO_LARGE, VETTING_FAILED, VETTING_TIMEOUT, BUNDLE_INCOMPATIBLE, BUNDLE_INVALID]
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may be, and what reading all programs of a bundle may take."""

    memory_bytes: int = 4 << 30
    """Address space, beyond what the process has before it reads."""
    cpu_seconds: int = 30
    """Seconds of computing."""
    seconds: float = 120.0
    """Seconds in all."""
    bundle_bytes: int = 512 << 20
    """Size of all serialized programs."""
    operations: int = 1_000_000
    """Operations of one program, those of a function counted as often as it is called."""
    nesting: int = 64
    """Operations inside each other."""
    calls: int = 128
    """Functions that call each other, in a chain."""
    constant_bytes: int = 256 << 20
    """Constants of one program, written out."""
    array_bytes: int = 1 << 50
    """One array, its symbolic extents taken as 1. It need never be in memory as a whole; but arithmetic with such sizes overflows."""
    rank: int = 64
    """Axes of an array."""


_STABLEHLO: Final = """
    abs add and atan2 bitcast_convert broadcast_in_dim case cbrt ceil cholesky clamp compare complex composite concatenate
    constant convert
    convolution cosine count_leading_zeros custom_call divide dot_general dynamic_broadcast_in_dim dynamic_conv dynamic_gather
    dynamic_iota dynamic_pad dynamic_reshape dynamic_slice dynamic_update_slice exponential exponential_minus_one fft floor gather
    get_dimension_size if imag iota is_finite log log_plus_one logistic maximum minimum multiply negate not optimization_barrier or
    pad popcnt power real real_dynamic_slice reduce reduce_precision reduce_window remainder reshape return reverse
    rng_bit_generator round_nearest_afz round_nearest_even rsqrt scatter select select_and_scatter shift_left
    shift_right_arithmetic shift_right_logical sign sine slice sort sqrt subtract tan tanh transpose triangular_solve while xor
"""
_CHLO: Final = """
    acos acosh asin asinh atan atanh bessel_i1e conj cosh digamma erf erf_inv erfc is_inf is_neg_inf is_pos_inf lgamma mulhi
    next_after polygamma ragged_dot sinh square tan top_k zeta
"""

OPERATIONS: Final = frozenset(
    ["func.func", "func.call", "func.return"] + [f"stablehlo.{name}" for name in _STABLEHLO.split()]
)
"""Operations of a program, inside its one builtin.module. Pure, on one device: nothing that sends, receives, feeds, or tells devices
apart; no stateful random numbers; no tuples and tokens."""

COMPOSITES: Final = frozenset(f"chlo.{name}" for name in _CHLO.split())
"""Names of stablehlo.composite, which come with a function that does the same: as these, CHLO's operations travel."""

_LAPACK: Final = {
    # Shapes of operands and results behind the axes that all share: m and n are any, k is the smaller one, e is n - 1.
    "potrf": (["nn"], ["nn", ""]),
    "getrf": (["mn"], ["mn", "k", ""]),
    "geqrf": (["mn"], ["mn", "k"]),
    "orgqr": (["mn", "q"], ["mn"]),
    "syevd": (["nn"], ["nn", "n", ""]),
    "gesdd": (["mn"], ["mn", "k", "mu", "vn", ""]),
    "gehrd": (["nn"], ["nn", "e", ""]),
    "sytrd": (["nn"], ["nn", "n", "e", "e", ""]),
    "gtsv": (["n", "n", "n", "nc"], ["n", "n", "n", "nc", ""]),
}
_REAL: Final = {
    "geev": (["nn"], ["n", "n", "nn", "nn", ""]),
    "gees": (["nn"], ["nn", "nn", "n", "n", "", ""]),
}
_COMPLEX: Final = {
    "geev": (["nn"], ["n", "nn", "nn", ""]),
    "gees": (["nn"], ["nn", "nn", "n", "", ""]),
}
_COMPLEX_NAMES: Final = {"orgqr": "ungqr", "syevd": "heevd", "sytrd": "hetrd"}

_Shapes = tuple[Sequence[str], Sequence[str]]


def _lapack() -> dict[str, _Shapes]:
    found: dict[str, _Shapes] = {}
    for real in "sd":
        found |= {f"lapack_{real}{name}_ffi": shapes for name, shapes in (_LAPACK | _REAL).items()}
    for complex_ in "cz":
        both = _LAPACK | _COMPLEX
        found |= {f"lapack_{complex_}{_COMPLEX_NAMES.get(name, name)}_ffi": shapes for name, shapes in both.items()}
    return found


def _solvers() -> dict[str, _Shapes]:
    found: dict[str, _Shapes] = {}
    for vendor in ("cu", "hip"):
        found |= {f"{vendor}solver_{name}_ffi": _LAPACK[name] for name in ("potrf", "getrf", "geqrf", "orgqr", "sytrd")}
        found[f"{vendor}solver_syevd_ffi"] = _LAPACK["syevd"]
    return found


SHAPES: Final[Mapping[str, _Shapes]] = {
    **_lapack(),
    **_solvers(),
    "cusparse_gtsv2_ffi": (["n", "n", "n", "nc"], ["nc"]),
}
"""Custom calls that are routines of jaxlib, which trust the shapes that they are called with: what these must be."""

_OTHER_ROUTINES: Final = frozenset(
    [
        *(f"lapack_{letter}trsm_ffi" for letter in "sdcz"),  # See `fits`, for these.
        *(f"{vendor}solver_gesvd{kind}_ffi" for vendor in ("cu", "hip") for kind in ("", "j")),
        "hipsolver_gesdd_ffi",
        *(f"{vendor}_lu_pivots_to_permutation" for vendor in ("cu", "hip")),
        *(f"{vendor}_threefry2x32_ffi" for vendor in ("cu", "hip")),
    ]
)

ROUTINES: Final = frozenset(SHAPES) | _OTHER_ROUTINES
"""Custom calls of jaxlib's own routines, on the CPU or a GPU."""

TARGETS: Final = ROUTINES | {
    "Eigh",  # The compiler for TPUs has these.
    "Qr",
    "ProductOfElementaryHouseholderReflectors",
    "LuDecomposition",
    "ApproxTopK",
    "shape_assertion",  # Symbolic shapes; the compiler replaces these by operations.
    "stablehlo.dynamic_approx_top_k",
    "stablehlo.dynamic_reduce_window",
    "stablehlo.dynamic_rng_bit_generator",
    "stablehlo.dynamic_top_k",
}
"""Targets of custom calls. A part of those that jax guarantees to be stable, see `REFUSED_TARGETS`."""

REFUSED_TARGETS: Final[Mapping[str, str]] = {
    "tpu_custom_call": "a kernel that nobody can vet",
    "mosaic_gpu_v2": "a kernel that nobody can vet",
    "tf.call_tf_function": "a function of TensorFlow that is not here",
    "annotate_device_placement": "it moves arrays to the host's memory",
    "AllocateBuffer": "it shows what others have left in the device's memory",
    "Sharding": "programs are of one device",
    "SPMDFullToShardShape": "programs are of one device",
    "SPMDShardToFullShape": "programs are of one device",
}
"""What jax guarantees to be stable, and is not for a server that many use; and why not."""

FUNCTION_ATTRIBUTES: Final = frozenset(
    ["sym_name", "function_type", "sym_visibility", "arg_attrs", "res_attrs", "no_inline"]
)
"""Attributes of a function."""

ARGUMENT_ATTRIBUTES: Final = frozenset(["jax.global_constant", "jax.arg_info", "jax.result_info"])
"""Attributes of a function's arguments and results. None of aliases, donations or other kinds of memory."""

MODULE_ATTRIBUTES: Final[Mapping[str, str | None]] = {
    "sym_name": None,
    "jax.uses_shape_polymorphism": None,
    "mhlo.num_partitions": "1 : i32",
    "mhlo.num_replicas": "1 : i32",
}
"""Attributes of a module, and what they must be."""

OPERATION_ATTRIBUTES: Final = frozenset(["mhlo.backend_config", "mhlo.frontend_attributes", "sdy.sharding_rule"])
"""Attributes of operations that are not StableHLO's own, which have no dot in their name."""

FRONTEND_ATTRIBUTES: Final = frozenset(["num_batch_dims", "xla.sdy.sharding_rule"])
"""Keys of mhlo.frontend_attributes. Others choose where and how something is computed, on the host for instance."""


def fits(
    target: str,
    operands: Sequence[Sequence[int]],
    results: Sequence[Sequence[int]],
    settings: Mapping[str, int],
) -> bool:
    """Whether a routine of jaxlib may be called so: it reads and writes as far as it is told, and checks little.

    Args:
        target: Of `ROUTINES`.
        operands: Their shapes.
        results: Likewise.
        settings: Its attributes that are numbers.
    """
    if not operands or not results:
        return False
    if target in SHAPES:
        fitting = _fit(SHAPES[target], operands, results)
        return fitting and ("gesdd" not in target or _full(operands, results, settings.get("mode", 0)))
    check = _OTHER[next(name for name in _OTHER if name in target)]
    return check(operands, results, settings)


def _full(operands: Sequence[Sequence[int]], results: Sequence[Sequence[int]], mode: int) -> bool:
    """Whether the singular vectors have room: all of them are computed in mode A."""
    m, n = operands[0][-2:]
    return mode in (ord("N"), ord("S")) or (mode == ord("A") and (results[2][-1], results[3][-2]) == (m, n))


def _fit(expected: _Shapes, operands: Sequence[Sequence[int]], results: Sequence[Sequence[int]]) -> bool:
    names, arrays = [*expected[0], *expected[1]], [*operands, *results]
    if len(operands) != len(expected[0]) or len(results) != len(expected[1]):
        return False
    shared = len(operands[0]) - len(names[0])
    sizes: dict[str, int] = {}
    for axes, shape in zip(names, arrays, strict=True):
        if len(shape) != shared + len(axes) or list(shape[:shared]) != list(operands[0][:shared]):
            return False
        for axis, size in zip(axes, shape[shared:], strict=True):
            if sizes.setdefault(axis, size) != size:
                return False
    m, n = sizes.get("m", sizes["n"]), sizes["n"]
    k = min(m, n)
    return (
        sizes.get("k", k) == k
        and sizes.get("e", n - 1) == n - 1
        and sizes.get("q", 0) <= k
        and (sizes.get("u", m), sizes.get("v", n)) in ((m, n), (k, k))
    )


_Arrays = Sequence[Sequence[int]]


def _singular_values(operands: _Arrays, results: _Arrays, settings: Mapping[str, int]) -> bool:
    """A GPU's: as LAPACK's, or with V instead of its transpose, or of the transpose; and none where none are asked for."""
    if len(operands) != 1 or len(operands[0]) < 2 or len(results) != 5:
        return False
    *batch, m, n = operands[0]
    k = min(m, n)
    whole, values, left, right, info = map(list, results)
    if whole != list(operands[0]) or values != [*batch, k] or info != batch:
        return False
    if left == right == []:
        return not settings.get("compute_uv", 1)
    u, v, vectors = (
        ([m, m], [n, n], [[n, n]]) if settings.get("full_matrices", 1) else ([m, k], [k, n], [[k, n], [n, k]])
    )
    parts = [left[len(batch) :], right[len(batch) :]]
    if left[: len(batch)] != batch or right[: len(batch)] != batch:
        return False
    return (parts[0] == u and parts[1] in vectors) or parts == [v, u]


def _triangular(operands: _Arrays, results: _Arrays, settings: Mapping[str, int]) -> bool:
    if len(operands) != 2 or len(results) != 1 or any(len(shape) < 2 for shape in operands):
        return False
    (*batch, m, n), (*others, rows, columns) = operands
    side = {ord("L"): rows, ord("R"): columns}.get(settings.get("side", 0))
    return m == n == side and batch == others and list(results[0]) == list(operands[1])


def _permutation(operands: _Arrays, results: _Arrays, settings: Mapping[str, int]) -> bool:
    if len(operands) != 1 or len(results) != 1 or not operands[0] or len(operands[0]) != len(results[0]):
        return False
    (*batch, pivots), (*others, size) = operands[0], results[0]
    return batch == others and size >= pivots


def _same(operands: _Arrays, results: _Arrays, settings: Mapping[str, int]) -> bool:
    return len(operands) == 4 and len(results) == 2 and len({tuple(shape) for shape in [*operands, *results]}) == 1


_OTHER: Final[Mapping[str, Callable[[_Arrays, _Arrays, Mapping[str, int]], bool]]] = {
    "solver_ges": _singular_values,
    "trsm": _triangular,
    "lu_pivots_to_permutation": _permutation,
    "threefry2x32": _same,
}


def version() -> str:
    """What a verdict rests on: these rules, what reads programs by them, and jax."""
    here = Path(__file__).parent
    state = hashlib.sha256()
    for name in ("_rules.py", "_reading.py"):
        state.update((here / name).read_bytes())
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib"))
    return f"{state.hexdigest()[:16]} {versions}"
