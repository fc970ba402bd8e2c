"""One small case for each operation of the table, with results by NumPy and SciPy, or
worked out by hand.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.special

from hvpd_server.importer import attributes, evaluate, inlined, reader
from hvpd_server.importer.table import TABLE, Refused


@dataclasses.dataclass(frozen=True)
class Case:
    """A program of one operation."""

    body: str
    """Operations that make %r from %x0, %x1, ...; {t0}, {t1} and {r} are the types of
    arguments and result.
    """
    arguments: Sequence[np.ndarray[Any, Any]]
    expected: Sequence[np.ndarray[Any, Any]]
    sizes: Sequence[int] = ()
    """Positions of arguments that are sizes and must be known."""
    before: str = ""
    """Other functions."""
    result: str = ""
    """Type of the result, if it does not follow from `expected`."""


def tensor(array: np.ndarray[Any, Any]) -> str:
    """Return an array's type in MLIR."""
    element = next(text for text, name in attributes.DTYPES.items() if name == array.dtype.name)
    return f"tensor<{''.join(f'{extent}x' for extent in array.shape)}{element}>"


def case(body: str, *arguments: Any, gives: Any, sizes: Sequence[int] = (), before: str = "", result: str = "") -> Case:
    results = gives if isinstance(gives, tuple) else (gives,)
    return Case(
        body, [np.asarray(each) for each in arguments], [np.asarray(each) for each in results], sizes, before, result
    )


REAL = np.array([-2.5, -0.75, -0.0, 0.5, 1.25, 3.0])
POSITIVE = np.array([0.25, 0.5, 1.0, 2.0, 3.5])
SMALL = np.array([-0.9, -0.25, 0.0, 0.5, 0.875])
SIGNED = np.array([-128, -7, -1, 0, 6, 127], np.int8)
OTHER = np.array([3, -2, 5, 7, -4, 1], np.int8)
BITS = np.array([0, 1, 0b1011, 0x80, 0xFF], np.uint8)
LIMITS = np.array([1.0, np.inf, -np.inf, np.nan, 0.0])
MATRIX = np.array([[4.0, 1.0, 0.5], [1.0, 3.0, -0.25], [0.5, -0.25, 2.0]])
CUBE = np.arange(24.0).reshape(2, 3, 4) / 8


def unary(
    name: str, function: Callable[[Any], Any], argument: Any = REAL, dialect: str = "stablehlo"
) -> dict[str, Case]:
    gives = np.asarray(function(argument))
    # StableHLO shortens the type if it is the same; CHLO does not.
    same = gives.dtype == argument.dtype and dialect == "stablehlo"
    types = "{t0}" if same else "({t0}) -> {r}" if dialect == "stablehlo" else "{t0} -> {r}"
    return {f"{dialect}.{name}": case(f"%r = {dialect}.{name} %x0 : {types}", argument, gives=gives)}


def binary(
    name: str, function: Callable[[Any, Any], Any], one: Any, other: Any, dialect: str = "stablehlo"
) -> dict[str, Case]:
    types = "{t0}" if dialect == "stablehlo" else "{t0}, {t1} -> {r}"
    return {
        f"{dialect}.{name}": case(f"%r = {dialect}.{name} %x0, %x1 : {types}", one, other, gives=function(one, other))
    }


