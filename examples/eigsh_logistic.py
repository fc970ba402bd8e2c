"""Eigenvalues: SciPy's eigsh takes the Hessian of a logistic regression as a
LinearOperator.

The dense Hessian of 200 variables still fits, and checks the five largest eigenvalues.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import eigsh

import hvpd

jax.config.update("jax_enable_x64", True)  # For the dense Hessian here. hvpd traces float64 in either mode.
rng = np.random.default_rng(0)
X = rng.normal(size=(2_000, 200)) * np.geomspace(1, 0.01, 200)
y = np.where(X @ rng.normal(size=200) + rng.normal(size=2_000) > 0, 1.0, -1.0)


def loss(w, X, y):
    """Return the mean logistic loss with a little weight decay."""
    return jnp.mean(jnp.logaddexp(0, -y * (X @ w))) + 5e-4 * jnp.vdot(w, w)


with hvpd.local() as client:
    w = 0.1 * rng.normal(size=200)
    objective = client.register(loss, w, X, y, name="logistic")
    eigenvalues = eigsh(objective.at(w).hessian(), k=5, which="LA", return_eigenvectors=False)
    dense = np.linalg.eigvalsh(jax.hessian(loss)(w, X, y))[-5:]
    print("eigsh", np.sort(eigenvalues), f"with {client.statistics().products} products")
    print("dense", dense)
    error = np.abs(np.sort(eigenvalues) - dense).max()
    print(f"largest difference: {error:.1e}")
    assert error < 1e-10
