"""StableHLO to jax: reads a program once into plain Python, and rebuilds each operation
through `jax.lax`.

A program's way: bytes -> `reader` (MLIR, in a process that may crash) -> `graph` (plain
Python) -> `evaluate`, which looks up each operation in `table` -> a function that jax
can trace, differentiate and compile. Each family of operations has a file of its own.
An operation, attribute, or region that the table does not know is refused by name, so
that nothing of the program reaches XLA unless jax itself wrote it.
"""
