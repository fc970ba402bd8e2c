"""The table of custom calls: routines outside StableHLO that are rebuilt as the jax
operations from which they came.

No custom call of a program is ever made. The importer refuses a target that is not in
this table by its name. It also refuses a call whose options, operands, dtypes or memory
layouts differ from those that jax writes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from hvpd_server.importer.table import Call, Refused, Value

LAPACK_DTYPES: Final = {"s": "float32", "d": "float64", "c": "complex64", "z": "complex128"}
"""Dtypes by the first letter of a routine of LAPACK."""


@dataclasses.dataclass(frozen=True)
class CustomCall:
    """A custom call with its operands, as a target's rule sees it."""

    call: Call
    name: str
    """Name of the target."""
    operands: Sequence[Value]
    """Operands, without those that only state a result's shape."""
    options: Mapping[str, Any]
    """Options from the call's configuration."""

    def refuse(self, why: str) -> Refused:
        """Return the refusal of this call; `why` completes "has a stablehlo.custom_call
        of NAME ...".
        """
        return self.call.refuse(f"of {self.name} {why}")

    def option(self, name: str, values: Mapping[int, Any]) -> Any:
        """Return the meaning of an option.

        Raises:
            Refused: The option has none of the values.
        """
        found = self.options[name]
        if found not in values:
            raise self.refuse(f"with the option {name} = {found}: expected one of {', '.join(map(str, values))}")
        return values[found]


TargetRule = Callable[[CustomCall], Sequence[Value]]


@dataclasses.dataclass(frozen=True)
class Target:
    """A row of the table."""

    rule: TargetRule
    what: str
    """The target's function, for the report; "" if it is no function with a
    derivative.
    """
    operands: int | None
    """Number of operands, without those that state shapes; None for any number."""
    options: frozenset[str] | None
    """Names of all options that the call must have; None if the rule reads no
    configuration.
    """
    column_major: bool | None
    """Memory layout of matrices; None if the call states none or its layout has no
    meaning.
    """
    dtype: str | None
    """Dtype of the first operand; None for any."""
    attributes: frozenset[str]
    """Attributes besides those of every custom call."""


TARGETS: Final[dict[str, Target]] = {}
"""Every target that may be in a program, by name."""


def target(
    *names: str,
    what: str = "",
    operands: int | None = None,
    options: Sequence[str] | None = None,
    column_major: bool | None = None,
    attributes: Sequence[str] = (),
) -> Callable[[TargetRule], TargetRule]:
    """Register a rule for targets; see `Target` for the arguments.

    A routine of LAPACK expects the dtype of its first letter.
    """

    def register(rule: TargetRule) -> TargetRule:
        for name in names:
            assert name not in TARGETS, name
            dtype = LAPACK_DTYPES[name[len("lapack_")]] if name.startswith("lapack_") else None
            known = None if options is None else frozenset(options)
            TARGETS[name] = Target(rule, what, operands, known, column_major, dtype, frozenset(attributes))
        return rule

    return register


def lapack(name: str, complex_name: str | None = None) -> tuple[str, ...]:
    """Return the names of a routine of LAPACK for real and complex dtypes."""
    return tuple(f"lapack_{each}{(complex_name or name) if each in 'cz' else name}_ffi" for each in "sdcz")


def gpu(name: str) -> tuple[str, ...]:
    """Return the names of a routine of cuSOLVER and hipSOLVER."""
    return f"cusolver_{name}_ffi", f"hipsolver_{name}_ffi"


def check_layouts(custom: CustomCall, *, column_major: bool) -> None:
    """Check that each array lies in memory as jax writes it for a routine.

    A routine reads matrices column by column, so the same call with another layout
    would mean the transposed matrix.

    Raises:
        Refused: A layout differs.
    """
    call = custom.call
    ranks = [np.ndim(each) for each in call.operands]
    matrices = max(np.ndim(each) for each in custom.operands)
    for name, kinds in (("operand_layouts", ranks), ("result_layouts", [len(type_.shape) for type_ in call.types])):
        stated = call.attributes.get(name)
        if stated is None and not column_major:
            continue
        expected = [_layout(rank, column_major=column_major and rank == matrices) for rank in kinds]
        if stated is None or [np.asarray(each).tolist() for each in stated] != expected:
            found = "none" if stated is None else [np.asarray(each).tolist() for each in stated]
            raise custom.refuse(f"with {name} {found}: expected {expected}")


def _layout(rank: int, *, column_major: bool) -> list[int]:
    rows = list(range(rank))[::-1]
    return [rows[1], rows[0], *rows[2:]] if column_major and rank > 1 else rows
