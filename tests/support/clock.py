"""A clock for code that takes one as an argument."""

import dataclasses


@dataclasses.dataclass
class Clock:
    """A clock that moves only when a test changes `now`, in seconds."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now
