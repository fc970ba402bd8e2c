"""The metrics endpoint and the live page for operators."""