def wrapped(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return an integer function whose results wrap around."""
    return lambda one, other: function(one.astype(np.int64), other.astype(np.int64)).astype(one.dtype)


def truncated(one: Any, other: Any) -> Any:
    """Return the quotient, truncated towards zero."""
    return np.trunc(one / other)


BODY = (
    "^bb0(%a: tensor<f64>, %b: tensor<f64>): %s = stablehlo.{} %a, %b : tensor<f64> stablehlo.return %s : tensor<f64>"
)
ADD = BODY.format("add")
GREATER = """^bb0(%a: tensor<f64>, %b: tensor<f64>):
  %s = stablehlo.compare GE, %a, %b : (tensor<f64>, tensor<f64>) -> tensor<i1> stablehlo.return %s : tensor<i1>"""
TWICE = """func.func private @twice(%a: tensor<6xf64>) -> tensor<6xf64> {
  %s = stablehlo.add %a, %a : tensor<6xf64> return %s : tensor<6xf64> }"""
IMAGE = np.array([1.0, -2.0, 0.5, 3.0, 2.0, -1.0]).reshape(1, 6, 1)
NORMALIZED = np.array([[1.0, 2.0], [3.0, 4.0]])
KERNEL = np.array([0.5, 1.0, -2.0]).reshape(3, 1, 1)
CONVOLUTION = "dim_numbers = [b, 0, f]x[0, i, o]->[b, 0, f]"
COUNTS = "{batch_group_count = 1 : i64, feature_group_count = 1 : i64}"


def rotate(value: int, by: int) -> int:
    return (value << by | value >> (32 - by)) & 0xFFFFFFFF


def threefry(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Return Threefry-2x32 with 20 rounds, as in Salmon et al., Parallel random
    numbers: as easy as 1, 2, 3 (2011).
    """
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    one, other = (counter[0] + keys[0]) & 0xFFFFFFFF, (counter[1] + keys[1]) & 0xFFFFFFFF
    for block in range(5):
        for by in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            one = (one + other) & 0xFFFFFFFF
            other = rotate(other, by) ^ one
        one = (one + keys[(block + 1) % 3]) & 0xFFFFFFFF
        other = (other + keys[(block + 2) % 3] + block + 1) & 0xFFFFFFFF
    return one, other


def correlated(image: Any, kernel: Any, stride: int = 1) -> Any:
    """Return a correlation along one axis, with a zero on each side."""
    padded = np.pad(image.reshape(-1), 1)
    return np.array([padded[i : i + 3] @ kernel.reshape(-1) for i in range(0, len(padded) - 2, stride)]).reshape(
        1, -1, 1
    )


CASES: dict[str, Case] = {
    **unary("abs", np.abs),
    **unary("cbrt", np.cbrt),
    **unary("ceil", np.ceil),
    **unary("cosine", np.cos),
    **unary("exponential", np.exp),
    **unary("exponential_minus_one", np.expm1),
    **unary("floor", np.floor),
    **unary("log", np.log, POSITIVE),
    **unary("log_plus_one", np.log1p, SMALL),
    **unary("logistic", scipy.special.expit),
    **unary("negate", np.negative),
    **unary("not", np.invert, BITS),
    **unary("popcnt", lambda x: np.array([int(each).bit_count() for each in x], np.uint8), BITS),
    **unary("count_leading_zeros", lambda x: np.array([8 - int(each).bit_length() for each in x], np.uint8), BITS),
    **unary("round_nearest_afz", lambda x: np.sign(x) * np.floor(np.abs(x) + 0.5)),
    **unary("round_nearest_even", np.round),
    **unary("rsqrt", lambda x: 1 / np.sqrt(x), POSITIVE),
    **unary("sign", np.sign),
    **unary("sine", np.sin),
    **unary("sqrt", np.sqrt, POSITIVE),
    **unary("tan", np.tan),
    **unary("tanh", np.tanh),
    **unary("is_finite", np.isfinite, LIMITS),
    **unary("real", np.real, REAL + 1j * REAL[::-1]),
    **unary("imag", np.imag, REAL + 1j * REAL[::-1]),
    **unary("optimization_barrier", np.copy),
    **unary("convert", lambda x: x.astype(np.int32)),
    **unary("bitcast_convert", lambda x: x.view(np.int64)),
    **binary("add", wrapped(np.add), SIGNED, OTHER),
    **binary("subtract", wrapped(np.subtract), SIGNED, OTHER),
    **binary("multiply", wrapped(np.multiply), SIGNED, OTHER),
    **binary("divide", wrapped(truncated), SIGNED, OTHER),
    **binary("remainder", wrapped(np.fmod), SIGNED, OTHER),
    **binary("maximum", np.maximum, SIGNED, OTHER),
    **binary("minimum", np.minimum, SIGNED, OTHER),
    **binary("and", np.bitwise_and, SIGNED, OTHER),
    **binary("or", np.bitwise_or, SIGNED, OTHER),
    **binary("xor", np.bitwise_xor, SIGNED, OTHER),
    **binary("atan2", np.arctan2, REAL, REAL[::-1].copy()),
    **binary("power", np.power, POSITIVE, POSITIVE[::-1].copy()),
    "stablehlo.complex": case(
        "%r = stablehlo.complex %x0, %x1 : {r}", REAL, POSITIVE[0] + REAL, gives=REAL + 1j * (POSITIVE[0] + REAL)
    ),
    **binary(
        "shift_left",
        lambda x, y: np.array([0, 2, 0b101100, 0, 0], np.uint8),
        BITS,
        np.array([3, 1, 2, 1, 8], np.uint8),
    ),
    **binary(
        "shift_right_logical",
        lambda x, y: np.array([0, 0, 0b10, 0x40, 0], np.uint8),
        BITS,
        np.array([3, 1, 2, 1, 8], np.uint8),
    ),
    **binary(
        "shift_right_arithmetic",
        lambda x, y: np.array([-32, -4, -1, 0, 3, 0], np.int8),
        SIGNED,
        np.array([2, 1, 9, 1, 1, 7], np.int8),
    ),
    "stablehlo.compare": case(
        "%r = stablehlo.compare LT, %x0, %x1, SIGNED : ({t0}, {t1}) -> {r}", SIGNED, OTHER, gives=SIGNED < OTHER
    ),
    "stablehlo.select": case(
        "%r = stablehlo.select %x0, %x1, %x2 : {t0}, {t1}",
        SIGNED < OTHER,
        SIGNED,
        OTHER,
        gives=np.minimum(SIGNED, OTHER),
    ),
    "stablehlo.clamp": case(
        "%r = stablehlo.clamp %x0, %x1, %x2 : ({t0}, {t1}, {t2}) -> {r}",
        np.float64(-1.0),
        REAL,
        np.float64(1.0),
        gives=np.clip(REAL, -1, 1),
    ),
    "stablehlo.reduce_precision": case(
        "%r = stablehlo.reduce_precision %x0, format = e8m7 : {t0}",
        np.array([1.01, -3.3, 1e5], np.float32),
        gives=np.array([1.01, -3.3, 1e5], np.float32).astype(attributes.dtype("bfloat16")).astype(np.float32),
    ),
    "stablehlo.constant": case("%r = stablehlo.constant dense<[1.5, -2.0]> : {r}", gives=np.array([1.5, -2.0])),
    "stablehlo.iota": case("%r = stablehlo.iota dim = 1 : {r}", gives=np.tile(np.arange(4, dtype=np.int32), (3, 1))),
    "stablehlo.broadcast": case(
        "%r = stablehlo.broadcast %x0, sizes = [2] : ({t0}) -> {r}", REAL, gives=np.tile(REAL, (2, 1))
    ),
    "stablehlo.broadcast_in_dim": case(
        "%r = stablehlo.broadcast_in_dim %x0, dims = [1] : ({t0}) -> {r}", REAL, gives=np.tile(REAL, (2, 1))
    ),
    "stablehlo.concatenate": case(
        "%r = stablehlo.concatenate %x0, %x1, dim = 0 : ({t0}, {t1}) -> {r}", REAL, SMALL, gives=np.append(REAL, SMALL)
    ),
    "stablehlo.reshape": case("%r = stablehlo.reshape %x0 : ({t0}) -> {r}", REAL, gives=REAL.reshape(2, 3)),
    "stablehlo.reverse": case("%r = stablehlo.reverse %x0, dims = [0, 2] : {t0}", CUBE, gives=CUBE[::-1, :, ::-1]),
    "stablehlo.slice": case("%r = stablehlo.slice %x0 [1:6:2] : ({t0}) -> {r}", REAL, gives=REAL[1:6:2]),
    "stablehlo.transpose": case(
        "%r = stablehlo.transpose %x0, dims = [2, 0, 1] : ({t0}) -> {r}", CUBE, gives=CUBE.transpose(2, 0, 1)
    ),
    "stablehlo.pad": case(
        "%r = stablehlo.pad %x0, %x1, low = [1], high = [-1], interior = [1] : ({t0}, {t1}) -> {r}",
        np.array([1.0, 2.0, 3.0]),
        np.float64(9.0),
        gives=np.array([9.0, 1.0, 9.0, 2.0, 9.0]),
    ),
    "stablehlo.dynamic_pad": case(
        "%r = stablehlo.dynamic_pad %x0, %x1, %x2, %x3, %x4 : ({t0}, {t1}, {t2}, {t3}, {t4}) -> tensor<?xf64>",
        np.array([1.0, 2.0, 3.0]),
        np.float64(9.0),
        np.array([2]),
        np.array([1]),
        np.array([0]),
        gives=np.array([9.0, 9.0, 1.0, 2.0, 3.0, 9.0]),
        sizes=(2, 3, 4),
        result="tensor<?xf64>",
    ),
    "stablehlo.dynamic_slice": case(
        "%r = stablehlo.dynamic_slice %x0, %x1, sizes = [3] : ({t0}, {t1}) -> {r}", REAL, np.int32(5), gives=REAL[3:]
    ),
    "stablehlo.dynamic_update_slice": case(
        "%r = stablehlo.dynamic_update_slice %x0, %x1, %x2 : ({t0}, {t1}, {t2}) -> {r}",
        REAL,
        np.array([7.0, 8.0]),
        np.int32(1),
        gives=np.array([REAL[0], 7.0, 8.0, *REAL[3:]]),
    ),
    "stablehlo.real_dynamic_slice": case(
        "%r = stablehlo.real_dynamic_slice %x0, %x1, %x2, %x3 : ({t0}, {t1}, {t2}, {t3}) -> tensor<?xf64>",
        REAL,
        np.array([1]),
        np.array([6]),
        np.array([2]),
        gives=REAL[1:6:2],
        sizes=(1, 2, 3),
        result="tensor<?xf64>",
    ),
    "stablehlo.dynamic_broadcast_in_dim": case(
        "%r = stablehlo.dynamic_broadcast_in_dim %x0, %x1, dims = [1] : ({t0}, {t1}) -> tensor<?x6xf64>",
        REAL,
        np.array([2, 6]),
        gives=np.tile(REAL, (2, 1)),
        sizes=(1,),
        result="tensor<?x6xf64>",
    ),
    "stablehlo.dynamic_iota": case(
        "%r = stablehlo.dynamic_iota %x0, dim = 1 : ({t0}) -> tensor<?x?xf32>",
        np.array([2, 3]),
        gives=np.tile(np.arange(3, dtype=np.float32), (2, 1)),
        sizes=(0,),
        result="tensor<?x?xf32>",
    ),
    "stablehlo.dynamic_reshape": case(
        "%r = stablehlo.dynamic_reshape %x0, %x1 : ({t0}, {t1}) -> tensor<?x3xf64>",
        REAL,
        np.array([2, 3]),
        gives=REAL.reshape(2, 3),
        sizes=(1,),
        result="tensor<?x3xf64>",
    ),
    "stablehlo.get_dimension_size": case(
        "%r = stablehlo.get_dimension_size %x0, dim = 1 : ({t0}) -> {r}", CUBE, gives=np.int32(3)
    ),
    "stablehlo.dot": case(
        "%r = stablehlo.dot %x0, %x1 : ({t0}, {t1}) -> {r}", CUBE[0], CUBE[1].T, gives=CUBE[0] @ CUBE[1].T
    ),
    "stablehlo.dot_general": case(
        "%r = stablehlo.dot_general %x0, %x1, batching_dims = [0] x [0], contracting_dims = [2] x [2]"
        " : ({t0}, {t1}) -> {r}",
        CUBE,
        CUBE[:, :2] - 1,
        gives=CUBE @ (CUBE[:, :2] - 1).transpose(0, 2, 1),
    ),
    "stablehlo.cholesky": case(
        "%r = stablehlo.cholesky %x0, lower = true : {t0}", MATRIX, gives=np.linalg.cholesky(MATRIX)
    ),
    "stablehlo.triangular_solve": case(
        """%r = "stablehlo.triangular_solve"(%x0, %x1) {left_side = true, lower = true, unit_diagonal = false,
        transpose_a = #stablehlo<transpose TRANSPOSE>} : ({t0}, {t1}) -> {r}""",
        np.tril(MATRIX),
        MATRIX[:, :2],
        gives=scipy.linalg.solve_triangular(np.tril(MATRIX).T, MATRIX[:, :2], lower=False),
    ),
    "stablehlo.convolution": case(
        f"%r = stablehlo.convolution(%x0, %x1) {CONVOLUTION}, window = {{stride = [2], pad = [[1, 1]]}} {COUNTS}"
        " : ({t0}, {t1}) -> {r}",
        IMAGE,
        KERNEL,
        gives=correlated(IMAGE, KERNEL, 2),
    ),
    "stablehlo.dynamic_conv": case(
        '%r = "stablehlo.dynamic_conv"(%x0, %x1, %x2) {dimension_numbers = #stablehlo.conv<[b, 0, f]x[0, i, o]->[b, 0, f]>,'
        " batch_group_count = 1 : i64, feature_group_count = 1 : i64} : ({t0}, {t1}, {t2}) -> tensor<1x?x1xf64>",
        IMAGE,
        KERNEL,
        np.array([[1, 1]]),
        gives=correlated(IMAGE, KERNEL),
        sizes=(2,),
        result="tensor<1x?x1xf64>",
    ),
    "stablehlo.batch_norm_inference": case(
        """%r = "stablehlo.batch_norm_inference"(%x0, %x1, %x2, %x3, %x4) {epsilon = 0.0 : f32, feature_index = 1 : i64}
        : ({t0}, {t1}, {t2}, {t3}, {t4}) -> {r}""",
        NORMALIZED,
        np.ones(2),
        np.ones(2),
        np.array([2.0, 3.0]),
        np.ones(2),
        gives=np.array([[0.0, 0.0], [2.0, 2.0]]),
    ),
    "stablehlo.batch_norm_training": case(
        """%r:3 = "stablehlo.batch_norm_training"(%x0, %x1, %x2) {epsilon = 0.0 : f32, feature_index = 1 : i64}
        : ({t0}, {t1}, {t2}) -> ({r}, {t1}, {t1})""",
        NORMALIZED,
        np.ones(2),
        np.ones(2),
        gives=(np.array([[0.0, 0.0], [2.0, 2.0]]), np.array([2.0, 3.0]), np.ones(2)),
    ),
    "stablehlo.fft": case(
        "%r = stablehlo.fft %x0, type = RFFT, length = [6] : ({t0}) -> {r}", REAL, gives=np.fft.rfft(REAL)
    ),
    "stablehlo.gather": case(
        """%r = "stablehlo.gather"(%x0, %x1) {dimension_numbers = #stablehlo.gather<offset_dims = [1],
        collapsed_slice_dims = [0], start_index_map = [0], index_vector_dim = 1>, slice_sizes = array<i64: 1, 4>}
        : ({t0}, {t1}) -> {r}""",
        CUBE[0],
        np.array([[2], [0], [7]], np.int32),
        gives=CUBE[0][[2, 0, 2]],
    ),
    "stablehlo.dynamic_gather": case(
        """%r = "stablehlo.dynamic_gather"(%x0, %x1, %x2) {dimension_numbers = #stablehlo.gather<offset_dims = [1],
        collapsed_slice_dims = [0], start_index_map = [0], index_vector_dim = 1>}
        : ({t0}, {t1}, {t2}) -> tensor<3x?xf64>""",
        CUBE[0],
        np.array([[2], [0], [7]], np.int32),
        np.array([1, 4]),
        gives=CUBE[0][[2, 0, 2]],
        sizes=(2,),
        result="tensor<3x?xf64>",
    ),
    "stablehlo.scatter": case(
        f"""%r = "stablehlo.scatter"(%x0, %x1, %x2) ({{{ADD}}}) {{scatter_dimension_numbers =
        #stablehlo.scatter<inserted_window_dims = [0], scatter_dims_to_operand_dims = [0], index_vector_dim = 1>}}
        : ({{t0}}, {{t1}}, {{t2}}) -> {{r}}""",
        REAL,
        np.array([[2], [0], [9], [2]], np.int32),
        np.array([1.0, 2.0, 4.0, 8.0]),
        gives=REAL + np.array([2.0, 0.0, 9.0, 0.0, 0.0, 0.0]),
    ),
    "stablehlo.reduce": case(
        "%r = stablehlo.reduce(%x0 init: %x1) applies stablehlo.add across dimensions = [0, 2] : ({t0}, {t1}) -> {r}",
        CUBE,
        np.float64(0.0),
        gives=CUBE.sum((0, 2)),
    ),
    "stablehlo.reduce_window": case(
        f"""%r = "stablehlo.reduce_window"(%x0, %x1) ({{{BODY.format("maximum")}}}) {{window_dimensions = array<i64: 3>,
        window_strides = array<i64: 2>, padding = dense<[[1, 0]]> : tensor<1x2xi64>}} : ({{t0}}, {{t1}}) -> {{r}}""",
        REAL,
        np.float64(-np.inf),
        gives=np.array([REAL[:2].max(), REAL[1:4].max(), REAL[3:6].max()]),
    ),
    "stablehlo.select_and_scatter": case(
        f"""%r = "stablehlo.select_and_scatter"(%x0, %x1, %x2) ({{{GREATER}}}, {{{ADD}}})
        {{window_dimensions = array<i64: 3>, window_strides = array<i64: 3>,
        padding = dense<0> : tensor<1x2xi64>}} : ({{t0}}, {{t1}}, {{t2}}) -> {{r}}""",
        np.array([1.0, 5.0, 2.0, 7.0, 3.0, 4.0]),
        np.array([10.0, 20.0]),
        np.float64(0.0),
        gives=np.array([0.0, 10.0, 0.0, 20.0, 0.0, 0.0]),
    ),
    "stablehlo.map": case(
        f'%r = "stablehlo.map"(%x0, %x1) ({{{BODY.format("multiply")}}}) {{dimensions = array<i64: 0>}}'
        " : ({t0}, {t1}) -> {r}",
        REAL,
        REAL[::-1].copy(),
        gives=REAL * REAL[::-1],
    ),
    "stablehlo.sort": case(
        """%r = "stablehlo.sort"(%x0) ({^bb0(%a: tensor<f64>, %b: tensor<f64>):
        %s = stablehlo.compare GT, %a, %b, TOTALORDER : (tensor<f64>, tensor<f64>) -> tensor<i1>
        stablehlo.return %s : tensor<i1>}) {dimension = 0 : i64, is_stable = true} : ({t0}) -> {r}""",
        REAL,
        gives=np.sort(REAL)[::-1],
    ),
    "stablehlo.if": case(
        """%p = stablehlo.constant dense<true> : tensor<i1>
        %r = "stablehlo.if"(%x1) ({ stablehlo.return %x0 : {t0} }, { %n = stablehlo.negate %x0 : {t0}
        stablehlo.return %n : {t0} }) : (tensor<i1>) -> {r}""",
        REAL,
        np.bool_(False),
        gives=-REAL,
    ),
    "stablehlo.case": case(
        """%r = "stablehlo.case"(%x1) ({ stablehlo.return %x0 : {t0} }, { %n = stablehlo.negate %x0 : {t0}
        stablehlo.return %n : {t0} }, { %n = stablehlo.add %x0, %x0 : {t0} stablehlo.return %n : {t0} })
        : (tensor<i32>) -> {r}""",
        REAL,
        np.int32(-1),
        gives=2 * REAL,
    ),
    "stablehlo.while": case(
        """%one = stablehlo.constant dense<1> : tensor<i32>
        %zero = stablehlo.constant dense<0> : tensor<i32>
        %end = stablehlo.constant dense<3> : tensor<i32>
        %i, %r = stablehlo.while(%k = %zero, %v = %x0) : tensor<i32>, {t0}
        cond { %c = stablehlo.compare LT, %k, %end : (tensor<i32>, tensor<i32>) -> tensor<i1> stablehlo.return %c : tensor<i1> }
        do { %n = stablehlo.add %k, %one : tensor<i32> %w = stablehlo.add %v, %v : {t0}
        stablehlo.return %n, %w : tensor<i32>, {t0} }""",
        REAL,
        gives=8 * REAL,
    ),
    "func.call": case("%r = func.call @twice(%x0) : ({t0}) -> {r}", REAL, gives=2 * REAL, before=TWICE),
    "stablehlo.composite": case(
        '%r = stablehlo.composite "some.function" %x0 {decomposition = @twice} : ({t0}) -> {r}',
        REAL,
        gives=2 * REAL,
        before=TWICE,
    ),
    "stablehlo.custom_call": case(
        """%r:3 = stablehlo.custom_call @lapack_dgetrf_ffi(%x0) {mhlo.backend_config = {}, api_version = 4 : i32,
        operand_layouts = [dense<[0, 1]> : tensor<2xindex>], result_layouts = [dense<[0, 1]> : tensor<2xindex>,
        dense<0> : tensor<1xindex>, dense<> : tensor<0xindex>]} : ({t0}) -> ({t0}, tensor<3xi32>, tensor<i32>)""",
        MATRIX,
        gives=(
            scipy.linalg.lu_factor(MATRIX)[0],
            (scipy.linalg.lu_factor(MATRIX)[1] + 1).astype(np.int32),
            np.int32(0),
        ),
    ),
    "stablehlo.rng_bit_generator": case(
        "%s, %r = stablehlo.rng_bit_generator %x0, algorithm = THREE_FRY : ({t0}) -> ({t0}, {r})",
        np.array([5, 11], np.uint64),
        gives=np.array(threefry((5, 0), (11, 0)), np.uint32),
    ),
    **unary("acos", np.arccos, SMALL, "chlo"),
    **unary("acosh", np.arccosh, 1 + POSITIVE, "chlo"),
    **unary("asin", np.arcsin, SMALL, "chlo"),
    **unary("asinh", np.arcsinh, REAL, "chlo"),
    **unary("atan", np.arctan, REAL, "chlo"),
    **unary("atanh", np.arctanh, SMALL, "chlo"),
    **unary("bessel_i1e", scipy.special.i1e, REAL, "chlo"),
    **unary("conj", np.conj, REAL + 1j * REAL[::-1], "chlo"),
    **unary("cosh", np.cosh, REAL, "chlo"),
    **unary("digamma", scipy.special.digamma, POSITIVE, "chlo"),
    **unary("erf", scipy.special.erf, REAL, "chlo"),
    **unary("erf_inv", scipy.special.erfinv, SMALL, "chlo"),
    **unary("erfc", scipy.special.erfc, REAL, "chlo"),
    **unary("is_inf", np.isinf, LIMITS, "chlo"),
    **unary("is_neg_inf", np.isneginf, LIMITS, "chlo"),
    **unary("is_pos_inf", np.isposinf, LIMITS, "chlo"),
    **unary("lgamma", scipy.special.gammaln, POSITIVE, "chlo"),
    **unary("sinh", np.sinh, REAL, "chlo"),
    **unary("square", np.square, REAL, "chlo"),
    **unary("tan", np.tan, REAL, "chlo"),
    **binary("next_after", np.nextafter, REAL, REAL[::-1].copy(), "chlo"),
    **binary(
        "polygamma", lambda n, x: scipy.special.polygamma(n.astype(int), x), np.array([1.0, 2.0]), POSITIVE[:2], "chlo"
    ),
    **binary("zeta", scipy.special.zeta, 1 + POSITIVE, POSITIVE, "chlo"),
    "chlo.top_k": case(
        "%r:2 = chlo.top_k(%x0, k = 2) : {t0} -> ({r}, tensor<2xi32>)",
        REAL,
        gives=(np.array([3.0, 1.25]), np.array([5, 4], np.int32)),
    ),
}

REFUSED: dict[str, tuple[str, str]] = {
    "stablehlo.rng": (
        """func.func public @main(%a: tensor<f64>) -> tensor<2xf64> {
          %n = stablehlo.constant dense<2> : tensor<1xi64>
          %r = stablehlo.rng %a, %a, %n, distribution = UNIFORM : (tensor<f64>, tensor<f64>, tensor<1xi64>) -> tensor<2xf64>
          return %r : tensor<2xf64> }""",
        "stablehlo.rng at line 3 which draws other numbers",
    ),
}
"""Operations that the table refuses with a reason of their own, and the reason."""


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def written(each: Case) -> str:
    """Return the case's program."""
    types = {f"t{index}": tensor(argument) for index, argument in enumerate(each.arguments)}
    results = [each.result] if each.result else [tensor(value) for value in each.expected]
    names = ["%r"] if len(results) == 1 else [f"%r#{index}" for index in range(len(results))]
    arguments = ", ".join(f"%x{index}: {type_}" for index, type_ in enumerate(types.values()))
    body = each.body
    for name, type_ in {"r": results[0], **types}.items():
        body = body.replace(f"{{{name}}}", type_)
    return f"""{each.before}
      func.func public @main({arguments}) -> ({", ".join(results)}) {{
        {body}
        return {", ".join(names)} : {", ".join(results)}
      }}"""


def check(results: Sequence[Any], expected: Sequence[Any]) -> None:
    assert len(results) == len(expected)
    for got, want in zip(results, expected, strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        if want.dtype.kind in "fc":
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)
        else:
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", CASES)
def test_operation(name):
    each = CASES[name]
    run = evaluate.function(reader.read(written(each)))
    data = [value for index, value in enumerate(each.arguments) if index not in each.sizes]

    def traced(*rest):
        remaining = iter(rest)
        return run(*[value if index in each.sizes else next(remaining) for index, value in enumerate(each.arguments)])

    check(jax.jit(traced)(*data), each.expected)
    check(run(*each.arguments), each.expected)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_operation(name):
    text, words = REFUSED[name]
    with pytest.raises(Refused, match=words):
        evaluate.function(reader.read(text))(np.float64(1.0))


def test_every_operation_has_a_case():
    assert {*CASES, *REFUSED} == set(TABLE) - {inlined.LOGADDEXP}  # test_inlined.py; no program has it
