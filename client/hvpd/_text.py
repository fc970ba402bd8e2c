"""Makes text from elsewhere fit for terminals, logs and pages. Client and server use
it.
"""

from collections.abc import Iterator, Sequence


def printable(text: str, keep: str = "") -> str:
    """Return the text with an escape for each character that is not printable.

    The escapes are those of Python strings. They replace control characters, characters
    that join text or change its direction, and separators other than the space. So a
    text cannot move a terminal's cursor, or show other words than it holds.

    Args:
        text: Text of any origin.
        keep: Characters to leave as they are, such as the end of line.
    """
    return text if text.isprintable() else "".join(_escaped(text, keep))


def _escaped(text: str, keep: str) -> Iterator[str]:
    for character in text:
        safe = character.isprintable() or character in keep
        yield character if safe else character.encode("unicode_escape").decode("ascii")


def cut(text: str, most: int) -> str:
    """Return the first characters of a text, with its length if some are left out."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def quoted(text: str, most: int) -> str:
    """Return the first characters of a text in quotes, with its length if some are left
    out.
    """
    return repr(text) if len(text) <= most else f"{text[:most]!r}... ({len(text)} characters)"


def described(value: object) -> str:
    """Return the repr of a value, or the class and shape if it is an array."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"a {type(value).__name__} of shape {shape}"
    return cut(repr(value), 200)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table with aligned columns, of printable characters."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
