"""The server of hvpd: it owns the device, keeps programs warm and answers products.

See docs/architecture/overview.md.
"""
