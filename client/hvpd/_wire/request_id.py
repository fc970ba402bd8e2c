"""Ids of calls, which connect a user's error with the server's log.

All tries of a call have one id. A product on a stream has the stream's id and its tag:
`3f2a9c0d1b7e4a55/12`.
"""

import os
import re

KEY = "x-request-id"
"""Metadata key, with the name that proxies, meshes and gateways use."""

# Without an underscore, so that no token is taken for an id. Without a slash, because
# it separates the tag.
_VALID = re.compile(r"[0-9A-Za-z.:-]{1,64}")


def new() -> str:
    """Return sixteen random hexadecimal digits."""
    return os.urandom(8).hex()


def is_valid(text: object) -> bool:
    """Return whether a text can be an id.

    An id has 1 to 64 ASCII letters, digits, dots, colons and hyphens.
    """
    return isinstance(text, str) and _VALID.fullmatch(text) is not None
