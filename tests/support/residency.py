"""Calls of a residency in its tests, and random ones."""

from hypothesis import strategies as st

KEYS = st.sampled_from("abcdef")
PUTS = st.tuples(st.just("put"), KEYS, st.integers(0, 6), st.lists(KEYS, max_size=3))
OTHERS = st.tuples(st.sampled_from(["get", "drop"]), KEYS, st.none(), st.none())


def keys(residency, candidates="abcdef"):
    """Return the resident keys. Asking counts as use, so tests ask once, at the end."""
    return "".join(key for key in candidates if residency.get(key) is not None)


def put(residency, key, size, user, *, kind="point", needs=()):
    residency.put(key, kind, key, size, needs=needs)
    residency.join(key, user)
