"""A damped Newton step: (H + shift I) d = -g by CG, and by MINRES, which also takes an
indefinite H.

The gradient came with the point, so one step costs only the products. The residual
checks the step without a reference.
"""

import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import cg, minres

import hvpd

rng = np.random.default_rng(0)
A = rng.normal(size=(800, 500)) / np.sqrt(800)
b = 0.3 * rng.normal(size=800)


def loss(x, A, b):
    """Return a robust loss: smooth near 0, linear far out."""
    return jnp.sum(jnp.sqrt(1 + (A @ x - b) ** 2) - 1)


with hvpd.local() as client:
    x = np.zeros(500)
    point = client.register(loss, x, A, b, name="robust").at(x)
    H = point.hessian(shift=1e-3)
    for solver in (cg, minres):
        before = client.statistics().products
        step, info = solver(H, -point.gradient, rtol=1e-12)
        products = client.statistics().products - before
        residual = np.linalg.norm(H @ step + point.gradient) / np.linalg.norm(point.gradient)
        after = point.objective.at(x + step)
        print(f"{solver.__name__}: {products} products, relative residual {residual:.1e}")
        print(f"  f {point.value:.4f} -> {after.value:.4f}, |g| {np.linalg.norm(point.gradient):.1e} -> ", end="")
        print(f"{np.linalg.norm(after.gradient):.1e}")
        assert info == 0
        assert residual < 1e-8
