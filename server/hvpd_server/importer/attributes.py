"""MLIR's attributes and types as plain Python.

Knows single attributes, not operations or programs.

jaxlib's bindings cannot convert constants of bfloat16, float8 and complex numbers.
Those are read from their printed form, which MLIR writes so that each element can be
recovered bit by bit: short decimals, hexadecimal bit patterns, or the raw bytes.
"""

import fractions
import math
import re
from collections.abc import Iterator
from typing import Any, Final

import ml_dtypes
import numpy as np
from jaxlib.mlir import ir

from hvpd_server.importer import refusals
from hvpd_server.importer.graph import TensorType
from hvpd_server.importer.table import Refused

_FLOATS: Final = {
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "f8E3M4": "float8_e3m4",
    "f8E4M3": "float8_e4m3",
    "f8E4M3B11FNUZ": "float8_e4m3b11fnuz",
    "f8E4M3FN": "float8_e4m3fn",
    "f8E4M3FNUZ": "float8_e4m3fnuz",
    "f8E5M2": "float8_e5m2",
    "f8E5M2FNUZ": "float8_e5m2fnuz",
    "f8E8M0FNU": "float8_e8m0fnu",
}
DTYPES: Final = {
    **_FLOATS,
    "i1": "bool",
    **{f"i{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"ui{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "complex<f32>": "complex64",
    "complex<f64>": "complex128",
}
"""Names of NumPy or ml_dtypes dtypes, by the element type in MLIR."""

ATTRIBUTE_ELEMENTS: Final = 1 << 16
"""Most elements of an array in an attribute, constants excepted."""

_BUFFERS: Final = frozenset(["bool", "float16", "float32", "float64"])
"""Dtypes, besides integers, whose constants the bindings convert."""

_ENUM: Final = re.compile(r"#(?:stablehlo|chlo)(?:<\w+ (\w+)>|\.\w+_mode<(\w+)>)")
_STRUCT: Final = re.compile(r"#(?:stablehlo|chlo)\.(\w+)<(.*)>", re.DOTALL)
_FIELD: Final = re.compile(r"(\w+) = (\[[-\d, ]*\]|[^,\[\]<>]+|#stablehlo[.\w]*<[^<>]*>)(?:, |$)")
_INTEGER: Final = re.compile(r"-?\d+")
_REAL: Final = re.compile(r"-?\d+\.\d+e[-+]\d+")
_CONVOLUTION: Final = re.compile(r"\[([^\]]*)\]x\[([^\]]*)\]->\[([^\]]*)\]")
_DENSE: Final = re.compile(r"dense<(.*)> : tensor<[^<>]*(?:<\w+>)?>", re.DOTALL)
_HIDDEN: Final = re.compile(r"value = (dense<.*> : tensor<.*?>)\}>", re.DOTALL)


def dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a name in `DTYPES.values()`."""
    return np.dtype(getattr(ml_dtypes, name)) if name not in np.sctypeDict else np.dtype(name)


def items(attribute: ir.DictAttr) -> Iterator[tuple[str, Any]]:
    """Return the names and values of a dictionary.

    Its iterator differs between versions of jaxlib.
    """
    for named in attribute:  # type: ignore[attr-defined] # The stubs leave the iterator out.
        name = named if isinstance(named, str) else named.name
        yield name, attribute[name]


def tensor_type(type_: ir.Type) -> TensorType:
    """Return the shape and dtype of an array.

    Raises:
        Refused: It is another kind of value, or its elements or extents are not served.
            The message completes "has a value ...".
    """
    if str(type_) == "!stablehlo.token":
        raise Refused(
            refusals.OPERATION_REFUSED,
            "that is a token, which orders effects: export a function whose results are all that it does",
        )
    if not isinstance(type_, ir.RankedTensorType):
        raise Refused(
            refusals.OPERATION_REFUSED,
            f"of type {short(type_)}: expected an array with a rank, such as tensor<3x?xf32>",
        )
    if type_.encoding is not None:
        raise Refused(
            refusals.OPERATION_REFUSED,
            f"of type {short(type_)}, which has an encoding: expected a dense array without bounds or layout",
        )
    element = str(type_.element_type)
    if element not in DTYPES:
        raise Refused(
            refusals.OPERATION_REFUSED,
            f"with elements of type {short(element)}: expected one of {', '.join(DTYPES)}",
        )
    shape = tuple(None if type_.is_dynamic_dim(axis) else type_.get_dim_size(axis) for axis in range(type_.rank))
    return TensorType(shape, DTYPES[element])


def plain(attribute: Any) -> Any:  # noqa: C901, PLR0911 - one case for each kind of attribute
    """Return an attribute as plain Python.

    Returns:
        bool, int, float, str; list; dict; a tuple for MLIR's `array`; a NumPy array for
        `dense`; for enums of StableHLO the value's name; for its structures a dict of
        the printed fields.

    Raises:
        Refused: The attribute is of a kind that no operation of the table has. The
            message completes "has an attribute ...".
    """
    match attribute:
        case ir.BoolAttr() | ir.IntegerAttr() | ir.FloatAttr() | ir.StringAttr() | ir.FlatSymbolRefAttr():
            return attribute.value
        case ir.TypeAttr():
            return str(attribute.value)
        case ir.DenseBoolArrayAttr():
            return tuple(bool(value) for value in attribute)
        case ir.DenseI8ArrayAttr() | ir.DenseI16ArrayAttr() | ir.DenseI32ArrayAttr() | ir.DenseI64ArrayAttr():
            return tuple(attribute)
        case ir.DenseF32ArrayAttr() | ir.DenseF64ArrayAttr():
            return tuple(attribute)
        case ir.DenseElementsAttr():
            return dense(attribute)
        case ir.ArrayAttr():
            return [plain(each) for each in attribute]
        case ir.DictAttr():
            return {name: plain(value) for name, value in items(attribute)}
        case ir.UnitAttr():
            return True
    printed = str(attribute)
    if enum := _ENUM.fullmatch(printed):
        return enum[1] or enum[2]
    if (struct := _STRUCT.fullmatch(printed)) and (found := _structure(struct[1], struct[2])) is not None:
        return found
    if printed.startswith("dense_resource<"):
        raise Refused(
            refusals.OPERATION_REFUSED,
            "that is a dense_resource, stored beside the program: expected constants in place (dense<...>), or data",
        )
    raise Refused(refusals.OPERATION_REFUSED, f"that is not served: {short(printed)}")


def _structure(name: str, body: str) -> Any:
    """Return the fields of a structure of StableHLO, or None if it is printed in an
    unknown form.
    """
    if name == "conv":
        parts = _CONVOLUTION.fullmatch(body)
        if parts is None:
            return None
        lists = [[int(each) if each.isdigit() else each for each in part.split(", ")] for part in parts.groups()]
        return dict(zip(("input", "kernel", "output"), lists, strict=True))
    if name == "output_operand_alias":
        return body
    fields: dict[str, Any] = {}
    end = 0
    for field in _FIELD.finditer(body):
        if field.start() != end:
            return None
        end = field.end()
        fields[field[1]] = _field(field[2])
    return fields if end == len(body) else None


def _field(printed: str) -> Any:
    if printed.startswith("["):
        return [int(each) for each in _INTEGER.findall(printed)]
    if _INTEGER.fullmatch(printed):
        return int(printed)
    if enum := _ENUM.fullmatch(printed):
        return enum[1] or enum[2]
    if _REAL.fullmatch(printed):
        return float(printed)
    return {"true": True, "false": False}.get(printed, printed)


def dense(attribute: ir.DenseElementsAttr) -> np.ndarray[Any, Any]:
    """Return a dense constant, exact to the bit; a constant of equal elements takes the
    memory of one element.

    Raises:
        Refused: The elements are of a type that is not served.
    """
    shaped = ir.ShapedType(attribute.type)
    shape = [shaped.get_dim_size(axis) for axis in range(shaped.rank)]
    if math.prod(shape) > ATTRIBUTE_ELEMENTS:
        raise Refused(
            refusals.PROGRAM_TOO_LARGE,
            f"with more than {ATTRIBUTE_ELEMENTS} elements: {short(attribute.type)}",
        )
    if str(shaped.element_type) == "index":  # Layouts of custom calls, which the bindings cannot convert.
        found = [int(each) for each in _INTEGER.findall(str(attribute).partition(" : ")[0])]
        return np.array(found * math.prod(shape) if attribute.is_splat else found, np.int64).reshape(shape)
    return _elements(attribute, tensor_type(attribute.type))


def constant(operation: ir.Operation, type_: TensorType) -> np.ndarray[Any, Any]:
    """Return the value of a stablehlo.constant, exact to the bit.

    Args:
        operation: The constant.
        type_: Type of its result.
    """
    if not type_.dtype.startswith("complex"):
        value = operation.attributes["value"]
        return _elements(value, type_) if isinstance(value, ir.DenseElementsAttr) else plain(value)
    # The bindings raise TypeError when a complex attribute is so much as looked at.
    printed = str(operation.get_asm(print_generic_op_form=True))
    hidden = _HIDDEN.search(printed)
    if hidden is None:
        raise Refused(refusals.OPERATION_REFUSED, f"that is not served: {short(printed)}")
    return parse(hidden[1], type_)


def _elements(attribute: ir.DenseElementsAttr, type_: TensorType) -> np.ndarray[Any, Any]:
    shape = tuple(extent or 0 for extent in type_.shape)
    want = dtype(type_.dtype)
    if math.prod(shape) == 0:
        return np.zeros(shape, want)
    if want.kind not in "iu" and type_.dtype not in _BUFFERS:
        return parse(str(attribute), type_)
    if attribute.is_splat:
        found = np.asarray(attribute)
        return np.broadcast_to(np.array(found[(0,) * found.ndim], want), shape)
    found = np.array(attribute)
    if found.dtype != want or found.shape != shape:
        raise Refused(
            refusals.BUNDLE_INVALID, f"that is {found.dtype}{list(found.shape)}, not {want.name}{list(shape)}"
        )
    return found


def parse(printed: str, type_: TensorType) -> np.ndarray[Any, Any]:
    """Return the elements of a printed constant: `dense<...> : tensor<...>`.

    Args:
        printed: As MLIR prints it: one element, nested lists of elements, or a string
            of hexadecimal bytes.
        type_: Type that the constant has.
    """
    shape = tuple(extent or 0 for extent in type_.shape)
    want = dtype(type_.dtype)
    found = _DENSE.fullmatch(printed)
    if found is None:
        raise Refused(refusals.OPERATION_REFUSED, f"that is not served: {short(printed)}")
    body = found[1]
    size = math.prod(shape)
    if body.startswith('"'):
        values = np.frombuffer(bytes.fromhex(body[3:-1]), want.newbyteorder("<")).astype(want, copy=False)
    else:
        part = dtype({"complex64": "float32", "complex128": "float64"}.get(type_.dtype, type_.dtype))
        tokens = body.translate(str.maketrans("[]()", "    ")).split(",")
        parts = np.array([_number(token.strip(), part) for token in tokens if token.strip()], part)
        values = parts.view(want)
    if values.size == 1:
        return np.broadcast_to(values.reshape(()), shape)
    if values.size != size:
        raise Refused(refusals.BUNDLE_INVALID, f"that has {values.size} elements, not {size}")
    return values.reshape(shape)


def _number(printed: str, want: np.dtype[Any]) -> Any:
    """Return a printed element: a decimal, or the bit pattern in hexadecimal."""
    if printed.startswith("0x"):
        return np.array([int(printed, 16)], f"<u{want.itemsize}").view(want)[0]
    value = want.type(float(printed))
    if (
        want != np.float32
    ):  # Halves of float32's steps are not short decimals in other types, or are no issue in float64.
        return value
    # The way through float64 rounds twice; take the nearest of the neighbours.
    exact = fractions.Fraction(printed)
    near = [value, np.nextafter(value, np.float32(-np.inf)), np.nextafter(value, np.float32(np.inf))]
    return min(near, key=lambda each: abs(fractions.Fraction(float(each)) - exact) if np.isfinite(each) else math.inf)


def short(what: object) -> str:
    """Return at most 200 printable characters, because programs' texts go into logs."""
    text = str(what)[:201]
    if not text.isprintable():
        text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= 200 else text[:200] + "..."
