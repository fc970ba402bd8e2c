"""Objectives whose Hessians are known."""

import jax
import jax.numpy as jnp


def quadratic(x: jax.Array, A: jax.Array) -> jax.Array:
    """Return x' A x / 2, whose Hessian is (A + A') / 2."""
    return x @ A @ x / 2


def quartic(x: jax.Array) -> jax.Array:
    """Return sum(x^4) / 12, whose Hessian is diag(x^2)."""
    return jnp.sum(x**4) / 12
