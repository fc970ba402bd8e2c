"""The plan chooses between `hvp` and `apply` for a block: by the objective's mode, by
memory, and by measured times.

`hvp` recomputes with each block everything that depends on x. `apply` reads it back as
residuals. Which of them is faster depends on the function, the width and the device, so
the plan uses the times of real products. Knows neither jax nor gRPC.
"""

import collections
import threading

from hvpd.v1 import objective_pb2

_GAIN = 1.1
"""Factor by which `apply` must be faster, because residuals take memory and a `prepare`
at each point.

With this factor, some ten products pay for the `prepare`.
"""


class Plan:
    """The choice for one objective, by block width.

    Args:
        mode: Mode of the products, as in `Bundle.mode`; empty: none of these.
        has_apply: Whether there are programs `prepare` and `apply`.
        fits: Whether the residuals of a point fit in their part of the memory budget.
        fixed: Whether the choice must not depend on measurements.
    """

    SAMPLES = 5
    """Launches of each program before one is preferred. Only the latest count, because
    one may have run long before the other was compiled.
    """

    def __init__(self, mode: str, *, has_apply: bool, fits: bool, fixed: bool = False) -> None:
        self._mode = mode
        self._has_apply = has_apply
        self._fits = fits
        self._fixed = fixed
        self.needs_apply = has_apply and mode == "linearized" and fits
        """Whether products wait for `apply` to be compiled."""
        self._lock = threading.Lock()
        self._chosen: dict[int, str] = {}
        self._pairs_pay = True
        self._seen: dict[tuple[str, int], _Times] = {}
        self._final: dict[int, objective_pb2.Choice] = {}
        """The choice by measured times, by block width. It stays, so that a product's
        bits stay.
        """

    def add(self, program: str, width: int, seconds: float) -> None:
        """Record the duration of a launch, unless the choice for its width is final."""
        if width in self._final and program in ("hvp", "apply"):
            return
        with self._lock:
            times = self._seen.get((program, width))
            if times is None:
                times = self._seen[program, width] = _Times(self.SAMPLES)
            if times.add(seconds):
                self._judge_pairs()
                if width not in self._final:
                    self._chosen.pop(width, None)

    def forgo_residuals(self) -> None:
        """Choose `hvp` from now on, because the device has no memory for residuals."""
        with self._lock:
            self._fits = self.needs_apply = False
            self._chosen.clear()

    def program(self, width: int) -> str:
        """Return the program for a block of this width."""
        chosen = self._chosen.get(width)
        if chosen is None:
            with self._lock:
                chosen = self._chosen[width] = self._choice(width).program
        return chosen

    @property
    def pairs_may_pay(self) -> bool:
        """Whether a launch of products at several points, as pairs, may be faster:
        until it is known to be slower at all widths.
        """
        return self._pairs_pay

    def pairs(self, width: int, points: int) -> bool:
        """Return whether a launch of pairs is faster than a launch for each of so many
        points, or this is not known yet.
        """
        with self._lock:
            pairs = self._seen.get(("hvp_pairs", width))
            single = self._single()
            return pairs is None or not pairs.enough or single is None or pairs.least < points * single

    def _single(self) -> float | None:
        """Return the least time of a launch of one vector; None if there was none."""
        seen = [self._seen[program, 1].least for program in ("hvp", "apply") if (program, 1) in self._seen]
        return min(seen, default=None)

    def _judge_pairs(self) -> None:
        found = {width: seen for (program, width), seen in self._seen.items() if program == "hvp_pairs"}
        single = self._single()
        if single is not None and found:
            self._pairs_pay = any(not times.enough or times.least < width * single for width, times in found.items())

    def choose(self, width: int) -> objective_pb2.Choice:
        """Return the choice for a width, with its reason."""
        with self._lock:
            return self._choice(width)

    def _choice(self, width: int) -> objective_pb2.Choice:
        rules = [
            (not self._has_apply, "hvp", f"mode {self._mode}"),
            (not self._fits, "hvp", "the residuals do not fit in a quarter of the memory budget, or not on the device"),
            (self.needs_apply, "apply", "mode linearized"),
            (self._fixed, "hvp", "a fixed bucket: the choice depends on nothing that is measured"),
            (self._mode == "forward_over_reverse" and width > 1, "hvp", "a block shares what depends on x"),
        ]
        found = self._final.get(width)
        given = next(((program, reason) for holds, program, reason in rules if holds), None)
        if found is not None and given is None:
            return found
        hvp, apply = (self._seen.get((program, width), _Times(self.SAMPLES)) for program in ("hvp", "apply"))
        choice = objective_pb2.Choice(width=width, hvp_seconds=hvp.latest, apply_seconds=apply.latest)
        if given is not None:
            choice.program, choice.reason = given
        elif not (hvp.enough and apply.enough):
            choice.program, choice.reason = "apply" if hvp.enough else "hvp", "not yet measured"
        else:
            choice.program, choice.reason = "hvp", "measured to be faster"
            if hvp.latest > _GAIN * apply.latest:
                choice.program = "apply"
            elif hvp.latest > apply.latest:
                choice.reason = "apply is hardly faster, and takes memory"
            self._final[width] = choice
        return choice


class _Times:
    """Durations of the launches of one program and width, in seconds.

    Args:
        samples: Number of the latest durations that count, and that are enough.
    """

    def __init__(self, samples: int) -> None:
        self.least = float("inf")
        """The least of all durations."""
        self._latest: collections.deque[float] = collections.deque(maxlen=samples)

    def add(self, seconds: float) -> bool:
        """Add a duration. Return whether that can change a choice."""
        relevant = not self.enough or seconds < self.least
        self.least = min(self.least, seconds)
        self._latest.append(seconds)
        return relevant

    @property
    def enough(self) -> bool:
        """Whether there are enough durations."""
        return len(self._latest) == self._latest.maxlen

    @property
    def latest(self) -> float:
        """The least of the latest durations; 0 if there are none."""
        return min(self._latest, default=0.0)
