"""The words of a check: its items, its verdicts, and the precision that they refer to.

Client and server share this file. It computes nothing.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np

from hvpd import _html, _text
from hvpd._wire.codec import Array
from hvpd.v1 import objective_pb2

REGISTRATION_BYTES = 64 << 20
"""Bytes of the largest x that a client sends for the check at registration."""

EPS: Mapping[str, float] = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "TF32": 2.0**-10,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}
"""Distance from 1 to the next larger number of each format."""

_LEAST = ("definite", "taylor")
"""Items whose threshold is the smallest value that passes."""

MEANINGS = {
    "finite": "x, value, gradient and products hold no NaN and no infinity",
    "symmetry": "|u.Hv - v.Hu| / (|u| |Hv|)",
    "linearity": "|H(au + bv) - aHu - bHv| / (|aHu| + |bHv|)",
    "matmat": "H @ V against H @ v, relative to the largest element",
    "repeats": "the same product again",
    "widths": "the same product in blocks of 1, 2, 4 and 8",
    "precision": "how far rounding moves a product, relative",
    "definite": "least v.Gv / |v|^2, relative to the largest |Gv| / |v|",
    "difference": "|Hv - (g(x + tv) - g(x - tv)) / 2t| / |Hv|",
    "taylor": "order in t of f(x + td) - f - t g.d - t^2/2 d.Hd",
}
"""Quantity that each item measures, in the order of a certificate."""


class Curved(Protocol):
    """A point as a check uses it: `hvpd.Point`, or a point of the server."""

    n: int
    dtype: np.dtype[Any]
    x: Array
    value: float
    gradient: Array
    nonfinite: tuple[str, ...]

    def multiply(self, block: Array, operator: int = ..., /) -> Array:
        """Multiply a block: V[k,n] -> HV[k,n]."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One line of a certificate."""

    name: str
    """finite, symmetry, linearity, matmat, repeats, widths, precision, and then
    difference and taylor for the Hessian, or definite for other operators."""
    measured: float
    """Relative error; for taylor the order of the remainder. NaN if nothing could be
    measured."""
    threshold: float
    """Largest value that passes; for definite and taylor the smallest. NaN if there is
    none."""
    passed: bool | None
    """None for undecided: rounding or a kink hides the answer."""
    meaning: str
    """The measured quantity, and the reason for the verdict."""

    @property
    def verdict(self) -> str:
        """Return passed, FAILED or undecided."""
        return {True: "passed", False: "FAILED", None: "undecided"}[self.passed]


def rows_of(items: Collection[Item]) -> list[tuple[str, ...]]:
    """Return the table of items, with its headings."""
    rows: list[tuple[str, ...]] = [("ITEM", "MEASURED", "THRESHOLD", "VERDICT", "MEANING")]
    for item in items:
        bound = "" if math.isnan(item.threshold) else f"{'>=' if item.name in _LEAST else '<='} {item.threshold:.2g}"
        measured = "-" if math.isnan(item.measured) else f"{item.measured:.2g}"
        rows.append((item.name, measured, bound, item.verdict, item.meaning))
    return rows


@dataclasses.dataclass(frozen=True)
class RegistrationCheck:
    """The result of `Objective.registration_check`: the server's check.

    Example:
        >>> found = objective.registration_check()
        >>> assert found.verdict != "failed", str(found)
    """

    verdict: str
    """passed, failed, undecided or pending; empty if nothing was checked."""
    items: tuple[Item, ...]
    """finite, symmetry, linearity, difference: the verdict follows from these."""
    reason: str
    """The reason why there are no items, or which numbers are not finite; or empty."""

    def __str__(self) -> str:
        return _text.printable("\n".join([self._title, *_text.table(rows_of(self.items))]), keep="\n")

    def _repr_html_(self) -> str:
        return _html.grid(self._title, rows_of(self.items))

    @property
    def _title(self) -> str:
        return f"Registration check: {self.verdict or 'none'}{f', {self.reason}' if self.reason else ''}"


def registration_check(message: objective_pb2.RegistrationCheck) -> RegistrationCheck:
    """Read the server's message."""
    decided = {objective_pb2.VERDICT_PASSED: True, objective_pb2.VERDICT_FAILED: False}
    items = (
        Item(item.name, item.measured, item.threshold, decided.get(item.verdict), item.meaning)
        for item in message.items
    )
    return RegistrationCheck(verdict_of(message), tuple(items), message.reason)


def verdict_of(message: objective_pb2.RegistrationCheck) -> str:
    """Return passed, failed, undecided or pending.

    Return "" if nothing was checked, and for the verdicts of a newer server.
    """
    words = {
        objective_pb2.VERDICT_PENDING: "pending",
        objective_pb2.VERDICT_PASSED: "passed",
        objective_pb2.VERDICT_FAILED: "failed",
        objective_pb2.VERDICT_UNDECIDED: "undecided",
    }
    return words.get(message.verdict, "")


def resolution(dtypes: Collection[str], precision: str) -> float:
    """Return the coarsest eps of a computation on leaves of these dtypes.

    Args:
        dtypes: Names of the dtypes of the leaves of x.
        precision: Precision of matrix products. Below "highest" they may use TF32.
    """
    narrow = ["TF32"] if precision != "highest" and "float64" not in dtypes else []
    return max(EPS[name] for name in [*dtypes, *narrow])
