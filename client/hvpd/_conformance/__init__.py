"""The conformance suite of the protocol: `hvpd conformance HOST:PORT`.

`suite` runs the checks, `checks` has them, `golden` reads the golden frames: bytes of
requests, and what the answers must hold. golden.json is written once, and never changed
for a revision of the protocol: see tests/compat/write_golden.py.
"""
