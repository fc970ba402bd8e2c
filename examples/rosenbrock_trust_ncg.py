"""Minimise with SciPy: scipy.optimize.minimize takes `value_and_grad` and `hessp` of an
objective as they are.

The extended Rosenbrock function of 1,000 variables has its minimum, 0, where all of
them are 1.
"""

import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

import hvpd

N = 1_000


def rosenbrock(x):
    """Return a curved valley along each pair of variables (Rosenbrock 1960)."""
    odd, even = x[::2], x[1::2]
    return jnp.sum(100 * (even - odd**2) ** 2 + (1 - odd) ** 2)


with hvpd.local() as client:
    objective = client.register(rosenbrock, np.zeros(N), name="rosenbrock")
    x0 = np.tile([-1.2, 1.0], N // 2)
    result = minimize(objective.value_and_grad, x0, jac=True, hessp=objective.hessp, method="trust-ncg")
    error = np.abs(result.x - 1).max()
    print(f"{result.nit} iterations, {client.statistics().products} products: f = {result.fun:.1e}")
    print(f"largest distance to the true minimum: {error:.1e}")
    assert error < 1e-6
