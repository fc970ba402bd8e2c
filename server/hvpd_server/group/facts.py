"""Facts that must be equal on all ranks of a group: versions, flags, devices."""

from collections.abc import Mapping

from hvpd import _text

_SHOWN = 100
"""Most characters of a fact in a message."""


def differences(rank: int, found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """Return how the facts of a rank differ from those of the leader; empty if they are
    equal.

    Args:
        rank: The rank.
        found: Its facts, by name.
        expected: The facts of the leader.
    """
    lines = [
        f"its {name} is {_quoted(found.get(name))}, and the leader's is {_quoted(expected.get(name))}"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    if not lines:
        return ""
    return (
        f"rank {rank} differs from the leader: {'; '.join(lines)}. All ranks need the same software, flags and devices"
    )


def _quoted(text: str | None) -> str:
    return "not known" if text is None else _text.quoted(text, _SHOWN)
