"""Which of `hvp` and `apply` multiplies a block: by the objective's mode, by what fits, and by what has been measured.

`hvp` recomputes everything that depends on x with each block, `apply` reads it back as residuals. Which is faster depends on
the function, the width and the device, so it is timed here, on the products that are asked for anyway. Knows no jax, no gRPC.
"""

import threading

from hvpd.v1 import objective_pb2


class Plan:
    """The choice for one objective, by block width.

    Args:
        mode: Bundle.mode.
        has_apply: Whether the bundle has prepare and apply.
        fits: Whether the residuals of a point fit in the part of the memory budget that they may have.
        fixed: Whether the choice must not depend on what is measured.
    """

    SAMPLES = 3
    """Launches of each before one is preferred."""

    def __init__(self, mode: str, *, has_apply: bool, fits: bool, fixed: bool = False) -> None:
        self._mode = mode
        self._has_apply = has_apply
        self._fits = fits
        self._fixed = fixed
        self._lock = threading.Lock()
        self._chosen: dict[int, str] = {}
        self._pairs_pay = True
        self._seen: dict[tuple[str, int], tuple[int, float]] = {}

    @property
    def needs_apply(self) -> bool:
        """Whether products wait for `apply` to be compiled."""
        return self._mode == "linearized" and self._fits

    def add(self, program: str, width: int, seconds: float) -> None:
        """Notes how long a launch took."""
        with self._lock:
            count, least = self._seen.get((program, width), (0, float("inf")))
            self._seen[program, width] = (count + 1, min(least, seconds))
            if seconds < least or count <= self.SAMPLES:
                self._chosen.pop(width, None)
                self._judge_pairs()

    def forgo_residuals(self) -> None:
        """From now on: the device's memory does not suffice for them."""
        with self._lock:
            self._fits = False
            self._chosen.clear()

    def program(self, width: int) -> str:
        """What multiplies a block of this width now."""
        chosen = self._chosen.get(width)
        if chosen is None:
            with self._lock:
                chosen = self._chosen[width] = self._choice(width).program
        return chosen

    @property
    def pairs_may_pay(self) -> bool:
        """Whether products at several points are worth queueing together: until it is known that no width of them pays."""
        return self._pairs_pay

    def pairs(self, width: int, points: int) -> bool:
        """Whether a launch of pairs takes less than one launch for each of so many points, or that is not known yet."""
        with self._lock:
            count, pairs = self._seen.get(("hvp_pairs", width), (0, 0.0))
            single = self._single()
            return count < self.SAMPLES or single is None or pairs < points * single

    def _single(self) -> float | None:
        """Least time of a launch for one vector."""
        seen = [self._seen[program, 1][1] for program in ("hvp", "apply") if (program, 1) in self._seen]
        return min(seen, default=None)

    def _judge_pairs(self) -> None:
        found = {width: seen for (program, width), seen in self._seen.items() if program == "hvp_pairs"}
        single = self._single()
        if single is not None and found:
            self._pairs_pay = any(
                count < self.SAMPLES or seconds < width * single for width, (count, seconds) in found.items()
            )

    def choose(self, width: int) -> objective_pb2.Choice:
        """The same, and why."""
        with self._lock:
            return self._choice(width)

    def _choice(self, width: int) -> objective_pb2.Choice:
        hvps, hvp = self._seen.get(("hvp", width), (0, 0.0))
        applies, apply = self._seen.get(("apply", width), (0, 0.0))
        program, reason = self._decide(width, hvps, hvp, applies, apply)
        return objective_pb2.Choice(width=width, program=program, hvp_seconds=hvp, apply_seconds=apply, reason=reason)

    def _decide(self, width: int, hvps: int, hvp: float, applies: int, apply: float) -> tuple[str, str]:
        rules = [
            (not self._has_apply, "hvp", f"mode {self._mode}"),
            (not self._fits, "hvp", "the residuals do not fit in a quarter of the memory budget, or not on the device"),
            (self.needs_apply, "apply", "mode linearized"),
            (self._fixed, "hvp", "a fixed bucket: the choice depends on nothing that is measured"),
            (self._mode == "forward_over_reverse" and width > 1, "hvp", "a block shares what depends on x"),
        ]
        for holds, program, reason in rules:
            if holds:
                return program, reason
        if min(hvps, applies) < self.SAMPLES:
            return "hvp" if hvps < self.SAMPLES else "apply", "not yet measured"
        return "apply" if apply < hvp else "hvp", "measured to be faster"
