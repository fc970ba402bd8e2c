"""Decide whether a bundle may be used: read, differentiate and compile it in a process
of its own.
"""
