"""Which of `hvp` and `apply` multiplies a block: by the objective's mode, by what fits, and by what has been measured.

`hvp` recomputes everything that depends on x with each block, `apply` reads it back as residuals. Which is faster depends on
the function, the width and the device, so it is timed here, on the products that are asked for anyway. Knows no jax, no gRPC.
"""

import collections
import threading

from hvpd.v1 import objective_pb2

_GAIN = 1.1
"""How many times as fast `apply` must be: each point's residuals take memory, and a `prepare`, for which some ten products pay then."""


class Plan:
    """The choice for one objective, by block width.

    Args:
        mode: Bundle.mode.
        has_apply: Whether the bundle has prepare and apply.
        fits: Whether the residuals of a point fit in the part of the memory budget that they may have.
        fixed: Whether the choice must not depend on what is measured.
    """

    SAMPLES = 5
    """Launches of each before one is preferred: the latest, since one may be launched for long before the other is compiled."""

    def __init__(self, mode: str, *, has_apply: bool, fits: bool, fixed: bool = False) -> None:
        self._mode = mode
        self._has_apply = has_apply
        self._fits = fits
        self._fixed = fixed
        self.needs_apply = mode == "linearized" and fits
        """Whether products wait for `apply` to be compiled."""
        self._lock = threading.Lock()
        self._chosen: dict[int, str] = {}
        self._pairs_pay = True
        self._seen: dict[tuple[str, int], _Times] = {}
        self._settled: dict[int, objective_pb2.Choice] = {}
        """By block width, what was chosen by what was measured: from then on it stays, and so do a product's bits."""

    def add(self, program: str, width: int, seconds: float) -> None:
        """Notes how long a launch took; not where that decides nothing any more."""
        if width in self._settled and program in ("hvp", "apply"):
            return
        with self._lock:
            times = self._seen.get((program, width))
            if times is None:
                times = self._seen[program, width] = _Times(self.SAMPLES)
            if times.add(seconds):
                self._judge_pairs()
                if width not in self._settled:
                    self._chosen.pop(width, None)

    def forgo_residuals(self) -> None:
        """From now on: the device's memory does not suffice for them."""
        with self._lock:
            self._fits = self.needs_apply = False
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
            pairs = self._seen.get(("hvp_pairs", width))
            single = self._single()
            return pairs is None or not pairs.enough or single is None or pairs.least < points * single

    def _single(self) -> float | None:
        """Least time of a launch for one vector."""
        seen = [self._seen[program, 1].least for program in ("hvp", "apply") if (program, 1) in self._seen]
        return min(seen, default=None)

    def _judge_pairs(self) -> None:
        found = {width: seen for (program, width), seen in self._seen.items() if program == "hvp_pairs"}
        single = self._single()
        if single is not None and found:
            self._pairs_pay = any(not times.enough or times.least < width * single for width, times in found.items())

    def choose(self, width: int) -> objective_pb2.Choice:
        """The same, and why."""
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
        found = self._settled.get(width)
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
            self._settled[width] = choice
        return choice


class _Times:
    """How long launches took, in seconds.

    Args:
        samples: How many are enough, and how many of the latest are looked at.
    """

    def __init__(self, samples: int) -> None:
        self.least = float("inf")
        """Of all."""
        self._latest: collections.deque[float] = collections.deque(maxlen=samples)

    def add(self, seconds: float) -> bool:
        """Notes one; returns whether that is news."""
        news = not self.enough or seconds < self.least
        self.least = min(self.least, seconds)
        self._latest.append(seconds)
        return news

    @property
    def enough(self) -> bool:
        """Whether there were as many as are looked at."""
        return len(self._latest) == self._latest.maxlen

    @property
    def latest(self) -> float:
        """The least of the latest; 0 where there were none."""
        return min(self._latest, default=0.0)
