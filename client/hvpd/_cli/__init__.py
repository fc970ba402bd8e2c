"""The command `hvpd`."""
