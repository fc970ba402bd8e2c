"""Which revisions of the wire protocol this version of hvpd speaks, how client and server tell each other, and what limits it sets."""

OLDEST = 1
"""Oldest revision that is understood."""

NEWEST = 1
"""Newest revision; what the client says it speaks. Raised with every change that an older peer would misunderstand."""

REVISION_KEY = "hvpd-protocol"
"""Metadata key of the client's revision."""

MAX_PRIORITY = 100
"""Priorities of products go from minus this to this."""

MAX_PIN_SECONDS = 7 * 24 * 3600
"""Longest time for which a point stays after it was last used."""

VERSION_KEY = "hvpd-version"
"""Metadata key of the client's version of hvpd, for messages."""
