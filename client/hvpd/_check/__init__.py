"""Checks of an objective's products against their definition."""
