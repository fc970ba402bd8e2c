"""Rules of one family of operations; see `table`."""
