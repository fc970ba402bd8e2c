"""Names of programs, such as "hvp", "ggn[0,2]" or "hvp@reverse_over_reverse~default".

Needs no jax.
"""

import re
from typing import Final, NamedTuple, Self

_NAME: Final = re.compile(r"(\w+)(?:@(\w+))?(?:~(\w+))?(?:\[([\d,]+)\])?")


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

    def __str__(self) -> str:
        mode = f"@{self.mode}" if self.mode else ""
        precision = f"~{self.precision}" if self.precision else ""
        leaves = f"[{','.join(map(str, self.leaves))}]" if self.leaves else ""
        return f"{self.base}{mode}{precision}{leaves}"

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read a name.

        Raises:
            LookupError: It names no program.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise LookupError(name)
        base, mode, precision, leaves = found.groups()
        return cls(base, mode or "", precision or "", tuple(map(int, leaves.split(","))) if leaves else ())
