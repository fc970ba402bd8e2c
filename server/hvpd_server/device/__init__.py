"""Keeps and runs things on a device: executables, data and points, within a memory
budget.
"""
