"""Linear operators at a point."""
