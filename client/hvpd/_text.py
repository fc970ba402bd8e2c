"""Text that others wrote, made fit for terminals, logs and pages. Client and server use it."""

from collections.abc import Iterator


def printable(text: str, keep: str = "") -> str:
    """Return the text with each character that is not printable written as in a Python string, by its code point.

    These are control characters, those that change the direction of text or join it, and separators other than the space. So a text
    can neither move a terminal's cursor nor show something else than it says.

    Args:
        text: Of any origin.
        keep: Characters to leave as they are, such as the end of line.
    """
    return text if text.isprintable() else "".join(_escaped(text, keep))


def _escaped(text: str, keep: str) -> Iterator[str]:
    for character in text:
        safe = character.isprintable() or character in keep
        yield character if safe else character.encode("unicode_escape").decode("ascii")


def cut(text: str, most: int) -> str:
    """Return at most so many characters of a text, and how many there were if some are left out."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
