"""Turns a Python function into the StableHLO program that a server differentiates."""
