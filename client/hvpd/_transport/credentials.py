"""The token of a client, and the metadata of a call, which has the newest token at each
try.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

from hvpd._errors import InvalidArgumentError

LENGTH = 4096
"""Most characters of a token: gRPC has room for 8 KiB of metadata."""

Pairs = tuple[tuple[str, str | bytes], ...]


class Token:
    """A token, which can be replaced while clients use it. The connections of a fleet
    share one.

    Args:
        text: The token.
        read: Reads the token's file again; None if there is no file.

    Raises:
        InvalidArgumentError: The text is no token.

    Attributes:
        text: The token.
    """

    def __init__(self, text: str, read: Callable[[], str | None] | None = None) -> None:
        self.text = _checked(text)
        self._read = read

    def renew(self, refused: str) -> bool:
        """Read the file again after the server refused a token. Return whether there is
        another token now.
        """
        if self._read is not None and self.text == refused:
            with contextlib.suppress(InvalidArgumentError):  # The server's error says what is wrong.
                self.text = _checked(self._read())
        return self.text != refused


def _checked(token: object) -> str:
    if not (isinstance(token, str) and token.isascii() and token.isprintable()):
        raise InvalidArgumentError("a token must consist of printable ASCII characters", reason="TOKEN_MALFORMED")
    if not 0 < len(token.strip()) <= LENGTH:
        raise InvalidArgumentError(
            f"a token must have from 1 to {LENGTH} characters, got {len(token)}", reason="TOKEN_MALFORMED"
        )
    return token


class CallMetadata:
    """The metadata of one call. gRPC iterates over it at each try.

    Args:
        common: Returns the metadata of all calls.
        own: The metadata of this call.
    """

    def __init__(self, common: Callable[[], Pairs], own: Pairs) -> None:
        self._common = common
        self._own = own

    def __iter__(self) -> Iterator[tuple[str, str | bytes]]:
        yield from self._common()
        yield from self._own

    def plus(self, more: Iterable[tuple[str, str | bytes]]) -> "CallMetadata":
        """Return the metadata with more pairs at its end."""
        return CallMetadata(self._common, (*self._own, *more))
