"""Registration: from a Python function to the StableHLO program that a server differentiates."""
