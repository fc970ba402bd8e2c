"""The sizes that all parts share: small on a CPU, and few rounds for a quick
run.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy.typing as npt

from bench import _report
from bench._report import Figure, Goal

BENCH = "gpu"


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes and rounds of a run."""

    small: bool
    """Whether the device is a CPU."""
    quick: bool

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return 2 if self.quick or self.small else 9

    @property
    def seconds(self) -> float:
        """Seconds for a contender in a round."""
        return 0.02 if self.quick or self.small else 0.2

    def of(self, full: Any, small: Any) -> Any:
        """Return the size for this device."""
        return small if self.small else full

    def measured(
        self,
        figure: str,
        unit: str,
        rounds: npt.ArrayLike,
        *,
        n: int | None = None,
        k: int | None = None,
        predicted: float | None = None,
        goal: Goal | None = None,
    ) -> Figure:
        """Return a figure. Predictions and goals are for an accelerator, so a CPU's
        figure has none, and its note says so.
        """
        facts: dict[str, Any] = {"n": n, "k": k, "predicted": predicted, "goal": goal}
        if self.small:
            facts |= {"predicted": None, "goal": None, "note": "a small size, on a CPU: no figure"}
        return _report.measured(BENCH, figure, unit, rounds, **facts)

    def skipped(self, figure: str, unit: str, why: str, *, n: int | None = None, k: int | None = None) -> Figure:
        """Return a figure that could not be measured."""
        return _report.skipped(BENCH, figure, unit, why, n=n, k=k)


Part = Callable[[Scale], Iterator[Figure]]
