"""Names of programs, such as "hvp", "ggn[0,2]", "hvp@reverse_over_reverse~default" or
"minres_hvp{4.0.diagonal.}".

Needs no jax.
"""

import re
from typing import Final, NamedTuple, Self

_NAME: Final = re.compile(r"(\w+)(?:@(\w+))?(?:~(\w+))?(?:\[([\d,]+)\])?(?:\{(\d+\.\d+\.\w*\.[\dx]*)\})?")


class Form(NamedTuple):
    """What a program of several steps is compiled for, beside its right-hand sides."""

    shifts: int = 1
    """Shifts of each right-hand side."""
    rank: int = 0
    """Rank of the operator's low-rank term; 0 for none."""
    M: str = ""
    """Kind of the preconditioner; empty for none."""
    sizes: tuple[int, ...] = ()
    """The rank of a preconditioner of low rank; or p and q of each layer."""

    def __str__(self) -> str:
        text = f"{self.shifts}.{self.rank}.{self.M}.{'x'.join(map(str, self.sizes))}"
        return "" if self == Form() else f"{{{text}}}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text between the braces."""
        shifts, rank, M, sizes = text.split(".")
        return cls(int(shifts), int(rank), M, tuple(map(int, sizes.split("x"))) if sizes else ())


class Name(NamedTuple):
    """The parsed name of a program."""

    base: str
    """Kind of program, such as "hvp"."""
    mode: str = ""
    """Mode of differentiation; empty for the objective's."""
    precision: str = ""
    """Precision of matrix products that state none; empty for the objective's."""
    leaves: tuple[int, ...] = ()
    """Positions of the leaves of x of a principal block; empty for the whole."""
    form: Form = Form()
    """Form of a program of several steps."""

    def __str__(self) -> str:
        mode = f"@{self.mode}" if self.mode else ""
        precision = f"~{self.precision}" if self.precision else ""
        leaves = f"[{','.join(map(str, self.leaves))}]" if self.leaves else ""
        return f"{self.base}{mode}{precision}{leaves}{self.form}"

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read a name.

        Raises:
            LookupError: It names no program.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise LookupError(name)
        base, mode, precision, leaves, form = found.groups()
        return cls(
            base,
            mode or "",
            precision or "",
            tuple(map(int, leaves.split(","))) if leaves else (),
            Form.parse(form) if form else Form(),
        )
