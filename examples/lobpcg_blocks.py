"""Blocks: `H @ V` multiplies all columns of V in one round trip. lobpcg needs no more.

f is quadratic here, x·Kx/2 with K the Laplacian of a path, whose eigenvalues are 2 - 2
cos(pi j / (n + 1)).
"""

import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import lobpcg

import hvpd

N, WIDTH = 400, 8


def energy(x):
    """Return half the sum of squared differences of neighbours, with zeros at both
    ends.
    """
    return 0.5 * jnp.sum(jnp.diff(jnp.pad(x, 1)) ** 2)


with hvpd.local() as client:
    objective = client.register(energy, np.zeros(N), name="path")
    H = objective.at(np.zeros(N)).hessian()
    start = np.random.default_rng(0).normal(size=(N, WIDTH))
    eigenvalues, _ = lobpcg(H, start, largest=True, tol=1e-7, maxiter=1_000)
    truth = 2 - 2 * np.cos(np.pi * np.arange(N, N - WIDTH, -1) / (N + 1))
    done = client.statistics()
    print(f"{done.vectors} vectors in {done.products} products: {done.vectors / done.products:.1f} a round trip")
    error = np.abs(np.sort(eigenvalues)[::-1] - truth).max()
    print(f"largest difference to the {WIDTH} true eigenvalues: {error:.1e}")
    assert error < 1e-8
