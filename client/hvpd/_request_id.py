"""Ids of calls: what joins the error that a user sees to the lines in the server's log. Client and server share the rule.

A call has one id, also when it is repeated. Products of a stream have the stream's and their tag: `3f2a9c0d1b7e4a55/12`.
"""

import os
import re

KEY = "x-request-id"
"""Metadata key; the name that proxies, meshes and gateways use."""

# Without an underscore, so that no token of ours is taken for one; and without the slash that stands before a tag.
_VALID = re.compile(r"[0-9A-Za-z.:-]{1,64}")


def new() -> str:
    """Sixteen hexadecimal digits, at random."""
    return os.urandom(8).hex()


def is_valid(text: object) -> bool:
    """Whether it can be an id: 1 to 64 letters, digits, dots, colons and hyphens of ASCII."""
    return isinstance(text, str) and _VALID.fullmatch(text) is not None
