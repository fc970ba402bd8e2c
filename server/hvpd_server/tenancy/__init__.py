"""Tokens, tenants and their limits."""
