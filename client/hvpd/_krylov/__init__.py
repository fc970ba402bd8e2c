"""Krylov iterations, trace estimates and minimisation. Needs neither jax nor grpc.

The parts, from the bottom up:

- `vectors`: inner products of rows, accumulated in float64.
- `space`: `Space`, where the basis of a Krylov space lives and grows, and `LocalSpace`,
  which keeps it in NumPy. A server implements `Space` on its device.
- `results`, `spectrum`: what the iterations return. Results are plain data, and save
  to `.npz`.
- `ritz`: which Ritz values are wanted, and when one has converged.
- `lanczos`: `Lanczos`, a run that can be extended. It keeps the small projected matrix
  and leaves all vectors to its space.
- `probes`: random vectors, and what begins with them: Lanczos iterations side by side,
  and sketches.
- `conjugate_gradients`, `short_recurrence`, `trust_region`: states and steps of linear
  solvers.
- `preconditioning`: preconditioners M.
- `runner`: `Runner`, which has these parts for one operator. An operator gives its
  runner by a method `_krylov()`. A runner that uses a server overrides `space`, or
  whole computations, whose numbers are in `computed`.
- `thick_restart`, `quadrature`, `solve`, `trace`, `minimize`: the calls of users, by a
  runner.

Vectors are rows: a block V[k, n] has k vectors of n elements. Scalars and small
matrices are float64, for vectors of both dtypes.
"""
