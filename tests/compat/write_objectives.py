"""Writes the objective that a client with this jax registers, beside this file:
`python tests/compat/write_objectives.py`.

test_objectives.py registers each such file at today's server, for any version of jax.
Run this for each version of jax in the range.
"""

import base64
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hvpd._registration import export

STABLEHLO = "1.17.0"
"""StableHLO version that a server with jax 0.10.2 reads, the oldest jax of the range.
The server states this version to its clients.
"""

X = np.random.default_rng(0).normal(size=(6, 3))
X_AT = np.linspace(-0.5, 1.0, 3)


def fun(w, X):
    """Use marks of each kind: a rule of relu's, a stopped gradient, special functions,
    a scan, a factorization.

    jax 0.11 has primitives for a base-2 logarithm, for the derivative of tanh and for a
    root, and jax 0.10 has none.
    """

    def step(state, row):
        return jnp.tanh(state + row * w), jnp.sum(jax.scipy.special.erf(state))

    state, errors = jax.lax.scan(step, jnp.zeros(3), X)
    root = jax.lax.custom_root(
        lambda y: y**3 + y - w,
        w,
        lambda f, guess: jax.lax.fori_loop(0, 40, lambda _, y: y - f(y) / (3 * y**2 + 1), guess),
        lambda g, y: y / g(jnp.ones_like(y)),
    )
    gram = jnp.outer(state, state) + jnp.eye(3)
    return (
        jnp.sum(jax.nn.relu(X @ w) ** 2)
        + jax.nn.logsumexp(X @ w)
        + jnp.sum(errors)
        + jnp.sum(root**2)
        + jnp.sum(jnp.log2(2 + w**2))
        + jnp.sum(jax.vmap(jax.grad(jnp.tanh))(w))
        + jnp.linalg.slogdet(gram)[1]
        + jnp.sum(jnp.log(jnp.diag(jnp.linalg.cholesky(gram))))
        + jnp.sum(jax.lax.stop_gradient(w) * w**2)
    )


def main() -> None:
    """Write the file of this jax."""
    with jax.enable_x64(True):
        made = export.export(
            fun,
            X_AT,
            (X,),
            platforms=("cpu", "cuda"),
            precision="highest",
            any_rows=True,
            stablehlo_version=STABLEHLO,
        )
        hessian = jax.hessian(fun)(jnp.asarray(X_AT), jnp.asarray(X))
    found = {
        "jax": jax.__version__,
        "digest": made.digest,
        "blobs": {digest: base64.b64encode(blob).decode() for digest, blob in made.blobs.items()},
        "x": X_AT.tolist(),
        "hessian": np.asarray(hessian).tolist(),
    }
    path = Path(__file__).with_name(f"objective-jax-{jax.__version__}.json")
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
